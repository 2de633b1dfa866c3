"""Sequences that share steps and rows: each as it would be alone, and nothing left behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from adapters import written
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Tiny, pack

import bloomq
from bloomq.errors import BloomqError, CapacityError, UsageError
from bloomq.generation import Engine, Reader, Request, Window, read
from bloomq.language_model import LanguageModel
from bloomq.layers import STEP_TOKENS
from bloomq.sampling import Sampler, Sampling

TINY = Tiny(n_head=4, head_dim=16, vocab_size=211, seed=4)
SAMPLED = Sampling(temperature=0.9, top_p=0.95, seed=7)
WORTH = 16  # tokens in common that are worth a copy


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    return bloomq.load()


@pytest.fixture
def tiny(base: Path) -> LanguageModel:
    """A random model without a tokenizer, context 2,048, nothing kept yet."""
    return bloomq.load(pack(base, TINY, "int8"))


def tokens(seed: int, count: int) -> list[int]:
    """Random ids; 2 is the end-of-text token."""
    return np.random.default_rng(seed).integers(4, TINY.vocab_size, count).tolist()


def steps(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each step of the model has, as it makes them."""
    sizes: list[int] = []
    step = model.head.step
    monkeypatch.setattr(
        model.head, "step", lambda ids, *rest: sizes.append(len(ids)) or step(ids, *rest)
    )
    return sizes


# -- together and alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("parallel", [1, 2, 5])
def test_texts_that_enter_and_leave_are_the_texts_of_one_call(tiny, sampling, parallel):
    prompts = [tokens(i, n) for i, n in enumerate((3, 700, 1, 40, 2, 130, 9))]
    whole = tiny.generate(prompts, max_new_tokens=9, sampling=sampling)
    tiny.forget()
    each = list(tiny.generate_each(prompts, parallel=parallel, max_new_tokens=9, sampling=sampling))
    assert [(g.ids, g.logprobs) for g in each] == [(g.ids, g.logprobs) for g in whole]
    assert tiny.engine.used_rows == 0


def test_the_rest_of_a_list_is_what_the_whole_would_have_been(tiny):
    prompts = [tokens(i, 5 + i) for i in range(6)]
    options = {"max_new_tokens": 6, "sampling": SAMPLED}
    whole = [g.ids for g in tiny.generate_each(prompts, **options)]
    rest = [g.ids for g in tiny.generate_each(prompts[4:], first=4, **options)]
    assert rest == whole[4:]


def test_prompts_are_asked_for_as_places_become_free(tiny):
    asked = []

    def prompts() -> Iterator[list[int]]:
        for i in range(40):
            asked.append(i)
            yield [5 + i, 7]

    for done, _ in enumerate(tiny.generate_each(prompts(), parallel=3, max_new_tokens=2), 1):
        assert len(asked) <= done + 4 * 3


@pytest.mark.parametrize("parallel", [0, 65, 1.5, True])
def test_an_impossible_number_of_texts_at_a_time_is_refused(tiny, parallel):
    with pytest.raises(UsageError, match=r"^parallel is .*, expected 1 to 64 texts at a time$"):
        next(tiny.generate_each([[5]], parallel=parallel))


def test_streams_read_in_turn_share_their_steps(tiny, monkeypatch):
    prompts = [tokens(1, 6), tokens(2, 9), tokens(3, 4)]
    alone = [tiny.generate(p, max_new_tokens=10).ids for p in prompts]
    tiny.forget()
    sizes = steps(tiny, monkeypatch)
    streams = [tiny.stream(p, max_new_tokens=10) for p in prompts]
    found = [[piece.id for piece in pieces] for pieces in zip(*streams, strict=True)]
    assert [tuple(ids) for ids in zip(*found, strict=True)] == alone
    assert len(sizes) < 3 * 10  # each on its own would take ten
    assert max(sizes[4:]) == 3


def test_threads_share_their_steps(tiny):
    prompts = [tokens(i, 8 + 3 * i) for i in range(6)]
    alone = [tiny.generate(p, max_new_tokens=20, sampling=SAMPLED).ids for p in prompts]
    tiny.forget()
    found: dict[int, tuple[int, ...]] = {}

    def work(i: int) -> None:
        found[i] = tiny.generate(prompts[i], max_new_tokens=20, sampling=SAMPLED).ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(6)] == alone
    assert tiny.engine.used_rows == 0


def test_a_stream_that_waits_costs_others_no_step(tiny, monkeypatch):
    waiting = tiny.stream(tokens(1, 5), max_new_tokens=50)
    next(waiting)
    sizes = steps(tiny, monkeypatch)
    tiny.generate(tokens(2, 7), max_new_tokens=20)
    assert sizes[:2] == [1 + 7, 1]  # it is awaited once, then holds a token that nobody took
    assert set(sizes[2:]) == {1}
    assert next(waiting).id == tiny.generate(tokens(1, 5), max_new_tokens=2).ids[1]


def test_a_text_whose_logits_are_no_numbers_ends_alone(tiny, monkeypatch):
    prompts = [tokens(1, 6), tokens(2, 9)]
    expected = tiny.generate(prompts[1], max_new_tokens=8).ids
    tiny.forget()
    bad, good = (tiny.stream(p, max_new_tokens=8) for p in prompts)
    found = [next(good).id]
    next(bad)
    step, row = tiny.head.step, bad._reader.sequence.row

    def spoilt(ids, cache, span, wanted):
        logits = tiny.backend.numpy(step(ids, cache, span, wanted)).copy()
        logits[span.rows == row] = np.nan
        return logits

    monkeypatch.setattr(tiny.head, "step", spoilt)
    with pytest.raises(bloomq.NumericError, match="NaN or infinity after"):
        list(bad)
    found += [piece.id for piece in good]
    assert tuple(found) == expected


def test_keys_that_are_no_numbers_reach_no_other_text(tiny):
    """A row's damage is found in a row of its own: its neighbours keep what they hold."""
    prompts = [tokens(2, 140), tokens(3, 100)]
    expected = [tiny.generate(p, max_new_tokens=8).ids for p in prompts]
    tiny.forget()
    tiny.generate(tokens(1, 90), max_new_tokens=1)
    stored = tiny.engine.stored(tokens(1, 90))
    broken = type(stored)(np.full_like(stored.keys, np.nan), stored.values, stored.scales)
    tiny.forget()
    tiny.engine.restore(tokens(1, 90), broken)
    streams = [tiny.stream(p, max_new_tokens=8) for p in [[*tokens(1, 90), 7], *prompts]]
    found: list[list[int]] = [[], [], []]
    for _ in range(8):
        for stream, ids in zip(streams[1:], found[1:], strict=True):
            ids.append(next(stream).id)
        if not found[0]:
            with pytest.raises(bloomq.NumericError, match=r"NaN or infinity after h\.0"):
                next(streams[0])
            found[0] = [0]
    assert [tuple(ids) for ids in found[1:]] == expected
    for prompt, ids in zip(prompts, expected, strict=True):
        assert tiny.generate(prompt, max_new_tokens=8).ids == ids


def test_an_error_in_a_list_comes_after_the_texts_before_it(tiny):
    prompts = [tokens(1, 5), tokens(2, 6), tokens(3, 3000), tokens(4, 5)]
    each = tiny.generate_each(prompts, parallel=4, max_new_tokens=4)
    assert [next(each).ids for _ in range(2)] == [
        tiny.generate(p, max_new_tokens=4).ids for p in prompts[:2]
    ]
    with pytest.raises(CapacityError, match="exceed the context"):
        next(each)
    assert tiny.engine.used_rows == 0


def test_a_guesser_that_fails_ends_its_text_alone(tiny):
    class Failing:
        def guess(self, ids, most):
            raise CapacityError("no memory for a cache of 9 GB: ask for fewer tokens or rows")

    good, engine = tiny.stream(tokens(1, 5), max_new_tokens=6), tiny.engine
    next(good)
    sampler = Sampler(Sampling(), tokens(2, 5), 0, TINY.vocab_size)
    request = Request(
        prompt=tuple(tokens(2, 5)), max_new_tokens=9, sampler=sampler, guesser=Failing
    )
    bad = Reader(engine.sequence(request), None, ())
    with pytest.raises(CapacityError, match="no memory for a cache"):
        list(read(engine, [bad]))
    assert len(list(good)) == 5


def test_more_readers_than_a_step_takes_take_turns(tiny, monkeypatch):
    prompts = [[5 + i % 200, 6 + i // 200] for i in range(150)]
    expected = [g.ids for g in tiny.generate(prompts, max_new_tokens=3)]
    tiny.forget()
    sizes = steps(tiny, monkeypatch)
    found: dict[int, tuple[int, ...]] = {}
    streams = [tiny.stream(p, max_new_tokens=3) for p in prompts]
    for stream in streams:
        next(stream)

    def work(i: int) -> None:
        list(streams[i])
        found[i] = streams[i].generation.ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(150)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(150)] == expected
    assert max(sizes) <= 64 + 128


def test_forgetting_while_others_write_changes_no_text(tiny):
    prompts = [tokens(i, 30) for i in range(4)]
    expected = [g.ids for g in tiny.generate(prompts, max_new_tokens=30)]
    over = threading.Event()

    def forget() -> None:
        while not over.is_set():
            tiny.forget()

    thread = threading.Thread(target=forget)
    thread.start()
    try:
        for _ in range(5):
            assert [g.ids for g in tiny.generate(prompts, max_new_tokens=30)] == expected
    finally:
        over.set()
        thread.join()


# -- beginnings that are known ---------------------------------------------------------------------


def test_a_conversation_is_not_read_again(tiny):
    first = tiny.generate(tokens(1, 300), max_new_tokens=20)
    longer = [*tokens(1, 300), *first.ids, *tokens(2, 10)]
    found = tiny.generate(longer, max_new_tokens=12)
    assert found.stats.reused_tokens == 319  # the last token was never fed
    tiny.forget()
    again = tiny.generate(longer, max_new_tokens=12)
    assert again.stats.reused_tokens == 0
    assert (found.ids, found.logprobs) == (again.ids, again.logprobs)


def test_two_ways_on_from_one_beginning_share_it(tiny):
    common = tokens(1, 200)
    tiny.generate(common, max_new_tokens=4)
    ways = [[*common, *tokens(seed, 5)] for seed in (2, 3, 4)]
    found = tiny.generate(ways, max_new_tokens=6)
    assert [g.stats.reused_tokens for g in found] == [200] * 3
    tiny.forget()
    for way, shared in zip(ways, found, strict=True):
        tiny.forget()
        assert tiny.generate(way, max_new_tokens=6).ids == shared.ids


def test_the_same_prompt_many_times_is_read_once(tiny, monkeypatch):
    sizes = steps(tiny, monkeypatch)
    prompt = tokens(5, 400)
    found = tiny.generate([prompt] * 8, max_new_tokens=3, temperature=9.0, seed=1)
    assert sizes[:2] == [400, 1 + 7]  # the others run the last token each, for its logits
    assert len({g.ids for g in found}) > 1


def test_a_short_common_beginning_is_read_by_each(tiny, monkeypatch):
    sizes = steps(tiny, monkeypatch)
    tiny.generate([tokens(5, WORTH)] * 3, max_new_tokens=1)
    assert sizes == [3 * WORTH]


def test_what_is_kept_is_bounded_and_the_oldest_goes(base):
    model = bloomq.load(pack(base, TINY, "int8"), context=300)
    texts = [tokens(i, 120) for i in range(3)]
    for text in texts:
        model.generate(text, max_new_tokens=1)
    assert model.engine.idle_tokens <= 300
    assert model.generate(texts[2], max_new_tokens=1).stats.reused_tokens == 119
    assert model.generate(texts[0], max_new_tokens=1).stats.reused_tokens == 0


def test_an_adapters_text_is_no_beginning_of_the_bases(base, tmp_path):
    model = bloomq.load(pack(base, TINY, "int8"))
    model.load_adapter(written(tmp_path / "lora", hidden_size=64), "pirate")
    prompt = tokens(1, 100)
    plain = model.generate(prompt, max_new_tokens=6)
    other = model.generate(prompt, max_new_tokens=6, adapters="pirate")
    assert other.stats.reused_tokens == 0
    assert other.logprobs != plain.logprobs
    again = model.generate(prompt, max_new_tokens=6, adapters="pirate")
    assert again.stats.reused_tokens == 99
    assert again.logprobs == other.logprobs
    assert model.generate(prompt, max_new_tokens=6, adapters={"pirate": 0.5}).logprobs not in (
        plain.logprobs, other.logprobs,
    )  # fmt: skip


# -- nothing left behind ---------------------------------------------------------------------------


def test_a_stream_that_is_dropped_gives_its_row_back(tiny):
    for count in range(5):
        stream = tiny.stream(tokens(count, 30), max_new_tokens=100)
        next(stream)
        assert tiny.engine.used_rows == 1
        del stream
        assert tiny.engine.used_rows == 0


def test_more_streams_than_a_step_takes_can_be_open(tiny):
    streams = [tiny.stream([5 + i, 9], max_new_tokens=3) for i in range(70)]
    first = [next(stream).id for stream in streams]
    rest = [[piece.id for piece in stream] for stream in streams]
    assert [len(ids) for ids in rest] == [2] * 70
    assert first[69] == tiny.generate([5 + 69, 9], max_new_tokens=1).ids[0]
    assert tiny.engine.used_rows == 0


def test_pages_are_those_of_what_is_kept_and_no_others(tiny):
    """After streams that were dropped, stopped, interrupted and read to their ends."""
    for count in range(8):
        stream = tiny.stream(tokens(count, 70 + 10 * count), max_new_tokens=100)
        for _ in range(count):
            next(stream)
        del stream
    tiny.generate([tokens(20, 100)] * 3, max_new_tokens=5, temperature=1.0)
    kept = tiny.engine.idle_tokens
    assert 0 < tiny.engine._rows.cache.pages_in_use <= kept // 64
    cache = tiny.engine._rows.cache
    tiny.forget()
    assert cache.pages_in_use == 0


def test_a_stream_that_never_began_takes_no_row(tiny):
    stream = tiny.stream(tokens(1, 30), max_new_tokens=100)
    tiny.generate(tokens(2, 5), max_new_tokens=2)
    assert tiny.engine.used_rows == 0
    assert stream.generation.finish_reason == "interrupted"


def test_ctrl_c_gives_every_row_back_and_the_model_goes_on(tiny, monkeypatch):
    prompts = [tokens(i, 20) for i in range(4)]
    expected = [g.ids for g in tiny.generate(prompts, max_new_tokens=8)]
    tiny.forget()
    step, calls = tiny.head.step, [0]

    def interrupted(*args):
        calls[0] += 1
        if calls[0] == 4:
            step(*args)  # run, but nobody hears of it
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(tiny.head, "step", interrupted)
    found = tiny.generate(prompts, max_new_tokens=8)
    assert [g.ids for g in found] == [ids[:3] for ids in expected]
    assert tiny.engine.used_rows == 0
    assert [g.ids for g in tiny.generate(prompts, max_new_tokens=8)] == expected


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer here")
def test_ctrl_c_at_any_instant_leaves_the_others_and_the_next_as_they_should_be(tiny):
    """A timer presses it; another stream, sampled, goes on with the draws it would have had."""
    prompts = [tokens(i, 60) for i in range(3)]
    expected = [g.ids for g in tiny.generate(prompts, max_new_tokens=12, sampling=SAMPLED)]
    long = tiny.generate(tokens(9, 40), max_new_tokens=400, sampling=SAMPLED).ids
    other = tiny.stream(tokens(9, 40), max_new_tokens=400, sampling=SAMPLED)
    heard: list[int] = []
    rng = np.random.default_rng(0)
    pressed = 0

    def press(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
    try:
        for _ in range(60):
            signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(0.0005, 0.02)))
            try:
                found = tiny.generate(prompts, max_new_tokens=12, sampling=SAMPLED)
                signal.setitimer(signal.ITIMER_REAL, 0)
                for one, whole in zip(found, expected, strict=True):
                    assert one.ids == whole[: len(one.ids)]
                pressed += any(one.finish_reason == "interrupted" for one in found)
            except KeyboardInterrupt:  # outside of the part that keeps what was produced
                pressed += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            for _ in range(3):
                heard.append(next(other).id)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, before)
    assert pressed > 5
    assert tuple(heard) == long[: len(heard)]
    assert [g.ids for g in tiny.generate(prompts, max_new_tokens=12, sampling=SAMPLED)] == expected
    assert tiny.engine.used_rows == 1  # the other's


@pytest.mark.parametrize("draft", [None, "lookup"])
@pytest.mark.parametrize("window", [None, Window(128), Window(192, 64)], ids=str)
def test_sequences_go_on_after_steps_that_were_cut_off_anywhere(tiny, monkeypatch, draft, window):
    """Before they began, with keys and values written that no length counts, with some of the rows
    counted, or all: what is left in the cache is nobody's token."""
    prompts = [tokens(1, 70), tokens(2, 600), tokens(3, 20) * 8]
    options = {"max_new_tokens": 30, "draft": draft, "window": window}
    alone = [tiny.generate(prompt, **options) for prompt in prompts]
    tiny.forget()
    step, advance, rng = tiny.head.step, tiny.engine.advance, np.random.default_rng(0)
    pressed = 0

    def cut_off(ids, cache, span, wanted):
        nonlocal pressed
        if rng.random() < 0.6:
            return step(ids, cache, span, wanted)
        pressed += 1
        if rng.random() < 0.7:
            before = cache.lengths.copy()
            step(ids, cache, span, wanted)
            uncounted = span.rows[rng.integers(len(span.rows) + 1) :]
            cache.lengths[uncounted] = before[uncounted]
        raise KeyboardInterrupt

    def insistent(awaited):
        awaited = list(awaited)
        while True:
            try:
                return advance(awaited)
            except KeyboardInterrupt:
                continue

    monkeypatch.setattr(tiny.head, "step", cut_off)
    monkeypatch.setattr(tiny.engine, "advance", insistent)
    found = tiny.generate(prompts, **options)
    assert [(g.ids, g.logprobs) for g in found] == [(g.ids, g.logprobs) for g in alone]
    assert pressed > 5
    idle = tiny.engine.idle_tokens
    assert tiny.engine._rows.cache.pages_in_use == idle // 64


def test_ctrl_c_on_jax_costs_the_text_and_not_the_model(base, monkeypatch):
    model = bloomq.load(pack(base, TINY, "f32"), backend="jax")
    expected = model.generate([5, 6, 7], max_new_tokens=4).ids
    step, calls = model.head.step, [0]

    def interrupted(ids, cache, *rest):
        calls[0] += 1
        if calls[0] == 3:
            for layer in cache.layers:  # as when its memory was taken and nothing came back
                for part in layer:
                    part.delete()
            raise KeyboardInterrupt
        return step(ids, cache, *rest)

    monkeypatch.setattr(model.head, "step", interrupted)
    found = model.generate([5, 6, 7], max_new_tokens=4)
    assert (found.ids, found.finish_reason) == (expected[:2], "interrupted")
    monkeypatch.undo()
    assert model.generate([5, 6, 7], max_new_tokens=4).ids == expected


def test_what_is_kept_gives_way_to_what_is_needed(base, monkeypatch):
    model = bloomq.load(pack(base, TINY, "int8"))
    model.generate(tokens(1, 500), max_new_tokens=1)
    step, calls = model.head.step, [0]

    def full_once(*args):
        calls[0] += 1
        if calls[0] == 1:
            raise CapacityError("no memory for a cache of 1 GB: ask for fewer tokens or rows")
        return step(*args)

    monkeypatch.setattr(model.head, "step", full_once)
    assert model.generate(tokens(2, 50), max_new_tokens=1).ids
    assert model.engine.idle_tokens == 64


def test_rows_of_a_cache_without_pages_are_no_more_than_are_used(base):
    model = bloomq.load(pack(base, TINY, "f32"), backend="reference", context=64)
    for i in range(20):
        model.generate(tokens(i, 6), max_new_tokens=1)
    assert model.engine._rows.cache.batch <= 2
    model.forget()
    assert model.generate([5, 6], max_new_tokens=2).ids
    assert model.engine._rows.cache.capacity == 3  # a cache of its own


def test_a_text_that_begins_another_is_kept_once(tiny):
    for _ in range(12):
        tiny.generate(tokens(1, 100), max_new_tokens=5)
    assert tiny.engine.idle_tokens == 128


def test_no_memory_for_a_text_alone_is_said_so(tiny, monkeypatch):
    tiny.generate([5], max_new_tokens=1)

    def full(capacity, batch=None):
        raise CapacityError("no memory for a cache of 1 GB: ask for fewer tokens or rows")

    monkeypatch.setattr(tiny.engine._rows.cache, "grow", full)
    with pytest.raises(CapacityError, match="no memory for a cache"):
        tiny.generate(tokens(2, 1500), max_new_tokens=4)


def test_no_memory_for_one_text_ends_it_alone(tiny, monkeypatch):
    good = tiny.stream(tokens(1, 5), max_new_tokens=4)
    next(good)
    rows = tiny.engine._rows
    grow = rows.cache.grow

    def full(capacity, batch=None):
        if capacity > 1000:
            raise CapacityError("no memory for a cache of 1 GB: ask for fewer tokens or rows")
        grow(capacity, batch)

    monkeypatch.setattr(rows.cache, "grow", full)
    with pytest.raises(CapacityError, match="no memory for a cache"):
        tiny.generate(tokens(2, 1500), max_new_tokens=4)
    assert len(list(good)) == 3


# -- windows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "sinks"), [(0, 0), (64, 0), (100, 0), (128, 64), (192, -64), (256, 10), (128.0, 0)]
)
def test_impossible_windows_are_refused(size, sinks):
    with pytest.raises(UsageError, match=r"^a window (of|with) .*, expected "):
        Window(size, sinks)


@given(st.integers(2, 20), st.integers(0, 10), st.integers(0, 3000))
def test_a_window_holds_no_more_than_it_may(pages, sinks, position):
    if sinks > pages - 2:
        return
    window = Window(64 * pages, 64 * sinks)
    held = position + 1 - window.dropped(position)
    assert held <= window.tokens
    assert position < window.tokens or held > window.tokens - 64
    room = window.room(position)
    assert room >= 1
    assert window.dropped(position + room - 1) == window.dropped(position)
    assert window.dropped(position + room) > window.dropped(position)


def test_a_text_within_its_window_is_the_text_without(tiny):
    prompt = tokens(1, 100)
    found = tiny.generate(prompt, max_new_tokens=28, window=Window(128))
    assert found.ids == tiny.generate(prompt, max_new_tokens=28).ids


@pytest.mark.parametrize("window", [Window(128), Window(192, 64)], ids=str)
def test_a_windowed_text_goes_on_beyond_the_context_and_is_the_same_in_any_batch(base, window):
    model = bloomq.load(pack(base, TINY, "int8"), context=256)
    prompts = [tokens(1, 500), tokens(2, 3), tokens(3, 150)]
    options = {"max_new_tokens": 200, "window": window, "sampling": SAMPLED}
    together = model.generate(prompts, **options)
    assert model.engine._rows.cache.capacity <= 256
    assert all(len(g.ids) == 200 for g in together)
    first = model.generate(prompts[0], **options)
    assert (first.ids, first.logprobs) == (together[0].ids, together[0].logprobs)
    guessed = model.generate(prompts, draft="lookup", **options)
    assert [g.ids for g in guessed] == [g.ids for g in together]
    assert model.engine.used_rows == 0


@pytest.mark.parametrize("window", [Window(128), Window(192, 64)], ids=str)
def test_a_window_is_attention_to_what_it_holds(base, window):
    """Against every token's attention written out: keys that are out of its window hidden, and
    distances counted among those that are in it."""
    model = bloomq.load(pack(base, TINY, "f32"), cache_dtype="f32")
    prompt = tokens(9, 420)
    found = model.generate(prompt, max_new_tokens=4, window=window)
    from window_oracle import logits_within  # beside this file

    expected = logits_within(pack(base, TINY, "f32"), [*prompt, *found.ids[:-1]], window)[-4:]
    normed = expected - np.log(np.exp(expected).sum(axis=1, keepdims=True))
    assert found.ids == tuple(expected.argmax(axis=1).tolist())
    assert found.logprobs == pytest.approx(normed.max(axis=1).tolist(), abs=1e-4)


# -- any order of events ---------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_order_of_reading_stopping_and_entering_gives_the_texts_alone(plan, data):
    model, alone = plan
    engine = Engine(model.head, context=model.context, rows=3, idle_tokens=100)
    readers: dict[int, Reader] = {}
    found: dict[int, list[int]] = {}
    for _ in range(data.draw(st.integers(5, 40))):
        event = data.draw(st.sampled_from(["enter", "read", "read", "read", "stop"]))
        if event == "enter":
            name = data.draw(st.integers(0, len(alone) - 1))
            if name not in readers:
                readers[name], found[name] = reader(model, engine, name), []
        elif readers:
            name = data.draw(st.sampled_from(sorted(readers)))
            one = readers[name]
            if event == "stop":
                one.sequence.stop()
                del readers[name]
                continue
            while not one.has_ended and not engine.advance([one.sequence]):
                pass
            piece = one.take()
            if piece is not None:
                found[name].append(piece.id)
            assert found[name] == alone[name][: len(found[name])]
    for one in readers.values():
        one.sequence.stop()
    assert engine.used_rows == 0


@pytest.fixture(scope="module")
def plan(base: Path) -> tuple[LanguageModel, list[list[int]]]:
    model = bloomq.load(pack(base, TINY, "int8"))
    texts = []
    for name in range(6):
        engine = Engine(model.head, context=model.context)
        one = reader(model, engine, name)
        texts.append([piece.id for _, piece in read(engine, [one])])
    return model, texts


def reader(model: LanguageModel, engine: Engine, name: int) -> Reader:
    """Texts that share beginnings, of several lengths."""
    prompt = [*tokens(name % 2, 40), *tokens(name, 10 * name)]
    sampler = Sampler(SAMPLED, prompt, name, TINY.vocab_size)
    request = Request(prompt=tuple(prompt), max_new_tokens=6, sampler=sampler)
    return Reader(engine.sequence(request), None, ())


def test_a_step_is_no_longer_than_it_may_be(tiny, monkeypatch):
    sizes = steps(tiny, monkeypatch)
    tiny.generate([tokens(1, 3), tokens(2, 1400), tokens(3, 5)], max_new_tokens=5)
    assert max(sizes) <= STEP_TOKENS


def test_errors_of_the_engine_are_bloomqs(tiny):
    assert issubclass(CapacityError, BloomqError)
    with pytest.raises(UsageError, match="the prompt is empty"):
        tiny.engine.sequence(
            Request(prompt=(), max_new_tokens=1, sampler=Sampler(Sampling(), [], 0, 211))
        )
