"""What pipelines over single texts have in common: a model, its tokenizer, and texts as tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Generic, Self, TypeVar

from bloomq.modeling import BloomPreTrainedModel
from bloomq.pipelines.texts import Text, Texts, read
from bloomq.tokenizer import BloomTokenizer

Model = TypeVar("Model", bound=BloomPreTrainedModel)


class Pipeline(Generic[Model]):
    """A model and a tokenizer, joined. Each pipeline says which class of model it takes, and
    whether its tokens need the characters that they came from."""

    _kind: type[Model]
    _offsets = False

    def __init__(self, model: Model, tokenizer: BloomTokenizer) -> None:
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
        devices: str = "auto",
        max_memory: str | None = None,
        save_pack: str | os.PathLike[str] | None = None,
    ) -> Self:
        """The pipeline of a pack or a checkpoint's folder; options: see
        `BloomPreTrainedModel.from_pretrained`."""
        model = cls._kind.from_pretrained(
            path, backend=backend, threads=threads, scheme=scheme, cache_dtype=cache_dtype,
            devices=devices, max_memory=max_memory, save_pack=save_pack,
        )  # fmt: skip
        return cls(model, BloomTokenizer.of_pack(model.pack))

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
        return read(
            self.tokenizer, texts, most=most, truncate=truncate, offsets=self._offsets, names=names
        )
