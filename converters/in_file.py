"""Tensors that lie in a file as they are: rows are read where they lie."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from bloomq.errors import CheckpointError
from bloomq.schemes import Array
from bloomq.tensorfile import DTYPES

from .source import SourceTensor


def tensor_in_file(
    path: Path, size: int, label: str, dtype: str, shape: tuple[int, ...], start: int
) -> SourceTensor:
    """The tensor whose rows lie one behind the other from byte `start` of a file of `size` bytes;
    the caller has checked that they do."""
    row_bytes = np.dtype(DTYPES[dtype]).itemsize
    for extent in shape[1:]:
        row_bytes *= extent
    rows = partial(_read_rows, path, size, dtype, shape[1:], row_bytes, start)
    columns = partial(_read_columns, path, size, dtype, shape, start) if len(shape) == 2 else None
    return SourceTensor(label, dtype, shape, rows, columns)


def _read_rows(
    path: Path, size: int, dtype: str, shape: tuple[int, ...], row_bytes: int, at: int,
    start: int, stop: int,
) -> Array:  # fmt: skip
    buffer = np.empty((stop - start) * row_bytes, np.uint8)
    read_into(path, size, at + start * row_bytes, buffer)
    return buffer.view(DTYPES[dtype]).reshape(stop - start, *shape)


def _read_columns(
    path: Path, size: int, dtype: str, shape: tuple[int, ...], at: int, start: int, stop: int
) -> Array:
    """Columns [start, stop) of every row: one read a row."""
    itemsize = np.dtype(DTYPES[dtype]).itemsize
    row_bytes = shape[1] * itemsize
    buffer = np.empty((shape[0], (stop - start) * itemsize), np.uint8)
    first = at + start * itemsize
    read_pieces(path, size, [(first + i * row_bytes, piece) for i, piece in enumerate(buffer)])
    return buffer.view(DTYPES[dtype])


def read_into(path: Path, size: int, start: int, buffer: np.ndarray) -> None:
    """Fill `buffer`, uint8, from byte `start` of a file that had `size` bytes.

    By system calls, not through a mapping: pages of a 14 GB file stay out of our memory, and a file
    cut short meanwhile is an error, not a crash. Raises: CheckpointError.
    """
    read_pieces(path, size, [(start, buffer)])


def read_pieces(path: Path, size: int, pieces: Iterable[tuple[int, np.ndarray]]) -> None:
    """As `read_into`, of several pieces of one file."""
    try:
        with path.open("rb", buffering=0) as file:
            for start, buffer in pieces:
                file.seek(start)
                done = 0
                while done < len(buffer):
                    count = file.readinto(buffer.data[done:])
                    if not count:
                        raise CheckpointError(
                            f"{path}: shorter than the {size} bytes it had: it changed"
                        )
                    done += count
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
