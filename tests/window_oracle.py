"""BLOOM with each token's sight written out: the tokens it attends to, and how far away."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.reference import ReferenceBackend
from bloomq.generation import Window
from bloomq.heads import Head
from bloomq.layers import Span, slopes
from bloomq.pack import Pack

F32 = NDArray[np.float32]


class SightBackend(ReferenceBackend):
    """The reference, with attention over all tokens of one row at once and no cache."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self._window = window

    def attention(self, layer: int, n_head: int, head_dim: int):  # type: ignore[no-untyped-def]
        def attend(qkv: F32, cache: object, span: Span) -> F32:
            q, k, v = np.moveaxis(qkv.reshape(len(qkv), n_head, 3, head_dim), 2, 0)  # [T, H, D]
            out = np.empty((len(qkv), n_head, head_dim), np.float32)
            for t in range(len(qkv)):
                seen = sight(self._window, t)
                distance = np.arange(len(seen)) - (len(seen) - 1)
                scores = np.einsum("hd,shd->hs", q[t], k[seen]) / np.sqrt(head_dim)
                scores = scores + slopes(n_head)[:, None] * distance
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                out[t] = np.einsum("hs,shd->hd", weights, v[seen])
            return out.reshape(len(qkv), -1)

        return attend


def sight(window: Window, position: int) -> NDArray[np.int64]:
    """The tokens that the token at `position` sees: sinks, then whole pages go, 64 at a time."""
    seen = list(range(position + 1))
    while len(seen) > window.tokens:
        del seen[window.sinks : window.sinks + 64]
    return np.array(seen)


def logits_within(pack: Path, ids: list[int], window: Window) -> NDArray[np.float64]:
    """Logits [T, V] of a text under a window."""
    backend = SightBackend(window)
    head = Head(Pack.open(pack), backend, "BloomForCausalLM")
    span = Span.of([0], [len(ids)])
    cache = head.cache(1, len(ids))
    logits = head.step(np.array(ids), cache, span, np.arange(len(ids)))
    return logits.astype(np.float64)
