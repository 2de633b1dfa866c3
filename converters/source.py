"""What every reader yields: a checkpoint's tensors, named as ours, read a block of rows at a
time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bloomq.config import BloomConfig
from bloomq.schemes import Array
from bloomq.tokenizer_config import Settings

# One read of 1 MiB is done sooner than 64 scattered ones.
_WHOLE_BYTES, _SAMPLED_ROWS = 1 << 20, 64


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor that is still in its file.

    name: what an error calls it (file and foreign name); dtype: F32, F16 or BF16;
    rows(start, stop): those rows, [stop - start, ...], in that dtype, bf16 as uint16.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: Callable[[int, int], Array]

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "F32" else 2

    @property
    def nbytes(self) -> int:
        size = self.itemsize
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as the converter sees it. `tensors` holds exactly what `config` asks for, each
    of the right shape; settings: of the tokenizer; notes are for the user."""

    config: BloomConfig
    tensors: Mapping[str, SourceTensor]
    tokenizer: bytes | None
    provenance: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the config, the tokenizer with its settings and chat templates, and the
        tensors' names, types, shapes and values, wherever they lie.

        Values: vectors, and tensors of up to 1 MiB or 64 rows, whole; of larger ones 64 rows, from
        the first to the last, evenly between. So it is quick to take (of 14 GB it reads some 110
        MB), training changes it, and an edit of a few rows of a large matrix may not.
        """
        text = None if self.tokenizer is None else hashlib.sha256(self.tokenizer).hexdigest()
        tensors = [[name, t.dtype, list(t.shape)] for name, t in self.tensors.items()]
        templates = self.settings.chat_templates
        facts = [self.config.to_dict(), text, self.settings.to_dict(), tensors]
        facts += [templates] if templates else []  # packs of a checkpoint without keep theirs
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for tensor in self.tensors.values():
            for start, stop in _sample(tensor):
                digest.update(tensor.rows(start, stop).tobytes())
        return digest.hexdigest()


def _sample(tensor: SourceTensor) -> list[tuple[int, int]]:
    """The blocks of rows that stand for a tensor."""
    count = tensor.shape[0]
    if len(tensor.shape) == 1 or tensor.nbytes <= _WHOLE_BYTES or count <= _SAMPLED_ROWS:
        return [(0, count)]
    return [(int(i), int(i) + 1) for i in np.linspace(0, count - 1, _SAMPLED_ROWS).astype(int)]
