"""How arrays come into the inputs of a program: by one compiled call.

An array's address alone (`array.ctypes.data`) takes 30 us between two steps, when the Python code
behind it is cold; one of these calls 12.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from numba import float32, int64, types, void

from bloomq.backends.numba_cpu.jit import compiled

_INPUTS, _LEVELS = int64[::1], types.Array(types.uint16, 1, "C", readonly=True)
_VALUES = types.Array(float32, 1, "C", readonly=True)
_LOGITS = types.Array(float32, 2, "A", readonly=True)


@lru_cache(maxsize=1)
def bind_top() -> Any:
    """bind_top(inputs, logits): inputs are logits, their stride in bytes."""

    @compiled(void(_INPUTS, _LOGITS))
    def bind_top(inputs, logits):  # type: ignore[no-untyped-def]
        inputs[0], inputs[1] = logits.ctypes.data, logits.strides[0]

    return bind_top
