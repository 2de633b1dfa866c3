"""`BloomForCausalLM.generate` against transformers': the same tokens, the same array."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from models import DEMO
from oracle import Models, Spec, ids_of, one_torch_thread, padded, tensor, torch, transformers

import bloomq
from bloomq.errors import BloomqError, UsageError

# A head of its own: a random model whose head is its embedding repeats the last token for ever.
SPEC = Spec(tied=False)
VARIANTS = {
    "4 heads": SPEC,
    "tied": Spec(),
    "3 heads": Spec(n_head=3, head_dim=12, tied=False, seed=1),
    "12 heads, post-norm": Spec(n_head=12, post_norm=True, tied=False, seed=2),
    "no padding": Spec(pad=None, tied=False, seed=3),
}
PROMPTS = ["Once upon a time", "Hello my name is", "def main(", "Il était une fois dans la ville"]


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def demo(pack_of: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """The trained demo: ours, transformers' and its tokenizer, which pads on the left."""
    ours = bloomq.BloomForCausalLM.from_pretrained(pack_of("f32"))
    theirs = transformers.BloomForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    return ours, theirs, transformers.AutoTokenizer.from_pretrained(DEMO)


def generated(theirs: Any, ids: np.ndarray, mask: np.ndarray | None = None, **options: Any) -> Any:
    """Of transformers, greedy unless asked otherwise."""
    with torch.no_grad():
        given = {} if mask is None else {"attention_mask": tensor(mask)}
        return theirs.generate(tensor(ids), **given, **{"do_sample": False, **options}).numpy()


# -- greedy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_of_left_padded_batches_are_those_of_transformers(models, variant):
    spec, mask = VARIANTS[variant], padded("left", 4, 13)
    ids = np.where(mask == 1, ids_of(spec, 4, 13), 3)
    found = models.ours(spec).generate(ids, mask, max_new_tokens=40)
    expected = generated(models.theirs(spec), ids, mask, max_new_tokens=40)
    assert found.dtype == np.int64
    assert np.array_equal(found, expected)


def test_text_of_the_demo_is_that_of_transformers(demo):
    """Four prompts of different length in one left-padded batch, as a tokenizer gives them."""
    ours, theirs, tokenizer = demo
    batch = tokenizer(PROMPTS, return_tensors="np", padding=True)
    found = ours.generate(**{k: batch[k] for k in ("input_ids", "attention_mask")}, max_length=50)
    expected = generated(theirs, batch["input_ids"], batch["attention_mask"], max_length=50)
    assert np.array_equal(found, expected)
    assert found.shape == (4, 50)
    texts = tokenizer.batch_decode(found, skip_special_tokens=True)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, PROMPTS, strict=True))


def test_the_same_prompt_twice_gives_the_same_text_twice(demo):
    ours, _, tokenizer = demo
    ids = np.array([tokenizer(PROMPTS[0])["input_ids"]] * 2)
    found = ours.generate(ids, max_length=50)
    assert np.array_equal(found[0], found[1])


def test_a_padded_prompt_gives_the_text_of_the_prompt_alone(demo):
    ours, _, tokenizer = demo
    batch = tokenizer(PROMPTS, return_tensors="np", padding=True)
    found = ours.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=40)
    width = batch["input_ids"].shape[1]
    for row, prompt in enumerate(PROMPTS):
        alone = np.array([tokenizer(prompt)["input_ids"]])
        expected = ours.generate(alone, max_new_tokens=40)[0, alone.shape[1] :]
        assert np.array_equal(found[row, width:], expected)


def test_the_load_interface_gives_the_same_tokens(demo, pack_of):
    ours, _, tokenizer = demo
    ids = tokenizer(PROMPTS[0])["input_ids"]
    expected = bloomq.load(pack_of("f32")).generate(PROMPTS[0], max_new_tokens=30).ids
    assert tuple(ours.generate(ids, max_new_tokens=30)[0, len(ids) :]) == expected


def test_greedy_tokens_are_the_best_of_recomputed_logits(models):
    """Each token is the likeliest behind all before it, by a call without a cache."""
    ours, ids = models.ours(SPEC), ids_of(SPEC, 2, 5)
    found = ours.generate(ids, max_new_tokens=30)
    logits = ours(found[:, :-1]).logits[:, 4:]
    assert np.array_equal(logits.argmax(axis=-1), found[:, 5:])


# -- where a text ends -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ending(models: Models) -> tuple[np.ndarray, int]:
    """Two prompts and a token that ends the first early and does not occur in the second."""
    ids = ids_of(SPEC, 12, 6)
    new = models.ours(SPEC).generate(ids, max_new_tokens=30)[:, 6:]
    for first, second in permutations(range(12), 2):
        for token in set(new[first, 3:20]) - set(new[first, :3]) - set(new[second]):
            return ids[[first, second]], int(token)
    raise AssertionError("no such prompts: try another seed")


@pytest.mark.parametrize("pad", [None, 3, 11])
def test_a_row_that_ended_is_filled_up_as_in_transformers(models, ending, pad):
    ids, end = ending
    options = {"max_new_tokens": 30, "eos_token_id": end}
    if pad is not None:
        options["pad_token_id"] = pad
    found = models.ours(SPEC).generate(ids, **options)
    assert np.array_equal(found, generated(models.theirs(SPEC), ids, np.ones((2, 6)), **options))
    stop = list(found[0, 6:]).index(end)
    assert 3 <= stop < 20
    assert set(found[0, 6 + stop + 1 :]) == {3 if pad is None else pad}


def test_a_model_without_padding_fills_up_with_the_end_token(models):
    spec = VARIANTS["no padding"]
    ids, ours = ids_of(spec, 2, 6), models.ours(spec)
    plain = ours.generate(ids, max_new_tokens=20)[:, 6:]
    end = next(int(t) for t in plain[0] if t not in plain[1])
    options = {"max_new_tokens": 20, "eos_token_id": end}
    found = ours.generate(ids, **options)
    assert np.array_equal(found, generated(models.theirs(spec), ids, np.ones((2, 6)), **options))
    assert found[0, -1] == end


def test_a_text_ends_at_whichever_end_token_comes_first(models, ending):
    ids, end = ending
    options = {"max_new_tokens": 30, "eos_token_id": [90, end, 91]}
    found = models.ours(SPEC).generate(ids, **options)
    assert np.array_equal(found, generated(models.theirs(SPEC), ids, np.ones((2, 6)), **options))
    kinds = (np.int64(end), (end,), [np.int32(end)])
    alone = models.ours(SPEC).generate(ids, max_new_tokens=30, eos_token_id=end)
    for kind in kinds:
        again = models.ours(SPEC).generate(ids, max_new_tokens=30, eos_token_id=kind)
        assert np.array_equal(again, alone)


def test_the_array_is_as_long_as_the_longest_row(models, ending):
    ids, end = ending
    found = models.ours(SPEC).generate(ids[:1], max_new_tokens=30, eos_token_id=end)
    expected = generated(models.theirs(SPEC), ids[:1], max_new_tokens=30, eos_token_id=end)
    assert np.array_equal(found, expected)
    assert found[0, -1] == end
    assert found.shape[1] < 36


def test_lengths_are_counted_as_in_transformers(models):
    ours, theirs, ids = models.ours(SPEC), models.theirs(SPEC), ids_of(SPEC, 2, 6)
    for options in ({}, {"max_length": 17}, {"max_new_tokens": 5, "max_length": 9}):
        found = ours.generate(ids, **options)
        assert np.array_equal(found, generated(theirs, ids, **options)), options
    assert ours.generate(ids).shape == (2, 26)
    assert ours.generate(ids, max_length=np.int8(120)).shape == (2, 120)


def test_padding_of_prompts_is_found_without_a_mask_as_in_transformers(models):
    spec, mask = SPEC, padded("left", 3, 9)
    ids = np.where(mask == 1, ids_of(spec, 3, 9), 3)
    found = models.ours(spec).generate(ids, max_new_tokens=30)
    assert np.array_equal(found, generated(models.theirs(spec), ids, max_new_tokens=30))
    assert np.array_equal(found, models.ours(spec).generate(ids, mask, max_new_tokens=30))


def test_padding_that_ends_texts_too_is_not_hidden_as_in_transformers(models):
    spec, mask = SPEC, padded("left", 3, 9)
    ids = np.where(mask == 1, ids_of(spec, 3, 9), 3)
    options = {"max_new_tokens": 30, "eos_token_id": 3}
    found = models.ours(spec).generate(ids, **options)
    assert np.array_equal(found, generated(models.theirs(spec), ids, **options))
    hidden = models.ours(spec).generate(ids, mask, **options)
    assert not np.array_equal(found, hidden)


# -- penalties and draws ---------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.3, 5.0, 0.7])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_repetition_penalty_is_that_of_transformers(models, variant, penalty):
    spec = VARIANTS[variant]
    ids, options = ids_of(spec, 3, 9), {"max_new_tokens": 40, "repetition_penalty": penalty}
    found = models.ours(spec).generate(ids, **options)
    assert np.array_equal(found, generated(models.theirs(spec), ids, **options))


def test_a_repetition_penalty_of_the_demo_is_that_of_transformers(demo):
    ours, theirs, tokenizer = demo
    ids = tokenizer([PROMPTS[0]], return_tensors="np")["input_ids"]
    options = {"max_new_tokens": 60, "repetition_penalty": 1.2}
    assert np.array_equal(ours.generate(ids, **options), generated(theirs, ids, **options))


def test_a_seed_makes_the_same_tokens_and_several_sequences_differ(models):
    ours, ids = models.ours(SPEC), ids_of(SPEC, 2, 5)
    options = {"max_new_tokens": 12, "do_sample": True, "num_return_sequences": 3}
    first = ours.generate(ids, seed=1, **options)
    assert first.shape == (6, 17)
    assert np.array_equal(first[:, :5], np.repeat(ids, 3, axis=0))
    assert np.array_equal(first, ours.generate(ids, seed=1, **options))
    assert not np.array_equal(first, ours.generate(ids, seed=2, **options))
    assert len({row.tobytes() for row in first}) == 6


def test_a_draw_from_one_candidate_is_the_greedy_token(models):
    ours, ids = models.ours(SPEC), ids_of(SPEC, 2, 5)
    greedy = ours.generate(ids, max_new_tokens=20)
    for only in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3, "top_k": 0}):
        found = ours.generate(ids, max_new_tokens=20, do_sample=True, seed=5, **only)
        assert np.array_equal(found, greedy), only


def test_what_is_drawn_is_among_the_candidates_of_transformers(models):
    """top_k, then top_p, of logits / temperature."""
    ours, ids = models.ours(SPEC), ids_of(SPEC, 1, 5)
    scores = torch.tensor(ours(ids).logits[:, -1])
    for warper in (
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(9),
        transformers.TopPLogitsWarper(0.8),
    ):
        scores = warper(torch.tensor(ids), scores)
    allowed = set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())
    options = {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "num_return_sequences": 300}
    drawn = ours.generate(ids, max_new_tokens=1, do_sample=True, seed=0, **options)[:, -1]
    assert 1 < len(allowed) < 9
    assert set(drawn.tolist()) == allowed  # the rarest of them has more than 1 in 100


# -- streamers -------------------------------------------------------------------------------------


class Heard:
    """A streamer that remembers."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.ended = 0

    def put(self, value: Any) -> None:
        assert not self.ended
        self.values.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_hears_what_it_hears_of_transformers(models):
    ours, theirs = Heard(), Heard()
    ids = ids_of(SPEC, 1, 6)
    out = models.ours(SPEC).generate(ids, max_new_tokens=25, streamer=ours)
    generated(models.theirs(SPEC), ids, max_new_tokens=25, streamer=theirs)
    assert ours.values == theirs.values
    assert ours.ended == theirs.ended == 1
    assert ours.values == [ids.tolist(), *([t] for t in out[0, 6:].tolist())]


def test_text_streamers_of_transformers_work_with_our_model(demo, capsys):
    ours, theirs, tokenizer = demo
    ids = tokenizer([PROMPTS[0]], return_tensors="np")["input_ids"]
    printed = []
    for make in (lambda s: ours.generate(ids, max_new_tokens=30, streamer=s),
                 lambda s: generated(theirs, ids, max_new_tokens=30, streamer=s)):  # fmt: skip
        make(transformers.TextStreamer(tokenizer, skip_prompt=True))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert len(printed[0]) > 40


def test_a_streamer_takes_one_sequence(models):
    with pytest.raises(UsageError, match=r"^a streamer takes one sequence, found 2$"):
        models.ours(SPEC).generate(ids_of(SPEC, 2, 5), streamer=Heard())


# -- searched, edited ------------------------------------------------------------------------------

EDITED: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[5], [7, 8]]},
    {"min_new_tokens": 6, "eos_token_id": [9, 11, 20]},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
]


@pytest.mark.parametrize("options", EDITED, ids=str)
def test_edited_tokens_are_those_of_transformers(models, options):
    ids = ids_of(SPEC, 3, 9)
    ours = models.ours(SPEC).generate(ids, max_new_tokens=12, pad_token_id=3, **options)
    expected = generated(models.theirs(SPEC), ids, max_new_tokens=12, pad_token_id=3, **options)
    assert ours.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.0},
     {"num_beams": 2, "early_stopping": True, "eos_token_id": [9, 11, 20, 33]},
     {"num_beams": 3, "repetition_penalty": 1.2, "min_new_tokens": 4}],
    ids=str,
)  # fmt: skip
def test_beams_of_left_padded_batches_are_those_of_transformers(models, options):
    ids, mask = ids_of(SPEC, 4, 13), padded("left", 4, 13)
    given = {"max_new_tokens": 10, "pad_token_id": 3, **options}
    ours = models.ours(SPEC).generate(ids, mask, **given)
    assert ours.tolist() == generated(models.theirs(SPEC), ids, mask, **given).tolist()


def test_contrastive_search_of_a_batch_is_that_of_each_prompt(models):
    ids, model = ids_of(SPEC, 2, 7), models.ours(SPEC)
    both = model.generate(ids, penalty_alpha=0.6, top_k=4, max_new_tokens=8)
    for row, prompt in zip(both, ids, strict=True):
        alone = model.generate([prompt], penalty_alpha=0.6, top_k=4, max_new_tokens=8)
        assert row.tolist() == alone[0].tolist()


# -- refused ---------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 0}, r"num_beams is 0, expected 1 to 4096$"),
    ({"num_beams": 2, "do_sample": True}, r"beam search with temperature 1\.0, expected 0"),
    ({"num_beams": 2, "num_return_sequences": 3}, r"num_return_sequences is 3, expected 1 to num"),
    ({"penalty_alpha": 2.0}, r"penalty_alpha is 2\.0, expected 0 to 1$"),
    ({"min_new_tokens": -1}, r"min_new_tokens is -1, expected a whole number from 0$"),
    ({"num_return_sequences": 2}, r"num_return_sequences is 2, expected 1, or more with do_sample"),
    ({"num_return_sequences": 0, "do_sample": True}, r"num_return_sequences is 0, expected 1, or"),
    ({"num_return_sequences": "2", "do_sample": True}, r"num_return_sequences is '2', expected 1"),
    ({"num_return_sequences": 1.0}, r"num_return_sequences is 1\.0, expected 1, or more with"),
    ({"max_new_tokens": 0}, r"max_new_tokens is 0, expected a whole number from 1$"),
    ({"max_new_tokens": "5"}, r"max_new_tokens is '5', expected a whole number from 1$"),
    ({"max_new_tokens": 2.5}, r"max_new_tokens is 2\.5, expected a whole number from 1$"),
    ({"max_length": True}, r"max_length is True, expected a whole number from 1$"),
    ({"max_length": 5}, r"max_length is 5, the prompts have 5 already: raise it, or pass max_new"),
    ({"eos_token_id": "a"}, r"eos_token_id is 'a', expected a token id or a list of them$"),
    ({"eos_token_id": [1, 2.5]}, r"eos_token_id is \[1, 2\.5\], expected a token id or a list"),
    ({"pad_token_id": "a"}, r"pad_token_id is 'a', expected a token id$"),
    ({"temperature": -1.0, "do_sample": True}, r"temperature is -1\.0, expected 0 \(greedy\) to"),
    ({"top_k": -1, "do_sample": True}, r"top_k is -1, expected a whole number, 0 for all$"),
    ({"top_p": 0.0, "do_sample": True}, r"top_p is 0\.0, expected above 0, at most 1$"),
    ({"repetition_penalty": 0.0}, r"repetition_penalty is 0\.0, expected 0\.001 to 1000$"),
    ({"seed": -1}, r"seed is -1, expected a whole number from 0$"),
    ({"attention_mask": [[1] * 5, [0] * 5]}, r"a prompt has no token that attention_mask leaves$"),
    ({"attention_mask": [[1] * 4] * 2}, r"attention_mask is \[2, 4\], expected \[2, 5\] as the"),
    ({"input_ids": [[97]]}, r"token id 97, expected 0 to 96$"),
    ({"input_ids": [[3, 3], [5, 6]]}, r"a prompt has no token that attention_mask leaves$"),
    ({"input_ids": None}, r"found neither of input_ids and inputs_embeds, expected one of them$"),
]


@pytest.mark.parametrize(("given", "expected"), WRONG, ids=str)
def test_what_cannot_be_is_refused_in_one_line(models, given, expected):
    with pytest.raises(BloomqError, match=f"^{expected}") as caught:
        models.ours(SPEC).generate(**{"input_ids": ids_of(SPEC, 2, 5), **given})
    assert isinstance(caught.value, UsageError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("unknown", ["min_length", "past_key_values", "max_tokens", "stop"])
def test_an_unknown_argument_is_refused_and_not_ignored(models, unknown):
    with pytest.raises(TypeError, match=unknown):
        models.ours(SPEC).generate([[5]], **{unknown: 5})


def test_do_sample_is_a_truth_value(models):
    with pytest.raises(UsageError, match=r"^do_sample is 'no', expected True or False$"):
        models.ours(Spec()).generate([[5, 6]], do_sample="no")


def test_options_that_are_none_are_switched_off(models):
    model = models.ours(Spec())
    off = model.generate(
        [[5, 6]], do_sample=True, temperature=None, top_k=None, top_p=None, repetition_penalty=None,
        seed=3, use_cache=True,
    )  # fmt: skip
    plain = model.generate([[5, 6]], do_sample=True, top_k=0, seed=3, temperature=np.float32(1))
    assert off.tolist() == plain.tolist()
