"""The best k of a row's logits, from the largest of each block: by counting, without a heap.

Invariant: keys order as logits do, best first, of equals the lower id; -0 and 0 are equal, NaN
comes with -infinity. No two are equal, so the order is one.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from bloomq.backends.numba_cpu.jit import called
from bloomq.backends.numba_cpu.memory import as_float, floats, ints

BLOCK = 64  # logits of a block: 3,920 of them in BLOOM's vocabulary, far more than the usual k
_ID_BITS = 31
ID_MASK = (1 << _ID_BITS) - 1
_INFINITY = 0x7F800000  # the bits of a float32
_DIGIT = 8  # bits that a pass of the sort looks at
# A line each: put where it is called before anything is compiled, none is compiled by itself.
_inlined = njit(inline="always", error_model="numpy")


@_inlined
def room_of(k):  # type: ignore[no-untyped-def]
    """Keys that a row's search needs memory for: twice k, and a block more than k at least."""
    return 2 * k + 2 * BLOCK


@_inlined
def _ordered(bits):  # type: ignore[no-untyped-def]
    """The bits of a float32 as a whole number that orders as the float does."""
    if bits & 0x7FFFFFFF > _INFINITY:  # NaN
        return -_INFINITY
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF)


@_inlined
def key_of(bits, token):  # type: ignore[no-untyped-def]
    """The key of a token, from the bits of its logit."""
    return (0x7FFFFFFF - _ordered(bits)) << _ID_BITS | token


@_inlined
def _float(ordered):  # type: ignore[no-untyped-def]
    """The float32 that `_ordered` gives this number for."""
    return as_float(ordered) if ordered >= 0 else -as_float(-ordered)


@called()
def _bound(maxima, k):  # type: ignore[no-untyped-def]
    """A number that at least k of the maxima reach, and not many more where these differ."""
    low, high = -_INFINITY, _INFINITY
    while high - low > 1:
        middle = (low + high) >> 1
        bound, reached = _float(middle), 0
        for i in range(len(maxima)):
            reached += maxima[i] >= bound
        if reached < k:
            high = middle
        else:
            low = middle
            if reached <= k + k // 8:
                break
    return _float(low)


@called()
def _keep_least(keys, count, k):  # type: ignore[no-untyped-def]
    """Move the least k of `count` keys to the front, in the order they are in; returns how many
    these are."""
    if count <= k:
        return count
    low, high = keys[0], keys[0]
    for i in range(count):
        low, high = min(low, keys[i]), max(high, keys[i])
    low -= 1
    while True:  # at most `low` are less than k, at most `high` at least k
        middle = low + ((high - low) >> 1)
        reached = 0
        for i in range(count):
            reached += keys[i] <= middle
        if reached == k:
            break
        if reached < k:
            low = middle
        else:
            high = middle
    kept = 0
    for i in range(count):
        key = keys[i]
        keys[kept] = key
        kept += key <= middle
    return kept


@called()
def sort_keys(keys, other, count):  # type: ignore[no-untyped-def]
    """Sort `count` keys that are in the order of their ids: by the digits of their logits, the last
    first. Returns what holds the result, `keys` or `other`."""
    differing = 0
    for i in range(count):
        differing |= keys[i] ^ keys[0]
    starts = np.empty(1 << _DIGIT, np.int64)
    for shift in range(_ID_BITS, 63, _DIGIT):
        if not differing >> shift & ((1 << _DIGIT) - 1):
            continue
        starts[:] = 0
        for i in range(count):
            starts[keys[i] >> shift & ((1 << _DIGIT) - 1)] += 1
        total = 0
        for digit in range(1 << _DIGIT):
            total, starts[digit] = total + starts[digit], total
        for i in range(count):
            digit = keys[i] >> shift & ((1 << _DIGIT) - 1)
            other[starts[digit]] = keys[i]
            starts[digit] += 1
        keys, other = other, keys
    return keys


@intrinsic
def reaching_bits(typingctx: Any, at: Any, bound: Any) -> Any:
    """Bit i: is logit i of the BLOCK at an address not below `bound`? NaN is not, so that there are
    at least as many as were counted."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row = ir.VectorType(ir.FloatType(), BLOCK)
        logits = builder.load(builder.inttoptr(args[0], ir.PointerType()), align=4, typ=row)
        low = ir.Constant(ir.VectorType(ir.IntType(32), BLOCK), None)
        one = builder.insert_element(ir.Constant(row, ir.Undefined), args[1], ir.IntType(32)(0))
        bounds = builder.shuffle_vector(one, ir.Constant(row, ir.Undefined), low)
        return builder.bitcast(builder.fcmp_unordered(">=", logits, bounds), ir.IntType(64))

    return types.int64(types.int64, types.float32), codegen


@intrinsic
def lowest_bit(typingctx: Any, bits: Any) -> Any:
    """The place of the lowest bit that is 1, of an int64 that is not 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), codegen


@called()
def best_of_row(logits, v, maxima, k, keys, other, ids, best):  # type: ignore[no-untyped-def]
    """The best k of v logits at an address, from the largest of each BLOCK (NaN counting as
    -infinity): ids int64 [k], best float32 [k]. keys, other: room_of(k) int64 each."""
    x, bits = floats(logits, v), ints(logits, v)
    room, blocks = len(keys), len(maxima)
    bound, count = _bound(maxima, k) if k < blocks else np.float32(-np.inf), 0
    for block in range(blocks):
        if maxima[block] < bound:
            continue
        first = BLOCK * block
        if first + BLOCK <= v:
            reaching = reaching_bits(logits + 4 * first, bound)
            while reaching:
                token = first + lowest_bit(reaching)
                keys[count] = key_of(np.int64(bits[token]), token)
                count += 1
                reaching &= reaching - 1
        else:
            for token in range(first, v):
                if not x[token] < bound:
                    keys[count] = key_of(np.int64(bits[token]), token)
                    count += 1
        if count > room - BLOCK:
            count = _keep_least(keys, count, k)
            worst = 0
            for i in range(count):
                worst = max(worst, keys[i])
            # Others must be better: their ids are higher.
            bound = _float(0x7FFFFFFF - (worst >> _ID_BITS) + 1)
    count = _keep_least(keys, count, k)
    found = sort_keys(keys, other, count)
    for i in range(k):
        ids[i] = found[i] & ID_MASK
        best[i] = x[ids[i]]
