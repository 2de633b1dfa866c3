"""Candidates of which the best few are listed, and nothing of the others but their sum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.levels import Sums
from bloomq.sampling.candidates import Candidates, check_possible
from bloomq.sampling.draws import pick
from bloomq.sampling.logits import Logits
from bloomq.sampling.ranked import Place, Ranked

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
_MOST_SPARED = 0.99  # then what is left of a sum of float32 terms is good to 1e-5


@dataclass(slots=True, eq=False)  # not frozen: those take three times as long to make
class Listed:
    """ids [n], best first, and their scores [n]: logits divided by `temperature`.

    more: the row's other tokens are candidates too, none better than a listed one; but for those
    before `start`, which have `spared` of the row's probability.
    """

    row: Logits
    ids: I64
    scores: F64
    temperature: float = 1.0
    more: bool = False
    start: Place | None = None
    spared: float = 0.0
    picked: int = 0  # the place of the token that was picked last

    @classmethod
    def of(cls, row: Logits, size: int) -> Listed:
        """All tokens of a row that are not at -infinity, the best `size` of them listed.
        Raises: UsageError where there are none."""
        ids, logits = row.best(size)
        check_possible(logits[0])
        possible = len(ids)
        if not logits[-1] > -np.inf:
            possible = int((-logits).searchsorted(np.float32(np.inf)))
        more = possible == len(ids) < row.vocab_size
        if possible < len(ids):
            ids, logits = ids[:possible], logits[:possible]
        return cls(row, ids, logits.astype(np.float64), more=more)

    @property
    def best(self) -> float:
        return float(self.scores[0])

    def cooled(self, temperature: float) -> Candidates:
        if self.start is not None:
            return self._whole().cooled(temperature)
        product = self.temperature * temperature
        return Listed(self.row, self.ids, self.scores / temperature, product, self.more)

    def first(self, count: int) -> Candidates | None:
        if count > len(self.ids) and self.more:
            return None
        return self._range(0, min(count, len(self.ids)))

    def reaching(self, share: float) -> Candidates | None:
        if self.start is not None:
            return self._whole().reaching(share)
        total = np.exp(self.scores - self.scores[0]).cumsum()
        whole = np.exp(self.logsumexp() - self.scores[0]) if self.more else total[-1]
        return self.first(int(total.searchsorted(share * whole)) + 1)

    def at_least(self, score: float) -> Candidates | None:
        count = int((-self.scores).searchsorted(-score, side="right"))
        if count == len(self.ids) and self.more:
            return None
        return self._range(0, max(count, 1))

    def below(self, share: float) -> Candidates | None:
        if self.start is not None:
            return self._whole().below(share)
        shares = self._shares()
        above = int((-shares).searchsorted(-share, side="right"))
        if above == len(self.ids) and self.more:
            return None
        if above < 2:
            return self
        if not self.more:
            return self._range(above - 1, len(self.ids))
        token = int(self.ids[above - 1])  # by its logit: score times temperature may be next to it
        return Listed(
            self.row, self.ids[above - 1 :], self.scores[above - 1 :], self.temperature, True,
            Place(self.row.logit(token), token), float(shares[: above - 1].sum()),
        )  # fmt: skip

    def typical(self, share: float) -> Candidates | None:
        if self.start is not None:
            return self._whole().typical(share)
        surprise = self.logsumexp() - self.scores
        entropy = self.entropy()
        distance = np.abs(surprise - entropy)
        nearest = distance.argsort()  # of equally near ones all are kept, in whatever order
        reached = int(np.exp(-surprise[nearest]).cumsum().searchsorted(share))
        # Any other token is at least as surprising as the last that is listed.
        others = surprise[-1] - entropy
        if self.more and (reached >= len(nearest) or distance[nearest[reached]] >= others):
            return None
        bound = distance[nearest[min(reached, len(nearest) - 1)]]
        kept = np.flatnonzero(distance <= bound)
        return self._range(int(kept[0]), int(kept[-1]) + 1)

    def size(self) -> int:
        if not self.more:
            return len(self.ids)
        return self._whole().size() if self.start is not None else int(self._sums().count)

    def logsumexp(self) -> float:
        if not self.more:
            return float(self.scores[0] + np.log(np.exp(self.scores - self.scores[0]).sum()))
        if self.start is not None:
            return self._whole().logsumexp()
        return self.row.logsumexp(self.temperature)

    def entropy(self) -> float:
        if self.more:
            return self._whole().entropy() if self.start is not None else self._sums().entropy()
        logs = self.scores - self.logsumexp()
        return float(-(np.exp(logs) * logs).sum())

    def deviation(self) -> float:
        if self.more:
            return self._whole().deviation() if self.start is not None else self._sums().deviation()
        return float(self.scores.std())

    def few(self, count: int) -> bool:
        return not self.more and len(self.ids) <= count

    def rank(self, token: int) -> int:
        if self.ids[self.picked] == token:
            return self.picked
        here = np.flatnonzero(self.ids == token)
        return int(here[0]) if len(here) else self._whole().rank(token)

    def tokens(self) -> tuple[I64, F64]:
        return self._whole().tokens() if self.more else (self.ids, self.scores)

    def pick(self, u: float) -> int:
        terms = np.exp(self.scores - self.scores[0])
        if not self.more:
            self.picked = pick(terms, u)
            return int(self.ids[self.picked])
        # Of the others the sum is known; where nearly all is spared, it is not precise enough.
        if self.spared < _MOST_SPARED:
            whole = np.exp(self.row.logsumexp(self.temperature) - self.scores[0])
            place = int(terms.cumsum().searchsorted(u * whole * (1 - self.spared), side="right"))
            if place < len(self.ids):
                self.picked = place
                return int(self.ids[place])
        return self._whole().pick(u)

    def _shares(self) -> F64:
        """Probabilities [n] of the listed tokens among all candidates."""
        return np.exp(self.scores - self.logsumexp())

    def _range(self, start: int, stop: int) -> Listed:
        """The listed ones from `start` to before `stop`, and no others."""
        if not self.more and stop - start == len(self.ids):
            return self
        ids, scores = self.ids[start:stop], self.scores[start:stop]
        return Listed(self.row, ids, scores, self.temperature)

    def _sums(self) -> Sums:
        return self.row.sums(self.temperature)

    def _whole(self) -> Ranked:
        return Ranked(self.row, self.temperature, self.start)
