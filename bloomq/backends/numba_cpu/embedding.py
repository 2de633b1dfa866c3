"""Rows of the embedding, restored from the tiles they are stored in."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.extending import intrinsic

from bloomq.backends.numba_cpu.jit import kernel
from bloomq.backends.numba_cpu.memory import codes as int8_at
from bloomq.backends.numba_cpu.memory import copy_bytes, fields, floats, longs, octets
from bloomq.grids import GRIDS
from bloomq.schemes import NF4_CODEBOOK, TILE


@intrinsic(prefer_literal=True)
def _half(typingctx: Any, dtype: Any, at: Any) -> Any:
    """The f16 or bf16 at an address, as float32."""
    is_f16 = dtype.literal_value == "f16"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[1], ir.PointerType())
        if is_f16:
            return builder.fpext(builder.load(pointer, typ=ir.HalfType()), ir.FloatType())
        wide = builder.zext(builder.load(pointer, typ=ir.IntType(16)), ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.IntType(32)(16)), ir.FloatType())

    return types.float32(dtype, types.int64), codegen


@lru_cache(maxsize=8)
def look_up(scheme: str, group: int) -> Any:
    """out = rows of a stored table. Units: tokens.

    Arguments: inputs (ids at `ids_at`), ids_at, codes (or values), scales, K as stored, columns,
    out, stride of out in bytes.
    """
    grid = GRIDS.get(scheme)
    entries = tuple(NF4_CODEBOOK.tolist() if grid is None else map(float, grid.book))
    is_float, wide, two_bytes = scheme in ("f32", "f16", "bf16"), scheme == "f32", scheme
    is_int8, is_int6, is_int4 = scheme == "int8", scheme == "int6", scheme == "int4"

    @kernel
    def look_up(arguments, first, last):  # type: ignore[no-untyped-def]
        inputs, ids_at, codes, scales, k, columns, out, stride = fields(arguments, 8)
        ids = longs(longs(inputs, ids_at + 1)[ids_at], last)
        for token in range(first, last):
            tile, lane = ids[token] // TILE, ids[token] % TILE
            target = floats(out + token * stride, columns)
            if is_float:
                start = (tile * k * TILE + lane) * (4 if wide else 2)
                for column in range(columns):
                    if wide:
                        target[column] = floats(codes + start + 64 * column, 1)[0]
                    else:
                        target[column] = _half(two_bytes, codes + start + 32 * column)
            elif is_int8:
                row = int8_at(codes + tile * k * TILE, k * TILE)
                scale = floats(scales, ids[token] + 1)[ids[token]]
                for column in range(columns):
                    code = row[(column // 4 * TILE + lane) * 4 + column % 4]
                    target[column] = np.float32(code) * scale
            elif is_int6:
                row = octets(codes + tile * k * 12, k * 12)
                for column in range(columns):
                    at = scales + 2 * ((tile * (k // group) + column // group) * TILE + lane)
                    block, i, j = column // 16 * 3, column // 4 % 4, column % 4
                    low = np.int64(row[((block + i // 2) * TILE + lane) * 4 + j])
                    high = np.int64(row[((block + 2) * TILE + lane) * 4 + j])
                    code = (low >> (4 * (i % 2)) & 15) | (high >> (2 * i) & 3) << 4
                    target[column] = np.float32(entries[code]) * _half("f16", at)
            else:
                row = octets(codes + tile * k * TILE // 2, k * TILE // 2)
                for column in range(columns):
                    at = scales + 2 * ((tile * (k // group) + column // group) * TILE + lane)
                    byte = np.int64(row[(column // 8 * TILE + lane) * 4 + column % 4])
                    nibble = byte >> 4 if column % 8 >= 4 else byte & 15
                    # A look-up costs twice as much as a difference.
                    value = np.float64(nibble - 8) if is_int4 else entries[nibble]
                    target[column] = np.float32(value) * _half("f16", at)

    return look_up


@lru_cache(maxsize=1)
def take_rows() -> Any:
    """out[i] = x[index[i]]. Units: rows of out.

    Arguments: inputs (index at `index_at`), index_at, x, stride of x in bytes, columns, out, stride
    of out in bytes.
    """

    @kernel
    def take_rows(arguments, first, last):  # type: ignore[no-untyped-def]
        inputs, index_at, x, stride, columns, out, out_stride = fields(arguments, 7)
        index = longs(longs(inputs, index_at + 1)[index_at], last)
        for i in range(first, last):
            copy_bytes(out + i * out_stride, x + index[i] * stride, 4 * columns)

    return take_rows
