"""One GGUF file's header: its metadata, and where each tensor lies.

    magic "GGUF", version, counts | metadata: key, type, value | tensors: name, shape, type, offset

The file is untrusted. Invariant: nothing is read, and no memory asked for, before it is known to
lie inside the file, and a tensor that is listed lies inside it too, with no other's bytes. Source:
ggml, docs/gguf.md. The `gguf` package maps the file and believes it, so it is not asked here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np

from bloomq.errors import CheckpointError
from bloomq.files import shown
from bloomq.schemes import Array

from .gguf_blocks import TYPES, BlockType

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # which differ in byte order alone; version 1 had counts of 32 bits
DEFAULT_ALIGNMENT = 32
# BLOOM's own header, of 250,880 tokens and as many merges, takes 11 MB.
HEADER_BYTES = 64 << 20
_MOST_NAME_BYTES = 64  # as ggml
_MOST_DIMENSIONS = 4
_MOST_ALIGNMENT = 1 << 20
_ENTRY_BYTES, _TENSOR_BYTES = 13, 24  # the least that one takes: 8 + 4 + 1, and 8 + 4 + 4 + 8


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """An array of metadata. Equal to nothing else: what compares with a value need not know it."""

    values: Array

    def __repr__(self) -> str:
        return f"an array of {len(self.values)}"


Value: TypeAlias = bool | int | float | str | tuple[str, ...] | Numbers
# By number; 8 is a string, 9 an array.
NUMBERS: dict[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8",
    11: "<i8", 12: "<f8",
}  # fmt: skip
BOOL, STRING, ARRAY = 7, 8, 9


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file: shape [N, K] or [N], its rows one behind the other from byte `start`."""

    type: BlockType
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Of a row of a matrix; of one element of a vector, whose elements are its rows."""
        return self.type.nbytes_of(self.shape[-1] if len(self.shape) > 1 else 1)


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says of itself. size: the file's, in bytes."""

    path: Path
    size: int
    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, Entry]


def read_header(path: Path) -> Header:
    """The header of a file. Raises: CheckpointError."""
    try:
        if path.is_fifo():  # opening it would wait for its other end
            raise CheckpointError(f"{path}: is a FIFO, expected a GGUF file")
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            return parse_header(file, size, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def parse_header(file: BinaryIO, size: int, path: Path) -> Header:
    """The header of an open file of `size` bytes; errors name `path`. Raises: CheckpointError."""
    cursor = _Cursor(file, size, path)
    if size < 24:
        raise CheckpointError(f"{path}: {size} bytes: not a GGUF file")
    if cursor.take(4, "the magic") != MAGIC:
        raise CheckpointError(f"{path}: does not begin with {MAGIC.decode()}: another kind of file")
    version = cursor.number("<I", "the version")
    if version in [int.from_bytes(v.to_bytes(4, "little"), "big") for v in VERSIONS]:
        raise CheckpointError(
            f"{path}: is big-endian, expected little-endian: take the file for other machines"
        )
    if version not in VERSIONS:
        raise CheckpointError(
            f"{path}: GGUF version {version}, expected 2 or 3: quantize the model anew"
        )
    n_tensors = cursor.number("<Q", "the number of tensors")
    n_entries = cursor.number("<Q", "the number of metadata entries")
    for count, least, what in (
        (n_entries, _ENTRY_BYTES, "metadata entries"), (n_tensors, _TENSOR_BYTES, "tensors"),
    ):  # fmt: skip
        if count * least > size:
            raise CheckpointError(f"{path}: {count} {what} cannot lie in {size} bytes: damaged")
    metadata: dict[str, Value] = {}
    for _ in range(n_entries):
        key = cursor.text("the name of a metadata entry")
        if key in metadata:
            raise CheckpointError(f"{path}: metadata {shown(key)} is given twice")
        metadata[key] = _value(cursor, key)
    alignment = _alignment(metadata, path)
    found: dict[str, tuple[BlockType, tuple[int, ...], int]] = {}
    for _ in range(n_tensors):
        name = cursor.text("the name of a tensor", _MOST_NAME_BYTES)
        if name in found:
            raise CheckpointError(f"{path}: two tensors are called {shown(name)}")
        found[name] = _tensor(cursor, f"{path}: {shown(name)}", alignment)
    base = -(-cursor.at // alignment) * alignment
    return Header(path, size, version, metadata, _placed(found, base, size, path))


class _Cursor:
    """Reads a header front to back, and nothing that the file does not hold."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self.at, self.path = 0, path
        self._file, self._size = file, size

    def need(self, count: int, what: str) -> None:
        """Raises: CheckpointError where the header has no such many bytes more."""
        if self.at + count > self._size:
            raise CheckpointError(
                f"{self.path}: {what} goes beyond the file's {self._size} bytes: truncated or "
                "damaged, download it again"
            )
        if self.at + count > HEADER_BYTES:
            raise CheckpointError(
                f"{self.path}: {what} goes beyond byte {HEADER_BYTES}, where no header of a BLOOM "
                "reaches: damaged"
            )

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        data = self._file.read(count)
        if len(data) != count:
            raise CheckpointError(f"{self.path}: grew shorter while its header was read")
        self.at += count
        return data

    def number(self, kind: str, what: str) -> int:
        value: int = struct.unpack(kind, self.take(struct.calcsize(kind), what))[0]
        return value

    def text(self, what: str, most: int = HEADER_BYTES) -> str:
        length = self.number("<Q", what)
        if length > most:
            raise CheckpointError(f"{self.path}: {what} has {length} bytes, expected up to {most}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: {what} is no UTF-8: damaged") from None


def _value(cursor: _Cursor, key: str) -> Value:
    """The value of a metadata entry: a number, a text, or an array of either."""
    what = f"metadata {shown(key)}"
    kind = cursor.number("<I", what)
    if kind == STRING:
        return cursor.text(what)
    if kind != ARRAY:
        return _numbers(cursor, kind, 1, what)[0].item()  # type: ignore[no-any-return]
    kind = cursor.number("<I", what)
    count = cursor.number("<Q", what)
    if kind == ARRAY:
        raise CheckpointError(f"{cursor.path}: {what} is an array of arrays, which ggml has not")
    if kind != STRING:
        return Numbers(_numbers(cursor, kind, count, what))
    cursor.need(8 * count, what)
    return tuple(cursor.text(what) for _ in range(count))


def _numbers(cursor: _Cursor, kind: int, count: int, what: str) -> Array:
    if kind not in NUMBERS:
        raise CheckpointError(f"{cursor.path}: {what} has value type {kind}, expected 0 to 12")
    dtype = np.dtype(NUMBERS[kind])
    data = cursor.take(count * dtype.itemsize, what)
    if kind == BOOL and data.strip(b"\0\1"):
        raise CheckpointError(f"{cursor.path}: {what} is neither true nor false")
    return np.frombuffer(data, dtype)


def _alignment(metadata: Mapping[str, Value], path: Path) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 0 < value <= _MOST_ALIGNMENT or value & (value - 1):  # type: ignore[operator]
        raise CheckpointError(
            f"{path}: general.alignment is {value!r:.40}, expected a power of two up to "
            f"{_MOST_ALIGNMENT}"
        )
    return int(value)  # type: ignore[arg-type]


def _tensor(cursor: _Cursor, label: str, alignment: int) -> tuple[BlockType, tuple[int, ...], int]:
    """A tensor's type, shape and offset, as the file lists it."""
    dimensions = cursor.number("<I", label)
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise CheckpointError(
            f"{label} has {dimensions} dimensions, expected 1 to {_MOST_DIMENSIONS}"
        )
    shape = tuple(cursor.number("<Q", label) for _ in range(dimensions))[::-1]  # columns come first
    kind, offset = cursor.number("<I", label), cursor.number("<Q", label)
    if 0 in shape:
        raise CheckpointError(f"{label} is {list(shape)}: a tensor without elements")
    if kind not in TYPES:
        raise CheckpointError(f"{label} is of ggml type {kind}, which bloomq does not read")
    if shape[-1] % TYPES[kind].block:
        raise CheckpointError(
            f"{label} has rows of {shape[-1]}, expected a multiple of {TYPES[kind].block}, the "
            f"block of {TYPES[kind].name}"
        )
    if offset % alignment:
        raise CheckpointError(
            f"{label} has offset {offset}, expected a multiple of the file's alignment, {alignment}"
        )
    return TYPES[kind], shape, offset


def _placed(
    found: Mapping[str, tuple[BlockType, tuple[int, ...], int]], base: int, size: int, path: Path
) -> dict[str, Entry]:
    """The tensors with their places in the file: inside it, and none in another's."""
    tensors: dict[str, Entry] = {}
    end, before = base, ""
    for name, (kind, shape, offset) in sorted(found.items(), key=lambda item: item[1][2]):
        start, label = base + offset, f"{path}: {shown(name)}"
        if start < end:
            raise CheckpointError(f"{label} begins inside {shown(before)}: damaged")
        end, before = start + kind.nbytes_of(math.prod(shape)), name
        if end > size:
            raise CheckpointError(
                f"{label} ends at byte {end}, the file has {size}: truncated, download it again"
            )
        tensors[name] = Entry(kind, shape, start)
    return tensors
