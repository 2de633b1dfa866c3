"""A part of a stored matrix, in its own scheme and layout, with the very same codes and scales.

Rows at whole pairs of tiles are views of what is mapped. Columns lie side by side within each tile,
so a part of them is a copy, of a rank's part alone. What falls elsewhere is laid out anew.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import UsageError
from bloomq.parallel.cuts import Cut
from bloomq.schemes import (
    GROUPED,
    ROW_MULTIPLE,
    TILE,
    Array,
    Scheme,
    tile_bytes,
    tile_nibbles,
    tile_rows,
    tile_sixes,
    untile_bytes,
    untile_nibbles,
    untile_rows,
    untile_sixes,
)
from bloomq.weights import Matrix

U8 = NDArray[np.uint8]
# Columns of a block of codes, and blocks of the second axis that it has.
_BLOCKS = {"int8": (4, 1), "int6": (16, 3), "nl4": (8, 1), "int4": (8, 1), "nf4": (8, 1)}


def part_of(matrix: Matrix, cut: Cut, rank: int) -> Matrix:
    """The part of a matrix that a rank has.

    Raises: UsageError for a cut inside a group of columns that share a scale.
    """
    if cut.axis == "whole":
        return matrix
    start, stop = cut.of(rank)
    n, k = matrix.shape
    shape = cut.shape(matrix.shape, rank)
    if cut.axis == "rows":
        whole = start % ROW_MULTIPLE == 0 and (stop % ROW_MULTIPLE == 0 or stop == n)
        parts = _rows(matrix, start, stop) if whole else _retiled(matrix, (start, stop), (0, k))
    else:
        _check_groups(matrix, start, stop)
        width = _BLOCKS.get(matrix.scheme.name, (1, 1))[0]
        whole = start % width == 0 and (stop % width == 0 or stop == k)
        parts = _columns(matrix, start, stop) if whole else _retiled(matrix, (0, n), (start, stop))
    return Matrix(matrix.name, matrix.scheme, shape, parts)


def _check_groups(matrix: Matrix, start: int, stop: int) -> None:
    scheme, k = matrix.scheme, matrix.shape[1]
    if scheme.name not in GROUPED:  # a scale of each row, or none
        return
    if start % scheme.group_size or (stop % scheme.group_size and stop != k):
        raise UsageError(
            f"{matrix.name}: columns {start} to {stop} of {k} cut a group of {scheme.group_size} "
            f"that has one {scheme.label} scale: use fewer ranks, or a pack of smaller groups"
        )


def _rows(matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
    """Whole pairs of tiles: views."""
    end = matrix.scheme.padded((stop, 1))[0]
    return {
        name: part[start:end] if part.ndim == 1 else part[start // TILE : end // TILE]
        for name, part in matrix.parts.items()
    }


def _columns(matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
    """Whole blocks of codes and whole groups, copied, padded with zeros up to a whole group."""
    scheme, shape = matrix.scheme, (matrix.shape[0], stop - start)
    end = matrix.scheme.padded(matrix.shape)[1] if stop == matrix.shape[1] else stop
    parts = {}
    for name, stored in scheme.parts(shape).items():
        part = matrix.parts[name]
        if part.ndim == 1:  # a value a row
            parts[name] = part
            continue
        width, blocks = _BLOCKS.get(scheme.name, (1, 1))
        if name == "scales":
            width, blocks = scheme.group_size, 1
        piece = part[:, start // width * blocks : -(-end // width) * blocks]
        parts[name] = _padded(piece, stored.shape)
    return parts


def _retiled(matrix: Matrix, rows: tuple[int, int], columns: tuple[int, int]) -> dict[str, Array]:
    """Any part, by way of plain rows and columns of the tiles that it lies in."""
    scheme, (n, k) = matrix.scheme, matrix.shape
    shape = rows[1] - rows[0], columns[1] - columns[0]
    first, last = rows[0] // TILE, -(-rows[1] // TILE)
    end = scheme.padded((n, k))[1] if columns[1] == k else columns[1]
    stored_n, stored_k = scheme.padded(shape)
    parts = {}
    for name, part in matrix.parts.items():
        if part.ndim == 1:
            parts[name] = _padded(part[slice(*rows)], (stored_n,))
            continue
        group = scheme.group_size if name == "scales" else 1
        plain = _untiled(scheme, name, part[first:last])
        inside = slice(rows[0] - first * TILE, rows[1] - first * TILE)
        piece = plain[inside, columns[0] // group : -(-end // group)]
        parts[name] = _tiled(scheme, name, _padded(piece, (stored_n, stored_k // group)))
    return parts


def _untiled(scheme: Scheme, name: str, part: Array) -> Array:
    """[tiles, ...] -> [16 tiles, K] of codes or values, or [16 tiles, K/G] of scales."""
    if name in ("values", "scales"):
        return untile_rows(part)
    if scheme.name == "int8":
        return untile_bytes(part)
    return untile_sixes(part) if scheme.name == "int6" else untile_nibbles(part)


def _tiled(scheme: Scheme, name: str, plain: Array) -> Array:
    """The way back."""
    if name in ("values", "scales"):
        return tile_rows(plain)
    if scheme.name == "int8":
        return tile_bytes(plain)
    return (tile_sixes if scheme.name == "int6" else tile_nibbles)(cast("U8", plain))


def _padded(piece: Array, shape: tuple[int, ...]) -> Array:
    """A copy of an array in the corner of zeros. Codes of padding rows have scales of 0; those of
    padding columns are int8 or float, whose 0 is 0, and as much of it as stored goes again."""
    out, piece = np.zeros(shape, piece.dtype), piece[tuple(slice(size) for size in shape)]
    out[tuple(slice(size) for size in piece.shape)] = piece
    return out
