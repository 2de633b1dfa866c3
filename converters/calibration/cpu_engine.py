"""A calibration on the CPU: layers of its backend, float32 sums and loops over rows in threads.

Invariant: no byte depends on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.layers import NumbaBackend
from bloomq.schemes import ROW_MULTIPLE, Scheme

from .engine import Sums
from .making_up import Wanted
from .moments import Moments
from .rounding import CpuRounding

F32 = NDArray[np.float32]
SOLVED_BYTES = 256 << 20  # of float32 rows at a time; with their values twice that
_AT_ONCE = 256  # of more tokens, what they are rounded to leaves the caches: twice the time


class CpuEngine:
    """`Engine` on the host; threads: of its layers, None for one a core."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int | None = None) -> None:
        self.pool, self.at_once = pool, _AT_ONCE
        self.layers = NumbaBackend(threads, "f32")

    def there(self, x: F32) -> F32:
        return np.ascontiguousarray(x)

    def moments(self) -> Moments:
        return Moments(self.pool)

    def wanted(self, stream: F32, moments: Sums) -> Wanted:
        return Wanted(stream, moments, self.pool)

    def rounding(self, moment: F32, scheme: Scheme, *, damping: float, sweeps: int) -> CpuRounding:
        return CpuRounding(moment, scheme, self.pool, damping=damping, sweeps=sweeps)

    def solved_rows(self, k: int) -> int:
        return max(ROW_MULTIPLE, SOLVED_BYTES // (4 * k) // ROW_MULTIPLE * ROW_MULTIPLE)

    @contextmanager
    def watched(self) -> Iterator[None]:
        yield
