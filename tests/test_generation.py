"""Generation: rows independent of their batch, text released in time, ends and refusals."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from models import Tiny, copied, pack

import bloomq
from bloomq.errors import CapacityError, NumericError, UsageError
from bloomq.generation import Stats, results
from bloomq.language_model import LanguageModel
from bloomq.layers import STEP_TOKENS
from bloomq.pack import Pack
from bloomq.text import TextAssembler

TINY = Tiny(n_head=4, head_dim=16, vocab_size=211, seed=4)
PROMPTS = ["Once upon a time", "El", "def f(x):\n    return", "Il était une fois un roi qui"]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    return bloomq.load()


@pytest.fixture(scope="module")
def tiny(base: Path) -> LanguageModel:
    """A random model without a tokenizer, context 2,048."""
    return bloomq.load(pack(base, TINY, "int8"))


def tokens(seed: int, count: int) -> list[int]:
    """Random ids; 2 is the end-of-text token."""
    return np.random.default_rng(seed).integers(4, TINY.vocab_size, count).tolist()


# -- a batch equals its prompts alone --------------------------------------------------------------


def test_a_greedy_batch_equals_its_prompts_one_by_one(demo: LanguageModel):
    for prompt, found in zip(PROMPTS, demo.generate(PROMPTS, max_new_tokens=24), strict=True):
        alone = demo.generate(prompt, max_new_tokens=24)
        assert (found.text, found.ids, found.logprobs) == (alone.text, alone.ids, alone.logprobs)


@pytest.mark.parametrize("extra", [{}, {"top_k": 9}, {"repetition_penalty": 1.2}], ids=str)
def test_a_sampled_row_depends_on_its_place_and_prompt_alone(demo: LanguageModel, extra):
    options = {**SAMPLED, **extra, "max_new_tokens": 12}
    batch = demo.generate(PROMPTS, **options)
    first = demo.generate(PROMPTS[0], **options)
    assert (first.ids, first.logprobs) == (batch[0].ids, batch[0].logprobs)
    others = demo.generate(["x", PROMPTS[1], "y z", PROMPTS[3], "more"], **options)
    for row in (1, 3):
        assert (others[row].ids, others[row].logprobs) == (batch[row].ids, batch[row].logprobs)


def test_a_seed_repeats_and_rows_of_one_prompt_differ(demo: LanguageModel):
    options = {**SAMPLED, "temperature": 1.2, "max_new_tokens": 12}
    first, again = (demo.generate(["The"] * 3, **options) for _ in range(2))
    assert [g.ids for g in first] == [g.ids for g in again]
    assert len({g.ids for g in first}) == 3
    assert demo.generate("The", **{**options, "seed": 8}).ids != first[0].ids


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_prompts_longer_than_a_prefill_step_equal_themselves_alone(tiny: LanguageModel, options):
    lengths = (STEP_TOKENS - 1, 3, 2 * STEP_TOKENS + 77, STEP_TOKENS)
    prompts = [tokens(i, length) for i, length in enumerate(lengths)]
    done: list[tuple[int, int]] = []
    tiny.forget()
    batch = tiny.generate(
        prompts, max_new_tokens=6, progress=lambda n, of: done.append((n, of)), **options
    )
    total = sum(lengths)
    assert done[0] == (STEP_TOKENS, total)
    assert done == sorted(set(done))
    assert done[-1] == (total, total)
    for row, prompt in enumerate(prompts):
        if options:  # a sampled row's numbers are those of its place
            alone = tiny.generate([[5]] * row + [prompt], max_new_tokens=6, **options)[row]
        else:
            alone = tiny.generate(prompt, max_new_tokens=6)
        assert (alone.ids, alone.logprobs) == (batch[row].ids, batch[row].logprobs)


def test_a_long_prompt_in_steps_equals_the_logits_of_the_whole(tiny: LanguageModel):
    prompt = tokens(9, 2 * STEP_TOKENS + 1)
    logits = tiny(prompt).logits[0, -1]
    assert tiny.generate(prompt, max_new_tokens=1).ids == (int(logits.argmax()),)


def test_prompts_may_be_text_or_ids_in_one_batch(demo: LanguageModel):
    ids = demo.prompt_ids(PROMPTS[0])
    found = demo.generate([PROMPTS[0], ids, tuple(ids), np.array(ids), [9]], max_new_tokens=5)
    assert found[0].text == found[1].text == found[2].text == found[3].text
    assert demo.generate(ids, max_new_tokens=5).ids == found[0].ids
    assert demo.generate(np.array(ids), max_new_tokens=5).ids == found[0].ids


def test_a_list_of_one_prompt_gives_a_list(demo: LanguageModel):
    found = demo.generate(["The"], max_new_tokens=2)
    assert isinstance(found, list)
    assert found[0].ids == demo.generate("The", max_new_tokens=2).ids


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, SAMPLED, {**SAMPLED, "repetition_penalty": 1.5}, {"repetition_penalty": 2.0}],
    ids=["greedy", "sampled", "sampled with penalty", "greedy with penalty"],
)  # fmt: skip
def test_logprobs_are_the_log_softmax_of_the_model_before_temperature_and_penalty(
    demo: LanguageModel, options
):
    prompt = demo.prompt_ids("The little")
    found = demo.generate(prompt, max_new_tokens=10, **options)
    logits = demo([prompt + list(found.ids)]).logits[0, len(prompt) - 1 : -1].astype(np.float64)
    normed = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = normed[np.arange(10), list(found.ids)]
    assert found.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_repetition_penalty_changes_a_text_that_repeats_itself(demo: LanguageModel):
    plain = demo.generate("Once upon a time", max_new_tokens=40).ids
    penalised = demo.generate("Once upon a time", max_new_tokens=40, repetition_penalty=1.5).ids
    assert len(set(penalised)) > len(set(plain))


def test_top_k_of_one_is_greedy(demo: LanguageModel):
    found = demo.generate("The", max_new_tokens=10, temperature=1.5, top_k=1, seed=3)
    assert found.ids == demo.generate("The", max_new_tokens=10).ids


def test_stats_count_tokens_and_time(demo: LanguageModel):
    demo.forget()
    stats = demo.generate("Once upon a time", max_new_tokens=6).stats
    assert stats.prompt_tokens == len(demo.prompt_ids("Once upon a time"))
    assert stats.generated_tokens == 6
    assert stats.load_s == demo.load_s
    assert stats.prompt_s > 0
    assert stats.generate_s > 0
    assert stats.prompt_tokens_per_s == stats.prompt_tokens / stats.prompt_s
    assert stats.generated_tokens_per_s == 5 / stats.generate_s


def test_stats_do_not_depend_on_when_they_are_read(demo: LanguageModel):
    stream = demo.stream("Once upon a time", max_new_tokens=6)
    for _, at in zip(stream, range(4), strict=False):
        now = stream.generation.stats
        time.sleep(0.02)
        assert stream.generation.stats == now
        assert now.generated_tokens == at + 1
    list(stream)
    now = stream.generation.stats
    time.sleep(0.02)
    assert stream.generation.stats == now


def test_a_clock_times_a_sequence_by_its_tokens(monkeypatch: pytest.MonkeyPatch):
    now = [10.0]
    monkeypatch.setattr(results, "perf_counter", lambda: now[0])
    clock = results.Clock()
    now[0] = 12.0
    assert (clock.prompt_s, clock.generate_s) == (2.0, 0.0)  # still at its prompt
    clock.tick()
    now[0] = 15.0
    assert (clock.prompt_s, clock.generate_s) == (2.0, 0.0)
    clock.tick()
    now[0] = 30.0
    assert (clock.prompt_s, clock.generate_s) == (2.0, 3.0)
    assert Stats(7, 3, 1.0, 4.0, 0.5).generated_tokens_per_s == 2 / 4.0
    assert Stats(7, 3, 2.0, 4.0, 0.5, reused_tokens=3).prompt_tokens_per_s == 4 / 2.0


def test_rates_of_no_time_and_no_tokens_are_zero():
    stats = Stats(0, 0, 0.0, 0.0, 0.0)
    assert (stats.prompt_tokens_per_s, stats.generated_tokens_per_s) == (0.0, 0.0)
    assert Stats(3, 0, 1.0, 1.0, 0.0).generated_tokens_per_s == 0


# -- text and its ends -----------------------------------------------------------------------------


class Spelled:
    """A decoder whose token i is the i-th of some byte strings; incomplete characters wait."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces, self.waiting = pieces, b""

    def push(self, ids: int) -> str:
        self.waiting += self.pieces[ids]
        for cut in range(len(self.waiting), -1, -1):
            try:
                text = self.waiting[:cut].decode()
            except UnicodeDecodeError:
                continue
            self.waiting = self.waiting[cut:]
            return text
        return ""

    def finish(self) -> str:
        text, self.waiting = self.waiting.decode(errors="replace"), b""
        return text


def assembled(pieces: Sequence[bytes], *stop: str) -> tuple[list[str], str, bool]:
    """What each token releases, what the end does, and whether a stop string was met."""
    assembler = TextAssembler(Spelled(pieces), stop)
    released = [assembler.push(i) for i in range(len(pieces))]
    return released, assembler.finish(), assembler.stopped


def test_text_without_stop_strings_is_released_at_once():
    assert assembled([b"a", b"bc", b"d"]) == (["a", "bc", "d"], "", False)


def test_a_stop_string_within_a_token_ends_the_text_before_it():
    assert assembled([b"one", b" two END three"], "END") == (["one", " two "], "", True)


def test_a_stop_string_across_tokens_is_held_back_until_it_is_whole():
    assert assembled([b"ab E", b"N", b"D c"], "END") == (["ab ", "", ""], "", True)


def test_what_could_have_been_a_stop_string_is_released_when_it_is_not():
    assert assembled([b"ab E", b"N", b"X", b"!"], "END") == (["ab ", "", "ENX", "!"], "", False)


def test_the_longest_possible_start_is_held_back():
    assert assembled([b"aa", b"ab", b"c"], "aabc") == (["", "a", ""], "", True)
    assert assembled([b"aab", b"aa", b"d"], "aabc") == (["", "aab", "aad"], "", False)


def test_held_text_is_released_at_the_end():
    assert assembled([b"ab E", b"N"], "END") == (["ab ", ""], "EN", False)


def test_the_first_of_several_stop_strings_wins():
    assert assembled([b"x B y A z"], "A", "B") == (["x "], "", True)


def test_a_stop_string_inside_another_wins_as_soon_as_it_is_whole():
    assert assembled([b"x<", b"a", b">"], "<a>", "<a") == (["x", "", ""], "", True)


def test_a_stop_string_of_one_character_holds_nothing_back():
    assert assembled([b"ab", b"c.d"], ".") == (["ab", "c"], "", True)


def test_a_stop_string_across_the_bytes_of_a_character():
    emoji = "🙂é".encode()
    pieces = [b"hi ", emoji[:2], emoji[2:5], emoji[5:], b"!"]
    assert assembled(pieces, "🙂é") == (["hi ", "", "", "", ""], "", True)
    assert assembled(pieces, "🙂è")[0] == ["hi ", "", "", "🙂é", "!"]


def test_a_character_cut_short_is_shown_as_such_at_the_end():
    assert assembled([b"a", "é".encode()[:1]]) == (["a", ""], "\ufffd", False)


def test_nothing_is_released_after_a_stop():
    assert assembled([b"a.b", b"c", b"d"], ".") == (["a", "", ""], "", True)


def test_a_stop_string_that_straddles_the_demos_tokens_ends_generation(demo: LanguageModel):
    whole = demo.generate("Once upon a time", max_new_tokens=30)
    pieces = [piece.text for piece in demo.stream("Once upon a time", max_new_tokens=30)]
    cut = sum(map(len, pieces[:4]))
    stop = whole.text[cut - 2 : cut + 2]  # two characters on each side of a border
    at = whole.text.find(stop)
    for options in ({"stop": stop}, {"stop": ["never\0", stop]}):
        found = demo.generate("Once upon a time", max_new_tokens=30, **options)
        assert found.text == whole.text[:at]
        assert found.finish_reason == "stop"
        assert found.ids == whole.ids[: len(found.ids)]
        assert stop in demo.tokenizer.decode(list(found.ids))


def test_only_the_row_that_stops_ends(demo: LanguageModel):
    whole = demo.generate(PROMPTS[:2], max_new_tokens=12)
    stop = next(word for word in whole[0].text.split() if word not in whole[1].text)
    found = demo.generate(PROMPTS[:2], max_new_tokens=12, stop=stop)
    assert [g.finish_reason for g in found] == ["stop", "length"]
    assert found[1].ids == whole[1].ids
    assert len(found[0].ids) < 12


def test_the_end_of_text_token_ends_a_row_and_is_not_in_its_text(demo, monkeypatch):
    plain = demo.generate("Once upon a time", max_new_tokens=8)
    forced_steps(demo, monkeypatch, 3, demo.config.eos_token_id)
    found = demo.generate("Once upon a time", max_new_tokens=8, stop="never\0")
    assert found.finish_reason == "eos"
    assert found.ids == (*plain.ids[:3], demo.config.eos_token_id)
    assert found.text == demo.tokenizer.decode(list(plain.ids[:3]))
    assert "</s>" not in found.text


def forced_steps(model: LanguageModel, monkeypatch, at: int, token: int) -> None:
    """From step `at` on the likeliest token is `token`."""
    step, calls = model.head.step, [0]

    def forced(ids, cache, span, wanted):
        logits = model.backend.numpy(step(ids, cache, span, wanted)).copy()
        calls[0] += 1
        if calls[0] > at:
            logits[:, token] = logits.max() + 5
        return logits

    monkeypatch.setattr(model.head, "step", forced)


def test_the_last_token_may_be_the_end_of_text(tiny: LanguageModel, monkeypatch):
    forced_steps(tiny, monkeypatch, 2, 2)
    found = tiny.generate([5, 6], max_new_tokens=3)
    assert (found.finish_reason, found.ids[-1], found.text) == ("eos", 2, "")


def test_numpys_whole_numbers_are_taken_as_pythons(demo: LanguageModel):
    options = {"max_new_tokens": 5, "top_k": 7, "seed": 3}
    whole = {name: np.int64(value) for name, value in options.items()}
    expected = demo.generate([5, 6, 7], temperature=1.0, **options).ids
    assert demo.generate([5, 6, 7], temperature=1.0, **whole).ids == expected
    assert all(type(token) is int for token in expected)
    for kind in (np.int8, np.uint16, np.int64):
        ids = [kind(token) for token in (5, 6, 7)]
        for prompt in (ids, tuple(ids), np.array(ids)):
            assert demo.generate(prompt, temperature=1.0, **options).ids == expected


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_a_small_kind_of_number_gives_no_smaller_cache(demo: LanguageModel, kind: type):
    """200 + 100 are 44 of 8 bits."""
    with np.errstate(over="ignore"):
        found = demo.generate([5] * 200, max_new_tokens=kind(100))
    assert found.ids == demo.generate([5] * 200, max_new_tokens=100).ids


def test_max_new_tokens_end_a_row(demo: LanguageModel):
    for count in (1, 2, 9):
        found = demo.generate("The", max_new_tokens=count)
        assert (len(found.ids), found.finish_reason) == (count, "length")


def test_a_text_is_what_its_ids_decode_to(demo: LanguageModel):
    found = demo.generate("Il était", max_new_tokens=40, **SAMPLED)
    assert found.text == demo.tokenizer.decode(list(found.ids), skip_special_tokens=True)


def test_a_stream_equals_generate(demo: LanguageModel):
    stream = demo.stream("Il était", max_new_tokens=20, **SAMPLED)
    pieces = list(stream)
    whole = demo.generate("Il était", max_new_tokens=20, **SAMPLED)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert tuple(piece.id for piece in pieces) == whole.ids == stream.generation.ids
    assert tuple(piece.logprob for piece in pieces) == whole.logprobs
    assert stream.generation.finish_reason == "length"
    assert next(stream, None) is None


# -- interrupted -----------------------------------------------------------------------------------


def interrupted_steps(model: LanguageModel, monkeypatch, at: int, error: type = KeyboardInterrupt):
    """Ctrl-C during step `at`, counted from 0."""
    step, calls = model.head.step, [0]

    def interrupted(*args):
        calls[0] += 1
        if calls[0] > at:
            raise error
        return step(*args)

    monkeypatch.setattr(model.head, "step", interrupted)


def test_ctrl_c_while_decoding_keeps_what_was_produced(demo: LanguageModel, monkeypatch):
    whole = demo.generate(PROMPTS[:2], max_new_tokens=9)
    interrupted_steps(demo, monkeypatch, 4)
    for found, expected in zip(demo.generate(PROMPTS[:2], max_new_tokens=9), whole, strict=True):
        assert found.finish_reason == "interrupted"
        assert found.ids == expected.ids[:4]
        assert found.logprobs == expected.logprobs[:4]
        assert expected.text.startswith(found.text)
        assert found.stats.generated_tokens == 4


def test_ctrl_c_keeps_the_reason_of_rows_that_had_ended(demo: LanguageModel, monkeypatch):
    whole = demo.generate(PROMPTS[:2], max_new_tokens=12)
    stop = whole[0].text[:3]
    interrupted_steps(demo, monkeypatch, 8)
    found = demo.generate(PROMPTS[:2], max_new_tokens=12, stop=stop)
    assert [g.finish_reason for g in found] == ["stop", "interrupted"]


def test_ctrl_c_in_the_prompt_gives_an_empty_generation(demo: LanguageModel):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    found = demo.generate([5] * (STEP_TOKENS + 1), max_new_tokens=5, progress=interrupt)
    assert (found.text, found.ids, found.finish_reason) == ("", (), "interrupted")
    assert found.stats.generated_tokens == 0
    assert found.stats.prompt_s > 0
    assert found.stats.generate_s == 0


def test_ctrl_c_at_the_end_of_the_prompt_gives_text_and_ids_that_agree(demo: LanguageModel):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    found = demo.generate("Once upon a time", max_new_tokens=5, progress=interrupt)
    assert found.finish_reason == "interrupted"
    assert found.text == demo.tokenizer.decode(list(found.ids))


def test_held_back_text_is_given_when_interrupted(demo: LanguageModel, monkeypatch):
    whole = demo.generate("Once upon a time", max_new_tokens=9)
    interrupted_steps(demo, monkeypatch, 3)
    kept = demo.tokenizer.decode(list(whole.ids[:3]))
    found = demo.generate("Once upon a time", max_new_tokens=9, stop=kept + "\0")
    assert found.text == kept


def test_a_stream_keeps_its_generation_after_break_and_after_ctrl_c(demo, monkeypatch):
    whole = demo.generate("Once upon a time", max_new_tokens=9)
    stream = demo.stream("Once upon a time", max_new_tokens=9)
    for count, _ in enumerate(stream, 1):
        if count == 3:
            break
    assert (stream.generation.ids, stream.generation.finish_reason) == (
        whole.ids[:3],
        "interrupted",
    )
    interrupted_steps(demo, monkeypatch, 5)
    stream = demo.stream("Once upon a time", max_new_tokens=9)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert stream.generation.ids == whole.ids[:5]
    assert stream.generation.text == demo.tokenizer.decode(list(whole.ids[:5]))


def test_a_stream_has_a_generation_before_its_first_piece(demo: LanguageModel):
    generation = demo.stream("The").generation
    assert (generation.ids, generation.text, generation.finish_reason) == ((), "", "interrupted")


def test_looking_at_the_generation_does_not_change_the_stream(demo: LanguageModel):
    whole = demo.generate("Once upon a time", max_new_tokens=12)
    stop = whole.text[3:8]
    stream = demo.stream("Once upon a time", max_new_tokens=12, stop=stop)
    text = ""
    for piece in stream:
        assert stream.generation.ids
        text += piece.text
    assert stream.generation.finish_reason == "stop"
    assert text == whole.text[: whole.text.find(stop)]


def test_another_error_is_not_swallowed(demo: LanguageModel, monkeypatch):
    interrupted_steps(demo, monkeypatch, 2, RuntimeError)
    with pytest.raises(RuntimeError):
        demo.generate("The", max_new_tokens=5)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1, True, False, 1.5, "3", None], ids=str)
def test_an_impossible_number_of_new_tokens_is_refused(demo: LanguageModel, count):
    expected = re.escape(f"max_new_tokens is {count!r}, expected at least 1")
    for call in (demo.generate, demo.stream):
        with pytest.raises(UsageError, match=f"^{expected}$"):
            call("The", max_new_tokens=count)


@pytest.mark.parametrize("prompt", ["", [], [[]], ["The", ""], ["", "The"]], ids=str)
def test_an_empty_prompt_is_refused(demo: LanguageModel, prompt):
    with pytest.raises(
        UsageError, match=r"^the prompt is empty: BLOOM needs at least one token to"
    ):
        demo.generate(prompt)


def test_no_prompts_are_refused(demo: LanguageModel):
    with pytest.raises(UsageError, match=r"^no prompts: give at least one$"):
        demo.generate(np.zeros((0, 3), np.int64))


@pytest.mark.parametrize(
    ("length", "new", "remedy"),
    [
        (2000, 49, "ask for at most 48 new tokens, load with a larger context, or give a window"),
        (2048, 1, "shorten it, load with a larger context, or give a window"),
        (3000, 5, "shorten it, load with a larger context, or give a window"),
    ],
)
def test_a_prompt_beyond_the_context_is_refused_with_what_would_fit(
    tiny: LanguageModel, length, new, remedy
):
    expected = (
        f"a prompt of {length} tokens and {new} new ones exceed the context of 2048: {remedy}"
    )
    with pytest.raises(CapacityError, match=f"^{expected}$"):
        tiny.generate([[5], [5] * length], max_new_tokens=new)


def test_a_prompt_that_just_fits_is_taken(base: Path):
    model = bloomq.load(pack(base, TINY, "int8"), context=20)
    assert len(model.generate([5] * 15, max_new_tokens=5).ids) == 5


@pytest.mark.parametrize("wrong", [-1, 211, 2**40])
def test_an_id_outside_the_vocabulary_is_refused(tiny: LanguageModel, wrong):
    with pytest.raises(UsageError, match=f"^token id {wrong}, expected 0 to 210$"):
        tiny.generate([[5, 6], [7, wrong]], max_new_tokens=2)


def test_sampling_options_are_checked_before_anything_runs(demo: LanguageModel):
    for call in (demo.generate, demo.stream):
        with pytest.raises(UsageError, match=r"^top_p is 2, expected above 0, at most 1$"):
            call("The", top_p=2)


NEITHER = "expected text, token ids, or a list of either"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (5, f"prompt is 5, {NEITHER}"),
        (None, f"prompt is None, {NEITHER}"),
        ({1: 2}, f"prompt is {{1: 2}}, {NEITHER}"),
        (b"abc", f"prompt is b'abc', {NEITHER}"),
        ([None], "prompt is None, expected text or a list of token ids"),
        (["a", ["b"]], "prompt is ['b'], expected text or a list of token ids"),
        ([1.9, 2.7], "prompt is 1.9, expected text or a list of token ids"),
        ([[True, 5]], "prompt is [True, 5], expected text or a list of token ids"),
        ([[[5]]], "prompt is [[5]], expected text or a list of token ids"),
        (np.ones(2), "prompt is np.float64(1.0), expected text or a list of token ids"),
        ([2**70], f"token id {2**70}, expected 0 to 8191"),
    ],
    ids=str,
)
def test_a_prompt_of_another_kind_is_refused_in_our_words(demo: LanguageModel, prompt, message):
    with pytest.raises(UsageError) as caught:
        demo.generate(prompt, max_new_tokens=1)
    assert str(caught.value) == message


def test_a_long_prompt_of_another_kind_is_shown_in_part(demo: LanguageModel):
    with pytest.raises(UsageError) as caught:
        demo.stream([0.5] * 1000)
    assert str(caught.value) == f"prompt is {[0.5] * 1000!r:.80}, expected text or a list of " \
        "token ids"  # fmt: skip


@pytest.mark.parametrize(
    "rows", [[np.array([5, 6]), np.array([7])], np.array([[5, 6], [7, 8]])], ids=["list", "2-D"]
)
def test_arrays_of_ids_are_a_batch(tiny: LanguageModel, rows):
    found = tiny.generate(rows, max_new_tokens=1)
    assert [g.ids for g in found] == [tiny.generate(list(r), max_new_tokens=1).ids for r in rows]


@pytest.mark.parametrize("stop", [5, None], ids=str)
def test_stop_of_another_kind_is_refused_in_our_words(demo: LanguageModel, stop):
    with pytest.raises(UsageError) as caught:
        demo.generate("a", stop=stop)
    assert str(caught.value) == f"stop is {stop!r}, expected a string or a list of them"


# -- not a number ----------------------------------------------------------------------------------


def planted(source: Path, target: Path, key: str, value: float) -> Path:
    """A copy of a pack with one value of array `key` replaced, behind the converter's back."""
    path = copied(source, target)
    file = next(path.glob("weights-*.safetensors"))
    entry = next(f.entries[key] for f in Pack.open(path)._files.values() if key in f.entries)
    with file.open("r+b") as handle:
        handle.seek(entry.start + 4)
        handle.write(np.float32(value).tobytes())
    return path


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize(
    ("key", "where"),
    [
        ("emb_ln.bias", "emb_ln"),
        ("h.0.attn.qkv.bias", "h.0"),
        ("h.1.attn.out.bias", "h.1"),
        ("h.1.mlp.down.bias", "h.1"),
        ("h.1.ln_2.weight", "h.1"),
        ("ln_f.bias", "ln_f or the head"),
    ],
)
@pytest.mark.parametrize("backend", bloomq.backends.available())
def test_a_weight_that_is_not_a_number_is_found_and_its_layer_named(
    base, tmp_path, *, backend, key, where, value
):
    path = planted(pack(base, TINY, "int8"), tmp_path / "pack", key, value)
    model = bloomq.load(path, backend=backend)
    expected = f"^NaN or infinity after {where}: the checkpoint is damaged or overflows: "
    with np.errstate(invalid="ignore", over="ignore"), pytest.raises(NumericError, match=expected):
        model.generate([5, 6, 7], max_new_tokens=3)
    with np.errstate(invalid="ignore", over="ignore"), pytest.raises(NumericError, match=expected):
        model([5, 6, 7])


def test_not_a_number_in_a_prompt_of_several_steps_is_found(base: Path, tmp_path: Path):
    path = planted(pack(base, TINY, "int8"), tmp_path / "pack", "h.1.attn.out.bias", math.nan)
    with pytest.raises(NumericError, match=r"^NaN or infinity after h.1: "):
        bloomq.load(path).generate(tokens(0, STEP_TOKENS + 40), max_new_tokens=3)


def test_logits_that_turn_bad_while_decoding_leave_the_cache_as_it_was(tiny, monkeypatch):
    step, seen = tiny.head.step, []

    def bad(ids, cache, span, wanted):
        logits = tiny.backend.numpy(step(ids, cache, span, wanted)).copy()
        seen.append(cache)
        if len(seen) == 3:
            logits[:] = np.nan
        return logits

    monkeypatch.setattr(tiny.head, "step", bad)
    with pytest.raises(NumericError, match=r"^NaN or infinity after ln_f or the head: "):
        tiny.generate([5, 6, 7], max_new_tokens=5)
    assert tiny.engine.used_rows == 0
    monkeypatch.undo()
    again = tiny.generate([5, 6, 7], max_new_tokens=5)
    tiny.forget()
    assert again.ids == tiny.generate([5, 6, 7], max_new_tokens=5).ids


@pytest.fixture(autouse=True)
def _models_are_left_as_they_were(demo: LanguageModel, tiny: LanguageModel) -> Iterator[None]:
    """monkeypatch sets `step` on the instances; what remains must be the class's own."""
    yield
    for model in (demo, tiny):
        assert model.head.step.__func__ is type(model.head).step
