"""DRY ("don't repeat yourself"): a token that would go on with a repetition is penalised, the more
the longer the repetition is.

Source: p-e-w, text-generation-webui pull request 5677; as in llama.cpp's llama_sampler_dry, but
that sequences end at single tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from bloomq.sampling.options import Sampling

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


def penalise_repetitions(out: F32, sampling: Sampling, text: I64) -> None:
    """score -= multiplier * base ** (length - allowed_length), of each token that followed the
    latest tokens of the text before; length: of the longest match behind which it did."""
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
    places = np.arange(len(text) - 1)  # where a match may end: a token follows it
    lengths = np.zeros(len(places), np.int64)
    for length in range(1, most + 1):
        places = places[places >= length - 1]
        places = places[text[places - length + 1] == text[-length]]
        if not len(places):
            break
        lengths[places] = length
    found = np.flatnonzero(lengths >= least)
    found = found[np.argsort(lengths[found], kind="stable")]  # of a token's matches the last stays
    longest = dict(zip(text[found + 1].tolist(), lengths[found].tolist(), strict=True))
    return np.array(list(longest), np.int64), np.array(list(longest.values()), np.int64)
