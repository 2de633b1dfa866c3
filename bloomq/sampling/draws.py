"""From probabilities and one number of [0, 1) to a token: the inverse of the cumulative sum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
_BLOCK = 256  # weights of a block: float32 sums of so few are good to 1e-6


def pick(weights: F64, u: float) -> int:
    """The place [n] of the weight in which u, uniform in [0, 1), falls; never one that is 0."""
    total = weights.cumsum()
    return _place(total, u * float(total[-1]))


def pick_large(scores: F32, u: float) -> int:
    """A place of scores [V] by softmax, none at -infinity; `scores` is used up.

    Blocks of exponentials are summed first, then the one in which u falls is gone through: float32
    terms, float64 sums.
    """
    scores -= scores.max()
    weights = np.exp(scores, out=scores)
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK))
    total = np.cumsum(blocks, dtype=np.float64)
    goal = u * float(total[-1])
    block = _place(total, goal)
    inside = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    before = float(total[block - 1]) if block else 0.0
    return block * _BLOCK + _place(inside, goal - before)


def _place(total: F64, goal: float) -> int:
    """Where an ascending sum first exceeds `goal`; where it ends, if rounding lets none."""
    found = int(total.searchsorted(goal, side="right"))
    return found if found < len(total) else int(total.searchsorted(total[-1]))
