"""The levels of one row of logits. NumPy twin: `bloomq.levels`.

Sixteen logits at a time: their exponentials and levels, as vectors; then each term is added to its
level, in one of four tables in turn, so that an addition seldom waits for the one before it. One
thread does it: two take longer between two steps, when the other must be woken. Bytes touched: the
logits once, and as many of terms and of levels, in a level-1 cache.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import float32, float64, types, uint16
from numba.core import cgutils
from numba.extending import intrinsic

from bloomq.backends.numba_cpu.jit import compiled
from bloomq.backends.numba_cpu.memory import address, copy_bytes, keep, shorts
from bloomq.backends.numba_cpu.simd import F32, I64, LANES, V16F, V16I, V16S, Vectors
from bloomq.levels import LEVELS

PART = 16384  # logits whose terms are summed in float32
BLOCK = 512  # logits whose terms and levels wait to be added: 4 KB
ROW = types.Array(float32, 1, "C", readonly=True)
SUMS = 4  # of a part: how many are possible, d, d squared, d e**d


@intrinsic(prefer_literal=True)
def level_terms(
    typingctx: Any, tier: Any, x: Any, blocks: Any, shift: Any, terms: Any, levels: Any, sums: Any
) -> Any:
    """Of blocks of 16 logits at x: e**d to terms, their levels to levels (uint16), and what is
    summed of d, by lanes, added to sums [SUMS, 16]; `shift` is the address of (best,
    1 / temperature, what gives a level)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit_level_terms(Vectors(builder, tier.literal_value), *args[1:])
        return context.get_dummy_value()

    addresses = (types.int64,) * 6
    return types.void(tier, *addresses), codegen


def _emit_level_terms(
    v: Vectors, x: ir.Value, blocks: ir.Value, shift: ir.Value, terms: ir.Value, levels: ir.Value,
    sums: ir.Value,
) -> None:  # fmt: skip
    b = v.b
    best, factor, scale = (v.broadcast(v.at(shift, 4 * i), F32) for i in range(3))
    last = v.constant(V16F, float(LEVELS - 1))
    totals = loaded_sums(v, sums, SUMS)
    with cgutils.for_range(b, blocks, intp=I64) as loop:
        at = b.mul(loop.index, I64(4 * LANES))
        distance = b.fsub(v.load(v.at(x, at), V16F), best)
        level = b.fmul(distance, scale)
        level = b.select(b.fcmp_ordered("<", level, last), level, last)  # NaN too
        v.store(b.trunc(b.fptosi(level, V16I), V16S), v.at(levels, b.lshr(at, I64(1))))
        v.store(added_term(v, b.fmul(distance, factor), totals), v.at(terms, at))
    store_sums(v, totals, sums)


def loaded_sums(v: Vectors, at: ir.Value, count: int) -> list[ir.Value]:
    """`count` sums by lanes, [count, 16] float32 at an address, where a loop can add to them."""
    totals = [cgutils.alloca_once(v.b, V16F) for _ in range(count)]
    for i, total in enumerate(totals):
        v.b.store(v.load(v.at(at, 4 * LANES * i), V16F), total)
    return totals


def store_sums(v: Vectors, totals: list[ir.Value], at: ir.Value) -> None:
    for i, total in enumerate(totals):
        v.store(v.b.load(total, typ=V16F), v.at(at, 4 * LANES * i))


def added_term(v: Vectors, d: ir.Value, totals: list[ir.Value]) -> ir.Value:
    """e**d, 0 where d is -infinity, with what is summed of d added to the first SUMS totals."""
    b, zero = v.b, v.constant(V16F, 0.0)
    possible = b.fcmp_unordered("!=", d, v.constant(V16F, float("-inf")))
    d = b.select(possible, d, zero)
    term = b.select(possible, v.exp_from(-80.0, d), zero)
    count, first, second, moment = (b.load(total, typ=V16F) for total in totals[:SUMS])
    b.store(b.fadd(count, b.select(possible, v.constant(V16F, 1.0), zero)), totals[0])
    b.store(b.fadd(first, d), totals[1])
    b.store(v.fma(d, d, second), totals[2])
    b.store(v.fma(term, d, moment), totals[3])
    return term


@lru_cache(maxsize=4)
def row_levels(tier: str) -> Any:
    """row_levels(logits [V], best, 1 / temperature, what gives a level, levels, masses) -> the sums
    of how many are possible, of d, d squared and d e**d. levels uint16 [V]; masses float64
    [LEVELS]."""

    @compiled(
        types.UniTuple(float64, SUMS)(ROW, float32, float64, float32, uint16[::1], float64[::1])
    )
    def row_levels(logits, best, factor, scale, levels, masses):  # type: ignore[no-untyped-def]
        shift = np.empty(3, np.float32)
        shift[0], shift[1], shift[2] = best, factor, scale
        terms, ends = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint16)
        table = np.empty(4 * LEVELS, np.float32)
        rest, lanes = np.empty(BLOCK, np.float32), np.empty((SUMS, LANES), np.float32)
        v, sums = len(logits), np.zeros(SUMS)
        masses[:] = 0.0
        for first in range(0, v, PART):
            table[:] = np.float32(0)
            lanes[:] = np.float32(0)
            for start in range(first, min(v, first + PART), BLOCK):
                count = min(BLOCK, v - start)
                at, to = address(logits) + 4 * start, address(levels) + 2 * start
                if count < BLOCK:
                    copy_bytes(address(rest), at, 4 * count)
                    rest[count:] = np.float32(-np.inf)
                    at, to = address(rest), address(ends)
                level_terms(
                    tier, at, BLOCK // LANES, address(shift), address(terms), to, address(lanes)
                )
                here = shorts(to, BLOCK)
                for i in range(0, BLOCK, 4):
                    table[here[i]] += terms[i]
                    table[LEVELS + here[i + 1]] += terms[i + 1]
                    table[2 * LEVELS + here[i + 2]] += terms[i + 2]
                    table[3 * LEVELS + here[i + 3]] += terms[i + 3]
                if count < BLOCK:
                    copy_bytes(address(levels) + 2 * start, address(ends), 2 * count)
            for level in range(LEVELS):
                two = np.float64(table[level]) + np.float64(table[LEVELS + level])
                more = np.float64(table[2 * LEVELS + level]) + np.float64(table[3 * LEVELS + level])
                masses[level] += two + more
            for i in range(SUMS):
                for lane in range(LANES):
                    sums[i] += np.float64(lanes[i, lane])
        keep(shift)
        keep(rest)
        keep(ends)
        return sums[0], sums[1], sums[2], sums[3]

    return row_levels
