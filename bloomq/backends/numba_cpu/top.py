"""The best of 250,880 logits, the log of the sum of all their exponentials, and what to find the
best few by.

A row is cut into parts that threads share, a part into blocks, of each of which the largest logit
is noted: `best` looks into few of them. What the parts found is merged in their order, so the
result does not depend on who did which. Bytes touched: the logits twice, mostly from the caches.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bloomq.backends.numba_cpu.best import BLOCK
from bloomq.backends.numba_cpu.jit import kernel
from bloomq.backends.numba_cpu.memory import (
    address,
    copy_bytes,
    doubles,
    fields,
    floats,
    keep,
    longs,
)
from bloomq.backends.numba_cpu.simd import F32, I64, LANES, V16F, Vectors

PART = 8192  # logits of a part: 32 KB, a level-1 cache
BLOCKS = PART // BLOCK  # of a part


@intrinsic(prefer_literal=True)
def sum_exp(typingctx: Any, tier: Any, x: Any, blocks: Any, shift: Any, out: Any) -> Any:
    """out [16] float32 = sum over blocks of 16 of exp(x - peak); peak: the float32 at `shift`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit_sum_exp(Vectors(builder, tier.literal_value), *args[1:])
        return context.get_dummy_value()

    return types.void(tier, types.int64, types.int64, types.int64, types.int64), codegen


def _emit_sum_exp(
    v: Vectors, x: ir.Value, blocks: ir.Value, shift: ir.Value, out: ir.Value
) -> None:
    b = v.b
    peak = v.broadcast(shift, F32)
    total = cgutils.alloca_once(b, V16F)
    b.store(v.constant(V16F, 0.0), total)
    with cgutils.for_range(b, blocks, intp=I64) as loop:
        value = v.load(v.at(x, b.mul(loop.index, I64(4 * LANES))), V16F)
        term = v.exp_from(-87.0, b.fsub(value, peak))
        b.store(b.fadd(b.load(total, typ=V16F), term), total)
    v.store(b.load(total, typ=V16F), out)


@intrinsic(prefer_literal=True)
def block_maxima(typingctx: Any, tier: Any, x: Any, blocks: Any, out: Any) -> Any:
    """out [blocks] float32 = the largest of each 64 values at x; NaN counts as -infinity."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit_block_maxima(Vectors(builder, tier.literal_value), *args[1:])
        return context.get_dummy_value()

    return types.void(tier, types.int64, types.int64, types.int64), codegen


def _emit_block_maxima(v: Vectors, x: ir.Value, blocks: ir.Value, out: ir.Value) -> None:
    b = v.b
    with cgutils.for_range(b, blocks, intp=I64) as loop:
        at = v.at(x, b.mul(loop.index, I64(4 * BLOCK)))
        peak = v.constant(V16F, float("-inf"))
        for lane in range(0, BLOCK, LANES):
            value = v.load(v.at(at, 4 * lane), V16F)
            peak = b.select(b.fcmp_ordered(">", value, peak), value, peak)
        largest = v.call("llvm.vector.reduce.fmax.v16f32", F32, [peak])
        v.store(largest, v.at(out, b.mul(loop.index, I64(4))))


@lru_cache(maxsize=4)
def top_parts(tier: str) -> Any:
    """The largest logits of each part of each row. Units: rows times parts.

    Arguments: address of (logits, stride of logits in bytes), V, parts, maxima, peaks, sums. maxima
    float32 [B, parts, BLOCKS]: of each block, -infinity beyond V; peaks and sums float64 [B,
    parts]: the part's largest logit, the sum of exp(logit - peak).
    """

    @kernel
    def top_parts(arguments, first, last):  # type: ignore[no-untyped-def]
        given, v, parts, to_maxima, to_peaks, to_sums = fields(arguments, 6)
        logits, stride = fields(given, 2)
        shift, ends = np.zeros(1, np.float32), np.empty(BLOCK, np.float32)
        sums, rest = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
        for unit in range(first, last):
            start = unit % parts * PART
            count = min(PART, v - start)
            at = logits + unit // parts * stride + 4 * start
            whole = count // BLOCK
            ends[:] = np.float32(-np.inf)
            copy_bytes(address(ends), at + 4 * BLOCK * whole, 4 * (count - BLOCK * whole))
            maxima = floats(to_maxima + 4 * unit * BLOCKS, BLOCKS)
            maxima[:] = np.float32(-np.inf)
            block_maxima(tier, at, whole, address(maxima))
            if whole < BLOCKS:
                block_maxima(tier, address(ends), 1, address(maxima) + 4 * whole)
            peak = np.float32(-np.inf)
            for block in range(BLOCKS):
                peak = max(peak, maxima[block])
            shift[0] = max(peak, np.float32(-3e38))  # -inf - -inf is NaN
            sum_exp(tier, at, whole * (BLOCK // LANES), address(shift), address(sums))
            sum_exp(tier, address(ends), BLOCK // LANES, address(shift), address(rest))
            total = np.float64(0)
            for lane in range(LANES):
                total += np.float64(sums[lane]) + np.float64(rest[lane])
            doubles(to_peaks, unit + 1)[unit] = peak
            doubles(to_sums, unit + 1)[unit] = total
        keep(shift)
        keep(ends)
        keep(sums)
        keep(rest)

    return top_parts


@lru_cache(maxsize=1)
def top_merge() -> Any:
    """Each row's best token and its logsumexp, from its parts. Units: rows.

    Arguments: as of `top_parts`, then ids, best logits, logsumexp. ids int64 [B], of equals the
    lowest; best logits float32 [B]; logsumexp float64 [B], NaN where a logit is.
    """

    @kernel
    def top_merge(arguments, first, last):  # type: ignore[no-untyped-def]
        (
            given, v, parts, from_maxima, from_peaks, from_sums, to_ids, to_logits, to_logsumexp,
        ) = fields(arguments, 9)  # fmt: skip
        logits, stride = fields(given, 2)
        for row in range(first, last):
            peaks = doubles(from_peaks + 8 * row * parts, parts)
            sums = doubles(from_sums + 8 * row * parts, parts)
            best = 0
            for part in range(1, parts):
                if peaks[part] > peaks[best]:
                    best = part
            total = np.float64(0)
            for part in range(parts):
                total += sums[part] * np.exp(peaks[part] - peaks[best])
            doubles(to_logsumexp, row + 1)[row] = peaks[best] + np.log(total)
            block, maxima = 0, floats(from_maxima + 4 * row * parts * BLOCKS, parts * BLOCKS)
            while block < parts * BLOCKS - 1 and maxima[block] < peaks[best]:
                block += 1
            x, token = floats(logits + row * stride, v), block * BLOCK
            while token < v - 1 and not x[token] >= peaks[best]:
                token += 1
            token = min(token, v - 1)
            longs(to_ids, row + 1)[row] = token
            floats(to_logits, row + 1)[row] = x[token]

    return top_merge
