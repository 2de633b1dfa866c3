"""What transformers' own tests of BLOOM look at, of our classes: shapes, orders, losses, defaults.

docs/transformers-tests.md says which test of theirs each one answers to.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import (
    CLASSES,
    Models,
    Spec,
    ask,
    ids_of,
    off,
    one_torch_thread,
    padded,
    torch,
    transformers,
)

import bloomq
from bloomq import forward
from bloomq.errors import UsageError

ROOT = Path(__file__).parent.parent
BASE, CAUSAL, SEQUENCE, TOKEN, QUESTION = CLASSES
HEADED = CLASSES[1:]
LIMIT = 1e-5  # see test_modeling_parity
OF_OURS = {"adapters", "streamer", "seed"}  # arguments that transformers has not, or elsewhere
# Losses are means of float32 numbers there, of float64 ones here.
LOSS = 2e-6


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.getbasetemp())


def labels_for(kind: str, batch: int, length: int) -> dict[str, np.ndarray]:
    """What makes a class compute its loss."""
    rng = np.random.default_rng(7)
    if kind == QUESTION:
        return {
            name: rng.integers(0, length, batch) for name in ("start_positions", "end_positions")
        }
    shape = (batch,) if kind == SEQUENCE else (batch, length)
    return {} if kind == BASE else {"labels": rng.integers(0, 3, shape)}


# -- one call --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_a_call_takes_the_arguments_of_transformers_in_its_order(kind):
    ours = inspect.signature(getattr(bloomq, kind).__call__).parameters
    theirs = inspect.signature(getattr(transformers, kind).forward).parameters
    shared = [name for name in ours if name not in OF_OURS]
    assert shared == [name for name in theirs if name != "kwargs"]
    assert getattr(bloomq, kind).forward is getattr(bloomq, kind).__call__
    for name in shared:
        assert ours[name].default == theirs[name].default, name


def test_generate_takes_names_and_defaults_of_transformers():
    ours = inspect.signature(bloomq.BloomForCausalLM.generate).parameters
    names = set(transformers.GenerationConfig().to_dict())
    defaults = transformers.GenerationConfig._get_default_generation_params()
    asked = {name for name, one in ours.items() if one.kind is inspect.Parameter.KEYWORD_ONLY}
    assert asked - OF_OURS <= names
    for name in asked & set(defaults):
        assert ours[name].default == defaults[name] or ours[name].default is None, name


SHAPES = {
    BASE: {"last_hidden_state": (3, 7, 32)},
    CAUSAL: {"logits": (3, 7, 97)},
    SEQUENCE: {"logits": (3, 3)},
    TOKEN: {"logits": (3, 7, 3)},
    QUESTION: {"start_logits": (3, 7), "end_logits": (3, 7)},
}


@pytest.mark.parametrize("kind", CLASSES)
def test_results_are_float32_of_the_documented_shapes(models, kind):
    given = labels_for(kind, 3, 7)
    out = models.ours(Spec(kind=kind))(ids_of(Spec(), 3, 7), **given)
    for name, shape in SHAPES[kind].items():
        assert out[name].shape == shape
        assert out[name].dtype == np.float32
    assert isinstance(out.get("loss"), float) == bool(given)


@pytest.mark.parametrize("kind", CLASSES)
def test_hidden_states_and_attentions_have_the_documented_shapes(models, kind):
    spec = Spec(kind=kind)
    out = models.ours(spec)(ids_of(spec, 3, 7), output_attentions=True, output_hidden_states=True)
    assert [a.shape for a in out.hidden_states] == [(3, 7, 32)] * (spec.n_layer + 1)
    assert [a.shape for a in out.attentions] == [(3, 4, 7, 7)] * spec.n_layer
    assert list(out)[-2:] == ["hidden_states", "attentions"]
    for weights in out.attentions:
        assert weights.sum(axis=-1) == pytest.approx(np.ones((3, 4, 7)), abs=1e-6)
        assert not np.triu(weights, 1).any()  # nothing looks ahead


@pytest.mark.parametrize("where", ["none", "left", "right", "middle"])
def test_attention_to_padding_is_zero(models, where):
    spec, mask = Spec(), padded(where, 3, 9) == 1
    out = models.ours(spec)(ids_of(spec, 3, 9), attention_mask=mask, output_attentions=True)
    for weights in out.attentions:  # [B, H, T, S]
        assert not weights.swapaxes(1, 3)[~mask].any()
        assert not weights.swapaxes(1, 2)[~mask].any()
        sums = weights.sum(axis=-1).swapaxes(1, 2)
        assert sums[mask] == pytest.approx(np.ones((mask.sum(), 4)), abs=1e-6)


@pytest.mark.parametrize("scheme", ["f32", "int4"])
@pytest.mark.parametrize("kind", CLASSES)
def test_recording_changes_no_bit_of_the_result(models, kind, scheme):
    ours, ids = models.ours(Spec(kind=kind), scheme), ids_of(Spec(), 3, 11)
    mask = padded("left", 3, 11)
    plain = ours(ids, attention_mask=mask)
    traced = ours(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    for name in SHAPES[kind]:
        assert traced[name].tobytes() == plain[name].tobytes()


@pytest.mark.parametrize("kind", CLASSES)
def test_the_same_call_gives_the_same_bits(models, kind):
    ours, ids = models.ours(Spec(kind=kind)), ids_of(Spec(), 3, 11)
    assert ours(ids)[0].tobytes() == ours(ids)[0].tobytes()
    assert ours.eval() is ours


@pytest.mark.parametrize("kind", CLASSES)
def test_a_row_of_a_batch_is_the_row_alone(models, kind):
    ours, ids = models.ours(Spec(kind=kind)), ids_of(Spec(), 4, 11)
    whole = ours(ids)[0]
    for row in range(4):
        assert whole[row].tobytes() == ours(ids[row])[0][0].tobytes()


FLAGS = [
    {},
    {"output_hidden_states": True},
    {"output_attentions": True},
    {"output_hidden_states": True, "output_attentions": True},
]


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "+".join(flags) or "plain")
@pytest.mark.parametrize("kind", CLASSES)
def test_a_tuple_has_the_fields_of_the_output_in_the_order_of_transformers(
    models, kind, flags, labelled
):
    spec, ids = Spec(kind=kind), ids_of(Spec(), 3, 7)
    given = {**flags, **(labels_for(kind, 3, 7) if labelled else {})}
    ours = models.ours(spec)
    found = ours(ids, **given, return_dict=False)
    named = ours(ids, **given, return_dict=True)
    expected = ask(models.theirs(spec), ids, **given, return_dict=False)
    assert isinstance(found, tuple)
    assert len(found) == len(named) == len(expected)
    for mine, same, other in zip(found, named.to_tuple(), expected, strict=True):
        if hasattr(mine, "get_seq_length"):
            assert mine.get_seq_length() == other.get_seq_length() == 7
        elif isinstance(mine, tuple):
            assert [a.tobytes() for a in mine] == [a.tobytes() for a in same]
            assert max(off(a, b) for a, b in zip(mine, other, strict=True)) < LIMIT
        else:
            assert np.array_equal(mine, same)
            assert off(np.asarray(mine), other) < LIMIT


@pytest.mark.parametrize("kind", [BASE, CAUSAL, SEQUENCE])
def test_use_cache_false_leaves_the_past_out(models, kind):
    spec, ids = Spec(kind=kind), ids_of(Spec(), 2, 7)
    for model in (models.ours(spec), lambda *a, **k: ask(models.theirs(spec), *a, **k)):
        cached, by_config = model(ids, use_cache=True), model(ids)
        uncached = model(ids, use_cache=False)
        assert len(cached) == len(by_config) == len(uncached) + 1
        assert uncached.past_key_values is None
        again = model(ids, past_key_values=cached.past_key_values, use_cache=False)
        assert again.past_key_values is cached.past_key_values
        assert cached.past_key_values.get_seq_length() == 14


def test_ids_may_be_lists_and_tensors(models):
    ours, ids = models.ours(Spec()), ids_of(Spec(), 2, 5)
    expected = ours(ids, attention_mask=np.ones((2, 5))).logits.tobytes()
    assert ours(ids.tolist(), attention_mask=[[1] * 5] * 2).logits.tobytes() == expected
    tensors = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(2, 5)}
    assert ours(**tensors).logits.tobytes() == expected


# -- losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["none", "right", "left"])
@pytest.mark.parametrize("kind", HEADED)
def test_losses_are_those_of_transformers(models, kind, where):
    """Labels of what is hidden are -100, as transformers wants them. It computes padding too: of
    the first token behind some, whose logits come from padding, it counts what it made up."""
    spec, mask = Spec(kind=kind), padded(where, 3, 12)
    given = labels_for(kind, 3, 12)
    if kind in (CAUSAL, TOKEN):
        behind = np.pad(mask, ((0, 0), (1, 0)))[:, :-1] if kind == CAUSAL else mask
        given["labels"] = np.where((mask == 1) & (behind == 1), given["labels"], -100)
        given["labels"][0, 5] = -100
    if kind == QUESTION and where != "none":  # its softmax runs over padding there
        mask = np.ones_like(mask)
    ids = np.where(mask == 1, ids_of(spec, 3, 12), 3)
    found = models.ours(spec)(ids, attention_mask=mask, **given).loss
    expected = ask(models.theirs(spec), ids, attention_mask=mask, **given).loss.item()
    assert found == pytest.approx(expected, rel=LOSS)


@pytest.mark.parametrize("kind", HEADED)
def test_padding_changes_no_loss(models, kind):
    """Labels stand at padding too; what they are does not matter."""
    ours, ids, labels = models.ours(Spec(kind=kind)), ids_of(Spec(), 1, 8), labels_for(kind, 1, 8)
    alone = ours(ids, **labels).loss
    for left, right in ((4, 0), (0, 4)):
        wide = np.pad(ids, ((0, 0), (left, right)), constant_values=3)
        mask = np.pad(np.ones((1, 8)), ((0, 0), (left, right)))
        shifted = labels
        if kind in (CAUSAL, TOKEN):
            shifted = {"labels": np.pad(labels["labels"], ((0, 0), (left, right)))}
        elif kind == QUESTION:
            shifted = {name: at + left for name, at in labels.items()}
        assert ours(wide, attention_mask=mask, **shifted).loss == pytest.approx(alone, rel=1e-12)


PROBLEMS: dict[str, tuple[int, str, Any]] = {
    "regression of one": (1, "regression", [0.5, -1.0, 2.0]),
    "regression of one, columns": (1, "regression", [[0.5], [-1.0], [2.0]]),
    "regression of three": (3, "regression", [[0.5, 1, 2], [0, 0, 0], [-1, -2, 3]]),
    "one class": (3, "single_label_classification", [0, 2, 1]),
    "one class, some ignored": (3, "single_label_classification", [0, -100, 1]),
    "several": (3, "multi_label_classification", [[0.0, 1, 1], [1, 0, 0], [0, 0, 0]]),
}


@pytest.mark.parametrize(
    ("problem", "stated"),
    [(problem, True) for problem in PROBLEMS]
    + [(problem, False) for problem in PROBLEMS if problem != "regression of three"],
)
def test_each_problem_type_has_the_loss_of_transformers(models, problem, stated):
    """Stated in the config, or told by the labels (three numbers would be several labels)."""
    count, kind, labels = PROBLEMS[problem]
    spec = Spec(kind=SEQUENCE, labels=count, problem=kind if stated else None)
    ids, array = ids_of(spec, 3, 8), np.array(labels)
    array = array if array.dtype.kind == "i" else array.astype(np.float32)
    theirs = models.theirs(spec)
    theirs.config.problem_type = spec.problem  # which it overwrites at the first call
    expected = ask(theirs, ids, labels=array).loss.item()
    found = models.ours(spec)(ids, labels=array)
    assert found.loss == pytest.approx(expected, rel=LOSS)
    assert found.logits.shape == (3, count)


def test_a_problem_type_told_by_labels_is_told_anew_at_each_call(models):
    """transformers keeps the first one for good."""
    ours, ids = models.ours(Spec(kind=SEQUENCE)), ids_of(Spec(), 2, 5)
    first = ours(ids, labels=[0, 2]).loss
    several = ours(ids, labels=np.eye(3, dtype=np.float32)[[0, 2]]).loss
    assert ours(ids, labels=[0, 2]).loss == first != several
    assert ours.config.problem_type is None


@pytest.mark.parametrize("positions", [([0, 5], [3, 7]), ([11, 500], [11, 12])], ids=str)
def test_positions_behind_the_text_do_not_count(models, positions):
    spec, ids = Spec(kind=QUESTION), ids_of(Spec(), 2, 12)
    given = dict(zip(("start_positions", "end_positions"), map(np.array, positions), strict=True))
    expected = ask(models.theirs(spec), ids, **given).loss.item()
    assert models.ours(spec)(ids, **given).loss == pytest.approx(expected, rel=LOSS)
    alone = {"start_positions": given["start_positions"]}
    assert models.ours(spec)(ids, **alone).loss is None
    assert ask(models.theirs(spec), ids, **alone).loss is None


# -- which token is classified ---------------------------------------------------------------------


@pytest.mark.parametrize("where", ["left", "right", "middle"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_class_is_read_off_the_last_token_that_is_not_padding(models, where, masked):
    """Without a mask, padding is a token like others, but not one to read off."""
    spec, mask = Spec(kind=SEQUENCE), padded(where, 4, 11)
    ids = np.where(mask == 1, ids_of(spec, 4, 11), 3)
    given = {"attention_mask": mask} if masked else {}
    found = models.ours(spec)(ids, **given).logits
    assert off(found, ask(models.theirs(spec), ids, **given).logits) < LIMIT
    if masked:
        for row in range(4):
            alone = models.ours(spec)(ids[row, mask[row] == 1]).logits[0]
            assert found[row].tobytes() == alone.tobytes()


@pytest.mark.parametrize("shown", [4, 2])
def test_a_row_of_padding_alone_is_read_off_its_first_token(models, shown):
    spec, ids = Spec(kind=SEQUENCE), np.array([[3, 3, 3, 3], [5, 6, 3, 3]])
    mask = np.arange(4) < [[shown], [4]]
    found = models.ours(spec)(ids, attention_mask=mask).logits
    assert off(found, ask(models.theirs(spec), ids, attention_mask=mask).logits) < LIMIT


def test_a_model_without_padding_classifies_the_last_token(models):
    spec = Spec(kind=SEQUENCE, pad=None)
    ours, ids = models.ours(spec), ids_of(spec, 3, 9)
    assert off(ours(ids[:1]).logits, ask(models.theirs(spec), ids[:1]).logits) < LIMIT
    mask = padded("right", 3, 9)
    found = ours(ids, attention_mask=mask).logits  # transformers refuses several rows
    for row in range(3):
        alone = ours(ids[row, mask[row] == 1]).logits[0]
        assert found[row].tobytes() == alone.tobytes()


def test_several_rows_with_neither_padding_nor_mask_are_refused(models):
    spec = Spec(kind=SEQUENCE, pad=None)
    expected = r"^3 rows, and the model has no pad_token_id to find their ends by: pass"
    with pytest.raises(UsageError, match=expected):
        models.ours(spec)(ids_of(spec, 3, 9))
    with pytest.raises(ValueError, match="if no padding token is defined"):
        ask(models.theirs(spec), ids_of(spec, 3, 9))


def test_a_hidden_row_has_no_class(models):
    with pytest.raises(UsageError, match=r"^attention_mask hides a whole row: nothing to classify"):
        models.ours(Spec(kind=SEQUENCE))([[5, 6], [7, 8]], attention_mask=[[1, 1], [0, 0]])


# -- what a model says of itself -------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_parameters_are_counted_as_transformers_counts_them(models, kind):
    expected = models.theirs(Spec(kind=kind)).num_parameters()
    found = models.ours(Spec(kind=kind)).num_parameters()
    assert found == expected


def test_input_embeddings_are_those_of_transformers(models):
    spec, ids = Spec(), ids_of(Spec(), 2, 3, 4)
    found = models.ours(spec).get_input_embeddings()(ids)
    expected = models.theirs(spec).get_input_embeddings()(torch.tensor(ids)).detach().numpy()
    assert np.array_equal(found, expected)
    assert models.ours(spec).get_input_embeddings()(5).shape == (32,)


def test_the_config_speaks_both_spellings(models):
    config, theirs = (
        models.ours(Spec(kind=SEQUENCE)).config,
        models.theirs(Spec(kind=SEQUENCE)).config,
    )
    names = ("num_hidden_layers", "num_attention_heads", "n_layer", "n_head", "hidden_size")
    for name in (*names, "vocab_size", "num_labels", "id2label", "label2id", "pad_token_id"):
        assert getattr(config, name) == getattr(theirs, name), name


def test_every_test_that_the_documentation_names_is_there():
    """docs/transformers-tests.md: names without `test_`, of the file that stands before them."""
    text = (ROOT / "docs" / "transformers-tests.md").read_text()
    cells = [row.split("|")[-2] for row in text.splitlines() if row.count("|") > 2]
    sources = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    ours = "".join(sources[name] for name in sources if name.startswith("test_modeling"))
    named = [name for cell in cells for name in re.findall(r"`([a-z0-9_]+)`", cell)]
    names = {name for name in named if name.count("_") > 3}
    assert len(names) > 25
    assert [name for name in sorted(names) if f"def test_{name}(" not in ours] == []
    files = {name for cell in cells for name in re.findall(r"`tests/(\w+\.py)`", cell)}
    assert len(files) > 5
    assert files <= set(sources)


# -- refused ---------------------------------------------------------------------------------------

PLAIN = np.array([[5, 6, 7], [8, 9, 10]])
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "neither ids nor embeddings": (
        {"input_ids": None},
        r"found neither of input_ids and inputs_embeds, expected one of them$",
    ),
    "both": (
        {"inputs_embeds": np.zeros((2, 3, 32), np.float32)},
        r"found both of input_ids and inputs_embeds, expected one of them$",
    ),
    "float ids": (
        {"input_ids": PLAIN.astype(float)},
        r"input_ids is float64 \[2, 3\], expected whole numbers of shape \[B, T\]$",
    ),
    "ids of three axes": ({"input_ids": PLAIN[None]}, r"input_ids is int64 \[1, 2, 3\], expected"),
    "ragged ids": (
        {"input_ids": [[1, 2], [3]]},
        r"input_ids has rows of different lengths: pad them and pass attention_mask$",
    ),
    "an id beyond": ({"input_ids": PLAIN + 90}, r"token id 100, expected 0 to 96$"),
    "a negative id": ({"input_ids": PLAIN - 6}, r"token id -1, expected 0 to 96$"),
    "a short mask": (
        {"attention_mask": np.ones((2, 2))},
        r"attention_mask is \[2, 2\], expected \[2, 3\] as the tokens$",
    ),
    "a mask of four axes": (
        {"attention_mask": np.ones((2, 1, 3, 3))},
        r"attention_mask is \[2, 1, 3, 3\], expected \[2, 3\]",
    ),
    "a mask of other values": (
        {"attention_mask": np.full((2, 3), 2)},
        r"attention_mask holds other values than 0 and 1$",
    ),
    "a mask that hides all": (
        {"attention_mask": np.zeros((2, 3))},
        r"attention_mask hides every token: nothing to compute$",
    ),
    "embeddings of another width": (
        {"input_ids": None, "inputs_embeds": np.zeros((2, 3, 31), np.float32)},
        r"inputs_embeds is float32 \[2, 3, 31\], expected floats of shape \[B, T, 32\]$",
    ),
    "whole embeddings": (
        {"input_ids": None, "inputs_embeds": np.zeros((2, 3, 32), np.int64)},
        r"inputs_embeds is int64 \[2, 3, 32\], expected floats of shape \[B, T, 32\]$",
    ),
    "no embeddings": (
        {"input_ids": None, "inputs_embeds": np.zeros((2, 0, 32), np.float32)},
        r"inputs_embeds is float32 \[2, 0, 32\], expected floats of shape \[B, T, 32\]$",
    ),
    "ragged embeddings": (
        {"input_ids": None, "inputs_embeds": [[[1.0]], [[1.0, 2.0]]]},
        r"inputs_embeds has rows of different lengths$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_refuses(models, kind, what):
    given, expected = WRONG[what]
    with pytest.raises(UsageError, match=f"^{expected}") as caught:
        models.ours(Spec(kind=kind))(**{"input_ids": PLAIN, **given})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_refuses_arguments_it_does_not_know(models, kind):
    with pytest.raises(TypeError, match="position_ids"):
        models.ours(Spec(kind=kind))(PLAIN, position_ids=PLAIN)


@pytest.mark.parametrize("keep", [-1, 4, 1.5, True, "1", None], ids=repr)
def test_logits_to_keep_is_a_number_of_positions(models, keep):
    with pytest.raises(UsageError, match=f"^logits_to_keep is {keep!r}, expected 0 to 3$"):
        models.ours(Spec())(PLAIN, logits_to_keep=keep)


def test_logits_to_keep_may_be_of_any_kind_of_whole_number(models):
    expected = models.ours(Spec())(PLAIN, logits_to_keep=2).logits
    for kind in (np.uint8, np.int64):
        found = models.ours(Spec())(PLAIN, logits_to_keep=kind(2)).logits
        assert found.tobytes() == expected.tobytes()


def test_labels_need_all_logits(models):
    with pytest.raises(UsageError, match=r"^labels need all logits: leave logits_to_keep at 0$"):
        models.ours(Spec())(PLAIN, labels=PLAIN, logits_to_keep=1)


@pytest.mark.parametrize("kind", [CAUSAL, TOKEN, SEQUENCE])
def test_labels_out_of_range_are_refused_by_every_class(models, kind):
    most = 96 if kind == CAUSAL else 2
    shape = (2,) if kind == SEQUENCE else (2, 3)
    for wrong in (most + 1, -1):
        expected = f"^labels holds {wrong}, expected 0 to {most}, or -100"
        with pytest.raises(UsageError, match=expected):
            models.ours(Spec(kind=kind))(PLAIN, labels=np.full(shape, wrong))
    with pytest.raises(UsageError, match=r"^labels is int64 \[3\], expected whole numbers of"):
        models.ours(Spec(kind=kind))(PLAIN, labels=[0, 1, 1])


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (1.5, r"^input_ids is float64 \[1, 1\], expected whole numbers"),
        ([["a"]], r"^input_ids is <U1 \[1, 1\], expected whole numbers"),
        (True, r"^input_ids is bool \[1, 1\], expected whole numbers"),
        (-1, r"^token id -1, expected 0 to 96$"),
        ([97], r"^token id 97, expected 0 to 96$"),
        ([[1], [1, 2]], r"^ids have rows of different lengths: pad them$"),
    ],
    ids=str,
)
def test_input_embeddings_are_of_ids_of_the_vocabulary(models, ids, expected):
    with pytest.raises(UsageError, match=expected):
        models.ours(Spec()).get_input_embeddings()(ids)


def test_few_logits_of_a_large_batch_take_little_memory(models, monkeypatch):
    made = []
    plain = forward.zeros
    monkeypatch.setattr(
        forward, "zeros", lambda shape, *rest: made.append(shape) or plain(shape, *rest)
    )
    model = models.ours(Spec())
    kept = model(PLAIN, logits_to_keep=1).logits
    assert made == [(*kept.shape,)]
    assert kept.tobytes() == model(PLAIN).logits[:, -1:].tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_embeddings_that_are_no_numbers_are_refused(models, value):
    embeds = np.full((1, 2, 32), value)
    with pytest.raises(UsageError, match=r"^inputs_embeds holds NaN, infinity or more than float"):
        models.ours(Spec())(inputs_embeds=embeds)
