"""Texts as vectors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import UsageError
from bloomq.lora import Choice
from bloomq.modeling import BloomModel
from bloomq.pipelines.batches import BATCH_TOKENS, results
from bloomq.pipelines.texts import Text, Texts, read, tokenizer_of
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

    def read(
        self,
        texts: Texts,
        *,
        max_tokens: int | None = None,
        truncate: bool = False,
        names: Sequence[str] | None = None,
    ) -> list[Text]:
        """Texts with their tokens, which the other methods take in place of a str.

        names: what errors call each; None: text 0, text 1, ...; the rest: see `Classifier.scores`.

        Raises: UsageError.
        """
        most = self.model.config.seq_length if max_tokens is None else max_tokens
        return read(self.tokenizer, texts, most=most, truncate=truncate, names=names)

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
