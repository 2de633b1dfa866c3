"""The best few of 250,880 logits, and the log of the sum of all their exponentials.

Bytes touched: the logits twice. One thread does one row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import float32, float64, int64, njit, prange, types, void
from numba.core import cgutils
from numba.extending import intrinsic, overload

from bloomq.backends.numba_cpu.jit import compiled
from bloomq.backends.numba_cpu.matmul import address, keep
from bloomq.backends.numba_cpu.simd import F32, I64, LANES, V16F, Vectors


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
def _best(row, values, ids):  # type: ignore[no-untyped-def]
    """The len(values) largest of a row, best first, by a heap of the best so far."""
    k = values.shape[0]
    for i in range(k):
        values[i] = np.float32(-np.inf)
        ids[i] = row.shape[0] + i  # what was never replaced ranks after everything
    for i in range(row.shape[0]):
        if row[i] > values[0] or (row[i] == values[0] and i < ids[0]):
            values[0] = row[i]
            ids[0] = i
            _sift_down(values, ids, 0, k)
    for end in range(k - 1, 0, -1):  # heap sort: the worst goes last
        _swap(values, ids, 0, end)
        _sift_down(values, ids, 0, end)


def _top_row(tier, row, temperature, values, ids):  # type: ignore[no-untyped-def]
    """One row: fills values and ids, returns the logsumexp."""


@overload(_top_row, prefer_literal=True)
def _build_top_row(tier, row, temperature, values, ids):  # type: ignore[no-untyped-def]
    name = tier.literal_value

    def top_row(tier, row, temperature, values, ids):  # type: ignore[no-untyped-def]
        _best(row, values, ids)
        blocks = row.shape[0] // 16
        shift = np.array([values[0], 1 / temperature], np.float32)
        sums, rest = np.zeros(16, np.float32), np.zeros(16, np.float32)
        last = np.full(16, -np.inf, np.float32)
        last[: row.shape[0] - 16 * blocks] = row[16 * blocks :]
        sum_exp(name, address(row), blocks, address(shift), address(sums))
        sum_exp(name, address(last), 1, address(shift), address(rest))
        total = np.float64(0)
        for lane in range(16):
            total += np.float64(sums[lane]) + np.float64(rest[lane])
        keep(shift)
        keep(last)
        return np.float64(values[0]) / temperature + np.log(total)

    return top_row


@lru_cache(maxsize=4)
def top_rows(tier: str) -> Any:
    """top_rows(logits [B, V], temperature, values [B, k], ids [B, k], logsumexp [B]): per row the k
    largest logits, best first, and log(sum(exp(logits / temperature))). A row with NaN has
    logsumexp NaN.
    """

    @compiled(
        void(float32[:, ::1], float64, float32[:, ::1], int64[:, ::1], float64[::1]), parallel=True
    )
    def top_rows(logits, temperature, values, ids, logsumexp):  # type: ignore[no-untyped-def]
        if logits.shape[0] == 1:
            logsumexp[0] = _top_row(tier, logits[0], temperature, values[0], ids[0])
        else:
            for r in prange(logits.shape[0]):
                logsumexp[r] = _top_row(tier, logits[r], temperature, values[r], ids[r])

    return top_rows
