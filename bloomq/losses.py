"""The losses of the heads, as transformers computes them, in float64.

What a mask hides was never computed, and counts in no loss; transformers takes what it computed
there into account wherever a label is not -100.

Source: transformers' loss/loss_utils.py and modeling_bloom.py; torch.nn's losses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bloomq.config import BloomConfig, ProblemType
from bloomq.errors import UsageError

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]  # True where a token is real
IGNORED = -100  # a label that does not count


def cross_entropy(logits: F32, labels: I64, ignored: int = IGNORED) -> np.float64:
    """Mean of -log softmax(logits)[label] over labels other than `ignored`; NaN where all are.

    logits: [N, K], labels: [N].
    """
    counted = np.flatnonzero(labels != ignored)
    if not len(counted):
        return np.float64("nan")
    total = 0.0
    for part in np.array_split(counted, -(-len(counted) * logits.shape[1] // _PART)):
        wide = logits[part].astype(np.float64)
        wide -= wide.max(axis=1, keepdims=True)
        picked = wide[np.arange(len(part)), labels[part]]
        total += float((np.log(np.exp(wide).sum(axis=1)) - picked).sum())
    return np.float64(total / len(counted))


_PART = 1 << 24  # logits in float64 at a time: 128 MB


def binary_cross_entropy(logits: F32, labels: F64) -> np.float64:
    """Mean of the binary cross entropy of each logit; labels in 0..1, the same shape."""
    z = logits.astype(np.float64)
    return np.float64((np.maximum(z, 0) - z * labels + np.log1p(np.exp(-np.abs(z)))).mean())


def causal_lm_loss(logits: F32, labels: ArrayLike, mask: Mask) -> np.float64:
    """Cross entropy of logits [B, T, V] with the labels [B, T] one position further on, where the
    mask [B, T] shows both."""
    checked = class_labels("labels", labels, logits.shape[:2], logits.shape[2])
    shifted = np.full_like(checked, IGNORED)
    shifted[:, :-1] = np.where(mask[:, :-1] & mask[:, 1:], checked[:, 1:], IGNORED)
    return cross_entropy(logits.reshape(-1, logits.shape[2]), shifted.reshape(-1))


def token_loss(logits: F32, labels: ArrayLike, mask: Mask) -> np.float64:
    """Cross entropy of logits [B, T, K] with labels [B, T], where the mask [B, T] shows them."""
    checked = class_labels("labels", labels, logits.shape[:2], logits.shape[2])
    counted = np.where(mask, checked, IGNORED)
    return cross_entropy(logits.reshape(-1, logits.shape[2]), counted.reshape(-1))


def sequence_loss(logits: F32, labels: ArrayLike, config: BloomConfig) -> np.float64:
    """The loss of logits [B, K] by the config's problem_type; where that is None, regression for
    one label, else single-label for whole numbers and multi-label for others, as transformers."""
    given = _array("labels", labels)
    kind = config.problem_type or _problem_type(given, logits.shape[1])
    if kind == "single_label_classification":
        return cross_entropy(
            logits, class_labels("labels", given.reshape(-1), logits.shape[:1], logits.shape[1])
        )
    shape = logits.shape if given.size != len(logits) or logits.shape[1] != 1 else given.shape
    values = _numbers(given, shape)
    if kind == "regression":
        return np.float64(
            np.square(logits.astype(np.float64).reshape(values.shape) - values).mean()
        )
    if not ((values >= 0) & (values <= 1)).all():
        raise UsageError("labels of several classes hold other numbers than 0 to 1")
    return binary_cross_entropy(logits, values)


def _problem_type(labels: NDArray[np.generic], count: int) -> ProblemType:
    if count == 1:
        return "regression"
    whole = labels.dtype.kind in "iu"
    return "single_label_classification" if whole else "multi_label_classification"


def span_loss(
    start_logits: F32,
    end_logits: F32,
    start_positions: ArrayLike,
    end_positions: ArrayLike,
    mask: Mask,
) -> np.float64:
    """Mean of the cross entropies of start and end over the columns that the mask [B, T] shows,
    logits [B, T] and positions [B]; a position from T on (an answer that was cut off), or one that
    is hidden, does not count."""
    batch, length = start_logits.shape
    losses = []
    for name, logits, given in (
        ("start_positions", start_logits, start_positions),
        ("end_positions", end_logits, end_positions),
    ):
        positions = _array(name, given)
        if positions.ndim == 2 and positions.shape[1] == 1:
            positions = positions[:, 0]
        if positions.shape != (batch,) or positions.dtype.kind not in "iu" or positions.min() < 0:
            raise UsageError(
                f"{name} is {positions.dtype} {list(positions.shape)}, expected whole numbers from "
                f"0 of shape [{batch}]"
            )
        capped = np.minimum(positions, length).astype(np.int64)
        shown = np.pad(mask, ((0, 0), (0, 1)))[np.arange(batch), capped]
        visible = np.where(mask, logits, np.float32(-np.inf))
        losses.append(cross_entropy(visible, np.where(shown, capped, length), ignored=length))
    return np.float64(sum(losses) / 2)


def class_labels(name: str, labels: ArrayLike, shape: tuple[int, ...], count: int) -> I64:
    """Labels as int64 of `shape`, each below `count` or IGNORED. Raises: UsageError."""
    checked = _array(name, labels)
    if checked.ndim == 1 and len(shape) == 2 and shape[0] == 1:
        checked = checked[None]
    if checked.shape != shape or checked.dtype.kind not in "iu":
        raise UsageError(
            f"{name} is {checked.dtype} {list(checked.shape)}, expected whole numbers of shape "
            f"{list(shape)}"
        )
    wrong = (checked != IGNORED) & ((checked < 0) | (checked >= count))
    if wrong.any():
        raise UsageError(
            f"{name} holds {int(checked[wrong][0])}, expected 0 to {count - 1}, or {IGNORED} for "
            "what does not count"
        )
    return checked.astype(np.int64)


def _array(name: str, values: ArrayLike) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError:
        raise UsageError(f"{name}: rows of different lengths make no array") from None


def _numbers(labels: NDArray[np.generic], shape: tuple[int, ...]) -> F64:
    if labels.shape != shape or labels.dtype.kind not in "biuf":
        raise UsageError(
            f"labels are {labels.dtype} {list(labels.shape)}, expected numbers of shape "
            f"{list(shape)}"
        )
    values = labels.astype(np.float64)
    if not np.isfinite(values).all():
        raise UsageError("labels hold NaN or infinity")
    return values
