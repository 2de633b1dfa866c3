"""What samplers ask of rows of logits.

Between two steps all code and data are cold, and Python then takes longer than the work itself: so
what can be done within the step is (`surveyed`), and each of the rest is one call of compiled code.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.best import BLOCK
from bloomq.backends.numba_cpu.levels import row_levels
from bloomq.backends.numba_cpu.program import Program
from bloomq.backends.numba_cpu.row_calls import (
    best_few,
    find_tokens,
    mask_row,
    row_maxima,
    row_sums,
)
from bloomq.backends.numba_cpu.surveyed import LogitRows, TopWork
from bloomq.backends.numba_cpu.threads import Pool
from bloomq.backends.numba_cpu.top import top_merge, top_parts
from bloomq.layers import Top
from bloomq.levels import LEVELS, Levels, Sums, level_scale

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class RowQuestions:
    """`survey`, `top`, `best`, `masked`, `sums` and `levels` of the Numba backend."""

    def __init__(self, pool: Pool, tier: str) -> None:
        """Compile all that is called, or take it from the cache."""
        self._pool = pool
        for made in (top_parts, row_maxima, row_sums, row_levels, find_tokens):
            made(tier)
        for made_once in (top_merge, best_few, mask_row):
            made_once()

    def survey(self, tier: str, logits: F32) -> LogitRows:
        """See `Backend.survey`."""
        logits = _in_rows(logits)
        program = Program()
        where = np.array([logits.ctypes.data, logits.strides[0]], np.int64)
        program.keep(logits, where)
        work = TopWork(program, tier, where, *logits.shape, touched=logits.nbytes)
        self._pool.run(program)
        return work.rows(logits)

    def top(self, tier: str, logits: F32 | LogitRows, k: int) -> Top:
        """See `Backend.top`."""
        rows = logits if isinstance(logits, LogitRows) else self.survey(tier, logits)
        if k <= 1:
            return rows.top
        ids, best = self._best(rows.values, rows.maxima, k)
        return Top(ids, best, rows.top.logsumexp)

    def best(self, tier: str, logits: F32 | LogitRows, k: int) -> tuple[I64, F32]:
        """See `Backend.best`."""
        if isinstance(logits, LogitRows):
            top = self.top(tier, logits, k)
            return top.ids[0], top.logits[0]
        rows = _in_rows(logits)
        maxima = np.empty((1, -(-rows.shape[1] // BLOCK)), np.float32)
        row_maxima(tier)(rows[0], maxima[0])
        ids, found = self._best(rows[:1], maxima, k)
        return ids[0], found[0]

    def masked(self, logits: F32, allowed: NDArray[np.bool_]) -> F32:
        """See `Backend.masked`."""
        out = np.empty(logits.shape, np.float32)
        mask_row()(_in_rows(logits)[0], allowed, out[0])
        return out

    def sums(self, tier: str, logits: F32 | LogitRows, temperature: float) -> Sums:
        """See `Backend.sums`."""
        values, peak = _row(logits)
        found = row_sums(tier)(values, peak, 1 / temperature)
        return Sums(float(peak), temperature, *found)

    def levels(self, tier: str, logits: F32 | LogitRows, temperature: float) -> Levels:
        """See `Backend.levels`."""
        values, peak = _row(logits)
        levels, masses = np.empty(len(values), np.uint16), np.empty(LEVELS)
        found = row_levels(tier)(
            values, peak, 1 / temperature, level_scale(temperature), levels, masses
        )
        sums = Sums(float(peak), temperature, float(masses.sum()), *found)
        return Levels(levels, masses, sums, partial(_found, tier))

    def _best(self, values: F32, maxima: F32, k: int) -> tuple[I64, F32]:
        batch, vocab = values.shape
        k = min(max(k, 1), vocab)
        ids, best = np.empty((batch, k), np.int64), np.empty((batch, k), np.float32)
        best_few()(values, maxima, ids, best)
        return ids, best


def _row(logits: F32 | LogitRows) -> tuple[F32, np.float32]:
    """A row's logits [V], and the largest of them."""
    if isinstance(logits, LogitRows):
        return logits.values[0], logits.top.logits[0, 0]
    values = _in_rows(logits)[0]
    return values, values.max()


def _in_rows(logits: F32) -> F32:
    """Logits [B, V] whose rows lie each in one piece."""
    return logits if logits.strides[1] == logits.itemsize else np.ascontiguousarray(logits)


def _found(
    tier: str, levels: NDArray[np.uint16], values: F32, low: int, high: int
) -> tuple[I64, F64]:
    """See `levels.find`."""
    ids, best = np.empty(len(levels), np.int64), np.empty(len(levels))
    count = find_tokens(tier)(levels, values, low, high, ids, best)
    return ids[:count].copy(), best[:count].copy()
