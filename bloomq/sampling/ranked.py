"""Candidates by how much of the probability lies at which score: no list, however many there are.

The row's levels (`bloomq.levels`) are summed by the backend in one pass. A bound falls into one
level, which alone is listed and sorted; so does a draw. What lies between is known by its sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bloomq.levels import LEVELS, PER_NAT, Levels, level_of
from bloomq.sampling.candidates import Candidates, check_possible
from bloomq.sampling.draws import place_of
from bloomq.sampling.logits import Logits

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


_SLACK = 1e-6  # of a share: sums of float32 terms are good to 1e-7 (of many equal ones to 5e-5)
# What a token in the middle of a level has of the best one's probability.
_MIDDLES = np.exp(-(np.arange(LEVELS - 1) + 0.5) / PER_NAT)


@dataclass(frozen=True, slots=True)
class Place:
    """Between two ranks of a row: before the token of this logit and id, if there is one. Larger
    logits come first, of equals the lower id."""

    logit: float
    id: int

    def after(self, ids: I64, logits: F64) -> NDArray[np.bool_]:
        """Which tokens come behind this place?"""
        behind: NDArray[np.bool_] = logits < self.logit
        equal: NDArray[np.bool_] = (logits == self.logit) & (ids >= self.id)
        return behind | equal


@dataclass(frozen=True, eq=False)
class Ranked:
    """The tokens of a row from `start` to before `stop` (None: all that are not at -infinity), with
    scores logits / temperature."""

    row: Logits
    temperature: float = 1.0
    start: Place | None = None
    stop: Place | None = None

    @property
    def best(self) -> float:
        return self._best_logit / self.temperature

    @classmethod
    def of(cls, row: Logits, temperature: float = 1.0) -> Ranked:
        """All tokens of a row that are not at -infinity. temperature: at which its levels are
        wanted first. Raises: UsageError where there are none."""
        check_possible(row.levels(temperature).sums.best)
        return cls(row)

    def cooled(self, temperature: float) -> Candidates:
        return Ranked(self.row, self.temperature * temperature, self.start, self.stop)

    def first(self, count: int) -> Candidates:
        total = self._counts.cumsum()
        if count >= total[-1]:
            return self
        level = int(total.searchsorted(count))
        ids, logits = self._level(level)
        last = count - 1 - (int(total[level - 1]) if level else 0)
        return self._until(logits[last], int(ids[last]))

    def reaching(self, share: float) -> Candidates:
        total = self._masses.cumsum()
        goal = share * float(total[-1])
        level = max(int(total.searchsorted(goal)), int(np.argmax(self._masses > 0)))
        if level == LEVELS:  # rounding: the sum ends below its share
            return self
        ids, logits = self._level(level)
        before = float(total[level - 1]) if level else 0.0
        inside = self._terms(logits).cumsum()
        last = min(int(inside.searchsorted(goal - before)), len(ids) - 1)
        return self._until(logits[last], int(ids[last]))

    def at_least(self, score: float) -> Candidates:
        if score > self.best:
            return self.first(1)
        logit = min(score * self.temperature, self._best_logit)
        return self._until(logit, self.row.vocab_size)

    def below(self, share: float) -> Candidates:
        logit = (self.logsumexp() + np.log(share)) * self.temperature if share else -np.inf
        if logit > self._best_logit:
            return self
        # The last token that reaches the logit: in its level, or in the nearest one above.
        lowest = self._level_of(logit)
        above = np.flatnonzero(self._masses[:lowest] > 0)
        for level in (lowest, *above[::-1]):
            ids, logits = self._level(int(level))
            reaching = np.flatnonzero(logits >= logit)
            if len(reaching):
                last = reaching[-1]
                return self._from(logits[last], int(ids[last]))
        return self

    def typical(self, share: float) -> Candidates:
        total = self.logsumexp()
        expected = total - self.entropy()  # the score that is as surprising as the entropy
        levels, sure = self._undecided(share, expected)
        logits = np.concatenate([found for _, found in self._within(levels)])
        distance = np.abs(expected - logits / self.temperature)
        order = np.argsort(distance)
        shares = np.exp(logits[order] / self.temperature - total)
        reached = int((sure + shares.cumsum()).searchsorted(share))
        kept = logits[distance <= distance[order[min(reached, len(order) - 1)]]]
        return self._from(kept.max(), 0)._until(kept.min(), self.row.vocab_size)

    def _undecided(self, share: float, expected: float) -> tuple[list[int], float]:
        """The levels with tokens that may or may not be among the nearest to a score that reach a
        share; the probability of the levels that surely are. These lie between the first ones,
        of which the outermost are therefore listed too."""
        width = 1 / PER_NAT
        # How far a level's tokens are below that score, from and to; float32 may err by 1e-4.
        edges = expected - self._levels.sums.best / self.temperature + width * np.arange(LEVELS)
        low, high = edges - 0.01 * width, edges + 1.01 * width
        high[-1] = np.inf
        nearest = np.maximum(np.maximum(low, -high), 0)
        farthest = np.maximum(np.abs(low), np.abs(high))
        shares = self._masses / self._masses.sum()
        surely = _bound(farthest, shares, share + _SLACK)  # by then they reach it for sure
        maybe = _bound(nearest, shares, share - _SLACK)  # before that for sure not
        sure = np.flatnonzero((farthest < maybe) & (shares > 0)).tolist()
        inside = slice(sure[0] + 1, sure[-1]) if sure else slice(0)
        listed = nearest <= surely  # empty ones too: they join runs, which are found at once
        listed[inside] = listed[: self._ends[0]] = listed[self._ends[1] + 1 :] = False
        return np.flatnonzero(listed).tolist(), float(shares[inside].sum())

    def size(self) -> int:
        if self.start is None and self.stop is None:
            return int(self._levels.sums.count)
        return int(self._counts.sum())

    def logsumexp(self) -> float:
        return float(self._unit / self.temperature + np.log(self._masses.sum()))

    def entropy(self) -> float:
        if self.start is None and self.stop is None:
            return self._levels.sums.entropy()
        logs = self._inside[1] / self.temperature - self.logsumexp()
        return float(-(np.exp(logs) * logs).sum())

    def deviation(self) -> float:
        if self.start is None and self.stop is None:
            return self._levels.sums.deviation()
        return float((self._inside[1] / self.temperature).std())

    def few(self, count: int) -> bool:
        # A level's mass, by what each of its tokens has, is good to 2 % of their number.
        return bool((self._masses[:-1] / _MIDDLES).sum() <= count)

    def rank(self, token: int) -> int:
        end = self._level_of(self.row.logit(token)) + 1  # those of its own level too
        return int((self._masses[:-1] / _MIDDLES)[:end].sum())

    def tokens(self) -> tuple[I64, F64]:
        ids, logits = self._inside
        order = np.lexsort((ids, -logits))
        return ids[order], logits[order] / self.temperature

    def pick(self, u: float) -> int:
        total = self._masses.cumsum()
        goal = u * float(total[-1])
        level = place_of(total, goal)
        ids, logits = self._level(level)
        before = float(total[level - 1]) if level else 0.0
        return int(ids[place_of(self._terms(logits).cumsum(), goal - before)])

    # -- how --------------------------------------------------------------------------------------

    def _from(self, logit: float, token: int) -> Ranked:
        """Those from this token on."""
        start = Place(float(logit), token)
        if self.start is not None:
            start = max(start, self.start, key=_rank)
        return Ranked(self.row, self.temperature, start, self.stop)

    def _until(self, logit: float, token: int) -> Ranked:
        """Those up to this token."""
        stop = Place(float(logit), token + 1)
        if self.stop is not None:
            stop = min(stop, self.stop, key=_rank)
        return Ranked(self.row, self.temperature, self.start, stop)

    @cached_property
    def _levels(self) -> Levels:
        return self.row.levels(self.temperature)

    @cached_property
    def _ends(self) -> tuple[int, int]:
        """The first level with tokens of the range, and the last that may have some."""
        first = 0 if self.start is None else self._level_of(self.start.logit)
        return first, LEVELS - 1 if self.stop is None else self._level_of(self.stop.logit)

    @cached_property
    def _unit(self) -> float:
        """The logit whose token adds 1 to a mass: the row's best, but of a range that is too far
        below for sums of its exponentials the range's."""
        if self._ends[0] < LEVELS - 1:
            return self._levels.sums.best
        return float(self._level(LEVELS - 1)[1][0])

    @cached_property
    def _masses(self) -> F64:
        """Of each level, what lies within the range. Where this goes from the best to somewhere in
        the last level, that counts as nothing: it would be 3e-9 at most, and at a low temperature
        most of the row would be listed for it."""
        if self.start is None and self.stop is None:
            return self._levels.masses
        first, last = self._ends
        masses = self._within_ends(self._levels.masses)
        if self.start is not None:
            masses[first] = self._terms(self._level(first)[1]).sum()
        if self.start is None and self.stop is not None and last == LEVELS - 1:
            masses[last] = 0
        elif self.stop is not None:
            masses[last] = self._terms(self._level(last)[1]).sum()
        return masses

    @cached_property
    def _counts(self) -> F64:
        """How many tokens each level has within the range."""
        counts = np.bincount(self._levels.levels, minlength=LEVELS).astype(np.float64)
        counts[-1] = self._levels.sums.count - counts[:-1].sum()  # none at -infinity
        counts = self._within_ends(counts)
        for place, level in zip((self.start, self.stop), self._ends, strict=True):
            if place is not None:
                counts[level] = len(self._level(level)[0])
        return counts

    def _within_ends(self, sums: F64) -> F64:
        """Sums of levels, but 0 for those that lie outside the range."""
        first, last = self._ends
        within = np.zeros(LEVELS)
        within[first : last + 1] = sums[first : last + 1]
        return within

    @cached_property
    def _best_logit(self) -> float:
        if self.start is None:
            return self._levels.sums.best
        return float(self._level(self._ends[0])[1][0])

    @cached_property
    def _inside(self) -> tuple[I64, F64]:
        """Ids and logits of all tokens of the range, in no order."""
        first, last = self._ends
        ids = self._levels.tokens(range(first + 1, last))
        ends = self._within(sorted({first, last}))
        logits = self.row.values()[ids].astype(np.float64)
        return (
            np.concatenate([ids, *(found for found, _ in ends)]),
            np.concatenate([logits, *(found for _, found in ends)]),
        )

    def _level_of(self, logit: float) -> int:
        with np.errstate(over="ignore"):
            here = np.array([logit], np.float32)
        return int(level_of(here, np.float32(self._levels.sums.best), self.temperature)[0])

    def _level(self, level: int) -> tuple[I64, F64]:
        """Ids and logits of a level's tokens within the range, best first."""
        return self._within([level])[0]

    def _within(self, levels: Sequence[int]) -> list[tuple[I64, F64]]:
        """Of each of these levels the ids and logits of the tokens within the range, best first."""
        found = self.row.listed(self.temperature, levels)
        first, last = self._ends
        for i, level in enumerate(levels):
            if self.start is not None and level <= first:
                found[i] = _chosen(self.start.after(*found[i]), *found[i])
            if self.stop is not None and level >= last:
                found[i] = _chosen(~self.stop.after(*found[i]), *found[i])
        return found

    def _terms(self, logits: F64) -> F64:
        """What tokens add to the masses."""
        return np.exp((logits - self._unit) / self.temperature)


def _chosen(kept: NDArray[np.bool_], ids: I64, logits: F64) -> tuple[I64, F64]:
    return ids[kept], logits[kept]


def _rank(place: Place) -> tuple[float, int]:
    return -place.logit, place.id


def _bound(distances: F64, shares: F64, share: float) -> float:
    """Within which distance levels together have at least a share; the largest one if they never
    have."""
    order = np.argsort(distances, kind="stable")
    reached = int(shares[order].cumsum().searchsorted(share))
    return float(distances[order[min(reached, len(order) - 1)]])
