"""Contrastive search: what transformers 4 finds, and what the formula says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import written
from models import Tiny, pack

import bloomq
from bloomq import backends
from bloomq.errors import CapacityError, NumericError, UsageError
from bloomq.language_model import LanguageModel
from bloomq.layers import STEP_TOKENS
from bloomq.sampling import Sampling
from bloomq.search import ContrastiveSearch, ContrastOptions, Hypothesis, contrastive_search

GOLDEN = Path(__file__).parent / "data" / "search" / "contrastive.json"
TINY = Tiny(n_head=4, head_dim=16, vocab_size=97, seed=4, tied=False)
CONTEXT = 2048
NEW = 12


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


def found(model: LanguageModel, prompt: list[int], **options: Any) -> Hypothesis:
    given = {"max_new_tokens": NEW, "context": CONTEXT, "penalty_alpha": 0.6, **options}
    return contrastive_search(model.head, prompt, **given)


def goldens() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["cases"]
    return cases


@pytest.mark.parametrize("alpha", [0.2, 0.6, 1.0])
def test_texts_are_those_of_transformers_4(demo: LanguageModel, alpha: float):
    cases = [case for case in goldens() if case["penalty_alpha"] == alpha]
    assert len(cases) == 18
    for case in cases:
        sampling = Sampling(repetition_penalty=case["repetition_penalty"])
        one = found(
            demo, case["prompt"], penalty_alpha=alpha, top_k=case["top_k"], ends=(2,),
            sampling=sampling,
        )  # fmt: skip
        assert list(one.ids) == case["ids"]


def test_each_token_has_the_best_of_probability_less_likeness(tiny: LanguageModel):
    """Recomputed from whole calls without a cache."""
    prompt, alpha, top_k = prompt_of(1), 0.6, 5
    text = list(prompt)
    for token in found(tiny, prompt, penalty_alpha=alpha, top_k=top_k, max_new_tokens=6).ids:
        logits = tiny(text).logits[0, -1].astype(np.float64)
        shares = np.exp(logits) / np.exp(logits).sum()
        candidates = np.argsort(-logits)[:top_k]
        gains = []
        for candidate in candidates.tolist():
            states = tiny.model([[*text, candidate]], output_hidden_states=True).hidden_states[-1][
                0
            ]
            units = states / np.linalg.norm(states, axis=1, keepdims=True)
            likeness = (units[:-1] @ units[-1]).max()
            gains.append((1 - alpha) * shares[candidate] - alpha * likeness)
        assert token == candidates[int(np.argmax(gains))]
        text.append(token)


def test_without_a_penalty_the_text_is_greedy(demo: LanguageModel):
    greedy = demo.generate("Once upon a time", max_new_tokens=20)
    one = found(
        demo, demo.prompt_ids("Once upon a time"), penalty_alpha=0.0, max_new_tokens=20, ends=(2,)
    )
    assert one.ids == greedy.ids
    assert one.logprobs == pytest.approx(greedy.logprobs, abs=1e-5)
    assert one.score == pytest.approx(sum(greedy.logprobs))


def test_a_penalty_ends_repetitions(demo: LanguageModel):
    prompt = demo.prompt_ids("Once upon a time")
    greedy = demo.generate(prompt, max_new_tokens=60).ids
    assert len(set(found(demo, prompt, max_new_tokens=60).ids)) > len(set(greedy))


def test_prompts_in_one_search_find_what_each_finds_alone(tiny: LanguageModel):
    """Of different length, one longer than a step; one is stopped, the others go on."""
    prompts = [prompt_of(i, length) for i, length in enumerate((7, 1, STEP_TOKENS + 3, 30))]
    done: list[tuple[int, int]] = []
    search = ContrastiveSearch(
        tiny.head, prompts, ContrastOptions(penalty_alpha=0.6), max_new_tokens=NEW, context=CONTEXT
    )
    for length in search.run(lambda n, total: done.append((n, total))):
        if length == 4:
            search.texts[3].reason = "stop"
    total = sum(map(len, prompts))
    assert done == [(STEP_TOKENS, total), (total, total)]
    for prompt, text, count in zip(prompts, search.texts, (NEW, NEW, NEW, 4), strict=True):
        alone = found(tiny, prompt)
        assert tuple(text.ids) == alone.ids[:count]
        assert tuple(text.logprobs) == alone.logprobs[:count]  # to the last bit


@pytest.mark.parametrize("backend", backends.available())
def test_every_backend_finds_the_same_text(base: Path, tiny: LanguageModel, backend: str):
    other = bloomq.load(pack(base, TINY), backend=backend)
    assert found(other, prompt_of(0)).ids == found(tiny, prompt_of(0)).ids


def test_each_prompts_candidates_use_its_adapter(base: Path, tmp_path: Path):
    model = bloomq.load(pack(base, TINY))
    model.load_adapter(written(tmp_path / "lora", hidden_size=64), "pirate")
    gates = model.head.adapters.gates([None, "pirate"], 2)
    search = ContrastiveSearch(
        model.head, [prompt_of(1)] * 2, ContrastOptions(penalty_alpha=0.0), max_new_tokens=NEW,
        context=CONTEXT, gates=gates,
    )  # fmt: skip
    list(search.run())
    for text, adapter in zip(search.texts, (None, "pirate"), strict=True):
        greedy = model.generate(prompt_of(1), max_new_tokens=NEW, adapters=adapter)
        assert tuple(text.ids) == greedy.ids


def test_more_candidates_than_tokens_are_all_tokens(base: Path):
    few = bloomq.load(pack(base, Tiny(vocab_size=6, tied=False)))
    assert found(few, [4, 5], top_k=50).ids == found(few, [4, 5], top_k=6).ids


def test_a_text_says_why_it_ended(tiny: LanguageModel):
    whole = found(tiny, prompt_of(0))
    assert (whole.finish_reason, len(whole.ids)) == ("length", NEW)
    end = next(token for i, token in enumerate(whole.ids) if i > 2 and token not in whole.ids[:i])
    ended = found(tiny, prompt_of(0), ends=(end,))
    assert ended.finish_reason == "eos"
    assert ended.ids == whole.ids[: whole.ids.index(end) + 1]


def test_ctrl_c_returns_what_was_produced(tiny: LanguageModel, monkeypatch):
    read, calls = tiny.head.read, []

    def press(states: Any) -> Any:
        calls.append(states)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return read(states)

    whole = found(tiny, prompt_of(0))
    monkeypatch.setattr(tiny.head, "read", press)
    one = found(tiny, prompt_of(0))
    assert one.finish_reason == "interrupted"
    assert one.ids == whole.ids[:4]


def test_no_row_is_left_when_a_search_has_ended(tiny: LanguageModel, monkeypatch):
    made = []
    cache = tiny.head.cache
    monkeypatch.setattr(tiny.head, "cache", lambda *sizes: made.append(cache(*sizes)) or made[-1])
    found(tiny, prompt_of(0))
    assert made[0].lengths.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"penalty_alpha": 1.5}, r"penalty_alpha is 1\.5, expected 0 to 1"),
        ({"penalty_alpha": -0.1}, r"penalty_alpha is -0\.1, expected 0 to 1"),
        ({"penalty_alpha": None}, r"penalty_alpha is None, expected 0 to 1"),
        ({"top_k": 1}, r"contrastive search with top_k 1, expected at least 2 candidates"),
        ({"top_k": 4.0}, r"contrastive search with top_k 4\.0, expected at least 2 candidates"),
        ({"sampling": Sampling(temperature=1.0)},
         r"contrastive search with temperature 1\.0, expected 0: it chooses by score, not by cha"),
        ({"sampling": Sampling(logit_bias={97: 1.0})}, r"logit_bias names token 97"),
        ({"sampling": Sampling(bad_words=[[i] for i in range(97)])},
         r"no candidate is left to choose: bad_words and the like forbid them all"),
        ({"max_new_tokens": 0}, r"max_new_tokens is 0, expected at least 1"),
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


@pytest.mark.parametrize("layer", ["read", "ln_f"])
def test_not_a_number_is_an_error_not_a_score(tiny: LanguageModel, monkeypatch, layer):
    whole, calls = getattr(tiny.head, layer), []

    def bad(states: Any) -> Any:
        result = whole(states)
        calls.append(result)
        if len(calls) == 3:
            result[-1] = np.nan
        return result

    monkeypatch.setattr(tiny.head, layer, bad)
    with pytest.raises(NumericError, match=r"^NaN or infinity after ln_f or the head: "):
        found(tiny, prompt_of(0))
