"""What is asked of one row of logits, each in one call of compiled code, of one thread: to wake
another between two steps takes as long as most of these do.

NumPy twins: `bloomq.levels`, and a stable sort.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import float32, float64, int64, types, void
from numba.core import cgutils
from numba.extending import intrinsic

from bloomq.backends.numba_cpu.best import (
    BLOCK,
    ID_MASK,
    best_of_row,
    key_of,
    lowest_bit,
    room_of,
    sort_keys,
)
from bloomq.backends.numba_cpu.jit import compiled
from bloomq.backends.numba_cpu.levels import ROW, SUMS, added_term, loaded_sums, store_sums
from bloomq.backends.numba_cpu.memory import address, copy_bytes, floats, ints, keep
from bloomq.backends.numba_cpu.simd import F32, I16, I64, LANES, V16F, Vectors
from bloomq.backends.numba_cpu.top import block_maxima

WORD = 64  # levels that are compared at once
_V64S = ir.VectorType(I16, WORD)
_PIECE = 8192  # logits whose terms are summed in float32

_ROWS = types.Array(float32, 2, "A", readonly=True)
_LEVELS = types.Array(types.uint16, 1, "C", readonly=True)


@intrinsic(prefer_literal=True)
def levels_between(typingctx: Any, tier: Any, levels: Any, low: Any, width: Any) -> Any:
    """Bit i: is level i of the 64 (uint16) at an address from `low` to low + width?"""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = Vectors(builder, tier.literal_value)
        below, wide = (v.splat(builder.trunc(arg, I16), WORD) for arg in args[2:])
        above = builder.sub(v.load(args[1], _V64S), below)  # what lies before wraps around
        return builder.bitcast(builder.icmp_unsigned("<=", above, wide), I64)

    return types.int64(tier, types.int64, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def row_terms(typingctx: Any, tier: Any, x: Any, blocks: Any, shift: Any, sums: Any) -> Any:
    """What is summed of blocks of 16 logits at x, by lanes, added to sums [SUMS + 1, 16]: the last
    is of e**d; `shift` is the address of (best, 1 / temperature)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit_row_terms(Vectors(builder, tier.literal_value), *args[1:])
        return context.get_dummy_value()

    return types.void(tier, *(types.int64,) * 4), codegen


def _emit_row_terms(
    v: Vectors, x: ir.Value, blocks: ir.Value, shift: ir.Value, sums: ir.Value
) -> None:
    b = v.b
    best, factor = v.broadcast(shift, F32), v.broadcast(v.at(shift, 4), F32)
    totals = loaded_sums(v, sums, SUMS + 1)
    with cgutils.for_range(b, blocks, intp=I64) as loop:
        value = v.load(v.at(x, b.mul(loop.index, I64(4 * LANES))), V16F)
        term = added_term(v, b.fmul(b.fsub(value, best), factor), totals)
        b.store(b.fadd(b.load(totals[SUMS], typ=V16F), term), totals[SUMS])
    store_sums(v, totals, sums)


@lru_cache(maxsize=4)
def row_sums(tier: str) -> Any:
    """row_sums(logits [V], best, 1 / temperature) -> the sums of e**d, of how many are possible,
    of d, d squared and d e**d."""

    @compiled(types.UniTuple(float64, SUMS + 1)(ROW, float32, float64))
    def row_sums(logits, best, factor):  # type: ignore[no-untyped-def]
        shift, rest = np.empty(2, np.float32), np.full(LANES, np.float32(-np.inf))
        shift[0], shift[1] = best, factor
        lanes, totals = np.empty((SUMS + 1, LANES), np.float32), np.zeros(SUMS + 1)
        v, at = len(logits), address(logits)
        for start in range(0, v, _PIECE):
            count = min(_PIECE, v - start)
            lanes[:] = np.float32(0)
            row_terms(tier, at + 4 * start, count // LANES, address(shift), address(lanes))
            ends = count % LANES
            if ends:
                copy_bytes(address(rest), at + 4 * (v - ends), 4 * ends)
                row_terms(tier, address(rest), 1, address(shift), address(lanes))
            for i in range(SUMS + 1):
                for lane in range(LANES):
                    totals[i] += np.float64(lanes[i, lane])
        keep(shift)
        keep(rest)
        keep(lanes)
        return totals[4], totals[0], totals[1], totals[2], totals[3]

    return row_sums


@lru_cache(maxsize=1)
def best_few() -> Any:
    """best_few(logits [B, V], maxima [B, blocks], ids, best): the best k of each row, ids int64 and
    best float32 [B, k]. maxima: of each BLOCK, NaN counting as -infinity."""

    @compiled(void(_ROWS, _ROWS, int64[:, ::1], float32[:, ::1]))
    def best_few(logits, maxima, ids, best):  # type: ignore[no-untyped-def]
        batch, k = ids.shape
        keys = np.empty((2, room_of(k)), np.int64)
        blocks = maxima.shape[1]
        for row in range(batch):
            at = address(logits) + row * logits.strides[0]
            most = floats(address(maxima) + row * maxima.strides[0], blocks)
            best_of_row(at, logits.shape[1], most, k, keys[0], keys[1], ids[row], best[row])

    return best_few


@lru_cache(maxsize=4)
def row_maxima(tier: str) -> Any:
    """row_maxima(logits [V], maxima [blocks]): the largest of each BLOCK, NaN counting as
    -infinity."""

    @compiled(void(ROW, float32[::1]))
    def row_maxima(logits, maxima):  # type: ignore[no-untyped-def]
        v, whole = len(logits), len(logits) // BLOCK
        block_maxima(tier, address(logits), whole, address(maxima))
        if whole < len(maxima):
            peak = np.float32(-np.inf)
            for i in range(whole * BLOCK, v):
                peak = logits[i] if logits[i] > peak else peak
            maxima[whole] = peak

    return row_maxima


@lru_cache(maxsize=1)
def mask_row() -> Any:
    """mask_row(logits [V], allowed [V], out [V]): the logits, -infinity where not allowed."""

    @compiled(void(ROW, types.Array(types.bool_, 1, "C", readonly=True), float32[::1]))
    def mask_row(logits, allowed, out):  # type: ignore[no-untyped-def]
        for i in range(len(out)):
            out[i] = logits[i] if allowed[i] else np.float32(-np.inf)

    return mask_row


@lru_cache(maxsize=4)
def find_tokens(tier: str) -> Any:
    """find_tokens(levels [V], logits [V], low, high, ids, best) -> how many tokens the levels from
    `low` to `high` have that are not at -infinity: ids int64 [V] and their logits best float64 [V],
    best first, of equals the lower id."""

    @compiled(int64(_LEVELS, ROW, int64, int64, int64[::1], float64[::1]))
    def find_tokens(levels, logits, low, high, ids, best):  # type: ignore[no-untyped-def]
        v, count = len(levels), 0
        whole = v - v % WORD
        for token in range(0, whole, WORD):
            bits = levels_between(tier, address(levels) + 2 * token, low, high - low)
            while bits:
                ids[count] = token + lowest_bit(bits)
                count += 1
                bits &= bits - 1
        for token in range(whole, v):
            if low <= levels[token] <= high:
                ids[count] = token
                count += 1
        possible, bits = 0, ints(address(logits), v)
        keys = np.empty((2, count), np.int64)
        for i in range(count):
            token = ids[i]
            keys[0, possible] = key_of(np.int64(bits[token]), token)
            possible += logits[token] > -np.inf
        found = sort_keys(keys[0], keys[1], possible)
        for i in range(possible):
            ids[i] = found[i] & ID_MASK
            best[i] = logits[ids[i]]
        return possible

    return find_tokens
