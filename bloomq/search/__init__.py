"""Search: several continuations under way at once, of which the best are kept."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bloomq.heads import Head
from bloomq.sampling import Sampling
from bloomq.search.beams import Stopped
from bloomq.search.contrastive import ContrastiveSearch, contrastive_search
from bloomq.search.hypotheses import Hypothesis, best
from bloomq.search.options import BeamOptions, ContrastOptions
from bloomq.search.steps import BeamSearch, beam_search

AnySearch: TypeAlias = BeamOptions | ContrastOptions


def searcher_of(
    head: Head,
    prompts: Sequence[Sequence[int]],
    options: AnySearch,
    *,
    max_new_tokens: int,
    context: int,
    ends: tuple[int, ...],
    sampling: Sampling,
    stopped: Stopped,
    gates: NDArray[np.float32] | None,
) -> BeamSearch | ContrastiveSearch:
    """The search that options are of: see `BeamSearch` for the arguments."""
    kind: Any = BeamSearch if isinstance(options, BeamOptions) else ContrastiveSearch
    made: BeamSearch | ContrastiveSearch = kind(
        head, prompts, options, max_new_tokens=max_new_tokens, context=context, ends=ends,
        sampling=sampling, stopped=stopped, gates=gates,
    )  # fmt: skip
    return made


__all__ = [
    "AnySearch", "BeamOptions", "BeamSearch", "ContrastOptions", "ContrastiveSearch", "Hypothesis",
    "beam_search", "best", "contrastive_search", "searcher_of",
]  # fmt: skip
