"""From logits to a token: hand-computed cases, transformers' processors, and many draws."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from bloomq.errors import UsageError
from bloomq.layers import Top
from bloomq.sampling import Sampling, draw, generator, is_whole, penalise, top_of

LN = math.log
STEPS = 4000  # of the sweep below


class Sweep:
    """A stand-in for a generator: the middle of each of STEPS equal pieces of [0, 1), in turn."""

    def __init__(self, steps: int = STEPS) -> None:
        self.steps, self.at = steps, 0

    def random(self) -> float:
        self.at += 1
        return (self.at - 0.5) / self.steps


def shares(sampling: Sampling, logits: np.ndarray, top: Callable | None = None) -> np.ndarray:
    """The probability of each token, within 2 / STEPS: how often it is drawn as u sweeps [0, 1)."""
    sweep, found = Sweep(), np.zeros(len(logits))
    top = top or (lambda k, temperature: top_of(logits, k, temperature))
    for _ in range(STEPS):
        found[draw(sampling, sweep, len(logits), top, lambda: logits)] += 1 / STEPS
    return found


def logits_of(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities)).astype(np.float32)


# -- by hand ---------------------------------------------------------------------------------------


def test_greedy_takes_the_likeliest_and_of_equals_the_lowest_id():
    logits = np.array([1, 5, 5, -2], np.float32)
    assert draw(Sampling(), Sweep(), 4, lambda k, t: top_of(logits, k, t), lambda: logits) == 1


def test_temperature_one_draws_the_softmax():
    found = shares(Sampling(temperature=1.0), logits_of(0.5, 0.125, 0.25, 0.125))
    assert found == pytest.approx([0.5, 0.125, 0.25, 0.125], abs=2 / STEPS)


def test_temperature_a_half_squares_the_odds():
    found = shares(Sampling(temperature=0.5), logits_of(0.6, 0.3, 0.1))
    assert found == pytest.approx([36 / 46, 9 / 46, 1 / 46], abs=2 / STEPS)


def test_a_high_temperature_is_nearly_flat():
    found = shares(Sampling(temperature=100.0), np.array([3, 0, -3, 1], np.float32))
    assert found == pytest.approx([0.25] * 4, abs=0.01)


def test_a_low_temperature_is_nearly_greedy():
    found = shares(Sampling(temperature=0.001), np.array([3, 3.01, -80, 80, 79.9], np.float32))
    assert found[3] == pytest.approx(1)


def test_top_k_keeps_the_k_likeliest_and_renormalises():
    found = shares(Sampling(temperature=1.0, top_k=2), logits_of(0.1, 0.5, 0.15, 0.25))
    assert found == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=2 / STEPS)


def test_top_k_beyond_the_vocabulary_keeps_all():
    found = shares(Sampling(temperature=1.0, top_k=50), logits_of(0.1, 0.9))
    assert found == pytest.approx([0.1, 0.9], abs=2 / STEPS)


def test_top_k_of_ties_keeps_the_lowest_ids():
    found = shares(Sampling(temperature=1.0, top_k=2), logits_of(0.1, 0.3, 0.3, 0.3))
    assert found == pytest.approx([0, 0.5, 0.5, 0], abs=2 / STEPS)


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = logits_of(0.05, 0.5, 0.15, 0.3)
    for top_p, kept in ((0.4, [1]), (0.6, [1, 3]), (0.79, [1, 3]), (0.81, [1, 3, 2]), (0.96, None)):
        found = shares(Sampling(temperature=1.0, top_p=top_p), logits)
        expected = np.exp(logits.astype(np.float64))
        if kept is not None:
            expected[[i for i in range(4) if i not in kept]] = 0
        assert found == pytest.approx(expected / expected.sum(), abs=2 / STEPS), top_p


def test_top_p_always_keeps_the_likeliest():
    assert shares(Sampling(temperature=1.0, top_p=1e-9), logits_of(0.3, 0.7)).tolist() == [
        0,
        pytest.approx(1),
    ]


def test_top_p_cuts_what_top_k_left_renormalised():
    # of 0.4 0.3 0.2 0.1 top_k 3 leaves 4/9 3/9 2/9; 0.75 is reached by the first two
    found = shares(Sampling(temperature=1.0, top_k=3, top_p=0.75), logits_of(0.1, 0.4, 0.3, 0.2))
    assert found == pytest.approx([0, 4 / 7, 3 / 7, 0], abs=2 / STEPS)


def test_penalise_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits = np.array([2.0, -2.0, 0.0, 6.0, -6.0], np.float32)
    changed = penalise(logits, np.array([0, 1, 2]), 2.0)
    assert changed.tolist() == [1, -4, 0, 6, -6]
    assert logits.tolist() == [2, -2, 0, 6, -6]  # the logits themselves are left alone


def test_a_penalty_under_one_makes_seen_tokens_likelier():
    assert penalise(np.array([2, -2], np.float32), np.array([0, 1]), 0.5).tolist() == [4, -1]


def test_top_of_agrees_with_a_stable_sort():
    logits = np.rint(np.random.default_rng(0).standard_normal(300) * 2).astype(np.float32)
    order = np.argsort(-logits, kind="stable")
    for k in (1, 2, 17, 299, 300, 1000):
        top = top_of(logits, k, 0.5)
        assert top.ids[0].tolist() == order[:k].tolist()
        assert top.logits[0].tolist() == logits[order[:k]].tolist()
        scaled = logits.astype(np.float64) / 0.5
        assert top.logsumexp[0] == pytest.approx(np.log(np.exp(scaled).sum()), rel=1e-12)


# -- against transformers --------------------------------------------------------------------------

CASES = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.5},
    {"temperature": 0.9, "repetition_penalty": 1.3},
    {"temperature": 0.8, "top_k": 10, "top_p": 0.95, "repetition_penalty": 0.7},
    {"temperature": 2.0, "top_k": 1},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_kept_tokens_and_probabilities_equal_those_of_transformers(options, seed):
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal(40)).astype(np.float32)
    seen = rng.integers(0, 40, 12)
    scores = torch.tensor(logits)[None]
    if "repetition_penalty" in options:
        penalty = hf.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])
        scores = penalty(torch.tensor(seen)[None], scores)
    scores = hf.TemperatureLogitsWarper(options["temperature"])(None, scores)
    if "top_k" in options:
        scores = hf.TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = hf.TopPLogitsWarper(options["top_p"])(None, scores)
    expected = torch.softmax(scores[0].double(), 0).numpy()
    sampling = Sampling(**options)
    if sampling.penalised:
        logits = penalise(logits, np.unique(seen), sampling.repetition_penalty)
    found = shares(sampling, logits)
    assert not found[expected == 0].any()
    assert found[expected > 2 / STEPS].all()
    assert np.abs(found - expected).max() <= 2 / STEPS


# -- many draws ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 6}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.9}], ids=str
)
def test_draws_follow_the_distribution_by_chi_square(options):
    logits = (1.5 * np.random.default_rng(7).standard_normal(12)).astype(np.float32)
    sampling = Sampling(temperature=0.9, seed=11, **options)
    expected = shares(sampling, logits)
    rng, draws = generator(sampling, 0), 20_000
    counts = Counter(
        draw(sampling, rng, 12, lambda k, t: top_of(logits, k, t), lambda: logits)
        for _ in range(draws)
    )
    kept = np.flatnonzero(expected)
    assert set(counts) <= set(kept.tolist())
    square = sum((counts[i] - draws * expected[i]) ** 2 / (draws * expected[i]) for i in kept)
    # mean and deviation of chi-square with n degrees of freedom: n and sqrt(2 n); the seed is fixed
    freedom = len(kept) - 1
    assert square < freedom + 4 * math.sqrt(2 * freedom)


def test_a_seed_gives_the_same_numbers_again_and_another_seed_others():
    first, again, other = (
        generator(Sampling(temperature=1.0, seed=seed), 3).random(8) for seed in (5, 5, 6)
    )
    assert first.tolist() == again.tolist()
    assert not np.isin(first, other).any()


def test_each_sequence_has_numbers_of_its_own():
    sampling = Sampling(temperature=1.0, seed=5)
    streams = [tuple(generator(sampling, index).random(4)) for index in range(20)]
    assert len(set(streams)) == 20


def test_no_seed_means_new_numbers_each_time():
    sampling = Sampling(temperature=1.0)
    assert generator(sampling, 0).random() != generator(sampling, 0).random()


def test_a_large_seed_is_taken_whole():
    a, b = (generator(Sampling(seed=seed), 0).random() for seed in (2**200, 2**200 + 1))
    assert a != b


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_every_draw_takes_one_number_so_that_streams_stay_in_step(options):
    logits, sweep = logits_of(0.5, 0.3, 0.1, 0.1), Sweep()
    sampling = Sampling(temperature=1.0, **options)
    for count in range(1, 4):
        draw(sampling, sweep, 4, lambda k, t: top_of(logits, k, t), lambda: logits)
        assert sweep.at == count


# -- a large vocabulary ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "whole"), [(0.1, True), (8.0, False)], ids=["flat: all logits", "peaked: top 1024"]
)
def test_a_nucleus_takes_all_logits_only_where_1024_candidates_do_not_reach_top_p(scale, whole):
    logits = (scale * np.random.default_rng(0).standard_normal(50_000)).astype(np.float32)
    fetched, asked = [], []

    def top(k: int, temperature: float) -> Top:
        asked.append(k)
        return top_of(logits, k, temperature)

    def fetch() -> np.ndarray:
        fetched.append(1)
        return logits

    sampling = Sampling(temperature=1.0, top_p=0.9)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    total = np.cumsum(p[order])
    count = int(np.searchsorted(total, 0.9)) + 1
    assert (count > 1024) == whole
    sweep = Sweep(50)
    for i in range(50):
        token = draw(sampling, sweep, 50_000, top, fetch)
        at = int(np.searchsorted(total, (i + 0.5) / 50 * total[count - 1], side="right"))
        assert token == order[at]
    assert len(fetched) == (50 if whole else 0)
    assert set(asked) == {1024}


def test_a_small_vocabulary_never_fetches_its_logits_for_a_nucleus():
    logits = np.zeros(100, np.float32)

    def fetch() -> np.ndarray:
        raise AssertionError("fetched")

    sampling = Sampling(temperature=1.0, top_p=0.999)
    tokens = {
        draw(sampling, Sweep(1), 100, lambda k, t: top_of(logits, k, t), fetch) for _ in range(3)
    }
    assert tokens == {50}


class Highest:
    """The largest float under 1."""

    def random(self) -> float:
        return float(np.nextafter(1.0, 0.0))


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.99}], ids=str)
def test_the_highest_number_draws_a_token_that_is_kept(options):
    logits = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    sampling = Sampling(temperature=1.0, **options)
    token = draw(sampling, Highest(), 1000, lambda k, t: top_of(logits, k, t), lambda: logits)
    assert 0 <= token < 1000
    if "top_k" in options:
        assert token == np.argsort(-logits, kind="stable")[6]


# -- values that cannot be -------------------------------------------------------------------------

WRONG = [
    ("temperature", -0.1, "0 (greedy) to 100"),
    ("temperature", 100.5, "0 (greedy) to 100"),
    ("temperature", math.nan, "0 (greedy) to 100"),
    ("temperature", math.inf, "0 (greedy) to 100"),
    ("temperature", True, "0 (greedy) to 100"),
    ("temperature", "1", "0 (greedy) to 100"),
    ("temperature", None, "0 (greedy) to 100"),
    ("temperature", 1e-4, "0 (greedy) or at least 0.001"),
    ("top_k", -1, "a whole number, 0 for all"),
    ("top_k", 2.0, "a whole number, 0 for all"),
    ("top_k", "5", "a whole number, 0 for all"),
    ("top_p", 0.0, "above 0, at most 1"),
    ("top_p", 1.01, "above 0, at most 1"),
    ("top_p", -0.5, "above 0, at most 1"),
    ("top_p", math.nan, "above 0, at most 1"),
    ("top_p", False, "above 0, at most 1"),
    ("repetition_penalty", 0.0, "0.001 to 1000"),
    ("repetition_penalty", -1.0, "0.001 to 1000"),
    ("repetition_penalty", 1001, "0.001 to 1000"),
    ("repetition_penalty", math.nan, "0.001 to 1000"),
    ("seed", -1, "a whole number from 0"),
    ("seed", 1.5, "a whole number from 0"),
    ("seed", "1", "a whole number from 0"),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG, ids=str)
def test_an_impossible_value_is_refused_by_name(name, value, expected):
    with pytest.raises(UsageError) as caught:
        Sampling(**{name: value})
    assert str(caught.value) == f"{name} is {value!r}, expected {expected}"


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint64])
def test_numpys_whole_numbers_are_taken_as_pythons(kind: type):
    ours, theirs = Sampling(top_k=3, seed=9), Sampling(top_k=kind(3), seed=kind(9))
    draws = [generator(sampling, 2).random(4).tolist() for sampling in (ours, theirs)]
    assert draws[0] == draws[1]


@pytest.mark.parametrize(
    ("value", "whole"),
    [
        (0, True), (-3, True), (2**80, True), (np.int8(3), True), (np.uint64(2**63), True),
        (True, False), (np.bool_(True), False), (1.0, False), (np.float32(1), False),
        ("1", False), (None, False), (np.array([1]), False),
    ],
    ids=repr,
)  # fmt: skip
def test_whole_numbers_are_integers_and_no_truth_values(value, whole):
    assert is_whole(value) is whole


@pytest.mark.parametrize("value", [True, False, np.True_], ids=repr)
@pytest.mark.parametrize("name", ["top_k", "seed"])
def test_a_truth_value_is_not_a_whole_number(name, value):
    with pytest.raises(UsageError, match=rf"^{name} is .*, expected a whole number"):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"temperature": 0.001}, {"temperature": 100}, {"top_p": 1}, {"seed": 0}],
    ids=str,
)
def test_values_at_the_edge_are_taken(options):
    sampling = Sampling(**options)
    assert sampling.greedy == (sampling.temperature == 0)
    assert not sampling.penalised
