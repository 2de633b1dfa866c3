"""Against transformers' processors and warpers on the same logits: the same kept tokens, the same
probabilities to float32's rounding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from sampling_oracle import probabilities

from bloomq.sampling import Sampling, edited

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

WARPERS: dict[str, Any] = {  # in transformers' order, which is ours
    "temperature": hf.TemperatureLogitsWarper,
    "top_k": hf.TopKLogitsWarper,
    "top_p": hf.TopPLogitsWarper,
    "min_p": hf.MinPLogitsWarper,
    "typical_p": hf.TypicalLogitsWarper,
}
CASES = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 20, "top_p": 0.5},
    {"temperature": 2.0, "top_k": 1},
    {"min_p": 0.05},
    {"temperature": 1.3, "top_p": 0.95, "min_p": 0.1},
    {"typical_p": 0.5},
    {"typical_p": 0.95, "temperature": 1.4},
    {"typical_p": 0.9, "top_k": 15, "temperature": 0.8},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "typical_p": 0.8},
]


@pytest.mark.parametrize("size", [40, 3000])
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_warpers_keep_the_same_tokens_with_the_same_probabilities(options, seed, size):
    logits = (3 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)
    scores = torch.tensor(logits)[None]
    for name, warper in WARPERS.items():
        if name in options:
            scores = warper(options[name])(None, scores)
    expected = torch.softmax(scores[0].double(), 0).numpy()
    found = probabilities(logits, Sampling(**{"temperature": 1.0, **options}), few=8)
    assert np.flatnonzero(found).tolist() == np.flatnonzero(expected).tolist()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("top_p", [0.5, 0.75, 0.2])
def test_top_p_keeps_the_first_token_that_crosses_the_threshold(top_p):
    logits = np.log([0.5, 0.25, 0.125, 0.125]).astype(np.float32)
    warped = hf.TopPLogitsWarper(top_p)(None, torch.tensor(logits)[None])[0].numpy()
    found = probabilities(logits, Sampling(temperature=1.0, top_p=top_p))
    assert np.flatnonzero(found).tolist() == np.flatnonzero(warped > -np.inf).tolist()


def ours(logits: np.ndarray, text: list[int], prompt: int, **options: Any) -> np.ndarray:
    ends = options.pop("ends", ())
    return edited(Sampling(**options), logits, text[:prompt], text[prompt:], ends)


PROCESSORS = [
    ({"repetition_penalty": 1.3}, lambda: hf.RepetitionPenaltyLogitsProcessor(1.3)),
    ({"repetition_penalty": 0.7}, lambda: hf.RepetitionPenaltyLogitsProcessor(0.7)),
    ({"no_repeat_ngram_size": 1}, lambda: hf.NoRepeatNGramLogitsProcessor(1)),
    ({"no_repeat_ngram_size": 2}, lambda: hf.NoRepeatNGramLogitsProcessor(2)),
    ({"no_repeat_ngram_size": 3}, lambda: hf.NoRepeatNGramLogitsProcessor(3)),
    (
        {"bad_words": [[1], [0, 2], [3, 3, 1], [2, 0]]},
        lambda: hf.NoBadWordsLogitsProcessor([[1], [0, 2], [3, 3, 1], [2, 0]]),
    ),
    (
        {"logit_bias": {1: 2.5, 4: -1.0, 5: -math.inf}},
        lambda: hf.SequenceBiasLogitsProcessor({(1,): 2.5, (4,): -1.0, (5,): -math.inf}),
    ),
    (
        {"min_new_tokens": 5, "ends": (2, 4)},
        lambda: hf.MinNewTokensLengthLogitsProcessor(6, 5, [2, 4]),
    ),
    (
        {"min_new_tokens": 4, "ends": (2,)},
        lambda: hf.MinNewTokensLengthLogitsProcessor(6, 4, 2),
    ),
]


@pytest.mark.parametrize(
    ("options", "theirs"),
    PROCESSORS,
    ids=lambda o: str(o)[:60] if isinstance(o, dict) else "theirs",
)
@pytest.mark.parametrize("seed", range(6))
def test_processors_give_the_same_scores(options, theirs, seed):
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal(6)).astype(np.float32)
    text = rng.integers(0, 4, 10).tolist()
    expected = theirs()(torch.tensor([text]), torch.tensor(logits)[None])[0].numpy()
    assert ours(logits, text, 6, **options).tolist() == expected.tolist()


def test_a_forced_token_gets_0_and_the_others_minus_infinity_as_there():
    logits = np.array([3.0, 1.0, 2.0], np.float32)
    expected = hf.ForcedBOSTokenLogitsProcessor(1)(torch.tensor([[0]]), torch.tensor(logits)[None])
    assert ours(logits, [0], 1, forced_prefix=[1]).tolist() == expected[0].tolist()
