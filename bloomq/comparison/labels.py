"""What quantization changes of a classifier's results, on the lines of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.heads import Head
from bloomq.layers import Cache, Span

F32 = NDArray[np.float32]
_OF_LAST = "BloomForSequenceClassification"  # which reads a text's last token alone
_OF_SPAN = "BloomForQuestionAnswering"  # whose two columns are no labels to choose from


@dataclass(frozen=True, slots=True)
class Labels:
    """Of `lines` texts with `places` results (a sequence's one, or one for each token).

    same_label: the share with the same likeliest label; None where results are no labels;
    shift: the mean of the largest change of a label's probability; None as well;
    relative_error: |y - y'|^2 / |y|^2 of the results as they come, logits; max_error: the largest
    |y - y'|.
    """

    lines: int
    places: int
    same_label: float | None
    shift: float | None
    relative_error: float
    max_error: float


def read_labels(
    model: Head, base: Head, texts: Sequence[Sequence[int]], progress: Callable[[int], None]
) -> Labels:
    """Both models on texts of token ids, one at a time. progress: called with the texts done.

    Raises: NumericError.
    """
    pairs = []
    for done, ids in enumerate(texts, 1):
        pairs.append((_results(model, ids), _results(base, ids)))
        progress(done)
    ours, theirs = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
    square = float(np.square(theirs).sum())
    error = float(np.square(ours - theirs).sum()) / (square or 1.0)
    labelled = model.config.architecture != _OF_SPAN and model.columns > 1
    same = shift = None
    if labelled:
        same = float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
        shift = float(np.abs(_softmax(ours) - _softmax(theirs)).max(axis=1).mean())
    return Labels(
        len(texts), len(ours), same, shift, error, float(np.abs(ours - theirs).max())
    )  # fmt: skip


def _results(head: Head, ids: Sequence[int]) -> F32:
    """[places, columns] of one text."""
    given = np.array(ids, np.int64)
    cache: Cache = head.cache(1, len(given))
    span = Span.of([0], [len(given)])
    last = head.config.architecture == _OF_LAST
    wanted = span.last if last else np.arange(len(given))
    found = head.backend.numpy(head.step(given, cache, span, wanted))
    if not np.isfinite(found).all():
        raise head.model.find_not_finite(given, cache, span)
    return found


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
