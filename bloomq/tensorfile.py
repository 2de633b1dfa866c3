"""One safetensors file: its checked header, and its tensors as views of the mapped file.

The `safetensors` library checks the header (size, JSON, dtypes, offsets contiguous and covering the
file exactly); since there are no holes, the order and sizes of the tensors say where each one lies.

Invariant: every view lies inside the file as it was when opened.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import CheckpointError, InputNotFound
from bloomq.files import exists, shown
from bloomq.schemes import Array

# bfloat16, which NumPy lacks, comes as its bits.
DTYPES: dict[str, type[np.generic]] = {
    "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64, "I8": np.int8,
    "U8": np.uint8, "I16": np.int16, "U16": np.uint16, "I32": np.int32, "U32": np.uint32,
    "I64": np.int64, "U64": np.uint64, "BOOL": np.bool_,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file: dtype as safetensors spells it, shape, and its bytes' place in the
    file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class TensorFile:
    """An open safetensors file. metadata: the texts that its writer put into the header."""

    path: Path
    size: int
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    _map: NDArray[np.uint8]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Check the header and map the file.

        Raises: InputNotFound; CheckpointError for anything that is not whole and strict
        safetensors.
        """
        from safetensors import SafetensorError, safe_open

        if not exists(path):
            raise InputNotFound(f"{path}: no such file")
        if not path.is_file():
            raise CheckpointError(f"{path}: is not a regular file")
        entries: dict[str, Entry] = {}
        try:
            with path.open("rb") as file:
                start = 8 + int.from_bytes(file.read(8), "little")
                size = file.seek(0, 2)
                if size < 8:
                    raise CheckpointError(f"{path}: {size} bytes: not a safetensors file")
                with safe_open(path, framework="np") as checked:
                    metadata = dict(checked.metadata() or {})
                    for name in checked.offset_keys():
                        tensor = checked.get_slice(name)
                        entry = _entry(path, name, tensor.get_dtype(), tensor.get_shape(), start)
                        entries[name] = entry
                        start += entry.nbytes
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except SafetensorError as error:
            if _looks_pickled(path):
                raise CheckpointError(
                    f"{path}: is a PyTorch pickle, which bloomq never opens (it can run code): "
                    "save the model as safetensors"
                ) from None
            raise CheckpointError(f"{path}: damaged or truncated ({error})") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
        if start != size:
            raise CheckpointError(f"{path}: {size} bytes, expected {start} by its header")
        return cls(path, size, metadata, entries, np.frombuffer(mapped, np.uint8))

    def raw(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes, mapped and read-only."""
        entry = self.entries[name]
        return self._map[entry.start : entry.start + entry.nbytes]

    def copied(self, name: str) -> Array:
        """A tensor in memory of its own: what happens to the file is nothing to it any more.

        Raises: CheckpointError where the file has changed.
        """
        entry = self.entries[name]
        array: Array = np.frombuffer(_read(self.path, entry), DTYPES[entry.dtype])
        return array.reshape(entry.shape)

    def array(self, name: str) -> Array:
        """A tensor, mapped and read-only."""
        entry = self.entries[name]
        array: Array = self.raw(name).view(DTYPES[entry.dtype]).reshape(entry.shape)
        return array


def _read(path: Path, entry: Entry) -> bytes:
    """A tensor's bytes. Raises: CheckpointError."""
    try:
        with path.open("rb") as file:
            file.seek(entry.start)
            data = file.read(entry.nbytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) != entry.nbytes:
        raise CheckpointError(f"{path}: grew shorter while it was read: another program has it")
    return data


def _looks_pickled(path: Path) -> bool:
    """Does the file begin as torch.save writes: a zip archive, or a bare pickle?"""
    with path.open("rb") as file:
        return file.read(4)[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _entry(path: Path, name: str, dtype: str, shape: list[int], start: int) -> Entry:
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: {shown(name)} has dtype {dtype}, which bloomq does not read"
        )
    nbytes = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    return Entry(dtype, tuple(shape), start, nbytes)
