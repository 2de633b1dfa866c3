"""What a search may be told, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bloomq.checks import check_number, is_whole
from bloomq.errors import UsageError
from bloomq.sampling import Sampling

_MOST_BEAMS = 4096  # each a row of the cache, and a token of every step
_MOST_PENALTY = 10.0  # of lengths: 10 ** 6 tokens to the power of it is still a number


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamOptions:
    """How many texts are followed at once, and what makes one better than another.

    num_beams: texts under way; num_return_sequences: of the best found, how many are returned;
    length_penalty p: a text of n tokens scores (sum of its logprobs) / n ** p, so that above 0 long
    ones gain and below 0 short ones; early_stopping: a search ends when num_beams texts have ended
    (True), when besides the best under way is worse at its present length (False), or at any
    length it may reach ("never"). num_beam_groups: the beams in groups that each search on their
    own, one after another in each step; diversity_penalty: what a token's logprob loses for each
    beam of an earlier group that has chosen it in the same step.

    Raises: UsageError for a value that cannot be.
    Source: transformers' generation; groups: Vijayakumar et al. 2016 (arXiv 1610.02424).
    """

    num_beams: int
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not is_whole(self.num_beams) or not 1 <= self.num_beams <= _MOST_BEAMS:
            raise UsageError(f"num_beams is {self.num_beams!r}, expected 1 to {_MOST_BEAMS}")
        wanted = self.num_return_sequences
        if not is_whole(wanted) or not 1 <= wanted <= self.num_beams:
            raise UsageError(
                f"num_return_sequences is {wanted!r}, expected 1 to num_beams ({self.num_beams})"
            )
        check_number(
            "length_penalty", self.length_penalty, -_MOST_PENALTY, _MOST_PENALTY, "-10 to 10"
        )
        early: Any = self.early_stopping
        if not isinstance(early, bool) and not (isinstance(early, str) and early == "never"):
            raise UsageError(f"early_stopping is {early!r}, expected True, False or 'never'")
        self._check_groups()

    def _check_groups(self) -> None:
        groups = self.num_beam_groups
        if not is_whole(groups) or groups < 1 or self.num_beams % groups:
            raise UsageError(
                f"num_beam_groups is {groups!r}, expected a divisor of num_beams ({self.num_beams})"
            )
        check_number("diversity_penalty", self.diversity_penalty, 0.0, 1e6, "a number from 0")
        if groups == 1 and self.diversity_penalty:
            raise UsageError(
                f"diversity_penalty is {self.diversity_penalty!r} with one group of beams: raise "
                "num_beam_groups"
            )
        if groups > 1 and not self.diversity_penalty:
            raise UsageError(
                f"{groups} groups of beams without a diversity_penalty would find the same texts: "
                "give one above 0"
            )

    @property
    def rows(self) -> int:
        """Of a cache, for each prompt."""
        return self.num_beams

    @property
    def grouped(self) -> bool:
        return self.num_beam_groups > 1

    @property
    def width(self) -> int:
        """Beams of a group."""
        return self.num_beams // self.num_beam_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastOptions:
    """Contrastive search: of the top_k likeliest tokens the one with the best
    (1 - penalty_alpha) * probability - penalty_alpha * likeness, likeness the largest cosine of its
    hidden state with one of the context's.

    Raises: UsageError for a value that cannot be.
    Source: Su et al. 2022 (arXiv 2202.06417), section 4.
    """

    penalty_alpha: float
    top_k: int = 4

    def __post_init__(self) -> None:
        check_number("penalty_alpha", self.penalty_alpha, 0.0, 1.0, "0 to 1")
        if not is_whole(self.top_k) or self.top_k < 2:
            raise UsageError(
                f"contrastive search with top_k {self.top_k!r}, expected at least 2 candidates"
            )

    @property
    def rows(self) -> int:
        """Of a cache, for each prompt."""
        return self.top_k


def check_greedy(sampling: Sampling, what: str) -> None:
    """Raises: UsageError for a search that is to draw its tokens."""
    if not sampling.greedy:
        raise UsageError(
            f"{what} with temperature {sampling.temperature!r}, expected 0: it chooses by score, "
            "not by chance"
        )
