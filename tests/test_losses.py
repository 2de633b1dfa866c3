"""The losses, against torch's and transformers' own, and what is refused as a label."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bloomq import losses
from bloomq.config import BloomConfig
from bloomq.errors import UsageError
from bloomq.losses import (
    binary_cross_entropy,
    causal_lm_loss,
    class_labels,
    cross_entropy,
    sequence_loss,
    span_loss,
    token_loss,
)

torch = pytest.importorskip("torch")
F = torch.nn.functional
# torch's losses in float64 of the same float32 logits: what is left is the rounding of a sum of a
# few hundred float64 terms.
EXACT = 1e-12


def logits_of(*shape: int, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def labels_of(count: int, *shape: int, ignored: float = 0.0, seed: int = 1) -> np.ndarray:
    """Class ids, a share of them -100."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, count, shape)
    return np.where(rng.random(shape) < ignored, -100, labels)


def wide(array: np.ndarray) -> Any:
    """As a tensor in float64."""
    return torch.tensor(np.asarray(array, np.float64))


def seen(batch: int, length: int) -> np.ndarray:
    return np.ones((batch, length), bool)


def config(labels: int = 3, problem_type: Any = None) -> BloomConfig:
    names = tuple(f"LABEL_{i}" for i in range(labels))
    return BloomConfig(labels=names, problem_type=problem_type)


# -- against torch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("scale", [1e-3, 3.0, 1e4])
def test_cross_entropy_is_that_of_torch(ignored, scale):
    logits, labels = logits_of(50, 7, scale=scale), labels_of(7, 50, ignored=ignored)
    expected = F.cross_entropy(wide(logits), torch.tensor(labels)).item()
    assert cross_entropy(logits, labels) == pytest.approx(expected, rel=EXACT)


def test_logits_beyond_one_part_are_summed_part_by_part(monkeypatch):
    logits, labels = logits_of(50, 7), labels_of(7, 50, ignored=0.2)
    whole = cross_entropy(logits, labels)
    monkeypatch.setattr(losses, "_PART", 20)  # two rows
    assert cross_entropy(logits, labels) == pytest.approx(whole, rel=EXACT)


def test_where_no_label_counts_the_loss_is_nan_as_in_torch():
    logits, labels = logits_of(4, 5), np.full(4, -100)
    assert np.isnan(F.cross_entropy(wide(logits), torch.tensor(labels)).item())
    assert np.isnan(cross_entropy(logits, labels))


@pytest.mark.parametrize("scale", [1e-3, 3.0, 1e4])
def test_binary_cross_entropy_is_that_of_torch(scale):
    logits = logits_of(8, 5, scale=scale)
    labels = np.random.default_rng(2).random((8, 5)).round(1)
    expected = F.binary_cross_entropy_with_logits(wide(logits), wide(labels)).item()
    assert binary_cross_entropy(logits, labels) == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_the_loss_of_a_language_model_is_that_of_transformers(ignored):
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    logits, labels = logits_of(3, 9, 11), labels_of(11, 3, 9, ignored=ignored)
    expected = loss_utils.ForCausalLMLoss(torch.tensor(logits), torch.tensor(labels), 11)
    # transformers sums in float32: 24 terms, each off by up to 2^-24 of the largest.
    assert causal_lm_loss(logits, labels, seen(3, 9)) == pytest.approx(expected.item(), rel=2e-6)


def test_one_token_alone_has_nothing_to_predict():
    assert np.isnan(causal_lm_loss(logits_of(2, 1, 5), [[1], [2]], seen(2, 1)))


@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_the_loss_of_tokens_is_that_of_torch(ignored):
    logits, labels = logits_of(3, 9, 4), labels_of(4, 3, 9, ignored=ignored)
    expected = F.cross_entropy(wide(logits.reshape(-1, 4)), torch.tensor(labels.reshape(-1)))
    assert token_loss(logits, labels, seen(3, 9)) == pytest.approx(expected.item(), rel=EXACT)


@pytest.mark.parametrize("problem_type", [None, "regression"])
@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_one_label_is_regression_in_either_shape(problem_type, shape):
    logits, values = logits_of(6, 1), np.random.default_rng(3).standard_normal(6)
    expected = F.mse_loss(wide(logits[:, 0]), wide(values)).item()
    found = sequence_loss(logits, values.reshape(shape), config(1, problem_type))
    assert found == pytest.approx(expected, rel=EXACT)


def test_one_row_of_regression_may_be_a_bare_number():
    logits = logits_of(1, 1)
    assert sequence_loss(logits, 2.5, config(1)) == pytest.approx(float(logits[0, 0] - 2.5) ** 2)


def test_several_numbers_may_be_regressed_at_once():
    logits, values = logits_of(6, 3), np.random.default_rng(3).standard_normal((6, 3))
    expected = F.mse_loss(wide(logits), wide(values)).item()
    found = sequence_loss(logits, values, config(3, "regression"))
    assert found == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int8])
def test_whole_numbers_are_classes(problem_type, dtype):
    logits, labels = logits_of(6, 3), labels_of(3, 6)
    expected = F.cross_entropy(wide(logits), torch.tensor(labels)).item()
    found = sequence_loss(logits, labels.astype(dtype), config(3, problem_type))
    assert found == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_other_numbers_are_several_labels_at_once(problem_type, dtype):
    logits, labels = logits_of(6, 3), labels_of(2, 6, 3)
    expected = F.binary_cross_entropy_with_logits(wide(logits), wide(labels)).item()
    found = sequence_loss(logits, labels.astype(dtype), config(3, problem_type))
    assert found == pytest.approx(expected, rel=EXACT)


def test_several_labels_at_once_may_be_whole_numbers_where_the_config_says_so():
    """torch refuses them; their meaning is certain."""
    logits, labels = logits_of(6, 3), labels_of(2, 6, 3)
    expected = F.binary_cross_entropy_with_logits(wide(logits), wide(labels)).item()
    found = sequence_loss(logits, labels, config(3, "multi_label_classification"))
    assert found == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_the_loss_of_a_span_is_the_mean_of_its_ends(shape):
    """As transformers: a position from T on does not count."""
    starts, ends = logits_of(4, 9), logits_of(4, 9, seed=5)
    first, last = np.array([0, 3, 9, 8]), np.array([2, 500, 9, 8])
    expected = [
        F.cross_entropy(wide(logits), torch.tensor(at).clamp(0, 9), ignore_index=9).item()
        for logits, at in ((starts, first), (ends, last))
    ]
    found = span_loss(starts, ends, first.reshape(shape), last.reshape(shape), seen(4, 9))
    assert found == pytest.approx(sum(expected) / 2, rel=EXACT)


def test_a_span_that_is_cut_off_in_every_row_has_no_loss():
    assert np.isnan(span_loss(logits_of(2, 4), logits_of(2, 4), [4, 5], [4, 4], seen(2, 4)))


# -- what a mask hides counts in no loss -----------------------------------------------------------

MASKS = {
    "left": [[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
}


@pytest.mark.parametrize("where", MASKS)
def test_padding_does_not_change_the_loss_of_a_language_model(where):
    """Whatever stands there, in logits and labels: the mean is that of the bare rows."""
    mask = np.array(MASKS[where], bool)
    logits, labels = logits_of(2, 6, 5), labels_of(5, 2, 6)
    short, long = mask[0], mask[1]
    alone = [
        causal_lm_loss(logits[i : i + 1, row], labels[i : i + 1, row], seen(1, row.sum()))
        for i, row in ((0, short), (1, long))
    ]
    found = causal_lm_loss(logits, labels, mask)
    assert found == pytest.approx((2 * alone[0] + 5 * alone[1]) / 7, rel=EXACT)


@pytest.mark.parametrize("where", MASKS)
def test_padding_does_not_change_the_loss_of_tokens(where):
    mask = np.array(MASKS[where], bool)
    logits, labels = logits_of(2, 6, 5), labels_of(5, 2, 6)
    expected = cross_entropy(logits[mask], labels[mask])
    assert token_loss(logits, labels, mask) == pytest.approx(expected, rel=EXACT)


def test_padding_takes_no_part_in_the_softmax_of_a_span():
    mask = np.array(MASKS["left"], bool)
    starts, ends = logits_of(2, 6), logits_of(2, 6, seed=5)
    found = span_loss(starts, ends, [3, 1], [5, 9], mask)
    first = [cross_entropy(starts[:1, 3:], np.array([0])), cross_entropy(starts[1:], np.array([1]))]
    expected = (sum(first) / 2 + cross_entropy(ends[:1, 3:], np.array([2]))) / 2
    assert found == pytest.approx(expected, rel=EXACT)


def test_a_position_that_is_hidden_does_not_count():
    mask, logits = np.array(MASKS["left"], bool), logits_of(2, 6)
    found = span_loss(logits, logits, [1, 4], [0, 4], mask)
    assert found == pytest.approx(cross_entropy(logits[1:], np.array([4])), rel=EXACT)


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [3, -1, -99, 2**40], ids=str)
def test_a_label_out_of_range_is_named(wrong):
    expected = f"^labels holds {wrong}, expected 0 to 2, or -100 for what does not count$"
    with pytest.raises(UsageError, match=expected):
        class_labels("labels", [[0, 1], [wrong, -100]], (2, 2), 3)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([0, 1], r"int64 \[2\]"),
        ([[0.0, 1.0]] * 2, r"float64 \[2, 2\]"),
        ([[True, False]] * 2, r"bool \[2, 2\]"),
        ([[["a"]]], r"<U1 \[1, 1, 1\]"),
        ([[None, 1]] * 2, r"object \[2, 2\]"),
        (3, r"int64 \[\]"),
    ],
    ids=str,
)
def test_class_labels_are_whole_numbers_of_the_tokens_shape(labels, found):
    expected = rf"^labels is {found}, expected whole numbers of shape \[2, 2\]$"
    for loss in (causal_lm_loss, token_loss):
        with pytest.raises(UsageError, match=expected):
            loss(logits_of(2, 2, 3), labels, seen(2, 2))


def test_one_row_of_labels_is_a_batch_of_one():
    logits = logits_of(1, 3, 4)
    found = token_loss(logits, [0, 1, 2], seen(1, 3))
    assert found == token_loss(logits, [[0, 1, 2]], seen(1, 3))


@pytest.mark.parametrize(
    ("labels", "found"),
    [([0.5, 1.0], r"float64 \[2\]"), ([["a"] * 3] * 2, r"<U1 \[2, 3\]"), (1.5, r"float64 \[\]")],
    ids=str,
)
@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_numbers_have_the_shape_of_the_logits(labels, found, problem_type):
    expected = rf"^labels are {found}, expected numbers of shape \[2, 3\]$"
    with pytest.raises(UsageError, match=expected):
        sequence_loss(logits_of(2, 3), labels, config(3, problem_type))


@pytest.mark.parametrize(
    ("positions", "found"),
    [
        ([0], r"int64 \[1\]"),
        ([0.0, 1.0], r"float64 \[2\]"),
        ([-1, 1], r"int64 \[2\]"),
        ([[0, 1]], r"int64 \[1, 2\]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["start_positions", "end_positions"])
def test_positions_are_whole_numbers_from_0_one_a_row(name, positions, found):
    given: dict[str, Any] = {"start_positions": [0, 0], "end_positions": [0, 0], name: positions}
    expected = rf"^{name} is {found}, expected whole numbers from 0 of shape \[2\]$"
    with pytest.raises(UsageError, match=expected):
        span_loss(logits_of(2, 4), logits_of(2, 4), **given, mask=seen(2, 4))


def test_ragged_labels_are_refused_in_our_words():
    ragged = [[0, 1], [2]]
    expected = "^labels: rows of different lengths make no array$"
    with pytest.raises(UsageError, match=expected):
        token_loss(logits_of(2, 2, 3), ragged, seen(2, 2))
    with pytest.raises(UsageError, match=expected):
        sequence_loss(logits_of(2, 3), ragged, config())
    with pytest.raises(UsageError, match=r"^start_positions: rows of different lengths"):
        span_loss(logits_of(2, 4), logits_of(2, 4), ragged, [0, 1], seen(2, 4))


def test_labels_of_several_classes_are_shares():
    config = BloomConfig(problem_type="multi_label_classification", labels=("a", "b"))
    logits = np.zeros((2, 2), np.float32)
    with pytest.raises(UsageError, match=r"^labels of several classes hold other numbers than 0 t"):
        sequence_loss(logits, [[0, 7.5], [1, 1]], config)
    with pytest.raises(UsageError, match=r"^labels hold NaN or infinity$"):
        sequence_loss(logits, [[0, np.nan], [1, 1]], config)
