"""How arrays come into the inputs of a program: by one compiled call.

An array's address alone (`array.ctypes.data`) takes 30 us between two steps, when the Python code
behind it is cold; one of these calls 12.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from numba import float32, float64, int64, types, void

from bloomq.backends.numba_cpu.jit import compiled
from bloomq.backends.numba_cpu.memory import floats

_INPUTS, _LEVELS = int64[::1], types.Array(types.uint16, 1, "C", readonly=True)
_VALUES = types.Array(float32, 1, "C", readonly=True)
_LOGITS = types.Array(float32, 2, "A", readonly=True)


@lru_cache(maxsize=1)
def bind_top() -> Any:
    """bind_top(inputs, logits, factor): inputs are logits, their stride in bytes, the float32."""

    @compiled(void(_INPUTS, _LOGITS, float64))
    def bind_top(inputs, logits, factor):  # type: ignore[no-untyped-def]
        inputs[0], inputs[1] = logits.ctypes.data, logits.strides[0]
        floats(inputs.ctypes.data + 16, 1)[0] = factor

    return bind_top


@lru_cache(maxsize=1)
def bind_levels() -> Any:
    """bind_levels(inputs, logits, factor, scale, levels): inputs are logits, the two as float32,
    levels."""

    @compiled(void(_INPUTS, _LOGITS, float64, float64, _LEVELS))
    def bind_levels(inputs, logits, factor, scale, levels):  # type: ignore[no-untyped-def]
        inputs[0], inputs[3] = logits.ctypes.data, levels.ctypes.data
        floats(inputs.ctypes.data + 8, 1)[0] = factor
        floats(inputs.ctypes.data + 16, 1)[0] = scale

    return bind_levels


@lru_cache(maxsize=1)
def bind_find() -> Any:
    """bind_find(inputs, levels, low, more, values): inputs are levels, low, more, values."""

    @compiled(void(_INPUTS, _LEVELS, int64, int64, _VALUES))
    def bind_find(inputs, levels, low, more, values):  # type: ignore[no-untyped-def]
        inputs[0], inputs[1], inputs[2] = levels.ctypes.data, low, more
        inputs[3] = values.ctypes.data

    return bind_find
