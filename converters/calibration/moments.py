"""What a matrix's error is weighed by: mean and second moment of its inputs over the text.

Invariant: float32 sums in an order that does not depend on threads.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.products import add_product

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

SUMMED_ROWS = 8192  # 0.5 GB of 16,384 columns
_TRIANGLE = 512  # rows of a second moment that a thread sums at a time


class Moments:
    """Mean and second moment of rows that come a few at a time.

    Sums are taken about the first rows' mean, so that float32 holds them where a channel is large
    and nearly constant; and of many rows at once: for 16,384 columns, adding up is 1 GB each time.
    Of the second moment the upper triangle alone is summed.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._waiting: list[F32] = []
        self._centre: F32 | None = None
        self._total: F64 | None = None
        self._squares: F32 | None = None
        self._count = 0

    def add(self, x: F32) -> None:
        """x [M, K]."""
        if self._centre is None or self._total is None:
            self._centre = x.mean(axis=0, dtype=np.float64).astype(np.float32)
            self._total = np.zeros(x.shape[1])
        x = x - self._centre
        self._total += x.sum(axis=0, dtype=np.float64)
        self._count += len(x)
        self._waiting.append(x)
        if sum(map(len, self._waiting)) >= SUMMED_ROWS:
            self._sum()

    def _sum(self) -> None:
        """Of a block of the moment the sum over all rows that wait."""
        parts, self._waiting = self._waiting, []
        if self._squares is None:
            self._squares = np.zeros((parts[0].shape[1],) * 2, np.float32)
        squares = self._squares

        def run(start: int) -> None:
            rows, columns = slice(start, start + _TRIANGLE), slice(start, None)
            for part in parts:
                add_product(squares[rows, columns], part[:, rows], part[:, columns])

        list(self._pool.map(run, range(0, len(squares), _TRIANGLE)))  # the longest first

    def result(self, *, central: bool) -> tuple[F32, F32]:
        """(mean [K], moment [K, K]), about the mean or about 0; at most once."""
        if self._waiting:
            self._sum()
        moment, self._squares = self._squares, None
        assert self._centre is not None and self._total is not None and moment is not None
        shift = self._total / self._count
        mean = (self._centre + shift).astype(np.float32)
        narrow = shift.astype(np.float32)
        added = np.zeros_like(mean) if central else mean
        left, right = np.stack([-narrow, added]), np.stack([narrow, added])

        def run(start: int) -> None:
            stop = start + _TRIANGLE
            part = moment[start:stop, start:]
            part /= np.float32(self._count)
            add_product(part, left[:, start:stop], right[:, start:])
            square = moment[start:stop, start:stop]
            square[:] = np.triu(square) + np.triu(square, 1).T
            for at in range(stop, len(moment), _TRIANGLE):
                moment[at : at + _TRIANGLE, start:stop] = part[:, at - start :][:, :_TRIANGLE].T

        list(self._pool.map(run, range(0, len(moment), _TRIANGLE)))
        return mean, moment
