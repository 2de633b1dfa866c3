"""How a row's probability lies over its logits: summed by levels below the best one.

A level is 1/32 nat wide, the last one has no end. A token's level is computed in float32, with the
same operations here and in every backend, so all agree on which level a token belongs to. What a
level holds is a sum: to know a nucleus of 20,000 tokens, or to draw from 250,880, one or two levels
are listed, and nothing is sorted but these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

LEVELS, PER_NAT = 1024, 32  # 32 nats: what lies beyond has 1e-14 of the best one's probability


def find(levels: NDArray[np.uint16], values: F32, low: int, high: int) -> tuple[I64, F64]:
    """Ids and logits of the tokens of the levels from `low` to `high`, best first, of equals the
    lower id; none at -infinity."""
    if low == high:
        ids = _places(levels == low)
    else:  # what lies before the run wraps around
        ids = _places(levels - np.uint16(low) <= np.uint16(high - low))
    if high == LEVELS - 1:
        ids = ids[values[ids] > -np.inf]
    ids = ids[_best_first(values[ids])]
    return ids, values[ids].astype(np.float64)


Find = Callable[[NDArray[np.uint16], F32, int, int], tuple[I64, F64]]


@dataclass(frozen=True, slots=True)
class Sums:
    """Over logits [V] at a temperature, with d = (logit - best) / temperature of each token:

    mass: the sum of e**d; count, total, squares, moment: of the tokens whose d is not -infinity (in
    a backend's float32) how many there are, and the sums of d, d**2 and d e**d.
    """

    best: float
    temperature: float
    mass: float
    count: float
    total: float
    squares: float
    moment: float

    def logsumexp(self) -> float:
        """log sum exp(logits / temperature)."""
        return self.best / self.temperature + math.log(self.mass)

    def entropy(self) -> float:
        """-sum p log p of all tokens, in nats."""
        return math.log(self.mass) - self.moment / self.mass

    def deviation(self) -> float:
        """The standard deviation of d."""
        mean = self.total / self.count
        return math.sqrt(max(self.squares / self.count - mean * mean, 0.0))


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """Of logits [V] at a temperature, with d as in `Sums`:

    levels: uint16 [V], each token's; masses: float64 [LEVELS], the sums of e**d of each level's
    tokens; sums: of all; find: as the backend does it.
    """

    levels: NDArray[np.uint16]
    masses: F64
    sums: Sums
    find: Find = field(default=find, repr=False)

    def tokens(self, wanted: Sequence[int]) -> I64:
        """The tokens of these levels, by id."""
        mine = None
        for low, high in _runs(wanted):  # what lies before a run wraps around
            run = self.levels - np.uint16(low) <= np.uint16(high - low)
            mine = run if mine is None else np.bitwise_or(mine, run, out=mine)
        return np.empty(0, np.int64) if mine is None else _places(mine)

    def listed(self, values: F32, wanted: Sequence[int]) -> tuple[I64, F64]:
        """Ids and logits of the tokens of these levels, in ascending order, best first, of equals
        the lower id; none at -infinity. values: the logits [V]."""
        found = [self.find(self.levels, values, low, high) for low, high in _runs(wanted)]
        if len(found) == 1:
            return found[0]
        ids, logits = zip(*found, strict=True)
        return np.concatenate(ids), np.concatenate(logits)


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
    return Levels(levels, masses, sums_of(values, temperature))


def merged(parts: Sequence[Sums]) -> Sums:
    """The sums of a row that lies in parts. A part that is all -infinity adds nothing."""
    best = float(np.max([part.best for part in parts]))  # NaN, if one is
    mass = count = total = squares = moment = 0.0
    for part in parts:
        if part.best == -math.inf < best:
            continue
        shift = (part.best - best) / part.temperature
        scale = math.exp(shift)
        mass += scale * part.mass
        moment += scale * (part.moment + shift * part.mass)
        squares += part.squares + shift * (2 * part.total + shift * part.count)
        total += part.total + shift * part.count
        count += part.count
    return Sums(best, parts[0].temperature, mass, count, total, squares, moment)


def sums_of(values: F32, temperature: float) -> Sums:
    """The sums of logits [V], in NumPy. The mass is NaN where a logit is, or +infinity."""
    best = float(values.max())
    with np.errstate(invalid="ignore"):
        below = (values.astype(np.float64) - best) / temperature
    terms, possible = np.exp(below), below > -np.inf
    d = below[possible]
    sums = float(terms.sum()), len(d), float(d.sum()), float(np.square(d).sum())
    return Sums(best, temperature, *sums, float(terms[possible] @ d))


def _runs(wanted: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The first and the last level of each run of neighbours."""
    starts = [i for i, level in enumerate(wanted) if not i or level != wanted[i - 1] + 1]
    for first, stop in pairwise([*starts, len(wanted)]):
        yield wanted[first], wanted[stop - 1]


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


def _best_first(logits: F32) -> I64:
    """The places of logits [n] from the largest to the least, of equals in ascending order.

    A number's bits and its place make one whole number: ten times faster than to sort by NumPy's
    stable sort of what is not a whole number.
    """
    bits = (np.float32(0) - logits).view(np.int32)  # 0 and -0 alike
    bits ^= (bits >> 31) & np.int32(
        0x7FFFFFFF
    )  # in the order of the numbers, the negative ones too
    keys = bits.astype(np.int64) << 32 | np.arange(len(logits))
    keys.sort()
    return keys & 0xFFFFFFFF
