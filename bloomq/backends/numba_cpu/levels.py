"""The levels of one row of logits, in parts that threads share. NumPy twin: `bloomq.levels`.

Sixteen logits at a time: their exponentials and levels, as vectors; then each term is added to its
level, in one of four tables in turn, so that an addition seldom waits for the one before it. The
tables of the parts are added in order, so that who did which changes no bit. Bytes touched: the
logits once, and as many of terms and of levels, in a level-1 cache.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from bloomq.backends.numba_cpu.best import ID_MASK, key_of, sort_keys
from bloomq.backends.numba_cpu.jit import kernel
from bloomq.backends.numba_cpu.memory import (
    address,
    as_float,
    doubles,
    fields,
    floats,
    ints,
    keep,
    longs,
    shorts,
)
from bloomq.backends.numba_cpu.simd import F32, I16, I64, LANES, V16F, V16I, V16S, Vectors
from bloomq.levels import LEVELS

PART = 16384  # logits of a part: 16 of BLOOM's vocabulary, for a few threads
BLOCK = 512  # logits whose terms and levels wait to be added: 4 KB


SUMS = 4  # of a part: how many are possible, d, d squared, d e**d
WORD = 64  # levels that are compared at once
_V64S = ir.VectorType(I16, WORD)


@intrinsic(prefer_literal=True)
def largest(typingctx: Any, tier: Any, x: Any, blocks: Any, out: Any) -> Any:
    """out [16] float32 = by lanes, the largest of blocks of 16 values at x, at least one; NaN where
    one is."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit_largest(Vectors(builder, tier.literal_value), *args[1:])
        return context.get_dummy_value()

    return types.void(tier, types.int64, types.int64, types.int64), codegen


def _emit_largest(v: Vectors, x: ir.Value, blocks: ir.Value, out: ir.Value) -> None:
    b = v.b
    peak = cgutils.alloca_once(b, V16F)
    b.store(v.load(x, V16F), peak)
    with cgutils.for_range(b, blocks, intp=I64) as loop:
        value, most = v.load(v.at(x, b.mul(loop.index, I64(4 * LANES))), V16F), b.load(peak)
        kept = b.fcmp_unordered("uno", most, most)  # NaN stays, and comes in where it is not less
        kept = b.or_(kept, b.fcmp_ordered("<=", value, most))
        b.store(b.select(kept, most, value), peak)
    v.store(b.load(peak), out)


@intrinsic(prefer_literal=True)
def levels_between(typingctx: Any, tier: Any, levels: Any, low: Any, width: Any) -> Any:
    """Bit i: is level i of the 64 (uint16) at an address from `low` to low + width?"""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = Vectors(builder, tier.literal_value)
        below, wide = (v.splat(builder.trunc(arg, I16), WORD) for arg in args[2:])
        above = builder.sub(v.load(args[1], _V64S), below)  # what lies before wraps around
        return builder.bitcast(builder.icmp_unsigned("<=", above, wide), I64)

    return types.int64(tier, types.int64, types.int64, types.int64), codegen


@intrinsic
def lowest_bit(typingctx: Any, bits: Any) -> Any:
    """The place of the lowest bit that is 1, of an int64 that is not 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), codegen


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
    zero, one = v.constant(V16F, 0.0), v.constant(V16F, 1.0)
    last = v.constant(V16F, float(LEVELS - 1))
    totals = [cgutils.alloca_once(b, V16F) for _ in range(SUMS)]
    for i, total in enumerate(totals):
        b.store(v.load(v.at(sums, 4 * LANES * i), V16F), total)
    with cgutils.for_range(b, blocks, intp=I64) as loop:
        at = b.mul(loop.index, I64(4 * LANES))
        distance = b.fsub(v.load(v.at(x, at), V16F), best)
        level = b.fmul(distance, scale)
        level = b.select(b.fcmp_ordered("<", level, last), level, last)  # NaN too
        v.store(b.trunc(b.fptosi(level, V16I), V16S), v.at(levels, b.lshr(at, I64(1))))
        d = b.fmul(distance, factor)
        possible = b.fcmp_unordered("!=", d, v.constant(V16F, float("-inf")))
        d = b.select(possible, d, zero)
        term = b.select(possible, v.exp_from(-80.0, d), zero)
        v.store(term, v.at(terms, at))
        count, first, second, moment = (b.load(total, typ=V16F) for total in totals)
        b.store(b.fadd(count, b.select(possible, one, zero)), totals[0])
        b.store(b.fadd(first, d), totals[1])
        b.store(v.fma(d, d, second), totals[2])
        b.store(v.fma(term, d, moment), totals[3])
    for i, total in enumerate(totals):
        v.store(b.load(total, typ=V16F), v.at(sums, 4 * LANES * i))


@njit
def _larger(x, y):  # type: ignore[no-untyped-def]
    """The larger one; NaN where one is."""
    return x if np.isnan(x) or y <= x else y


@lru_cache(maxsize=4)
def row_peaks(tier: str) -> Any:
    """The largest logit of each part of a row, NaN where one is. Units: parts.

    Arguments: address of (logits, ...), V, peaks. peaks float32 [parts].
    """

    @kernel
    def row_peaks(arguments, first, last):  # type: ignore[no-untyped-def]
        given, v, to_peaks = fields(arguments, 3)
        logits = fields(given, 1)[0]
        lanes = np.empty(LANES, np.float32)
        for unit in range(first, last):
            at, count = logits + 4 * PART * unit, min(PART, v - PART * unit)
            lanes[:] = np.float32(-np.inf)
            whole = count // LANES
            if whole:
                largest(tier, at, whole, address(lanes))
            peak = np.float32(-np.inf)
            for lane in range(LANES):
                peak = _larger(peak, lanes[lane])
            x = floats(at, count)
            for i in range(whole * LANES, count):
                peak = _larger(peak, x[i])
            floats(to_peaks, unit + 1)[unit] = peak
        keep(lanes)

    return row_peaks


@njit
def _best(peaks_at, parts):  # type: ignore[no-untyped-def]
    """The largest of some float32, NaN where one is."""
    peaks = floats(peaks_at, parts)
    best = peaks[0]
    for i in range(1, parts):
        best = _larger(best, peaks[i])
    return best


@lru_cache(maxsize=4)
def level_parts(tier: str) -> Any:
    """The levels of each part of a row. Units: parts.

    Arguments: address of (logits, 1 / temperature, what gives a level, levels), V, parts, peaks,
    masses, sums. levels uint16 [V]; masses float64 [parts, LEVELS]; sums float64 [parts, SUMS].
    """

    @kernel
    def level_parts(arguments, first, last):  # type: ignore[no-untyped-def]
        given, v, parts, from_peaks, to_masses, to_sums = fields(arguments, 6)
        logits, factor, scale, to_levels = fields(given, 4)
        shift = np.empty(3, np.float32)
        shift[0], shift[1], shift[2] = _best(from_peaks, parts), as_float(factor), as_float(scale)
        terms, ends = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint16)
        table = np.empty(4 * LEVELS, np.float32)
        rest, lanes = np.empty(BLOCK, np.float32), np.empty(SUMS * LANES, np.float32)
        for unit in range(first, last):
            table[:] = np.float32(0)
            lanes[:] = np.float32(0)
            for start in range(unit * PART, min(v, (unit + 1) * PART), BLOCK):
                at, to, count = logits + 4 * start, to_levels + 2 * start, min(BLOCK, v - start)
                if count < BLOCK:
                    rest[:count] = floats(at, count)
                    rest[count:] = np.float32(-np.inf)
                    at, to = address(rest), address(ends)
                level_terms(
                    tier, at, BLOCK // LANES, address(shift), address(terms), to, address(lanes)
                )
                levels = shorts(to, BLOCK)
                for i in range(0, BLOCK, 4):
                    table[levels[i]] += terms[i]
                    table[LEVELS + levels[i + 1]] += terms[i + 1]
                    table[2 * LEVELS + levels[i + 2]] += terms[i + 2]
                    table[3 * LEVELS + levels[i + 3]] += terms[i + 3]
                if count < BLOCK:
                    shorts(to_levels + 2 * start, count)[:] = ends[:count]
            masses = doubles(to_masses + 8 * unit * LEVELS, LEVELS)
            for level in range(LEVELS):
                two = np.float64(table[level]) + np.float64(table[LEVELS + level])
                more = np.float64(table[2 * LEVELS + level]) + np.float64(table[3 * LEVELS + level])
                masses[level] = two + more
            sums = doubles(to_sums + 8 * unit * SUMS, SUMS)
            for i in range(SUMS):
                sums[i] = np.float64(0)
                for lane in range(LANES):
                    sums[i] += np.float64(lanes[LANES * i + lane])
        keep(shift)
        keep(rest)
        keep(lanes)

    return level_parts


@lru_cache(maxsize=1)
def level_merge() -> Any:
    """What the parts of a row found, added up in their order. Units: 1.

    Arguments: parts, peaks, masses, sums, all masses, all sums, best. all masses float64 [LEVELS],
    all sums float64 [SUMS], best float32 [1].
    """

    @kernel
    def level_merge(arguments, first, last):  # type: ignore[no-untyped-def]
        parts, from_peaks, from_masses, from_sums, to_masses, to_sums, to_best = fields(
            arguments, 7
        )
        for to, of_parts, count in (
            (to_masses, from_masses, LEVELS), (to_sums, from_sums, SUMS)
        ):  # fmt: skip
            total = doubles(to, count)
            total[:] = 0.0
            for part in range(parts):
                some = doubles(of_parts + 8 * count * part, count)
                for i in range(count):
                    total[i] += some[i]
        floats(to_best, 1)[0] = _best(from_peaks, parts)

    return level_merge


@lru_cache(maxsize=4)
def find_parts(tier: str) -> Any:
    """The tokens of a run of levels, of each part of a row. Units: parts.

    Arguments: address of (levels, first level, how many more, ...), V, ids, counts. ids int64
    [parts, PART], of which counts int64 [parts] are the part's.
    """

    @kernel
    def find_parts(arguments, first, last):  # type: ignore[no-untyped-def]
        given, v, to_ids, to_counts = fields(arguments, 4)
        at, low, width = fields(given, 3)
        for unit in range(first, last):
            ids, count = longs(to_ids + 8 * PART * unit, PART), 0
            start, stop = PART * unit, min(v, PART * (unit + 1))
            whole = stop - (stop - start) % WORD
            for token in range(start, whole, WORD):
                bits = levels_between(tier, at + 2 * token, low, width)
                while bits:
                    ids[count] = token + lowest_bit(bits)
                    count += 1
                    bits &= bits - 1
            levels = shorts(at, stop)
            for token in range(whole, stop):
                if low <= levels[token] <= low + width:
                    ids[count] = token
                    count += 1
            longs(to_counts, unit + 1)[unit] = count

    return find_parts


@lru_cache(maxsize=1)
def find_merge() -> Any:
    """What `find_parts` found that is not at -infinity, in the order of the logits. Units: 1.

    Arguments: address of (levels, first level, how many more, logits), parts, ids, counts, keys,
    best ids, best logits, count. keys int64 [2, V]; best ids int64 [V] and best logits float64 [V]:
    best first, of equals the lower id; count int64 [1], how many there are.
    """

    @kernel
    def find_merge(arguments, first, last):  # type: ignore[no-untyped-def]
        given, parts, v, from_ids, from_counts, to_keys, to_ids, to_logits, to_count = fields(
            arguments, 9
        )
        at = fields(given, 4)[3]
        x, bits, keys, count = floats(at, v), ints(at, v), longs(to_keys, v), 0
        counts = longs(from_counts, parts)
        for part in range(parts):
            ids = longs(from_ids + 8 * PART * part, PART)
            for i in range(counts[part]):
                token = ids[i]
                keys[count] = key_of(np.int64(bits[token]), token)
                count += x[token] > -np.inf
        keys = sort_keys(keys, longs(to_keys + 8 * v, v), count)
        best, logits = longs(to_ids, count), doubles(to_logits, count)
        for i in range(count):
            best[i] = keys[i] & ID_MASK
            logits[i] = x[best[i]]
        longs(to_count, 1)[0] = count

    return find_merge
