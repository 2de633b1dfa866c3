"""From probabilities and one number of [0, 1) to a place: the inverse of the cumulative sum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def pick(weights: F64, u: float) -> int:
    """The place [n] of the weight in which u, uniform in [0, 1), falls; never one that is 0."""
    total = weights.cumsum()
    return place_of(total, u * float(total[-1]))


def place_of(total: F64, goal: float) -> int:
    """Where an ascending sum first exceeds `goal`; where it ends, if rounding lets none."""
    found = int(total.searchsorted(goal, side="right"))
    return found if found < len(total) else int(total.searchsorted(total[-1]))
