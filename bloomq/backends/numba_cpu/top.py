"""The best few of 250,880 logits, and the log of the sum of all their exponentials.

A row is cut into parts that threads share; what the parts found is merged in their order, so the
result does not depend on who did which. Bytes touched: the logits twice, mostly from the caches.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from bloomq.backends.numba_cpu.jit import kernel
from bloomq.backends.numba_cpu.memory import address, as_float, doubles, fields, floats, keep, longs
from bloomq.backends.numba_cpu.simd import F32, I64, LANES, V16F, Vectors

PART = 8192  # logits of a part: 32 KB, a level-1 cache


@intrinsic(prefer_literal=True)
def sum_exp(typingctx: Any, tier: Any, x: Any, blocks: Any, shift: Any, out: Any) -> Any:
    """out [16] float32 = sum over blocks of 16 of exp((x - peak) * factor); `shift` is the address
    of (peak, factor)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit_sum_exp(Vectors(builder, tier.literal_value), *args[1:])
        return context.get_dummy_value()

    return types.void(tier, types.int64, types.int64, types.int64, types.int64), codegen


def _emit_sum_exp(
    v: Vectors, x: ir.Value, blocks: ir.Value, shift: ir.Value, out: ir.Value
) -> None:
    b = v.b
    peak, factor = v.broadcast(shift, F32), v.broadcast(v.at(shift, 4), F32)
    total = cgutils.alloca_once(b, V16F)
    b.store(v.constant(V16F, 0.0), total)
    with cgutils.for_range(b, blocks, intp=I64) as loop:
        value = v.load(v.at(x, b.mul(loop.index, I64(4 * LANES))), V16F)
        term = v.exp(b.fmul(b.fsub(value, peak), factor))
        b.store(b.fadd(b.load(total, typ=V16F), term), total)
    v.store(b.load(total, typ=V16F), out)


@intrinsic(prefer_literal=True)
def any_above(typingctx: Any, tier: Any, x: Any, floor: Any) -> Any:
    """Is one of the 64 values at `x` at least `floor` (float32)?"""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v, b = Vectors(builder, tier.literal_value), builder
        floors = v.splat(args[2])
        found = None
        for part in range(4):
            here = b.fcmp_ordered(">=", v.load(v.at(args[1], 4 * LANES * part), V16F), floors)
            found = here if found is None else b.or_(found, here)
        return b.icmp_unsigned("!=", b.bitcast(found, ir.IntType(16)), ir.IntType(16)(0))

    return types.boolean(tier, types.int64, types.float32), codegen


@njit
def _worse(values, ids, a, b):  # type: ignore[no-untyped-def]
    """Does entry a rank after entry b? Of equal logits the lower id ranks first."""
    return values[a] < values[b] or (values[a] == values[b] and ids[a] > ids[b])


@njit
def _swap(values, ids, a, b):  # type: ignore[no-untyped-def]
    values[a], values[b] = values[b], values[a]
    ids[a], ids[b] = ids[b], ids[a]


@njit
def _sift_down(values, ids, root, end):  # type: ignore[no-untyped-def]
    """Restore the heap whose root is the worst entry."""
    while True:
        child = 2 * root + 1
        if child >= end:
            return
        if child + 1 < end and _worse(values, ids, child + 1, child):
            child += 1
        if not _worse(values, ids, child, root):
            return
        _swap(values, ids, child, root)
        root = child


@njit
def _offer(values, ids, value, token):  # type: ignore[no-untyped-def]
    """Put a logit into the heap of the best, if it is one of them."""
    if value > values[0] or (value == values[0] and token < ids[0]):
        values[0] = value
        ids[0] = token
        _sift_down(values, ids, 0, values.shape[0])


@njit
def _clear(values, ids):  # type: ignore[no-untyped-def]
    """A heap of nothing: its entries rank after every token."""
    for i in range(values.shape[0]):
        values[i] = np.float32(-np.inf)
        ids[i] = (np.int64(1) << 62) + i


@njit
def _sort(values, ids):  # type: ignore[no-untyped-def]
    """A heap -> best first."""
    for end in range(values.shape[0] - 1, 0, -1):  # the worst goes last
        _swap(values, ids, 0, end)
        _sift_down(values, ids, 0, end)


@lru_cache(maxsize=4)
def top_parts(tier: str) -> Any:
    """The best of each part of each row. Units: rows times parts.

    Arguments: logits, stride of logits in bytes, V, parts, factor (1 / temperature), k of a part,
    values, ids, peaks, sums. values float32 and ids int64 [B, parts, k] as heaps; peaks and sums
    float64 [B, parts]: the sum is of exp((logit - peak) * factor).
    """

    @kernel
    def top_parts(arguments, first, last):  # type: ignore[no-untyped-def]
        logits, stride, v, parts, factor, k, to_values, to_ids, to_peaks, to_sums = fields(
            arguments, 10
        )
        shift, ends = np.zeros(2, np.float32), np.empty(LANES, np.float32)
        sums, rest = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
        for unit in range(first, last):
            start = unit % parts * PART
            count = min(PART, v - start)
            at = logits + unit // parts * stride + 4 * start
            x = floats(at, count)
            values, ids = floats(to_values + 4 * unit * k, k), longs(to_ids + 8 * unit * k, k)
            _clear(values, ids)
            i = 0
            while i < count:
                if i + 64 <= count and not any_above(tier, at + 4 * i, values[0]):
                    i += 64
                    continue
                for j in range(i, min(i + 64, count)):
                    _offer(values, ids, x[j], start + j)
                i += 64
            peak = np.float32(-np.inf)
            for j in range(k):
                peak = max(peak, values[j])
            shift[0] = max(peak, np.float32(-3e38))  # -inf - -inf is NaN
            shift[1] = as_float(factor)
            blocks = count // LANES
            ends[:] = np.float32(-np.inf)
            ends[: count - LANES * blocks] = x[LANES * blocks :]
            sum_exp(tier, at, blocks, address(shift), address(sums))
            sum_exp(tier, address(ends), 1, address(shift), address(rest))
            total = np.float64(0)
            for lane in range(LANES):
                total += np.float64(sums[lane]) + np.float64(rest[lane])
            doubles(to_peaks, unit + 1)[unit] = shift[0]
            doubles(to_sums, unit + 1)[unit] = total
        keep(shift)
        keep(ends)
        keep(sums)
        keep(rest)

    return top_parts


@lru_cache(maxsize=1)
def top_merge() -> Any:
    """Each row's best k, best first, and its logsumexp, from its parts. Units: rows.

    Arguments: parts, factor, k of a part, part values, part ids, peaks, sums, k, values, ids,
    logsumexp. values float32 and ids int64 [B, k]; logsumexp float64 [B], NaN where a logit is.
    """

    @kernel
    def top_merge(arguments, first, last):  # type: ignore[no-untyped-def]
        (
            parts, factor, part_k, from_values, from_ids, from_peaks, from_sums, k, to_values,
            to_ids, to_logsumexp,
        ) = fields(arguments, 11)  # fmt: skip
        scale = np.float64(as_float(factor))
        for row in range(first, last):
            values, ids = floats(to_values + 4 * row * k, k), longs(to_ids + 8 * row * k, k)
            _clear(values, ids)
            found = floats(from_values + 4 * row * parts * part_k, parts * part_k)
            tokens = longs(from_ids + 8 * row * parts * part_k, parts * part_k)
            for i in range(parts * part_k):
                _offer(values, ids, found[i], tokens[i])
            _sort(values, ids)
            peaks = doubles(from_peaks + 8 * row * parts, parts)
            sums = doubles(from_sums + 8 * row * parts, parts)
            peak = peaks[0]
            for part in range(parts):
                peak = max(peak, peaks[part])
            total = np.float64(0)
            for part in range(parts):
                total += sums[part] * np.exp((peaks[part] - peak) * scale)
            doubles(to_logsumexp, row + 1)[row] = peak * scale + np.log(total)

    return top_merge
