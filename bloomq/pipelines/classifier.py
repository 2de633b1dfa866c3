"""Texts into classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.checks import is_whole
from bloomq.errors import UsageError
from bloomq.lora import Choice
from bloomq.modeling import BloomForSequenceClassification
from bloomq.pipelines.base import Pipeline
from bloomq.pipelines.batches import BATCH_TOKENS, results
from bloomq.pipelines.texts import Texts, least_score

F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Label:
    """A class and its score: a probability, or a regression's value."""

    label: str
    score: float


class Classifier(Pipeline[BloomForSequenceClassification]):
    """Sorts texts into the classes that a `BloomForSequenceClassification` was trained on."""

    _kind = BloomForSequenceClassification

    def classify(
        self,
        texts: Texts,
        *,
        top_k: int | None = 1,
        threshold: float | None = None,
        max_tokens: int | None = None,
        truncate: bool = False,
        batch_tokens: int = BATCH_TOKENS,
        adapters: Choice = None,
    ) -> list[list[Label]]:
        """The classes of each text, best first.

        top_k: so many of them, None for all; threshold: those alone that score as much; scores and
        the rest: see `scores`.

        Raises: UsageError, NumericError.
        """
        if top_k is not None and (not is_whole(top_k) or top_k < 1):
            raise UsageError(f"top_k is {top_k!r}, expected None, or 1 or more classes")
        least = least_score(threshold)
        found = self.scores(
            texts, max_tokens=max_tokens, truncate=truncate, batch_tokens=batch_tokens,
            adapters=adapters,
        )  # fmt: skip
        labels = self.model.config.labels
        return [
            [Label(labels[i], float(row[i])) for i in best[:top_k] if row[i] >= least]
            for row, best in zip(found, np.argsort(-found, axis=1, kind="stable"), strict=True)
        ]

    def scores(
        self,
        texts: Texts,
        *,
        max_tokens: int | None = None,
        truncate: bool = False,
        batch_tokens: int = BATCH_TOKENS,
        adapters: Choice = None,
    ) -> F64:
        """The score of each class, [N, K]: softmax of the logits of a text's last token; where
        several labels (or none) may apply, the sigmoid of each; a regression's values.

        max_tokens: of a text, None for as many as the model was trained on; truncate: cut longer
        ones, which are an error otherwise; batch_tokens: that share a cache, which bounds memory;
        adapters: that `model` has loaded, one choice for all texts: see `generate`. Texts of `read`
        are taken as they are.

        Raises: UsageError, NumericError.
        """
        config = self.model.config
        rows = self.read(texts, max_tokens=max_tokens, truncate=truncate)
        ids = [_without_padding(text.tokens.ids, config.pad_token_id) for text in rows]
        logits = np.empty((len(ids), config.num_labels))
        for i, found in results(
            self.model.head, ids, batch_tokens=batch_tokens, last=True, adapters=adapters
        ):
            logits[i] = found[0]
        if config.problem_type == "regression":
            return logits
        if config.problem_type == "multi_label_classification" or config.num_labels == 1:
            return np.exp(-np.logaddexp(0, -logits))  # 1 / (1 + exp(-x)), without overflow
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _without_padding(ids: list[int], pad_token_id: int | None) -> list[int]:
    """A text that ends in the padding token is read before it, as by the model's own call."""
    end = len(ids)
    while end > 1 and ids[end - 1] == pad_token_id:
        end -= 1
    return ids[:end]
