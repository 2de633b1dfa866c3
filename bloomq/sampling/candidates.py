"""The tokens that may come next, as filters see them: the best few listed, the others known by
their sum.

Invariant: every number that a filter reads is of the whole distribution, not of the list, and does
not depend on how many tokens are listed. So a filter that can decide from a short list decides as
it would from the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import UsageError
from bloomq.sampling.logits import Logits

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """ids [n], best first, and their scores [n]: logits divided by `temperature` so far.

    cut False: the row's other tokens are candidates too, except `excluded`; no listed token is
    worse than one of them. more: there are such others.
    """

    row: Logits
    ids: I64
    scores: F64
    temperature: float = 1.0
    cut: bool = False
    more: bool = False
    excluded: I64 = field(default_factory=lambda: _NONE)

    @classmethod
    def of(cls, row: Logits, size: int, temperature: float = 1.0) -> Candidates:
        """All tokens of a row that are not at -infinity, the best `size` of them listed.
        temperature: at which their sum is wanted first. Raises: UsageError where there are none."""
        ids, logits = row.best(size, temperature)
        check_possible(logits[0])
        possible = int((-logits).searchsorted(np.float32(np.inf)))
        more = possible == len(ids) < row.vocab_size
        return cls(row, ids[:possible], logits[:possible].astype(np.float64), more=more)

    def first(self, count: int) -> Candidates:
        """The best `count` alone; these same candidates where there are no others."""
        if count == len(self.ids) and not self.more:
            return self
        return self.only(slice(count))

    def only(self, index: I64 | slice) -> Candidates:
        """The listed ones at these places alone, in ascending order."""
        ids, scores = self.ids[index], self.scores[index]
        return Candidates(self.row, ids, scores, self.temperature, True, False, _NONE)

    def without_first(self, count: int) -> Candidates:
        """All but the best `count`; nothing was excluded before."""
        out = _NONE if self.cut else self.ids[:count]
        ids, scores = self.ids[count:], self.scores[count:]
        return Candidates(self.row, ids, scores, self.temperature, self.cut, self.more, out)

    def cooled(self, temperature: float) -> Candidates:
        """The same with scores divided by a temperature."""
        scores, product = self.scores / temperature, self.temperature * temperature
        return Candidates(self.row, self.ids, scores, product, self.cut, self.more, self.excluded)

    def values(self) -> F32:
        """The scores of the whole row [V], of what is no candidate -infinity. Where nothing was
        cut."""
        values = self.row.values() / np.float32(self.temperature)
        values[self.excluded] = -np.inf
        return values

    def logsumexp(self) -> float:
        """log of the sum of the exponentials of all candidates' scores."""
        if self.cut:
            return float(self.scores[0] + np.log(np.exp(self.scores - self.scores[0]).sum()))
        if not len(self.excluded):
            return self.row.logsumexp(self.temperature)
        # Not by subtraction: what is left may be far less than what was taken away.
        return float(self.scores[0] + np.log(np.exp(self.values() - self.scores[0]).sum()))

    def shares(self) -> F64:
        """Probabilities [n] of the listed tokens among all candidates."""
        return np.exp(self.scores - self.logsumexp())

    def size(self) -> int:
        """How many candidates there are."""
        if self.cut or not self.more:
            return len(self.ids)
        impossible = int(np.count_nonzero(self.row.values() == -np.inf))
        return self.row.vocab_size - impossible - len(self.excluded)

    def entropy(self) -> float:
        """-sum p log p over all candidates, in nats."""
        total = self.logsumexp()
        if self.cut:
            logs = self.scores - total
            return float(-(np.exp(logs) * logs).sum())
        logs32 = self.values()
        logs32 -= np.float32(total)
        np.maximum(logs32, np.float32(-1e4), out=logs32)  # e**-1e4 is 0, and 0 * infinity none
        terms = np.exp(logs32)
        terms *= logs32
        return float(-terms.sum())

    def deviation(self) -> float:
        """The standard deviation of all candidates' scores."""
        if self.cut:
            return float(self.scores.std())
        values = self.values()
        if values.min() == -np.inf:
            values = values[values > -np.inf]
        values -= np.float32(self.scores[0])  # near 0, where float32 is fine
        mean = values.mean()
        return float(np.sqrt(np.square(values - mean, out=values).mean()))


def check_possible(best: np.float32) -> None:
    """Raises: UsageError where the best score is that of a forbidden token."""
    if best == -np.inf:
        raise UsageError(
            "no token is left to choose: constraint, bad_words and the like forbid them all"
        )
