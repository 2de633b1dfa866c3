"""What samplers ask of rows of logits.

The passes over whole rows are programs, recorded once for each shape with the memory that they work
in; the rest are calls of one thread. Between two steps all code and data are cold, which then takes
longer than the work itself: so all that can be done in compiled code is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.binding import bind_top
from bloomq.backends.numba_cpu.levels import row_levels
from bloomq.backends.numba_cpu.program import Program
from bloomq.backends.numba_cpu.recorded import Recorded
from bloomq.backends.numba_cpu.row_calls import (
    best_few,
    best_of_plain,
    find_tokens,
    row_peak,
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


@dataclass(frozen=True, slots=True, eq=False)
class _TopWork:
    program: Program
    work: TopWork


class RowPrograms:
    """`top`, `best`, `sums` and `levels` of the Numba backend."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._bind_top, self._best_few = bind_top(), best_few()
        self._tops: Recorded[_TopWork] = Recorded()

    def compile(self, tier: str) -> None:
        """Compile all that is called, or take it from the cache."""
        for made in (top_parts, best_of_plain, row_peak, row_sums, row_levels, find_tokens):
            made(tier)
        top_merge()

    def survey(self, tier: str, logits: F32) -> LogitRows:
        """See `Backend.survey`."""
        shape = (tier, *logits.shape)
        recorded = self._tops.take(shape, partial(_top_work, *shape))
        self._bind_top(recorded.program.inputs, logits)
        recorded.program.held = logits
        self._pool.run(recorded.program)
        recorded.program.held = None
        rows = recorded.work.rows(logits)
        self._tops.put_back(shape, recorded)
        return rows

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
        k = min(max(k, 1), logits.shape[1])
        ids, best = np.empty(k, np.int64), np.empty(k, np.float32)
        best_of_plain(tier)(logits[0], ids, best)
        return ids, best

    def sums(self, tier: str, logits: F32 | LogitRows, temperature: float) -> Sums:
        """See `Backend.sums`."""
        values, peak = _row(tier, logits)
        found = row_sums(tier)(values, peak, 1 / temperature)
        return Sums(float(peak), temperature, *found)

    def levels(self, tier: str, logits: F32 | LogitRows, temperature: float) -> Levels:
        """See `Backend.levels`."""
        values, peak = _row(tier, logits)
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
        self._best_few(values, maxima, ids, best)
        return ids, best


def _row(tier: str, logits: F32 | LogitRows) -> tuple[F32, np.float32]:
    """A row's logits [V], and the largest of them."""
    if isinstance(logits, LogitRows):
        return logits.values[0], logits.top.logits[0, 0]
    return logits[0], row_peak(tier)(logits[0])


def _found(
    tier: str, levels: NDArray[np.uint16], values: F32, low: int, high: int
) -> tuple[I64, F64]:
    """See `levels.find`."""
    ids, best = np.empty(len(levels), np.int64), np.empty(len(levels))
    count = find_tokens(tier)(levels, values, low, high, ids, best)
    return ids[:count].copy(), best[:count].copy()


def _top_work(tier: str, batch: int, vocab: int) -> _TopWork:
    """Inputs: logits, their stride in bytes."""
    program = Program(2)
    work = TopWork(program, tier, program.inputs, batch, vocab, touched=4 * batch * vocab)
    return _TopWork(program, work)
