"""What a filter sees: the tokens that may come next, always a range of the ranks of a row.

`Listed` knows the best few by name, `Ranked` knows how much of the probability lies at which score;
the first is quick where few tokens matter, the second never gives up. Invariant: every number that
a filter reads is of all candidates, not of a list, so both decide alike (but for ties within
rounding).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import UsageError
from bloomq.sampling.logits import Logits

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class Candidates(Protocol):
    """Some ranks of a row, from `start` on, and the scores there: logits / temperature.

    A method that narrows gives the candidates that are left, at least one; None: that depends on
    tokens which are not listed. `best`: the largest score.
    """

    @property
    def row(self) -> Logits: ...
    @property
    def temperature(self) -> float: ...
    @property
    def best(self) -> float: ...
    def cooled(self, temperature: float) -> Candidates:
        """The same with scores divided by a temperature."""
        ...

    def first(self, count: int) -> Candidates | None:
        """The best `count`, of equals those of the lower id."""
        ...

    def reaching(self, share: float) -> Candidates | None:
        """The fewest, best first, whose probabilities together reach a share."""
        ...

    def at_least(self, score: float) -> Candidates | None:
        """Those with at least this score, and the best one whatever its score."""
        ...

    def below(self, share: float) -> Candidates | None:
        """All but those of at least this probability; of these the least likely stays."""
        ...

    def typical(self, share: float) -> Candidates | None:
        """Those whose surprise is nearest to the entropy, the fewest whose probabilities together
        reach a share; of equally near ones all."""
        ...

    def size(self) -> int:
        """How many there are."""
        ...

    def logsumexp(self) -> float:
        """log of the sum of the exponentials of the scores."""
        ...

    def entropy(self) -> float:
        """-sum p log p, in nats."""
        ...

    def deviation(self) -> float:
        """The standard deviation of the scores."""
        ...

    def few(self, count: int) -> bool:
        """Are there about `count` or fewer?"""
        ...

    def rank(self, token: int) -> int:
        """How many candidates come before this one of them, at most and about."""
        ...

    def tokens(self) -> tuple[I64, F64]:
        """Ids and scores of all, best first."""
        ...

    def pick(self, u: float) -> int:
        """The token in which u, uniform in [0, 1), falls: probabilities summed up best first."""
        ...


def check_possible(best: float | np.float32) -> None:
    """Raises: UsageError where the best score is that of a forbidden token."""
    if best == -np.inf:
        raise UsageError(
            "no token is left to choose: constraint, bad_words and the like forbid them all"
        )
