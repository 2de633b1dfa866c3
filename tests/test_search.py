"""Beam search: what transformers finds, in its order and with its scores; exhaustive where it can
be; rows that are copied no more than they must be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import written
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Tiny, checkpoint, pack

import bloomq
from bloomq import backends
from bloomq.errors import CapacityError, NumericError, UsageError
from bloomq.language_model import LanguageModel
from bloomq.layers import STEP_TOKENS
from bloomq.sampling import Sampling
from bloomq.search import BeamOptions, BeamSearch, Hypothesis, beam_search, best
from bloomq.search.beams import Beams, Ends
from bloomq.search.candidates import Candidates
from bloomq.search.rows import Rows

GOLDEN = Path(__file__).parent / "data" / "search" / "groups.json"
TINY = Tiny(n_head=4, head_dim=16, vocab_size=97, seed=4, tied=False)
CONTEXT = 2048
EARLY = (False, True, "never")
PENALTIES = (-1.0, 0.0, 1.0, 2.0)
NEW = 12
# A logprob differs from transformers' by less (as test_transformers has it: other orders of sums).
LOGPROB_ERROR = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def tiny(base: Path) -> LanguageModel:
    return bloomq.load(pack(base, TINY))


@pytest.fixture(scope="module")
def demo(pack_of: Callable[..., Path]) -> LanguageModel:
    return bloomq.load(pack_of("f32"))


def prompt_of(seed: int, length: int = 7) -> list[int]:
    return np.random.default_rng(seed).integers(4, TINY.vocab_size, length).tolist()


def found(model: LanguageModel, prompt: list[int], **options: Any) -> list[Hypothesis]:
    given = {"max_new_tokens": NEW, "context": CONTEXT, "num_beams": 3, **options}
    return beam_search(model.head, prompt, **given)


def is_score(score: float, expected: float, tokens: int, length_penalty: float) -> bool:
    """Sums of logprobs differ by as many errors as they have terms."""
    return abs(score - expected) <= LOGPROB_ERROR * tokens / tokens**length_penalty


# -- against transformers --------------------------------------------------------------------------


class Oracle:
    """Transformers' beam search on TINY's checkpoint."""

    def __init__(self, base: Path) -> None:
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        folder = checkpoint(base, TINY)
        self._torch = torch
        self._model = transformers.BloomForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def __call__(
        self, prompt: list[int], ends: list[int], **options: Any
    ) -> tuple[list[tuple[int, ...]], list[float]]:
        """Ids of each sequence up to its end, and the scores."""
        torch = self._torch
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.no_grad():
            output = self._model.eval().generate(
                torch.tensor([prompt]), do_sample=False, return_dict_in_generate=True,
                output_scores=True, eos_token_id=ends, **options,
            )  # fmt: skip
        torch.set_num_threads(before)
        rows = output.sequences[:, len(prompt) :].tolist()
        return [cut(row, ends) for row in rows], output.sequences_scores.tolist()


def cut(row: list[int], ends: list[int]) -> tuple[int, ...]:
    """A text up to its end, which padding follows."""
    at = next((i for i, token in enumerate(row) if token in ends), len(row))
    return tuple(row[: at + 1])


@pytest.fixture(scope="module")
def oracle(base: Path) -> Oracle:
    return Oracle(base)


@pytest.fixture(scope="module")
def common(tiny: LanguageModel) -> list[int]:
    """Tokens that greedy text behind prompts 0 and 1 has, as ends of a text."""
    return sorted(
        {tiny.generate(prompt_of(s), max_new_tokens=9).ids[i] for s in (0, 1) for i in (3, 8)}
    )


def check(
    ours: LanguageModel, oracle: Oracle, prompt: list[int], ends: list[int], *,
    sampling: Sampling | None = None, **options: Any,
) -> None:  # fmt: skip
    """The same texts in the same order, with the same scores. sampling: as transformers' options
    say."""
    known = {k: options.pop(k) for k in list(options) if k not in OURS}
    hypotheses = found(ours, prompt, ends=tuple(ends), sampling=sampling, **options)
    ids, scores = oracle(prompt, ends, **{"max_new_tokens": NEW, **options, **known})
    assert [one.ids for one in hypotheses] == ids
    penalty = options.get("length_penalty", 1.0)
    for one, score in zip(hypotheses, scores, strict=True):
        assert is_score(one.score, score, len(one.ids), penalty)


OURS = {"num_beams", "num_return_sequences", "length_penalty", "early_stopping", "max_new_tokens"}


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("early", EARLY)
def test_texts_order_and_scores_are_those_of_transformers(tiny, oracle, common, early, penalty):
    for beams, seed, ends in product((2, 5), (0, 1), ([2], common)):
        check(
            tiny, oracle, prompt_of(seed), ends, num_beams=beams, early_stopping=early,
            length_penalty=penalty, num_return_sequences=beams,
        )  # fmt: skip


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_as_many_texts_are_returned_as_are_asked_for(tiny, oracle, common, wanted):
    check(tiny, oracle, prompt_of(2), common, num_beams=3, num_return_sequences=wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 6},
        {"min_new_tokens": 4, "no_repeat_ngram_size": 1, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_processors_change_scores_as_in_transformers(tiny, oracle, common, options):
    for seed, early in product((0, 1), EARLY):
        check(
            tiny, oracle, prompt_of(seed), common, num_beams=4, num_return_sequences=4,
            early_stopping=early, sampling=Sampling(**options), **options,
        )  # fmt: skip


def test_a_prompt_longer_than_a_step_is_that_of_transformers(tiny, oracle):
    check(tiny, oracle, prompt_of(3, STEP_TOKENS + 9), [2], num_beams=3, max_new_tokens=5)


# -- groups ----------------------------------------------------------------------------------------


def goldens() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["cases"]
    return cases


@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("beams", [2, 4, 6])
def test_groups_are_those_of_transformers_4(demo: LanguageModel, beams, early):
    """Which writes its first end-of-text token for whichever ended a text."""
    kind = (beams, early)
    cases = [c for c in goldens() if (c["num_beams"], c["early_stopping"]) == kind]
    assert len(cases) == 12
    for case in cases:
        prompt, ends, ids, scores = (case.pop(k) for k in ("prompt", "ends", "ids", "scores"))
        hypotheses = found(demo, prompt, ends=tuple(ends), **case)
        assert [
            [*one.ids[:-1], ends[0]] if one.finish_reason == "eos" else list(one.ids)
            for one in hypotheses
        ] == ids
        for one, score in zip(hypotheses, scores, strict=True):
            assert is_score(one.score, score, len(one.ids), case["length_penalty"])


def test_groups_differ_more_than_beams(demo: LanguageModel):
    """Of one step: each group begins with another token, as far as the penalty reaches."""
    prompt = demo.prompt_ids("Once upon a time")
    options = {"num_beams": 4, "num_return_sequences": 4}
    plain = found(demo, prompt, **options)
    diverse = found(demo, prompt, **options, num_beam_groups=4, diversity_penalty=50.0)
    assert len({one.ids[0] for one in diverse}) == 4 > len({one.ids[0] for one in plain})


def test_groups_take_what_processors_leave(demo: LanguageModel):
    """The same search with scores from all logits and from the best few."""
    prompt = demo.prompt_ids("def main(")
    options = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}
    plain = found(demo, prompt, **options)
    edited = found(demo, prompt, **options, sampling=Sampling(logit_bias={5: -1e-30}))
    assert [one.ids for one in plain] == [one.ids for one in edited]
    assert plain[0].score == pytest.approx(edited[0].score, abs=1e-5)


# -- what a search is ------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [False, True])
def test_one_beam_is_greedy(demo: LanguageModel, early):
    greedy = demo.generate("Once upon a time", max_new_tokens=20)
    one = found(
        demo, demo.prompt_ids("Once upon a time"), num_beams=1, max_new_tokens=20,
        early_stopping=early, ends=(2,),
    )[0]  # fmt: skip
    assert one.ids == greedy.ids
    assert one.logprobs == pytest.approx(greedy.logprobs, abs=1e-6)
    assert one.score == pytest.approx(sum(greedy.logprobs) / 20)


def test_logprobs_are_the_models_whatever_the_processors(demo: LanguageModel):
    prompt = demo.prompt_ids("Once upon a time")
    for sampling in (Sampling(), Sampling(repetition_penalty=1.5)):
        one = found(demo, prompt, num_beams=4, sampling=sampling)[0]
        logits = demo([prompt + list(one.ids)]).logits[0, len(prompt) - 1 : -1].astype(np.float64)
        normed = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        expected = normed[np.arange(NEW), list(one.ids)]
        assert one.logprobs == pytest.approx(expected.tolist(), abs=LOGPROB_ERROR)


def random_model(seed: int, vocab_size: int) -> Callable[[tuple[int, ...]], np.ndarray]:
    """Logprobs [V] of what follows a text: another random distribution behind each."""

    def logprobs(ids: tuple[int, ...]) -> np.ndarray:
        logits = np.random.default_rng([seed, *ids]).standard_normal(vocab_size)
        return np.asarray(logits - np.log(np.exp(logits).sum()))

    return logprobs


@given(
    seed=st.integers(0, 1000), vocab_size=st.integers(2, 4), most=st.integers(1, 4),
    ends=st.sampled_from([(), (0,), (0, 1)]), penalty=st.sampled_from(PENALTIES),
    early=st.sampled_from([False, "never"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_with_beams_for_all_texts_the_best_of_all_are_found(
    seed, vocab_size, most, ends, penalty, early
):
    model, count = random_model(seed, vocab_size), vocab_size**most
    options = BeamOptions(
        num_beams=count, num_return_sequences=count, length_penalty=penalty, early_stopping=early
    )
    beams = Beams(options, Ends(ends, most, lambda ids: False))
    while beams.running:
        beams.advance(lambda beam, ids, count, lowered: ranked(model(ids)))
    expected = {ids: total / len(ids) ** penalty for ids, total in texts(model, ends, most)}
    results = beams.results()
    assert {one.ids for one in results} == set(expected)
    assert [one.score for one in results] == sorted((one.score for one in results), reverse=True)
    for one in results:
        assert one.score == pytest.approx(expected[one.ids])


def ranked(logprobs: np.ndarray) -> Candidates:
    order = np.argsort(-logprobs)
    return Candidates(order, logprobs[order], logprobs[order])


def texts(
    model: Callable[[tuple[int, ...]], np.ndarray], ends: tuple[int, ...], most: int,
    ids: tuple[int, ...] = (), total: float = 0.0,
) -> Iterator[tuple[tuple[int, ...], float]]:  # fmt: skip
    """Every text there is, with the sum of its logprobs."""
    if len(ids) == most or (ids and ids[-1] in ends):
        yield ids, total
        return
    for token, logprob in enumerate(model(ids)):
        yield from texts(model, ends, most, (*ids, token), total + logprob)


def test_prompts_in_one_search_find_what_each_finds_alone(tiny: LanguageModel, common):
    prompts = [prompt_of(0), prompt_of(5, 1), prompt_of(6, 30), prompt_of(0)]
    options = BeamOptions(num_beams=3, num_return_sequences=3)
    search = BeamSearch(
        tiny.head, prompts, options, max_new_tokens=NEW, context=CONTEXT, ends=tuple(common)
    )
    lengths = list(search.run())
    assert lengths == list(range(1, len(lengths) + 1))
    for prompt, together in zip(prompts, search.results(), strict=True):
        alone = found(tiny, prompt, num_return_sequences=3, ends=tuple(common))
        assert together == alone  # to the last bit


def test_several_prompts_longer_than_a_step_find_what_each_finds_alone(tiny: LanguageModel):
    prompts = [prompt_of(i, length) for i, length in enumerate((STEP_TOKENS - 3, 5, STEP_TOKENS))]
    done: list[tuple[int, int]] = []
    search = BeamSearch(
        tiny.head, prompts, BeamOptions(num_beams=2), max_new_tokens=4, context=CONTEXT
    )
    assert len(list(search.run(lambda n, total: done.append((n, total))))) == 4
    total = sum(map(len, prompts))
    assert done == [(STEP_TOKENS, total), (2 * STEP_TOKENS, total), (total, total)][: len(done)]
    for prompt, together in zip(prompts, search.results(), strict=True):
        assert together == found(tiny, prompt, num_beams=2, max_new_tokens=4)


@pytest.mark.parametrize("backend", backends.available())
def test_every_backend_finds_the_same_texts(base: Path, tiny: LanguageModel, backend: str):
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 6}
    expected = found(tiny, prompt_of(0), **options)
    other = bloomq.load(pack(base, TINY), backend=backend)
    for one, same in zip(found(other, prompt_of(0), **options), expected, strict=True):
        assert one.ids == same.ids
        assert one.logprobs == pytest.approx(same.logprobs, abs=1e-4)


def test_each_prompts_beams_use_its_adapter(base: Path, tmp_path: Path):
    model = bloomq.load(pack(base, TINY))
    model.load_adapter(written(tmp_path / "lora", hidden_size=64), "pirate")
    prompt, options = prompt_of(1), BeamOptions(num_beams=3)
    gates = model.head.adapters.gates([None, "pirate"], 2)
    search = BeamSearch(
        model.head, [prompt, prompt], options, max_new_tokens=8, context=CONTEXT, gates=gates
    )
    list(search.run())
    plain, adapted = (results[0] for results in search.results())
    for one, chosen in ((plain, None), (adapted, "pirate")):
        logits = model([prompt + list(one.ids)], adapters=chosen).logits[0, len(prompt) - 1 : -1]
        wide = logits.astype(np.float64)
        normed = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
        expected = normed[np.arange(8), list(one.ids)]
        assert one.logprobs == pytest.approx(expected.tolist(), abs=LOGPROB_ERROR)
    assert plain.ids != adapted.ids


# -- ends and interruptions ------------------------------------------------------------------------


def test_a_text_says_why_it_ended(tiny: LanguageModel, common):
    texts = found(
        tiny, prompt_of(0), num_beams=5, num_return_sequences=5, ends=tuple(common),
        early_stopping="never", length_penalty=2.0,
    )  # fmt: skip
    assert {one.finish_reason for one in texts} == {"eos", "length"}
    for one in texts:
        assert (one.ids[-1] in common) == (one.finish_reason == "eos")
        assert (len(one.ids) == NEW) or one.finish_reason == "eos"
        assert not set(one.ids[:-1]) & set(common)
        assert len(one.logprobs) == len(one.ids)


def test_a_text_ends_where_the_caller_says(tiny: LanguageModel):
    texts = found(
        tiny,
        prompt_of(0),
        num_return_sequences=3,
        stopped=lambda ids: len(ids) == 3 and ids[0] > 50,
    )
    assert {one.finish_reason for one in texts} <= {"stop", "length"}
    stopped = [one for one in texts if one.finish_reason == "stop"]
    assert all(len(one.ids) == 3 and one.ids[0] > 50 for one in stopped)


def test_ctrl_c_returns_the_best_so_far(tiny: LanguageModel):
    calls = []

    def press(ids: tuple[int, ...]) -> bool:
        calls.append(ids)
        if len(ids) == 6:
            raise KeyboardInterrupt
        return False

    whole = found(tiny, prompt_of(0), num_return_sequences=3, max_new_tokens=5)
    texts = found(tiny, prompt_of(0), num_return_sequences=3, stopped=press)
    assert [one.finish_reason for one in texts] == ["interrupted"] * 3
    assert [one.ids for one in texts] == [one.ids for one in whole]
    assert [one.score for one in texts] == [one.score for one in whole]
    assert len(calls) > 3


@pytest.mark.parametrize("groups", [{}, {"num_beam_groups": 3, "diversity_penalty": 1.0}], ids=str)
def test_ctrl_c_in_the_prompt_returns_an_empty_text(tiny: LanguageModel, groups):
    def press(done: int, total: int) -> None:
        raise KeyboardInterrupt

    texts = found(
        tiny, prompt_of(0, STEP_TOKENS + 1), num_return_sequences=3, progress=press, **groups
    )
    assert texts == [Hypothesis((), 0.0, (), "interrupted")]


# -- rows ------------------------------------------------------------------------------------------


class Cabinet:
    """A cache as `Rows` sees it: what each row holds, and how often one was copied."""

    def __init__(self, rows: int) -> None:
        self.held: list[str] = [""] * rows
        self.copies = 0

    def copy(self, source: int, target: int) -> None:
        self.held[target] = self.held[source]
        self.copies += 1

    def truncate(self, row: int, length: int) -> None:
        assert length == 0
        self.held[row] = ""


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5), max_size=6))
def test_a_beams_row_holds_its_past_and_only_splits_are_copied(steps: list[list[int]]):
    cabinet = Cabinet(5)
    rows = Rows(cabinet, 0, 5)  # type: ignore[arg-type]
    pasts = [""]
    for n, drawn in enumerate(steps):
        parents = [parent % len(pasts) for parent in drawn]
        before = cabinet.copies
        rows.follow(parents)
        assert cabinet.copies - before == len(parents) - len(set(parents))
        assert len(set(rows.used)) == len(parents)
        pasts = [f"{pasts[parent]}{n}{i}." for i, parent in enumerate(parents)]
        for row, past in zip(rows.used, pasts, strict=True):
            cabinet.held[row] += past[len(cabinet.held[row]) :]
            assert cabinet.held[row] == past
        assert sum(held != "" for held in cabinet.held) == len(parents)


def test_no_row_is_left_when_a_search_has_ended(tiny: LanguageModel, monkeypatch):
    made = []
    cache = tiny.head.cache
    monkeypatch.setattr(tiny.head, "cache", lambda *sizes: made.append(cache(*sizes)) or made[-1])
    found(tiny, prompt_of(0), num_beams=4)
    assert made[0].batch == 4
    assert made[0].lengths.tolist() == [0] * 4


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_beams": 0}, r"num_beams is 0, expected 1 to 4096"),
        ({"num_beams": 4097}, r"num_beams is 4097, expected 1 to 4096"),
        ({"num_beams": True}, r"num_beams is True, expected 1 to 4096"),
        ({"num_beams": 2.0}, r"num_beams is 2\.0, expected 1 to 4096"),
        ({"num_return_sequences": 4}, r"num_return_sequences is 4, expected 1 to num_beams \(3\)"),
        ({"num_return_sequences": 0}, r"num_return_sequences is 0, expected 1 to num_beams \(3\)"),
        ({"length_penalty": "long"}, r"length_penalty is 'long', expected -10 to 10"),
        ({"length_penalty": float("nan")}, r"length_penalty is nan, expected -10 to 10"),
        ({"length_penalty": 11}, r"length_penalty is 11, expected -10 to 10"),
        ({"early_stopping": "always"}, r"early_stopping is 'always', expected True, False or 'nev"),
        ({"early_stopping": 1}, r"early_stopping is 1, expected True, False or 'never'"),
        ({"num_beam_groups": 2, "diversity_penalty": 1.0},
         r"num_beam_groups is 2, expected a divisor of num_beams \(3\)"),
        ({"num_beam_groups": 0}, r"num_beam_groups is 0, expected a divisor of num_beams"),
        ({"num_beam_groups": 3}, r"3 groups of beams without a diversity_penalty would find the"),
        ({"diversity_penalty": 1.0}, r"diversity_penalty is 1\.0 with one group of beams: raise"),
        ({"diversity_penalty": -1.0}, r"diversity_penalty is -1\.0, expected a number from 0"),
        ({"sampling": Sampling(temperature=0.7)},
         r"beam search with temperature 0\.7, expected 0: it chooses by score, not by chance"),
        ({"max_new_tokens": 0}, r"max_new_tokens is 0, expected at least 1"),
        ({"sampling": Sampling(bad_words=[[97]])}, r"bad_words names token 97"),
        ({"sampling": Sampling(bad_words=[[i] for i in range(97)])},
         r"no token is left for any beam: bad_words and the like forbid them all"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused(tiny: LanguageModel, options, expected):
    with pytest.raises(UsageError, match=f"^{expected}"):
        found(tiny, prompt_of(0), **options)


def test_prompts_that_cannot_be_are_refused_in_the_words_of_generate(tiny: LanguageModel):
    with pytest.raises(UsageError, match=r"^the prompt is empty: BLOOM needs at least one token"):
        found(tiny, [])
    with pytest.raises(CapacityError, match=r"^a prompt of 7 tokens and 12 new ones exceed the c"):
        found(tiny, prompt_of(0), context=18)
    with pytest.raises(UsageError, match=r"^no prompts: give at least one"):
        BeamSearch(tiny.head, [], BeamOptions(num_beams=2), max_new_tokens=1, context=9)
    with pytest.raises(UsageError, match=r"^token id 97, expected 0 to 96"):
        found(tiny, [5, 97])


def test_not_a_number_is_an_error_not_a_score(tiny: LanguageModel, monkeypatch):
    step, caches = tiny.head.step, []

    def bad(ids, cache, span, wanted):
        logits = tiny.backend.numpy(step(ids, cache, span, wanted)).copy()
        caches.append(cache)
        if len(caches) == 3:
            logits[-1] = np.nan
        return logits

    monkeypatch.setattr(tiny.head, "step", bad)
    with pytest.raises(NumericError, match=r"^NaN or infinity after ln_f or the head: "):
        found(tiny, prompt_of(0))
    assert caches[-1].lengths.tolist() == [8] * 3  # the prompt and one token


# -- the best of several ---------------------------------------------------------------------------


def test_the_best_are_those_whose_tokens_are_likeliest_on_average():
    short = Hypothesis((1,), 0.0, (-1.0,), "eos")
    long = Hypothesis((1, 2, 3), 0.0, (-0.5, -0.9, -0.8), "length")  # its sum is the lowest
    empty = Hypothesis((), 0.0, (), "interrupted")
    equal = Hypothesis((4,), 0.0, (-1.0,), "eos")
    assert best([empty, short, long, equal]) == [long]
    assert best([empty, short, long, equal], 4) == [long, short, equal, empty]


@pytest.mark.parametrize("count", [0, 3, 1.0, True])
def test_more_of_the_best_than_there_are_is_refused(count):
    one = Hypothesis((1,), 0.0, (-1.0,), "eos")
    with pytest.raises(UsageError, match=r"^the best .* of 2 results, expected 1 to as many"):
        best([one, one], count)
