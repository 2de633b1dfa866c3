"""What samplers ask of rows of logits, as programs: recorded once for each shape, with the memory
that they work in.

Between two steps all code and data are cold, which then takes longer than the work itself: so all
that can be done in compiled code is, and results leave in as few arrays as there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.best import best_ids, room_of
from bloomq.backends.numba_cpu.binding import bind_find, bind_levels, bind_top
from bloomq.backends.numba_cpu.levels import PART as LEVEL_PART
from bloomq.backends.numba_cpu.levels import (
    SUMS,
    find_merge,
    find_parts,
    level_merge,
    level_parts,
    row_peaks,
)
from bloomq.backends.numba_cpu.program import Program
from bloomq.backends.numba_cpu.recorded import Recorded
from bloomq.backends.numba_cpu.threads import Pool
from bloomq.backends.numba_cpu.top import BLOCKS, PART, top_merge, top_parts
from bloomq.layers import Top
from bloomq.levels import LEVELS, Levels, level_scale

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A program and the arrays of its results."""

    program: Program
    results: tuple[NDArray[Any], ...]


class RowPrograms:
    """`top` and `levels` of the Numba backend."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._bind_top, self._bind_levels, self._bind_find = bind_top(), bind_levels(), bind_find()
        self._tops: Recorded[Work] = Recorded()
        self._levels: Recorded[Work] = Recorded()
        self._finds: Recorded[Work] = Recorded()

    def compile(self, tier: str) -> None:
        """Compile all kernels, or take them from the cache."""
        for kernel in (top_parts, row_peaks, level_parts, find_parts):
            kernel(tier)
        for kernel in (top_merge, best_ids, level_merge, find_merge):
            kernel()

    def top(self, tier: str, logits: F32, k: int, temperature: float) -> Top:
        """See `Backend.top`."""
        batch, vocab = logits.shape
        shape = tier, batch, vocab, min(max(k, 1), vocab)
        work = self._tops.take(shape, partial(_top, *shape))
        self._bind_top(work.program.inputs, logits, 1 / temperature)
        ids, best, logsumexp = self._run(work, logits)
        self._tops.put_back(shape, work)
        return Top(ids, best, logsumexp)

    def levels(self, tier: str, logits: F32, temperature: float) -> Levels:
        """See `Backend.levels`."""
        vocab = logits.shape[1]
        levels = np.empty(vocab, np.uint16)
        work = self._levels.take((tier, vocab), partial(_levels, tier, vocab))
        factor, scale = 1 / temperature, level_scale(temperature)
        self._bind_levels(work.program.inputs, logits, factor, scale, levels)
        masses, sums, best = self._run(work, (logits, levels))
        self._levels.put_back((tier, vocab), work)
        count, total, squares, moment = sums.tolist()
        find = partial(self._find, tier)
        return Levels(best[0], temperature, levels, masses, count, total, squares, moment, find)

    def _find(
        self, tier: str, levels: NDArray[np.uint16], values: F32, low: int, high: int
    ) -> tuple[I64, F64]:
        """See `levels.find`."""
        shape = tier, len(levels)
        work = self._finds.take(shape, partial(_find, *shape))
        self._bind_find(work.program.inputs, levels, low, high - low, values)
        work.program.held = levels, values
        self._pool.run(work.program)
        work.program.held = None
        ids, logits, count = work.results
        found = int(count[0])
        best = ids[:found].copy(), logits[:found].copy()
        self._finds.put_back(shape, work)
        return best

    def _run(self, work: Work, given: object) -> list[Any]:
        """Copies of the results. given: what the inputs point into."""
        work.program.held = given
        self._pool.run(work.program)
        work.program.held = None
        return [result.copy() for result in work.results]


def _top(tier: str, batch: int, vocab: int, k: int) -> Work:
    """Inputs: logits, their stride in bytes, 1 / temperature."""
    program, parts = Program(3), -(-vocab // PART)
    maxima = np.empty((batch, parts * BLOCKS), np.float32)
    peaks, sums = np.empty((2, batch, parts))
    ids, logsumexp = np.empty((batch, k), np.int64), np.empty(batch)
    best = np.empty((batch, k), np.float32)
    keys = np.empty((batch, 2, room_of(k) if k > 1 else 0), np.int64)
    given = program.inputs.ctypes.data, vocab
    found = parts, *(array.ctypes.data for array in (maxima, peaks, sums))
    to = ids.ctypes.data, best.ctypes.data
    program.add(top_parts(tier), batch * parts, 2, *given, *found, touched=4 * batch * vocab)
    program.add(top_merge(), batch, 1, *given, *found, *to, logsumexp.ctypes.data)
    if k > 1:
        blocks = parts * BLOCKS
        program.add(
            best_ids(), batch, 1, *given, blocks, k, maxima.ctypes.data, keys.ctypes.data, *to
        )
    return _holding(program, (maxima, peaks, sums, keys), (ids, best, logsumexp))


def _levels(tier: str, vocab: int) -> Work:
    """Inputs: logits, 1 / temperature, what gives a level, levels."""
    program, parts = Program(4), -(-vocab // LEVEL_PART)
    peaks, best = np.empty(parts, np.float32), np.empty(1, np.float32)
    masses, sums = np.empty((parts, LEVELS)), np.empty((parts, SUMS))
    results = np.empty(LEVELS), np.empty(SUMS), best
    given = program.inputs.ctypes.data, vocab
    found = parts, *(array.ctypes.data for array in (peaks, masses, sums))
    program.add(row_peaks(tier), parts, 1, *given, peaks.ctypes.data)
    program.add(level_parts(tier), parts, 1, *given, *found, touched=12 * vocab)
    program.add(level_merge(), 1, 1, *found, *(to.ctypes.data for to in results))
    return _holding(program, (peaks, masses, sums), results)


def _find(tier: str, vocab: int) -> Work:
    """Inputs: levels, the first that is wanted, how many more, logits."""
    program, parts = Program(4), -(-vocab // LEVEL_PART)
    ids, counts = np.empty((parts, LEVEL_PART), np.int64), np.empty(parts, np.int64)
    keys = np.empty((2, vocab), np.int64)
    results = np.empty(vocab, np.int64), np.empty(vocab), np.empty(1, np.int64)
    given = program.inputs.ctypes.data
    to = ids.ctypes.data, counts.ctypes.data
    program.add(find_parts(tier), parts, 1, given, vocab, *to, touched=2 * vocab)
    inner = *to, keys.ctypes.data
    program.add(
        find_merge(), 1, 1, given, parts, vocab, *inner, *(to.ctypes.data for to in results)
    )
    return _holding(program, (ids, counts, keys), results)


def _holding(program: Program, inner: tuple[Any, ...], results: tuple[Any, ...]) -> Work:
    """A program that owns the memory it works in."""
    program.keep(*inner, *results)
    program.nbytes += sum(array.nbytes for array in (*inner, *results))
    return Work(program, results)
