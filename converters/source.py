"""What every reader yields: a checkpoint's tensors, named as ours, read a block of rows at a
time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bloomq.config import BloomConfig
from bloomq.schemes import Array


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
    of the right shape; notes are for the user."""

    config: BloomConfig
    tensors: Mapping[str, SourceTensor]
    tokenizer: bytes | None
    provenance: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def fingerprint(self) -> str:
        """A digest of the tensors' names, shapes, types and first rows: quick to take, and another
        for weights that were trained on, wherever they lie."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors.items():
            digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
            digest.update(tensor.rows(0, 1).tobytes())
        return digest.hexdigest()
