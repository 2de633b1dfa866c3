"""Logits and what the step that made them found out about them, while they were in the caches.

Between two steps all code is cold, and finding the best of 250,880 logits takes several times as
long; within a step it is two more operations of its program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.program import Buffer, Program
from bloomq.backends.numba_cpu.top import BLOCKS, PART, top_merge, top_parts
from bloomq.layers import Top

F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class LogitRows:
    """Logits [W, V]; of each row the largest of every block [W, blocks] (see `top`), its best token
    and its logsumexp."""

    values: F32
    maxima: F32
    top: Top

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)

    def take(self, index: Any) -> LogitRows:
        """Some of the rows: copies, but a single one is a view."""
        if len(index) == 1:
            index = slice(int(index[0]), int(index[0]) + 1)
        top = Top(self.top.ids[index], self.top.logits[index], self.top.logsumexp[index])
        return LogitRows(self.values[index], self.maxima[index], top)


class Survey:
    """The operations that find this out, recorded behind those that make the logits."""

    def __init__(self, tier: str, logits: Buffer) -> None:
        program = logits.program
        self._logits = logits
        where = np.array([logits.address, logits.stride_bytes], np.int64)
        program.keep(where)
        self._work = TopWork(program, tier, where, logits.rows, logits.columns)

    def rows(self) -> LogitRows:
        """What the last run made and found, in arrays of its own."""
        return self._work.rows(self._logits.values().copy())


class TopWork:
    """The best token and the logsumexp of rows of logits: operations of a program, and where they
    leave their results. where: the address of the logits and their stride in bytes, when it runs;
    touched: bytes that it reads from memory.
    """

    def __init__(
        self, program: Program, tier: str, where: NDArray[np.int64], batch: int, vocab: int, *,
        touched: int = 0,
    ) -> None:  # fmt: skip
        parts = -(-vocab // PART)
        self.maxima = np.empty((batch, parts * BLOCKS), np.float32)
        peaks, sums = np.empty((2, batch, parts))
        self.ids, self.logsumexp = np.empty((batch, 1), np.int64), np.empty(batch)
        self.best = np.empty((batch, 1), np.float32)
        found = (self.maxima, peaks, sums)
        results = (self.ids, self.best, self.logsumexp)
        given = where.ctypes.data, vocab, parts, *(array.ctypes.data for array in found)
        program.add(top_parts(tier), batch * parts, 2, *given, touched=touched)
        program.add(top_merge(), batch, 1, *given, *(array.ctypes.data for array in results))
        program.keep(*found, *results)
        program.nbytes += sum(array.nbytes for array in (*found, *results))

    def rows(self, values: F32) -> LogitRows:
        """The logits that were looked at, with copies of what the last run found."""
        top = Top(self.ids.copy(), self.best.copy(), self.logsumexp.copy())
        return LogitRows(values, self.maxima.copy(), top)
