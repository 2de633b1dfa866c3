"""What happens to a row of activations before a matrix product: layer norm, then int8.

Where a product asks for two limbs, what rounding leaves is rounded once more, to steps of 1/254 of
the first: a second int8, which the product multiplies as it does another token's.

A row belongs to one thread, and every sum runs in one fixed order, so the bits do not depend on the
number of threads or on the other rows.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bloomq.backends.numba_cpu.jit import VECTOR_SUMS, called, kernel
from bloomq.backends.numba_cpu.memory import (
    address,
    as_float,
    copy_bytes,
    fields,
    floats,
    keep,
    longs,
)
from bloomq.backends.numba_cpu.simd import I32, I64, LANES, LIMB, V16B, V16F, Vectors


@called(fastmath=VECTOR_SUMS)
def norm_row(x, gain, bias, epsilon, out):  # type: ignore[no-untyped-def]
    """out = (x - mean) / sqrt(variance + epsilon) * gain + bias, over one row [C]."""
    n = x.shape[0]
    total = np.float32(0)
    for i in range(n):
        total += x[i]
    mean = total / np.float32(n)
    squares = np.float32(0)
    for i in range(n):
        centred = x[i] - mean
        squares += centred * centred
    inverse = np.float32(1) / np.float32(math.sqrt(squares / np.float32(n) + epsilon))
    for i in range(n):
        out[i] = (x[i] - mean) * inverse * gain[i] + bias[i]


@intrinsic(prefer_literal=True)
def quantize_row(
    typingctx: Any, spec: Any, x: Any, groups: Any, offset: Any, codes: Any, step: Any,
    scales: Any, sums: Any,
) -> Any:  # fmt: skip
    """int8 codes of one row of `groups` whole groups, with one scale for each; see
    `Vectors.to_int8`.

    spec: "tier/group/limbs"; codes, scales (float32) and sums (int32; -offset times the sum of a
    group's codes): addresses of the first. step: bytes from each scale or sum to the next; times
    limbs, from four codes to the next four, each limb's 4 bytes behind the one's before.
    """
    tier, group, limbs = spec.literal_value.split("/")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit_quantize(Vectors(builder, tier), int(group), int(limbs), *args[1:])
        return context.get_dummy_value()

    return types.void(spec, *[types.int64] * 7), codegen


def _emit_quantize(
    v: Vectors, group: int, limbs: int, x: ir.Value, groups: ir.Value, offset: ir.Value,
    codes: ir.Value, step: ir.Value, scales: ir.Value, sums: ir.Value,
) -> None:  # fmt: skip
    b = v.b
    with cgutils.for_range(b, groups, intp=I64) as loop:
        source = v.at(x, b.mul(loop.index, I64(4 * group)))
        values = [v.load(v.at(source, 4 * i), V16F) for i in range(0, group, LANES)]
        at, apart = b.mul(loop.index, step), b.mul(step, I64(limbs))
        first = v.at(codes, b.mul(loop.index, b.mul(apart, I64(group // 4))))
        found, scale = v.to_int8(values, limbs)
        total: ir.Value = I32(0)
        for limb, parts in enumerate(found):
            here = _store_codes(v, parts, v.at(first, 4 * limb), apart)
            total = b.add(b.mul(total, I32(LIMB)), here)
        v.store(scale, v.at(scales, at))
        v.store(b.mul(b.neg(b.trunc(offset, I32)), total), v.at(sums, at))


def _store_codes(v: Vectors, parts: list[ir.Value], target: ir.Value, step: ir.Value) -> ir.Value:
    """Store int32 codes as int8, four after four `step` bytes apart; their sum."""
    b, total = v.b, parts[0]
    fours = ir.VectorType(I32, LANES // 4)
    for part in parts[1:]:
        total = b.add(total, part)
    for part in parts:
        packed = b.bitcast(b.trunc(part, V16B), fours)
        for i in range(LANES // 4):
            v.store(b.extract_element(packed, I32(i)), target)
            target = v.at(target, step)
    return v.call("llvm.vector.reduce.add.v16i32", I32, [total])


@lru_cache(maxsize=8)
def prepare(tier: str, group: int, limbs: int) -> Any:
    """The prologue of the integer products. Units: rows.

    Arguments: x, stride of x in bytes, C, gain (0: no norm), shift, epsilon, K (C padded to whole
    groups), offset, codes, scales, sums, tokens of a block. Results lie as the products read them,
    blocks of tokens interleaved, of each its limbs: codes int8 [blocks, K/4, tokens * limbs, 4];
    scales float32 and sums int32 [blocks, K/group, tokens].
    """
    spec = f"{tier}/{group}/{limbs}"

    @kernel
    def prepare(arguments, first, last):  # type: ignore[no-untyped-def]
        x, stride, c, gain, shift, epsilon, k, offset, codes, scales, sums, tokens = fields(
            arguments, 12
        )
        groups = k // group
        padded = np.zeros(k, np.float32)
        for row in range(first, last):
            source = x + row * stride
            if gain:
                norm_row(
                    floats(source, c), floats(gain, c), floats(shift, c), as_float(epsilon),
                    padded[:c],
                )  # fmt: skip
                source = address(padded)
            elif c < k:
                copy_bytes(address(padded), source, 4 * c)
                source = address(padded)
            block, t = row // tokens, row % tokens
            meta = 4 * (block * groups * tokens + t)
            quantize_row(
                spec, source, groups, offset, codes + (block * k * tokens + 4 * t) * limbs,
                4 * tokens, scales + meta, sums + meta,
            )  # fmt: skip
        keep(padded)

    return prepare


@lru_cache(maxsize=1)
def spread_rows() -> Any:
    """The prologue of the float products. Units: rows.

    Arguments: x, stride of x in bytes, C, gain (0: no norm), shift, epsilon, K >= C, out, tokens of
    a block. out: float32 [blocks, K, tokens], zeros beyond C.
    """

    @kernel
    def spread_rows(arguments, first, last):  # type: ignore[no-untyped-def]
        x, stride, c, gain, shift, epsilon, k, out, tokens = fields(arguments, 9)
        row_of = np.zeros(k, np.float32)
        for row in range(first, last):
            source = x + row * stride
            if gain:
                norm_row(
                    floats(source, c), floats(gain, c), floats(shift, c), as_float(epsilon),
                    row_of[:c],
                )  # fmt: skip
            else:
                copy_bytes(address(row_of), source, 4 * c)
            target = floats(out + 4 * (row // tokens * k * tokens + row % tokens), k * tokens)
            for column in range(k):
                target[column * tokens] = row_of[column]

    return spread_rows


@lru_cache(maxsize=1)
def norm_rows() -> Any:
    """A norm on its own, as behind the embedding. Units: rows.

    Arguments: x, stride of x in bytes, C, gain, shift, epsilon, out, stride of out in bytes.
    """

    @kernel
    def norm_rows(arguments, first, last):  # type: ignore[no-untyped-def]
        x, stride, c, gain, shift, epsilon, out, out_stride = fields(arguments, 8)
        for row in range(first, last):
            norm_row(
                floats(x + row * stride, c), floats(gain, c), floats(shift, c), as_float(epsilon),
                floats(out + row * out_stride, c),
            )  # fmt: skip

    return norm_rows


@lru_cache(maxsize=1)
def gate_rows() -> Any:
    """out = x * gates of the cache row that a token belongs to. Units: cache rows of the step.

    Arguments: inputs (see `NumbaCache.bind`), x, stride of x in bytes, ranks, out, stride of out in
    bytes.
    """

    @kernel
    def gate_rows(arguments, first, last):  # type: ignore[no-untyped-def]
        inputs, x, stride, ranks, out, out_stride = fields(arguments, 6)
        n_rows, rows, starts, _, gates = fields(inputs, 7)[2:]
        for r in range(first, last):
            gate = floats(gates + 4 * ranks * longs(rows, n_rows)[r], ranks)
            for token in range(longs(starts, n_rows + 1)[r], longs(starts, n_rows + 1)[r + 1]):
                source = floats(x + token * stride, ranks)
                target = floats(out + token * out_stride, ranks)
                for i in range(ranks):
                    target[i] = source[i] * gate[i]

    return gate_rows
