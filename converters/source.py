"""What every reader yields: a checkpoint's tensors, named as ours, read a block of rows at a
time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bloomq.config import BloomConfig
from bloomq.schemes import Array, Scheme
from bloomq.tensorfile import DTYPES
from bloomq.tokenizer_config import Settings

# One read of 1 MiB is done sooner than 64 scattered ones.
_WHOLE_BYTES, _SAMPLED_ROWS = 1 << 20, 64


@dataclass(frozen=True, slots=True)
class Stored:
    """A matrix that a checkpoint holds quantized already, on a grid that is one of ours.

    parts(start, stop): those rows, start a multiple of 32, as `scheme.quantize` returns arrays:
    with the checkpoint's own codes and scales, so that nothing is lost a second time.
    """

    scheme: Scheme
    parts: Callable[[int, int], dict[str, Array]]


def _keep() -> None:
    """Most tensors lie in files that stay."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor that is still in its file.

    name: what an error calls it (file and foreign name); dtype: F32, F16 or BF16;
    rows(start, stop): those rows, [stop - start, ...], in that dtype, bf16 as uint16. columns: the
    same of a matrix's columns, [rows, stop - start], where a reader can do that without reading
    the rest; transposed: these lie one behind the other, and single rows are dear. release: to be
    called when the tensor has been converted and is not read again.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: Callable[[int, int], Array]
    columns: Callable[[int, int], Array] | None = None
    transposed: bool = False
    stored: Stored | None = None
    release: Callable[[], None] = _keep

    @property
    def itemsize(self) -> int:
        return np.dtype(DTYPES[self.dtype]).itemsize

    @property
    def nbytes(self) -> int:
        size = self.itemsize
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as the converter sees it. `tensors` holds exactly what `config` asks for, each
    of the right shape; settings: of the tokenizer; notes are for the user. origin: what tells the
    tensors' values apart without reading them: the digests of files that lie elsewhere; or nothing.
    """

    config: BloomConfig
    tensors: Mapping[str, SourceTensor]
    tokenizer: bytes | None
    provenance: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    origin: str = ""

    @property
    def stored_scheme(self) -> Scheme | None:
        """The scheme in which the checkpoint holds its linears already, if any."""
        first = self.tensors.get("h.0.attn.qkv.weight")
        return None if first is None or first.stored is None else first.stored.scheme

    @property
    def quantized_by(self) -> str:
        """What made the codes of a quantized checkpoint, as a note names it."""
        packing = self.provenance.get("quantization")
        return str(packing["method"] if packing else self.provenance.get("format")).upper()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the config, the tokenizer with its settings and chat templates, and the
        tensors' names, types, shapes and values, wherever they lie.

        Values: vectors, and tensors of up to 1 MiB or 64 rows, whole; of larger ones 64 rows (or
        columns, where these lie together), from the first to the last, evenly between. So it is
        quick to take (of 14 GB it reads some 110 MB), training changes it, and an edit of a few
        rows of a large matrix may not. `origin`, where there is one, stands for all values.
        """
        text = None if self.tokenizer is None else hashlib.sha256(self.tokenizer).hexdigest()
        tensors = [[name, t.dtype, list(t.shape)] for name, t in self.tensors.items()]
        templates = self.settings.chat_templates
        facts = [self.config.to_dict(), text, self.settings.to_dict(), tensors]
        facts += [templates] if templates else []  # packs of a checkpoint without keep theirs
        facts += [self.origin] if self.origin else []
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        if self.origin:
            return digest.hexdigest()
        for tensor in self.tensors.values():
            for values in _sample(tensor):
                digest.update(values.tobytes())
        return digest.hexdigest()


def _sample(tensor: SourceTensor) -> Iterator[Array]:
    """The values that stand for a tensor."""
    count = tensor.shape[0]
    if len(tensor.shape) == 1 or tensor.nbytes <= _WHOLE_BYTES or count <= _SAMPLED_ROWS:
        yield tensor.rows(0, count)
        return
    read = tensor.rows
    if tensor.transposed and tensor.columns is not None:
        count, read = tensor.shape[1], tensor.columns
    for i in np.linspace(0, count - 1, _SAMPLED_ROWS).astype(int):
        yield read(int(i), int(i) + 1)
