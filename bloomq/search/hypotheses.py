"""What a search finds: texts with their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol, TypeVar

from bloomq.checks import is_whole
from bloomq.errors import UsageError
from bloomq.generation import FinishReason


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One text of a search.

    ids: every token produced, the end-of-text token included; score: what the search ranked it by;
    logprobs: of each token under the model itself (before penalties), natural log.
    """

    ids: tuple[int, ...]
    score: float
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


class Scored(Protocol):
    """Any result that knows its tokens' logprobs."""

    @property
    def logprobs(self) -> tuple[float, ...]: ...


S = TypeVar("S", bound=Scored)


def best(results: Sequence[S], count: int = 1) -> list[S]:
    """The `count` results whose tokens are likeliest on average (mean logprob; of equals the first
    given), best first. A sum would favour whatever is short; a result without tokens is last.

    Raises: UsageError for a count beyond the number of results.
    """
    if not is_whole(count) or not 1 <= count <= len(results):
        raise UsageError(f"the best {count!r} of {len(results)} results, expected 1 to as many")
    means = [fmean(result.logprobs) if result.logprobs else -float("inf") for result in results]
    order = sorted(range(len(results)), key=lambda i: -means[i])
    return [results[i] for i in order[:count]]
