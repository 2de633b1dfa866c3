"""Guessed tokens change the speed and nothing else: text, logprobs and draws stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from models import Tiny, pack

import bloomq
from bloomq.errors import UsageError
from bloomq.generation import Engine, Reader, Request, read
from bloomq.language_model import LanguageModel
from bloomq.sampling import Sampler, Sampling
from bloomq.speculation import MOST_GUESSES, DraftModel, Lookup, Pace

PROMPTS = [
    "Once upon a time",
    "def f(x):\n    return x\n\ndef g(x):\n    return x\n\ndef h(x):\n",
    "La maison est",
]
OPTIONS = [
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 0.7, "seed": 5, "top_k": 40, "repetition_penalty": 1.2},
    {"temperature": 1.0, "seed": 7, "top_p": 0.9},
]


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    return bloomq.load()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_text_logprobs_and_draws_are_those_without_guesses(demo, options, kind):
    draft = "lookup" if kind == "lookup" else demo
    for prompt in PROMPTS:
        plain = demo.generate(prompt, max_new_tokens=60, **options)
        guessed = demo.generate(prompt, max_new_tokens=60, draft=draft, **options)
        assert guessed.ids == plain.ids
        assert guessed.logprobs == plain.logprobs
        assert guessed.text == plain.text
        assert guessed.finish_reason == plain.finish_reason


def test_a_batch_with_guesses_equals_singles_without(demo):
    singles = [demo.generate(prompt, max_new_tokens=40) for prompt in PROMPTS]
    batch = demo.generate(PROMPTS, max_new_tokens=40, draft="lookup")
    assert [g.ids for g in batch] == [g.ids for g in singles]


def test_a_stop_string_within_accepted_guesses_ends_the_text_there(demo):
    prompt = "one two three four one two three four one two"
    plain = demo.generate(prompt, max_new_tokens=60)
    stop = plain.text[5:8]
    expected = demo.generate(prompt, max_new_tokens=60, stop=stop)
    found = demo.generate(prompt, max_new_tokens=60, stop=stop, draft=demo)
    assert (found.text, found.ids, found.finish_reason) == (expected.text, expected.ids, "stop")


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9])
def test_no_more_tokens_than_asked_for_come_out(demo, tokens):
    for draft in ("lookup", demo):
        found = demo.generate("a b c a b c a b c a", max_new_tokens=tokens, draft=draft)
        assert len(found.ids) == tokens


def test_a_model_that_drafts_for_itself_is_always_right(demo):
    stats = demo.generate("Once upon a time", max_new_tokens=60, draft=demo).stats
    assert stats.guessed_tokens == stats.right_guesses > 40


def guessed(model, prompts, guesser, new_tokens) -> list[tuple[list[int], list[float]]]:
    """Ids and logprobs of prompts, each with a guesser of its own."""
    engine = Engine(model.head, context=model.context)
    readers = []
    for index, prompt in enumerate(prompts):
        sampler = Sampler(Sampling(), prompt, index, model.config.vocab_size)
        request = Request(
            prompt=tuple(prompt), max_new_tokens=new_tokens, sampler=sampler, guesser=guesser
        )
        readers.append(Reader(engine.sequence(request), None, ()))
    for _ in read(engine, readers):
        pass
    results = [reader.result(0.0) for reader in readers]
    return [(list(result.ids), list(result.logprobs)) for result in results]


def test_right_guesses_save_steps(demo, monkeypatch):
    """A guesser that knows the answer: steps of 4, then of 8, the largest block."""
    prompt = demo.prompt_ids("Once upon a time")
    answer = list(demo.generate(prompt, max_new_tokens=40).ids)

    class Knowing:
        def guess(self, ids: Sequence[int], most: int) -> list[int]:
            at = len(ids) - len(prompt)
            return answer[at : at + most]

    sizes, step = [], demo.head.step
    monkeypatch.setattr(
        demo.head, "step", lambda ids, *rest: sizes.append(len(ids)) or step(ids, *rest)
    )
    assert [ids for ids, _ in guessed(demo, [prompt], Knowing, 40)] == [answer]
    block = 1 + MOST_GUESSES
    assert sizes == [len(prompt), 4, block, block, block, block, 3]  # 1 + 4 + 4 * 8 + 3 = 40


def test_rows_of_a_batch_share_one_block_of_guesses(demo, monkeypatch):
    sizes, step = [], demo.head.step
    monkeypatch.setattr(
        demo.head, "step", lambda ids, *rest: sizes.append(len(ids)) or step(ids, *rest)
    )
    demo.generate([[5, 6, 5, 6, 5, 6]] * 3, max_new_tokens=20, draft=demo)
    assert max(sizes[1:]) <= 1 + MOST_GUESSES + 2  # the draft's own steps are of one token


def test_a_draft_whose_logits_are_no_numbers_guesses_nothing(demo, monkeypatch):
    def no_numbers(logits, k):
        best = top(logits, k)
        return type(best)(best.ids, best.logits, best.logsumexp * np.nan)

    drafter, top = DraftModel(demo.head, 50), demo.backend.top
    monkeypatch.setattr(demo.backend, "top", no_numbers)
    assert drafter.guess([5, 6, 7], 4) == []


def test_wrong_guesses_leave_no_trace_in_the_cache(demo):
    """A guesser that is always wrong: every step is cut back, and the text is the plain one."""

    class Wrong:
        def guess(self, ids: Sequence[int], most: int) -> list[int]:
            return [(ids[-1] + 1) % 1000] * most

    prompts = [demo.prompt_ids(prompt) for prompt in PROMPTS]
    found = []
    for guesser in (None, Wrong):
        found.append(guessed(demo, prompts, guesser, 30))
    assert found[0] == found[1]


# -- who guesses -----------------------------------------------------------------------------------


def test_lookup_says_what_followed_the_last_time():
    lookup = Lookup()
    assert lookup.guess([1, 2, 3, 4, 9, 2, 3], 3) == [4, 9, 2]
    assert lookup.guess([1, 2, 3, 4, 9, 2, 3, 7, 8, 2, 3], 2) == [7, 8]  # the latest occurrence
    assert lookup.guess([1, 2, 3, 4, 9, 2, 3, 7, 8, 2, 3, 5], 2) == []


def test_lookup_goes_on_with_a_repetition():
    assert Lookup().guess([7, 8, 9, 7, 8, 9, 7, 8], 7) == [9, 7, 8, 9, 7, 8, 9]


def test_lookup_prefers_the_longer_context():
    assert Lookup().guess([1, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3], 1) == [7]


def test_lookup_needs_two_tokens():
    assert Lookup().guess([], 3) == []
    assert Lookup().guess([1], 3) == []
    assert Lookup().guess([1, 1], 3) == []
    assert Lookup().guess([1, 1, 1], 3) == [1, 1, 1]


def test_a_draft_model_follows_the_text_wherever_it_went(demo):
    ids = demo.prompt_ids("Once upon a time there was a little")
    drafter = DraftModel(demo.head, 100)
    first = drafter.guess(ids, 5)
    expected = demo.generate(ids, max_new_tokens=5).ids
    assert tuple(first) == expected
    other = [*ids, 17, 30]  # not what was guessed
    assert tuple(drafter.guess(other, 4)) == demo.generate(other, max_new_tokens=4).ids
    assert drafter.guess(other, 0) == []
    assert tuple(drafter.guess(ids[:3], 2)) == demo.generate(ids[:3], max_new_tokens=2).ids


def test_the_pace_rises_while_guesses_are_right_and_falls_after_a_wrong_one():
    pace = Pace()
    start = pace.most()
    pace.note(start, start)
    assert pace.most() == MOST_GUESSES
    pace.note(MOST_GUESSES, 2)
    assert pace.most() == start
    pace.note(0, 0)  # nothing guessed says nothing
    assert (pace.guessed, pace.right) == (start + MOST_GUESSES, start + 2)


# -- what is refused -------------------------------------------------------------------------------


def test_a_draft_of_another_vocabulary_is_refused(demo, tmp_path_factory):
    other = bloomq.load(pack(tmp_path_factory.getbasetemp(), Tiny(), "int4"))
    expected = (
        f"the draft model has 131 tokens, this one {demo.config.vocab_size}: use one of the same "
        "vocabulary"
    )
    with pytest.raises(UsageError) as caught:
        demo.generate("a", draft=other)
    assert str(caught.value) == expected


@pytest.mark.parametrize("draft", ["ngram", 3, Path("x")], ids=str)
def test_a_draft_that_is_neither_model_nor_lookup_is_refused(demo, draft):
    with pytest.raises(UsageError) as caught:
        demo.stream("a", draft=draft)
    assert str(caught.value) == f"draft is {draft!r:.80}, expected a model, 'lookup' or None"
