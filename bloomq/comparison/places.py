"""Every place of a text where two language models foretell the next token: what each says there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.divergence import BEST, differences
from bloomq.heads import Head
from bloomq.layers import Cache
from bloomq.scoring import Piece, pieces, token_logprobs
from bloomq.windows import plan

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
FEW = 5  # likeliest tokens that are compared, beside the likeliest and the ten of `differences`


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """T scored tokens of a text, in its order; base: the original, model: the pack.

    at: the token's index in the text; ids: itself; logprob, base_logprob: what it had, natural
    logarithm; kl: KL(base || model) in nats; best, base_best: the likeliest token; confidence,
    base_confidence: its probability; gap: by how many nats the base likes its best more than its
    second; second: is the model's best the base's second; common: how many of the base's 5 and 10
    likeliest are the model's, [T, 2]; counts: places of each window.
    """

    name: str
    ids: I64
    at: I64
    counts: I64
    logprob: F64
    base_logprob: F64
    kl: F64
    best: I64
    base_best: I64
    confidence: F64
    base_confidence: F64
    gap: F64
    second: NDArray[np.bool_]
    common: I64

    @property
    def same(self) -> NDArray[np.bool_]:
        """Do both like the same token best?"""
        return np.asarray(self.best == self.base_best)


def read(
    model: Head, base: Head, name: str, ids: Sequence[int], window: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Places:  # fmt: skip
    """Both models over a text in windows side by side, of which the first token is not scored; the
    logits of 64 positions of each are in memory at a time.

    progress: called with the tokens read. Raises: UsageError for fewer than two tokens;
    NumericError.
    """
    text = np.array(ids, np.int64)
    windows = plan(len(text), window, window, "fixed")
    caches = model.cache(1, window), base.cache(1, window)
    parts: list[dict[str, NDArray[np.generic]]] = []
    for begin, end, first in windows:
        for ours, theirs in _pairs(model, base, caches, text[begin:end], first):
            ((_, start, stop),) = ours.where
            at = np.arange(begin + start, begin + stop)
            parts.append({"at": at, "ids": text[at], **_facts(ours, theirs, text[at])})
            progress(begin + stop)
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    counts = np.array([end - begin - first for begin, end, first in windows])
    return Places(name=name, counts=counts, **joined)


def _pairs(
    model: Head, base: Head, caches: tuple[Cache, Cache], ids: I64, first: int
) -> Iterator[tuple[Piece, Piece]]:
    streams = []
    for head, cache in zip((model, base), caches, strict=True):
        cache.truncate(0, 0)
        streams.append(pieces(head, cache, {0: ids}, {0: first}, top=BEST))
    yield from zip(*streams, strict=True)


def _facts(ours: Piece, theirs: Piece, ids: I64) -> dict[str, NDArray[np.generic]]:
    """Of the W places of a piece."""
    found = differences(theirs, ours)
    best, base = ours.best, theirs.best
    few = [
        len(np.intersect1d(a, b)) for a, b in zip(base.ids[:, :FEW], best.ids[:, :FEW], strict=True)
    ]
    seconds = base.ids[:, 1] if base.ids.shape[1] > 1 else np.full(len(ids), -1)
    gaps = base.logits[:, 0] - base.logits[:, min(1, base.logits.shape[1] - 1)]
    return {
        "logprob": token_logprobs(ours, ids), "base_logprob": token_logprobs(theirs, ids),
        "kl": found.kl, "best": best.ids[:, 0], "base_best": base.ids[:, 0],
        "confidence": np.exp(best.logits[:, 0].astype(np.float64) - best.logsumexp),
        "base_confidence": np.exp(base.logits[:, 0].astype(np.float64) - base.logsumexp),
        "gap": gaps.astype(np.float64), "second": best.ids[:, 0] == seconds,
        "common": np.stack([few, found.common], axis=1),
    }  # fmt: skip
