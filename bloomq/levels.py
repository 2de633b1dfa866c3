"""How a row's probability lies over its logits: summed by levels below the best one.

A level is 1/32 nat wide, the last one has no end. A token's level is computed in float32, with the
same operations here and in every backend, so all agree on which level a token belongs to. What a
level holds is a sum: to know a nucleus of 20,000 tokens, or to draw from 250,880, one or two levels
are listed, and nothing is sorted but these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

LEVELS, PER_NAT = 1024, 32  # 32 nats: what lies beyond has 1e-14 of the best one's probability


def tokens_between(levels: NDArray[np.uint16], low: int, high: int) -> I64:
    """The tokens of the levels from `low` to `high`, by id."""
    if low == high:
        return _places(levels == low)
    return _places(levels - np.uint16(low) <= np.uint16(high - low))  # lower levels wrap around


def _places(mine: NDArray[np.bool_]) -> I64:
    """np.flatnonzero by eights: where few are true, several times as fast."""
    eights = mine[: len(mine) & ~7].view(np.uint64)
    some = np.flatnonzero(eights != 0)
    if len(some) > len(eights) // 16:
        return np.flatnonzero(mine)
    last = np.arange(8 * len(eights), len(mine))
    places = np.concatenate([np.add.outer(8 * some, np.arange(8)).ravel(), last])
    found: I64 = places[mine[places]]
    return found


Find = Callable[[NDArray[np.uint16], int, int], I64]


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """Of logits [V] at a temperature, with d = (logit - best) / temperature of each token:

    levels: uint16 [V], each token's; masses: float64 [LEVELS], the sums of e**d of each level's
    tokens; count, total, squares, moment: of the tokens whose d is not -infinity (in a backend's
    float32) how many there are, and the sums of d, d**2 and d e**d; find: how the backend does
    `tokens_between`.
    """

    best: np.float32
    temperature: float
    levels: NDArray[np.uint16]
    masses: F64
    count: float
    total: float
    squares: float
    moment: float
    find: Find = field(default=tokens_between, repr=False)

    def tokens(self, wanted: Sequence[int]) -> I64:
        """The tokens of these levels, by id."""
        starts = [i for i, level in enumerate(wanted) if not i or level != wanted[i - 1] + 1]
        runs = [
            self.find(self.levels, wanted[first], wanted[stop - 1])
            for first, stop in pairwise([*starts, len(wanted)])
        ]
        if len(runs) == 1:
            return runs[0]
        return np.sort(np.concatenate(runs)) if runs else np.empty(0, np.int64)

    def entropy(self) -> float:
        """-sum p log p of all tokens, in nats."""
        total = float(self.masses.sum())
        return float(np.log(total) - self.moment / total)

    def deviation(self) -> float:
        """The standard deviation of d."""
        mean = self.total / self.count
        return float(np.sqrt(max(self.squares / self.count - mean * mean, 0.0)))


def level_scale(temperature: float) -> np.float32:
    """What a logit's distance from the best is multiplied with to give its level."""
    return np.float32(-PER_NAT / temperature)


def level_of(logits: F32, best: np.float32, temperature: float) -> NDArray[np.uint16]:
    """The levels of logits."""
    with np.errstate(over="ignore", invalid="ignore"):  # beyond float32: the last level, as NaN
        below = (logits - best) * level_scale(temperature)
    levels: F32 = np.fmin(below, np.float32(LEVELS - 1))
    return levels.astype(np.uint16)


def levels_of(values: F32, temperature: float) -> Levels:
    """The levels of logits [V], in NumPy. Masses are NaN where a logit is."""
    best = values.max()
    levels = level_of(values, best, temperature)
    with np.errstate(invalid="ignore"):  # infinity less itself: the NaN is the answer
        below = (values.astype(np.float64) - best) / temperature
        masses = np.bincount(levels, np.exp(below), LEVELS).astype(np.float64)
    d = below[below > -np.inf]
    sums = float(d.sum()), float(np.square(d).sum()), float((np.exp(d) * d).sum())
    return Levels(best, temperature, levels, masses, len(d), *sums)
