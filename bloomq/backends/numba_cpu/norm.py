"""Layer norm on its own, as the embedding needs it; everywhere else it is a linear's prologue."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from numba import float32, prange, void

from bloomq.backends.numba_cpu.jit import compiled
from bloomq.backends.numba_cpu.prologue import norm_row

_SERIAL_ROWS = 8  # fewer are ready before another thread wakes


@lru_cache(maxsize=1)
def norm_rows() -> Any:
    """norm_rows(x [M, C], gain, bias, epsilon, out [M, C]), one thread to a row."""

    @compiled(
        void(float32[:, ::1], float32[::1], float32[::1], float32, float32[:, ::1]), parallel=True
    )
    def norm_rows(x, gain, bias, epsilon, out):  # type: ignore[no-untyped-def]
        if x.shape[0] <= _SERIAL_ROWS:
            for i in range(x.shape[0]):
                norm_row(x[i], gain, bias, epsilon, out[i])
        else:
            for i in prange(x.shape[0]):
                norm_row(x[i], gain, bias, epsilon, out[i])

    return norm_rows
