"""past_key_values and padding: however a batch is cut, wherever its padding lies, the same bits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import Models, Spec, ids_of, padded

import bloomq
from bloomq import forward
from bloomq.errors import NumericError, UsageError

BASE = Spec(kind="BloomModel", n_head=3)
TRIED = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.getbasetemp())


def in_pieces(
    model: Any, ids: np.ndarray, mask: np.ndarray, cuts: list[int], **options: Any
) -> Any:
    """First results of a batch, piece after piece, and the past of the last."""
    past, found = None, []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        out = model(
            ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past, **options
        )
        found.append(out[0])
        past = out.past_key_values
    return np.concatenate(found, axis=1), past


# -- the same bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["f32", "int4"])
@pytest.mark.parametrize("flags", [{}, {"output_hidden_states": True}], ids=["fast", "recorded"])
@TRIED
@given(mask=arrays(bool, (3, 14)), cuts=st.sets(st.integers(1, 13)))
def test_any_cut_of_any_padded_batch_gives_the_bits_of_one_call(models, scheme, flags, mask, cuts):
    """Rows that are hidden wholly, and pieces that are padding in some rows, too."""
    edges = [0, *sorted(cuts), 14]
    assume(all(mask[:, a:b].any() for a, b in pairwise(edges)))
    model, ids = models.ours(BASE, scheme), ids_of(BASE, 3, 14)
    whole = model(ids, attention_mask=mask).last_hidden_state
    found, past = in_pieces(model, ids, mask, sorted(cuts), **flags)
    assert found.tobytes() == whole.tobytes()
    assert past.get_seq_length() == 14
    assert np.array_equal(past.mask, mask)


@pytest.mark.parametrize("scheme", ["f32", "int8"])
@TRIED
@given(mask=arrays(bool, (2, 12)))
def test_where_the_padding_lies_changes_no_bit(models, scheme, mask):
    assume(mask.any())
    model, ids = models.ours(BASE, scheme), ids_of(BASE, 2, 12)
    whole = model(ids, attention_mask=mask).last_hidden_state
    assert not whole[~mask].any()
    for row in range(2):
        if mask[row].any():
            alone = model(ids[row, mask[row]]).last_hidden_state[0]
            assert whole[row, mask[row]].tobytes() == alone.tobytes()


@TRIED
@given(garbage=arrays(np.int64, (3, 10), elements=st.integers(-(2**62), 2**62)))
def test_what_is_hidden_may_hold_anything(models, garbage):
    model, mask = models.ours(BASE), padded("left", 3, 10)
    ids = ids_of(BASE, 3, 10)
    expected = model(ids, attention_mask=mask)[0]
    found = model(np.where(mask == 1, ids, garbage), attention_mask=mask)[0]
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("cache_dtype", ["f32", "f16", "int8"])
def test_token_by_token_gives_the_bits_of_one_call_in_every_cache(models, cache_dtype):
    """Over more tokens than the cache was made for, again and again."""
    path = models.ours(BASE, "int4").pack.path
    model = bloomq.BloomModel.from_pretrained(path, backend="numba", cache_dtype=cache_dtype)
    ids, mask = ids_of(BASE, 2, 150), padded("left", 2, 150)
    found, past = in_pieces(model, ids, mask, list(range(1, 150)))
    assert found.tobytes() == model(ids, attention_mask=mask)[0].tobytes()
    assert past.get_seq_length() == 150


def test_continuing_equals_the_whole_text_on_the_reference_backend(models):
    model = models.ours(BASE, backend="reference")
    ids, mask = ids_of(BASE, 3, 14), padded("middle", 3, 14)
    found, _ = in_pieces(model, ids, mask, [1, 6])
    # BLAS sums a product of other shape in another order.
    assert found == pytest.approx(model(ids, attention_mask=mask)[0], abs=1e-5)


def test_a_past_without_a_mask_is_of_real_tokens(models):
    model, ids = models.ours(BASE), ids_of(BASE, 2, 9)
    past = model(ids[:, :4]).past_key_values
    found = model(ids[:, 4:], attention_mask=np.ones((2, 9)), past_key_values=past)
    assert found[0].tobytes() == model(ids)[0][:, 4:].tobytes()


def test_embeddings_continue_a_past_as_ids_do(models):
    model, ids = models.ours(BASE), ids_of(BASE, 2, 9)
    past = model(ids[:, :4]).past_key_values
    embeds = model.get_input_embeddings()(ids[:, 4:])
    found = model(inputs_embeds=embeds, past_key_values=past)[0]
    assert found.tobytes() == model(ids)[0][:, 4:].tobytes()


def test_a_past_goes_from_one_class_to_another_of_the_same_model(models):
    causal, ids = models.ours(Spec(n_head=3)), ids_of(BASE, 2, 9)
    base = bloomq.BloomModel.from_pretrained(causal.pack.path, backend="numba")
    past = base(ids[:, :4]).past_key_values
    found = causal(ids[:, 4:], past_key_values=past).logits
    assert found.tobytes() == causal(ids).logits[:, 4:].tobytes()


def test_a_past_is_changed_in_place_and_ends_where_the_last_call_did(models):
    model, ids = models.ours(BASE), ids_of(BASE, 2, 9)
    past = model(ids[:, :4]).past_key_values
    assert past.get_seq_length() == 4
    assert model(ids[:, 4:], past_key_values=past).past_key_values is past
    assert past.get_seq_length() == 9
    assert past.cache.lengths.tolist() == [9, 9]


# -- a call that fails -----------------------------------------------------------------------------


def test_a_call_that_fails_midway_leaves_the_past_as_it_was(models, monkeypatch):
    """3 x 6 tokens in steps of 4: the third step fails."""
    model, ids = models.ours(BASE), ids_of(BASE, 3, 10)
    past = model(ids[:, :4]).past_key_values
    monkeypatch.setattr(type(model.backend), "step_tokens", 4)
    step, calls = model.head._step, []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise NumericError("not finite")
        return step(*args)

    monkeypatch.setattr(model.head, "_step", failing)
    with pytest.raises(NumericError, match="not finite"):
        model(ids[:, 4:], past_key_values=past)
    assert len(calls) == 3
    assert past.get_seq_length() == 4
    assert past.cache.lengths.tolist() == [4, 4, 4]
    monkeypatch.undo()
    found = model(ids[:, 4:], past_key_values=past)[0]
    assert found.tobytes() == model(ids)[0][:, 4:].tobytes()


def test_logits_of_many_tokens_come_in_steps_with_the_same_bits(models, monkeypatch):
    """Rows of 40, 23 and 40 tokens. Where 16 tokens' logits are all that a step may give, steps of
    which more are wanted are cut; of which fewer are, such as the last of each row, run whole."""
    model, ids = models.ours(Spec(n_head=3)), ids_of(BASE, 3, 40)
    mask = np.ones((3, 40), np.int64)
    mask[1, :17] = 0
    whole, last = model(ids, attention_mask=mask)[0], model(ids, logits_to_keep=1)[0]
    step, wanted = model.head._step, []

    def counted(ids: Any, cache: Any, span: Any, index: Any) -> Any:
        wanted.append((len(ids), len(index)))
        return step(ids, cache, span, index)

    monkeypatch.setattr(model.head, "_step", counted)
    monkeypatch.setattr(forward, "RESULT_BYTES", 4 * 16 * model.head.columns)
    assert model(ids, attention_mask=mask)[0].tobytes() == whole.tobytes()
    assert wanted == [(16, 16)] * 6 + [(7, 7)]
    wanted.clear()
    assert model(ids, logits_to_keep=1)[0].tobytes() == last.tobytes()
    assert wanted == [(120, 3)]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another batch": (
        {"input_ids": [[5]], "attention_mask": None}, r"1 rows, past_key_values has 3$"
    ),
    "a mask of the new tokens alone": (
        {"attention_mask": np.ones((3, 2))},
        r"attention_mask is \[3, 2\], expected \[3, 6\] as the tokens with 4 past columns$",
    ),
    "a mask of the past alone": (
        {"attention_mask": np.ones((3, 4))},
        r"attention_mask is \[3, 4\], expected \[3, 6\] as the tokens with 4 past columns$",
    ),
    "a mask that hides what was shown": (
        {"attention_mask": np.pad(np.zeros((3, 1)), ((0, 0), (0, 5)), constant_values=1)},
        r"attention_mask differs from the one that past_key_values was made with$",
    ),
    "an id beyond": ({"input_ids": [[5, 97]] * 3}, r"token id 97, expected 0 to 96$"),
    "nothing but padding": (
        {"attention_mask": np.pad(np.ones((3, 4)), ((0, 0), (0, 2)))},
        r"attention_mask hides every token: nothing to compute$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_a_past_is_refused_and_leaves_it_as_it_was(models, what):
    changed, expected = REFUSED[what]
    model, ids = models.ours(BASE), ids_of(BASE, 3, 6)
    past = model(ids[:, :4]).past_key_values
    with pytest.raises(UsageError, match=f"^{expected}"):
        model(**{"input_ids": ids[:, 4:], "past_key_values": past, **changed})
    assert past.get_seq_length() == 4
    found = model(ids[:, 4:], past_key_values=past)[0]
    assert found.tobytes() == model(ids)[0][:, 4:].tobytes()


@pytest.mark.parametrize("past", [(), (np.zeros((2, 3)),), "past", 5], ids=repr)
def test_a_past_is_what_an_earlier_call_returned(models, past):
    name = type(past).__name__
    expected = f"^past_key_values is a {name}, expected what an earlier call returned$"
    with pytest.raises(UsageError, match=expected):
        models.ours(BASE)([[5]], past_key_values=past)


OTHERS = {
    "more layers": Spec(kind="BloomModel", n_head=3, n_layer=3),
    "fewer heads": Spec(kind="BloomModel", n_head=2, head_dim=12),
    "narrower heads": Spec(kind="BloomModel", n_head=3, head_dim=4),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_past_of_another_model_is_refused(models, other):
    """Kernels would read and write beyond its memory."""
    past = models.ours(OTHERS[other])([[5, 6]]).past_key_values
    expected = "^past_key_values is of a model with other layers, heads or adapters, or on another"
    with pytest.raises(UsageError, match=expected):
        models.ours(BASE)([[7]], past_key_values=past)
    assert past.get_seq_length() == 2


def test_a_past_of_another_backend_or_cache_dtype_is_refused(models):
    model = models.ours(BASE)
    halved = bloomq.BloomModel.from_pretrained(model.pack.path, backend="numba", cache_dtype="int8")
    for other in (models.ours(BASE, backend="reference"), halved):
        past = other([[5, 6]]).past_key_values
        for one, its in ((model, past), (other, model([[5, 6]]).past_key_values)):
            with pytest.raises(UsageError, match=r"or on another backend: start a new one$"):
                one([[7]], past_key_values=its)
