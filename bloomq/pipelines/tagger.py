"""Spans of a text that belong to a class: names, places, languages."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.encoding import Offsets, Tokens
from bloomq.errors import UsageError
from bloomq.lora import Choice
from bloomq.modeling import BloomForTokenClassification
from bloomq.pipelines.base import Pipeline
from bloomq.pipelines.batches import BATCH_TOKENS, results
from bloomq.pipelines.texts import Texts, least_score

F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Tag:
    """Characters start to end of a text, without white space around them, and their class.

    score: the mean of their tokens' probabilities.
    """

    label: str
    score: float
    start: int
    end: int
    text: str


@dataclass(slots=True)
class _Run:
    """Tokens first to last, one class."""

    label: str
    first: int
    last: int


class Tagger(Pipeline[BloomForTokenClassification]):
    """Finds what a `BloomForTokenClassification` was trained to find."""

    _kind = BloomForTokenClassification
    _offsets = True

    def tag(
        self,
        texts: Texts,
        *,
        merge: bool = True,
        threshold: float | None = None,
        outside: Collection[str] = ("O",),
        max_tokens: int | None = None,
        truncate: bool = False,
        batch_tokens: int = BATCH_TOKENS,
        adapters: Choice = None,
    ) -> list[list[Tag]]:
        """The tags of each text, in its order.

        merge: neighbours of one class are one tag; of B-X and I-X, a B-X begins another, and the
        class is X. threshold: tags alone that score as much; outside: classes of what is no tag;
        the rest: see `Classifier.scores`.

        Raises: UsageError, NumericError.
        """
        least, none = least_score(threshold), _names(outside)
        rows = self.read(texts, max_tokens=max_tokens, truncate=truncate)
        tags: list[list[Tag]] = [[] for _ in rows]
        ids, labels = [text.tokens.ids for text in rows], self.model.config.labels
        for i, logits in results(
            self.model.head, ids, batch_tokens=batch_tokens, last=False, adapters=adapters
        ):
            found = _tags(rows[i].text, rows[i].tokens, logits, labels, merge, none)
            tags[i] = [tag for tag in found if tag.score >= least]
        return tags


def _names(outside: Collection[str]) -> set[str]:
    """Classes of what is no tag. Raises: UsageError."""
    several = isinstance(outside, list | tuple | set | frozenset)
    if several and all(isinstance(name, str) for name in outside):
        return set(outside)
    raise UsageError(f"outside is {outside!r:.80}, expected a list of names of classes")


def _tags(
    text: str, tokens: Tokens, logits: F32, labels: Sequence[str], merge: bool, outside: set[str]
) -> list[Tag]:
    """Tags of a text from the logits [T, K] of its tokens."""
    wide = logits.astype(np.float64)
    best = wide.argmax(axis=1)
    weights = np.exp(wide - wide.max(axis=1, keepdims=True))  # the best one's is 1
    probability = 1 / weights.sum(axis=1)  # [T]
    runs = _runs([labels[i] for i in best], merge, outside)
    tags = []
    for run in runs:
        start, end = _trimmed(text, tokens.offsets, run)
        if start < end:
            score = float(probability[run.first : run.last + 1].mean())
            tags.append(Tag(run.label, score, start, end, text[start:end]))
    return tags


def _runs(labels: list[str], merge: bool, outside: set[str]) -> list[_Run]:
    runs: list[_Run] = []
    for i, label in enumerate(labels):
        if label in outside:
            continue
        position = label[:2] if merge and label[:2] in ("B-", "I-") else ""
        name = label.removeprefix(position)
        before = runs[-1] if runs else None
        goes_on = before is not None and before.last == i - 1 and before.label == name
        if merge and before is not None and goes_on and position != "B-":
            before.last = i
        else:
            runs.append(_Run(name, i, i))
    return runs


def _trimmed(text: str, offsets: Offsets, run: _Run) -> tuple[int, int]:
    """Where the characters of a run start and end, without the space that BLOOM's tokens begin
    with."""
    start, end = offsets[run.first][0], offsets[run.last][1]
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())
