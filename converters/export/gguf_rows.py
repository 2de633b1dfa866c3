"""Rows of a pack's matrix as blocks of ggml, on the pack's own grid wherever ggml has it.

The codes are taken from the restored weights: w / scale is a code, but for a rounding that rounding
undoes. So one public call reads every scheme's layout.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import NumericError
from bloomq.grids import GRIDS
from bloomq.schemes import F32, TILE, Array, f32_to_bf16, get_scheme
from bloomq.weights import Matrix

from ..gguf_blocks import BLOCK, BlockType, q4_0_blocks, q8_0_blocks, q8_0_scales

_INT4_ZERO = 8  # int4's code of a weight of zero


def encoded_rows(matrix: Matrix, ids: NDArray[np.int64], kind: BlockType, label: str) -> Array:
    """Rows `ids` [n] of a matrix as a type of ggml, [n, K] or [n, bytes].

    Raises: NumericError where the type cannot hold them.
    """
    w = np.ascontiguousarray(matrix.rows(ids))  # [n, K]
    if kind.name == "F32":
        return w
    if kind.name == "BF16":
        return f32_to_bf16(w)
    with np.errstate(over="ignore", invalid="ignore"):  # seen by what is checked below
        data, halves = _in_halves(w, matrix, ids, kind)
    if not np.isfinite(halves).all():
        raise NumericError(f"{label} has weights that {kind.name} cannot hold: choose bf16 or f32")
    return data


def _in_halves(
    w: F32, matrix: Matrix, ids: NDArray[np.int64], kind: BlockType
) -> tuple[Array, NDArray[np.float16]]:
    """The rows, and what is float16 in them, values or scales: infinite where too large."""
    if kind.name == "F16":
        halves = w.astype(np.float16)
        return halves, halves
    scales = _scales(matrix, ids)
    if kind.name == "Q8_0":
        if scales is None:  # codes for the scale as it is stored: nearer than ggml's own
            scales = q8_0_scales(w).astype(np.float16).astype(np.float32)
        halves = scales.astype(np.float16)
        codes = np.clip(_codes(w, scales), -127, 127)
        return q8_0_blocks(codes.astype(np.int8), halves), halves
    if matrix.scheme.name != "int4":
        w, scales = _as_int4(w)
    assert scales is not None
    halves = scales.astype(np.float16)
    return q4_0_blocks((_codes(w, scales) + _INT4_ZERO).astype(np.uint8), halves), halves


def _codes(w: F32, scales: F32) -> F32:
    """weights [n, K] and the scale of each 32 of them [n, K/32] -> whole numbers [n, K]."""
    groups = w.reshape(len(w), -1, BLOCK)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(groups / scales[..., None])
    return np.where(scales[..., None] == 0, 0, codes).reshape(w.shape).astype(np.float32)


def _scales(matrix: Matrix, ids: NDArray[np.int64]) -> F32 | None:
    """The scale of each 32 columns of some rows, [n, K/32]; None for a scheme without."""
    scheme, k = matrix.scheme, matrix.shape[1]
    if scheme.name not in GRIDS and scheme.name != "int8":
        return None
    scales = np.asarray(matrix.parts["scales"])
    if scheme.name == "int8":
        return np.repeat(scales[ids, None].astype(np.float32), k // BLOCK, axis=1)
    groups = scales[ids // TILE, :, ids % TILE].astype(np.float32)  # [n, stored K/G]
    return np.repeat(groups, scheme.group_size // BLOCK, axis=1)[:, : k // BLOCK]


def _as_int4(w: F32) -> tuple[F32, F32]:
    """Weights of another grid in int4's, whose scales lose less than ggml's own choice; and the
    scale of each 32 columns, [n, K/32]."""
    scheme = get_scheme("int4", BLOCK)
    parts = scheme.quantize(w)
    ids = np.arange(len(w))
    scales = np.asarray(parts["scales"])[ids // TILE, :, ids % TILE]
    return scheme.dequantize(parts, (len(w), w.shape[1])), scales.astype(np.float32)
