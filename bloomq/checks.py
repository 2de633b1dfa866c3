"""Whether an argument is the number that it should be."""

from __future__ import annotations

import math

import numpy as np

from bloomq.errors import UsageError


def is_whole(value: object) -> bool:
    """Is this a whole number, of Python or NumPy, and not a truth value?"""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_number(name: str, value: object, low: float, high: float, expected: str) -> None:
    """Raises: UsageError for what is no number from `low` to `high`, in words `expected`."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | np.integer | np.floating)
        or math.isnan(value)
        or not (low <= value <= high)
    ):
        raise UsageError(f"{name} is {value!r}, expected {expected}")
