"""`bloomq.load` and the model it returns: what is chosen, what is computed, what is refused."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from models import DEMO, Tiny, checkpoint, copied, pack

import bloomq
from bloomq.errors import (
    BackendError,
    CapacityError,
    InputNotFound,
    PackError,
    TokenizerError,
    UsageError,
)  # fmt: skip
from bloomq.language_model import LanguageModel
from bloomq.layers import Span
from bloomq.loading import demo_pack

TINY = Tiny(n_head=4, head_dim=8, vocab_size=131, seq_length=96)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    return bloomq.load()


@pytest.fixture(scope="module")
def tiny(base: Path) -> LanguageModel:
    """A model without a tokenizer."""
    return bloomq.load(pack(base, TINY, "int4"))


# -- what load returns -----------------------------------------------------------------------------


def test_without_a_path_the_embedded_demo_is_loaded(demo: LanguageModel):
    assert demo.pack.path == demo_pack()
    assert demo.tokenizer is not None
    assert demo.generate("Once upon a time", max_new_tokens=4).text


def test_a_model_says_its_backend_reason_and_load_time(demo: LanguageModel):
    assert demo.backend.name in bloomq.backends.available()
    assert demo.backend_reason.startswith("auto: the fastest available here; ")
    assert demo.backend.description in demo.backend_reason
    assert demo.load_s > 0


def test_the_context_is_what_the_model_was_trained_on_unless_given(base: Path):
    path = pack(base, TINY, "int4")
    assert bloomq.load(path).context == 96
    assert bloomq.load(path, context=4000).context == 4000
    assert bloomq.load(str(path), backend="reference", threads=1).backend.name == "reference"


@pytest.mark.parametrize("context", [0, 1, -5, 1.5, True, "2048", 2**24 + 1, 2**62])
def test_an_impossible_context_is_refused(base: Path, context):
    expected = f"^context is {context!r}, expected 2 to 16777216 tokens$"
    with pytest.raises(UsageError, match=expected):
        bloomq.load(pack(base, TINY, "int4"), context=context)


@pytest.mark.parametrize("context", [2, 2**24, np.int64(300)], ids=str)
def test_a_context_may_be_any_possible_whole_number(base: Path, context):
    model = bloomq.load(pack(base, TINY, "int4"), context=context)
    assert model.context == context
    assert len(model.generate([5], max_new_tokens=1).ids) == 1


def test_an_impossible_cache_dtype_is_refused(base: Path):
    with pytest.raises(UsageError, match=r"^cache_dtype is 'q4', expected auto, f16, f32 or int8$"):
        bloomq.load(pack(base, TINY, "int4"), cache_dtype="q4")


def test_a_cache_dtype_may_be_asked_for(base: Path):
    model = bloomq.load(pack(base, TINY, "int4"), backend="numba", cache_dtype="f32")
    assert model.backend.description.endswith("f32 cache")


def test_a_path_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(InputNotFound, match=r"no such pack: make one with 'bloomq convert'$"):
        bloomq.load(tmp_path / "nothing")


def test_a_checkpoint_is_not_a_pack(base: Path):
    with pytest.raises(PackError, match=r"not a pack"):
        bloomq.load(checkpoint(base, TINY))


def test_a_wrong_backend_or_thread_count_is_refused(base: Path):
    path = pack(base, TINY, "int4")
    with pytest.raises(BackendError, match=r"^unknown backend 'gpu', expected auto, numba, cuda"):
        bloomq.load(path, backend="gpu")
    with pytest.raises(UsageError, match=r"^threads is 0, expected 1 to "):
        bloomq.load(path, backend="numba", threads=0)


def test_a_tokenizer_of_a_larger_vocabulary_belongs_to_another_model(base: Path):
    """Its ids would lie outside the embedding."""
    small = Tiny(vocab_size=300)
    folder = checkpoint(base, small, tokenizer=DEMO / "tokenizer.json")
    path = pack(base, folder, "int8")
    expected = "8192 tokens, the model has 300: it belongs to another model$"
    with pytest.raises(TokenizerError, match=expected) as caught:
        bloomq.load(path)
    assert str(caught.value).startswith(str(path / "tokenizer.json"))


def test_text_needs_a_tokenizer(tiny: LanguageModel):
    expected = re.escape(f"{tiny.pack.path}: has no tokenizer.json: pass token ids, not text")
    for call in (tiny.generate, tiny.stream, tiny.prompt_ids):
        with pytest.raises(PackError, match=f"^{expected}$"):
            call("text")


def test_stop_strings_need_a_tokenizer(tiny: LanguageModel):
    for call in (tiny.generate, tiny.stream):
        with pytest.raises(
            UsageError, match=r"^stop strings need a tokenizer, which this pack has not$"
        ):
            call([1, 2], stop="x")


@pytest.mark.parametrize("stop", ["", ["a", ""], [1], [None], ("x", b"y")], ids=str)
def test_stop_strings_are_not_empty_and_are_strings(demo: LanguageModel, stop):
    for call in (demo.generate, demo.stream):
        with pytest.raises(
            UsageError, match=r"^stop is .*, expected strings of at least one character$"
        ):
            call("a", stop=stop)


@pytest.mark.parametrize(
    "prompt", [5, None, range(3), [1.5], [True], np.ones((1, 2), int)], ids=str
)
def test_one_prompt_is_text_or_whole_numbers(tiny: LanguageModel, prompt):
    for call in (tiny.stream, tiny.prompt_ids):
        with pytest.raises(UsageError) as caught:
            call(prompt)
        expected = f"prompt is {prompt!r:.80}, expected text or a list of token ids"
        assert str(caught.value) == expected


# -- logits ----------------------------------------------------------------------------------------


def test_one_row_of_ids_is_a_batch_of_one(tiny: LanguageModel):
    one = tiny([3, 1, 4]).logits
    assert one.shape == (1, 3, 131)
    assert one.dtype == np.float32
    assert one.tobytes() == tiny([[3, 1, 4]]).logits.tobytes()


def test_ids_of_any_integer_type_are_taken(tiny: LanguageModel):
    expected = tiny([[3, 1, 4]]).logits.tobytes()
    for dtype in (np.uint8, np.int16, np.int32, np.uint64):
        assert tiny(np.array([[3, 1, 4]], dtype)).logits.tobytes() == expected


def test_masked_positions_have_zero_logits_and_no_influence(tiny: LanguageModel):
    ids = np.array([[7, 7, 3, 1, 4], [9, 8, 7, 6, 5]])
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 0, 1, 0]])
    found = tiny(ids, mask).logits
    assert not found[mask == 0].any()
    assert found[0, 2:].tobytes() == tiny([3, 1, 4]).logits[0].tobytes()
    assert found[1, [0, 1, 3]].tobytes() == tiny([9, 8, 6]).logits[0].tobytes()


def test_a_masked_id_may_be_anything(tiny: LanguageModel):
    found = tiny([[-1, 3], [10**6, 4]], [[0, 1], [0, 1]]).logits
    assert found[0, 1].tobytes() == tiny([3]).logits[0, 0].tobytes()


def test_a_row_that_is_hidden_wholly_has_zero_logits(tiny: LanguageModel):
    found = tiny([[1, 2], [3, 4]], [[0, 0], [1, 1]]).logits
    assert not found[0].any()
    assert found[1].tobytes() == tiny([3, 4]).logits[0].tobytes()


@pytest.mark.parametrize("backend", bloomq.backends.available())
def test_a_step_gives_the_logits_asked_for_alone(base: Path, backend: str):
    lm = bloomq.load(pack(base, TINY, "f32"), backend=backend).head
    ids, span = np.array([3, 1, 4, 1, 5]), Span.of([0, 1], [3, 2])
    every = np.array(lm.backend.numpy(lm.step(ids, lm.cache(2, 16), span, np.arange(5))))
    some = np.array(lm.backend.numpy(lm.step(ids, lm.cache(2, 16), span, span.last)))
    assert some == pytest.approx(every[[2, 4]], abs=1e-4)


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([], r"float64 \[1, 0\]"),
        ([[]], r"float64 \[1, 0\]"),
        ([1.0, 2.0], r"float64 \[1, 2\]"),
        ([True, False], r"bool \[1, 2\]"),
        ([[[1]]], r"int64 \[1, 1, 1\]"),
        (["a"], r"<U1 \[1, 1\]"),
        ([2**70], r"object \[1, 1\]"),
        (np.zeros((2, 0), np.int64), r"int64 \[2, 0\]"),
    ],
    ids=str,
)
def test_ids_of_a_wrong_shape_or_type_are_refused(tiny: LanguageModel, ids, found):
    with pytest.raises(UsageError, match=f"^input_ids is {found}, expected whole numbers of shape"):
        tiny(ids)


def test_ragged_ids_are_refused_with_the_remedy(tiny: LanguageModel):
    with pytest.raises(
        UsageError, match=r"^input_ids has rows of different lengths: pad them and pass"
    ):
        tiny([[1, 2], [3]])


@pytest.mark.parametrize("wrong", [-1, 131, 2**40])
def test_an_id_outside_the_vocabulary_is_named(tiny: LanguageModel, wrong):
    with pytest.raises(UsageError, match=f"^token id {wrong}, expected 0 to 130$"):
        tiny([[1, 2], [3, wrong]])


@pytest.mark.parametrize("mask", [[1], [[1, 1, 1]], [[1], [1]], 1, [[[1, 1]]]], ids=str)
def test_a_mask_of_another_shape_is_refused(tiny: LanguageModel, mask):
    shape = list(np.atleast_2d(np.asarray(mask)).shape)
    expected = re.escape(f"attention_mask is {shape}, expected [1, 2] as the tokens")
    with pytest.raises(UsageError, match=f"^{expected}$"):
        tiny([1, 2], mask)


def test_a_mask_that_hides_everything_is_refused(tiny: LanguageModel):
    with pytest.raises(UsageError, match=r"^attention_mask hides every token: nothing to compute$"):
        tiny([[1, 2]], [[0, 0]])


# -- found wanting ---------------------------------------------------------------------------------


def test_a_ragged_mask_is_refused_in_our_words(tiny: LanguageModel):
    with pytest.raises(UsageError, match=r"^attention_mask has rows of different lengths$"):
        tiny([[1, 2], [3, 4]], [[1], [1, 1]])


@pytest.mark.parametrize(
    "mask", [["a", "b"], [np.nan, 1.0], [1, 2], [0, -1], [0.5, 1], [None, 1], [1j, 1]], ids=str
)
def test_a_mask_that_holds_more_than_0_and_1_is_refused(tiny: LanguageModel, mask):
    expected = r"^attention_mask holds other values than 0 and 1$"
    with pytest.raises(UsageError, match=expected):
        tiny([1, 2], mask)


def test_a_mask_may_be_of_truth_values_or_of_floats(tiny: LanguageModel):
    expected = tiny([[7, 3, 1]], [[0, 1, 1]]).logits.tobytes()
    for dtype in (bool, np.uint8, np.float32, np.float64):
        assert tiny([[7, 3, 1]], np.array([[0, 1, 1]], dtype)).logits.tobytes() == expected


def test_an_id_beyond_int64_is_named_as_given(tiny: LanguageModel):
    with pytest.raises(UsageError, match=f"^token id {2**63 + 5}, "):
        tiny(np.array([2**63 + 5], np.uint64))


def test_a_truth_value_is_not_a_number_of_threads(base: Path):
    with pytest.raises(UsageError, match=r"^threads is True, expected 1 to "):
        bloomq.load(pack(base, TINY, "int4"), backend="numba", threads=True)


@pytest.mark.parametrize(("backend", "tokens"), [("numba", 2**60), ("reference", 10**13)])
def test_a_cache_beyond_memory_is_a_capacity_error(base: Path, backend: str, tokens: int):
    model = bloomq.load(pack(base, TINY, "int4"), backend=backend)
    expected = r"^no memory for a cache of \d+\.\d GB: ask for fewer tokens or rows$"
    with pytest.raises(CapacityError, match=expected):
        model.head.cache(1, tokens)


def test_a_pack_is_not_changed_by_being_loaded_and_used(base: Path, tmp_path: Path):
    path = copied(pack(base, TINY, "int4"), tmp_path / "pack")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    bloomq.load(path).generate([1, 2, 3], max_new_tokens=3)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_a_context_beyond_the_training_is_warned_of():
    with pytest.warns(UserWarning, match="trained on 2048: beyond them ALiBi extrapolates"):
        assert bloomq.load(context=4096).context == 4096
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bloomq.load(context=2048)
