"""Texts as vectors."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import UsageError
from bloomq.lora import Choice
from bloomq.modeling import BloomModel
from bloomq.pipelines.base import Pipeline
from bloomq.pipelines.batches import BATCH_TOKENS, results
from bloomq.pipelines.texts import Texts

F32 = NDArray[np.float32]
Pooling = Literal["mean", "last", "max"]


class Embedder(Pipeline[BloomModel]):
    """Turns texts into the hidden states of a `BloomModel`, one vector each."""

    _kind = BloomModel

    def embed(
        self,
        texts: Texts,
        *,
        pooling: Pooling = "mean",
        normalize: bool = False,
        max_tokens: int | None = None,
        truncate: bool = False,
        batch_tokens: int = BATCH_TOKENS,
        adapters: Choice = None,
    ) -> F32:
        """A vector for each text, [N, C]: the mean or the maximum over its tokens' hidden states,
        or the last token's.

        normalize: to length 1, so that products of vectors are cosines; the rest: see
        `Classifier.scores`.

        Raises: UsageError, NumericError.
        """
        if pooling not in get_args(Pooling):
            raise UsageError(f"pooling is {pooling!r}, expected mean, last or max")
        rows = self.read(texts, max_tokens=max_tokens, truncate=truncate)
        ids, last = [text.tokens.ids for text in rows], pooling == "last"
        out = np.empty((len(ids), self.model.config.hidden_size), np.float32)
        for i, hidden in results(
            self.model.head, ids, batch_tokens=batch_tokens, last=last, adapters=adapters
        ):
            out[i] = hidden.max(axis=0) if pooling == "max" else hidden.mean(axis=0)
        if normalize:
            lengths = np.linalg.norm(out, axis=1, keepdims=True)
            out /= np.where(lengths > 0, lengths, np.float32(1))
        return out
