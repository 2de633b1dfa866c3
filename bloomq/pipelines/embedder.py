"""Texts as vectors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import UsageError
from bloomq.modeling import BloomModel
from bloomq.pipelines.batches import BATCH_TOKENS, results
from bloomq.pipelines.texts import tokenized, tokenizer_of
from bloomq.tokenizer import BloomTokenizer

F32 = NDArray[np.float32]
Pooling = Literal["mean", "last", "max"]


class Embedder:
    """Turns texts into the hidden states of a `BloomModel`, one vector each."""

    def __init__(self, model: BloomModel, tokenizer: BloomTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        backend: str = "auto",
        threads: int | None = None,
        scheme: str | None = None,
        cache_dtype: str = "auto",
        save_pack: str | os.PathLike[str] | None = None,
    ) -> Self:
        """The embedder of a pack or a checkpoint's folder, with whatever head; options: see
        `BloomModel.from_pretrained`."""
        model = BloomModel.from_pretrained(
            path, backend=backend, threads=threads, scheme=scheme, cache_dtype=cache_dtype,
            save_pack=save_pack,
        )  # fmt: skip
        return cls(model, tokenizer_of(model.pack))

    def embed(
        self,
        texts: Sequence[str],
        *,
        pooling: Pooling = "mean",
        normalize: bool = False,
        max_tokens: int | None = None,
        truncate: bool = False,
        batch_tokens: int = BATCH_TOKENS,
    ) -> F32:
        """A vector for each text, [N, C]: the mean or the maximum over its tokens' hidden states,
        or the last token's.

        normalize: to length 1, so that products of vectors are cosines; the rest: see
        `Classifier.scores`.

        Raises: UsageError, NumericError.
        """
        if pooling not in get_args(Pooling):
            raise UsageError(f"pooling is {pooling!r}, expected mean, last or max")
        config = self.model.config
        most = config.seq_length if max_tokens is None else max_tokens
        rows = tokenized(self.tokenizer, texts, most=most, truncate=truncate)
        ids, last = [row.ids for row in rows], pooling == "last"
        out = np.empty((len(ids), config.hidden_size), np.float32)
        for i, hidden in results(self.model.head, ids, batch_tokens=batch_tokens, last=last):
            out[i] = hidden.max(axis=0) if pooling == "max" else hidden.mean(axis=0)
        if normalize:
            lengths = np.linalg.norm(out, axis=1, keepdims=True)
            out /= np.where(lengths > 0, lengths, np.float32(1))
        return out
