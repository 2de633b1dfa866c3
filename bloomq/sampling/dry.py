"""DRY ("don't repeat yourself"): a token that would go on with a repetition is penalised, the more
the longer the repetition is.

Source: p-e-w, text-generation-webui pull request 5677; as in llama.cpp's llama_sampler_dry, but
that sequences end at single tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.sampling.options import Sampling

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


def penalise_repetitions(out: Any, sampling: Sampling, text: I64) -> None:
    """Scores out [V], of each token that followed the latest tokens of the text before: less
    multiplier * base ** (length - allowed_length); length: of the longest match it followed."""
    if sampling.dry_range:
        text = text[-sampling.dry_range :]
    allowed, base = sampling.dry_allowed_length, sampling.dry_base
    # Base 1: all penalties are equal. Others: float32 ends at e**88.7.
    growth = int(_MOST_LOG / math.log(base)) if base > 1.000001 else 0
    most = min(_since_breaker(text, sampling.dry_sequence_breakers), allowed + growth)
    if most < allowed:
        return
    tokens, lengths = repetitions(text, allowed, most)
    out[tokens] -= (sampling.dry_multiplier * base ** (lengths - allowed)).astype(np.float32)


_MOST_LOG = 88.7228391  # log of the largest float32


def _since_breaker(text: I64, breakers: Collection[int]) -> int:
    """How many tokens follow the last one that no repetition reaches across."""
    if not breakers:
        return len(text)
    for i, token in enumerate(reversed(text.tolist())):
        if token in breakers:
            return i
    return len(text)


def repetitions(text: I64, least: int, most: int) -> tuple[I64, I64]:
    """Tokens that followed the text's last `least` or more before, each once, and behind how many
    of them: the longest match, counted up to `most`."""
    ends = np.flatnonzero(text[:-1] == text[-1:])  # of matches: a token follows
    longest = {} if least else dict.fromkeys(text[1:].tolist(), 0)
    for length in range(1, most + 1):
        if length > 1:
            ends = ends[ends >= length - 1]
            ends = ends[text[ends - length + 1] == text[-length]]
        if not len(ends):
            break
        if length >= least:
            longest.update(dict.fromkeys(text[ends + 1].tolist(), length))
    return np.array(list(longest), np.int64), np.array(list(longest.values()), np.int64)
