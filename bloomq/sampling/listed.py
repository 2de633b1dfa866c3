"""Candidates of which the best few are listed, and nothing of the others but their sum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.sampling.candidates import Candidates, check_possible
from bloomq.sampling.draws import pick
from bloomq.sampling.logits import Logits
from bloomq.sampling.ranked import Place, Ranked

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Listed:
    """ids [n], best first, and their scores [n]: logits divided by `temperature`.

    more: the row's other tokens are candidates too, none better than a listed one.
    """

    row: Logits
    ids: I64
    scores: F64
    temperature: float = 1.0
    more: bool = False

    @classmethod
    def of(cls, row: Logits, size: int, temperature: float = 1.0) -> Listed:
        """All tokens of a row that are not at -infinity, the best `size` of them listed.
        temperature: at which their sum is wanted first. Raises: UsageError where there are none."""
        ids, logits = row.best(size, temperature)
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
        product = self.temperature * temperature
        return Listed(self.row, self.ids, self.scores / temperature, product, self.more)

    def first(self, count: int) -> Candidates | None:
        if count > len(self.ids) and self.more:
            return None
        return self._range(0, min(count, len(self.ids)))

    def reaching(self, share: float) -> Candidates | None:
        total = np.exp(self.scores - self.scores[0]).cumsum()
        whole = np.exp(self.logsumexp() - self.scores[0]) if self.more else total[-1]
        return self.first(int(total.searchsorted(share * whole)) + 1)

    def at_least(self, score: float) -> Candidates | None:
        count = int((-self.scores).searchsorted(-score, side="right"))
        if count == len(self.ids) and self.more:
            return None
        return self._range(0, max(count, 1))

    def below(self, share: float) -> Candidates | None:
        above = int((-self._shares()).searchsorted(-share, side="right"))
        if above == len(self.ids) and self.more:
            return None
        if above < 2:
            return self
        if not self.more:
            return self._range(above - 1, len(self.ids))
        token = int(self.ids[above - 1])  # by its logit: score times temperature may be next to it
        return Ranked(self.row, self.temperature, start=Place(self.row.logit(token), token))

    def typical(self, share: float) -> Candidates | None:
        surprise = self.logsumexp() - self.scores
        entropy = self.entropy()
        distance = np.abs(surprise - entropy)
        nearest = np.argsort(distance, kind="stable")
        reached = int(np.exp(-surprise[nearest]).cumsum().searchsorted(share))
        # Any other token is at least as surprising as the last that is listed.
        others = surprise[-1] - entropy
        if self.more and (reached >= len(nearest) or distance[nearest[reached]] >= others):
            return None
        bound = distance[nearest[min(reached, len(nearest) - 1)]]
        kept = np.flatnonzero(distance <= bound)
        return self._range(int(kept[0]), int(kept[-1]) + 1)

    def size(self) -> int:
        return self._whole().size() if self.more else len(self.ids)

    def logsumexp(self) -> float:
        if self.more:
            return self.row.logsumexp(self.temperature)
        return float(self.scores[0] + np.log(np.exp(self.scores - self.scores[0]).sum()))

    def entropy(self) -> float:
        if self.more:
            return self._whole().entropy()
        logs = self.scores - self.logsumexp()
        return float(-(np.exp(logs) * logs).sum())

    def deviation(self) -> float:
        return self._whole().deviation() if self.more else float(self.scores.std())

    def few(self, count: int) -> bool:
        return self._whole().few(count) if self.more else len(self.ids) <= count

    def tokens(self) -> tuple[I64, F64]:
        return self._whole().tokens() if self.more else (self.ids, self.scores)

    def pick(self, u: float) -> int:
        if self.more:
            return self._whole().pick(u)
        return int(self.ids[pick(np.exp(self.scores - self.scores[0]), u)])

    def _shares(self) -> F64:
        """Probabilities [n] of the listed tokens among all candidates."""
        return np.exp(self.scores - self.logsumexp())

    def _range(self, start: int, stop: int) -> Listed:
        """The listed ones from `start` to before `stop`, and no others."""
        if not self.more and stop - start == len(self.ids):
            return self
        ids, scores = self.ids[start:stop], self.scores[start:stop]
        return Listed(self.row, ids, scores, self.temperature)

    def _whole(self) -> Ranked:
        return Ranked(self.row, self.temperature)
