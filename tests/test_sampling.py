"""The sampler of a sequence: draws, random numbers, constraints, mirostat, and the logits that it
reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_oracle import expected, logits_of, probabilities, row_of

from bloomq.backends.numba_cpu.layers import NumbaBackend
from bloomq.backends.reference import ReferenceBackend
from bloomq.errors import UsageError
from bloomq.layers import Top
from bloomq.levels import LEVELS, Levels
from bloomq.sampling import ORDER, Logits, Sampler, Sampling, generator
from bloomq.sampling.draws import pick
from bloomq.sampling.filters import FEW
from bloomq.sampling.listed import Listed
from bloomq.sampling.ranked import Ranked

STEPS = 2000  # of the sweep below
VOCABULARY = 250_880


class Sweep:
    """A stand-in for a generator: the middle of each of some equal pieces of [0, 1), in turn."""

    def __init__(self, steps: int = STEPS) -> None:
        self.steps, self.at = steps, 0

    def random(self) -> float:
        self.at += 1
        return (self.at - 0.5) / self.steps


class Always:
    """A stand-in for a generator: one number again and again."""

    def __init__(self, number: float) -> None:
        self.number, self.taken = number, 0

    def random(self) -> float:
        self.taken += 1
        return self.number


class Only:
    """A constraint that lets a set of tokens through, and notes what it is told."""

    def __init__(self, tokens: Sequence[int], vocab_size: int) -> None:
        self.mask = np.isin(np.arange(vocab_size), tokens)
        self.accepted: list[int] = []

    def allowed(self) -> np.ndarray:
        return self.mask

    def accept(self, token: int) -> None:
        self.accepted.append(token)


class Counting(ReferenceBackend):
    """Notes what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.tops: list[int] = []
        self.fetched = self.leveled = 0

    def levels(self, logits: np.ndarray, temperature: float = 1.0) -> Levels:
        self.leveled += 1
        return super().levels(logits, temperature)

    def top(self, logits: np.ndarray, k: int) -> Top:
        self.tops.append(k)
        return super().top(logits, k)

    def numpy(self, x: np.ndarray) -> np.ndarray:
        self.fetched += 1
        return super().numpy(x)


def sampler(size: int, rng: Any = None, constraint: Any = None, **options: Any) -> Sampler:
    made = Sampler(Sampling(**options), [0], 0, size, constraint=constraint)
    if rng is not None:
        made._rng = rng
    return made


def shares(values: np.ndarray, **options: Any) -> np.ndarray:
    """How often each token is drawn as the random number sweeps [0, 1): its probability, within
    2 / STEPS."""
    draws, row = sampler(len(values), Sweep(), **options), row_of(values)
    return np.bincount([draws(row, []) for _ in range(STEPS)], minlength=len(values)) / STEPS


def chi_square_p(square: float, freedom: int) -> float:
    """The probability that chi-square exceeds `square`. Source: Abramowitz and Stegun 26.4.4-5."""
    half, first = square / 2, freedom % 2 / 2
    terms = (math.exp((first + i) * math.log(half) - half - math.lgamma(first + i + 1))
             for i in range(freedom // 2))  # fmt: skip
    return sum(terms) + (math.erfc(math.sqrt(half)) if freedom % 2 else 0.0)


# -- draws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [ReferenceBackend(), NumbaBackend()], ids=["numpy", "numba"])
def test_greedy_takes_the_likeliest_and_of_equals_the_lowest_id(backend):
    assert sampler(4)(row_of(np.array([1, 5, 5, -2]), backend), []) == 1


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=200))
def test_greedy_is_argmax(values):
    array = np.array(values, np.float32)
    for backend in (ReferenceBackend(), NumbaBackend(1)):
        assert sampler(len(values))(row_of(array, backend), []) == array.argmax()


SHAPED = [
    {}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"typical_p": 0.6},
    {"top_n_sigma": 2.0}, {"dynamic_temperature": 0.7},
    {"top_k": 6, "top_p": 0.9, "temperature": 1.4, "order": (*ORDER[1:], "temperature")},
]  # fmt: skip


@pytest.mark.parametrize("options", SHAPED, ids=str)
def test_tokens_are_drawn_with_the_probabilities_that_the_filters_leave(options):
    values = (1.5 * np.random.default_rng(3).standard_normal(12)).astype(np.float32)
    options = {"temperature": 1.0, **options}
    wanted, _ = expected(values, Sampling(**options))
    assert shares(values, **options) == pytest.approx(wanted, abs=2 / STEPS)


@pytest.mark.parametrize("options", [*SHAPED, {"xtc_probability": 0.5}], ids=str)
def test_draws_follow_the_distribution_by_chi_square(options):
    values = (1.5 * np.random.default_rng(7).standard_normal(12)).astype(np.float32)
    options = {"temperature": 0.9, **options}
    sampling, draws = Sampling(**options, seed=11), 6000
    wanted = (expected(values, sampling)[0] + expected(values, sampling, exclude=True)[0]) / 2
    if not sampling.xtc_probability:
        wanted = expected(values, sampling)[0]
    made, row = Sampler(sampling, [0], 0, 12), row_of(values)
    counts = Counter(made(row, []) for _ in range(draws))
    kept = np.flatnonzero(wanted)
    assert set(counts) <= set(kept.tolist())
    square = sum((counts[i] - draws * wanted[i]) ** 2 / (draws * wanted[i]) for i in kept.tolist())
    assert chi_square_p(square, len(kept) - 1) > 1e-6


def test_the_probability_of_chi_square_is_that_of_tables():
    for square, freedom, p in ((11.07, 5, 0.05), (29.588, 10, 0.001), (23.928, 1, 1e-6)):
        assert chi_square_p(square, freedom) == pytest.approx(p, rel=0.01)


@pytest.mark.parametrize("size", [1, 5, 255, 256, 257, 1000])
@pytest.mark.parametrize("backend", [ReferenceBackend(), NumbaBackend(1)], ids=["plain", "numba"])
def test_a_draw_is_the_inverse_of_the_sum_best_first(size, backend):
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    order = np.argsort(-values, kind="stable")
    total = np.cumsum(np.exp(values[order].astype(np.float64)))
    whole, listed = Ranked.of(row_of(values, backend)), Listed.of(row_of(values, backend), size)
    for u in (0.0, 0.1, 0.5, 0.9, 0.999):
        wanted = int(order[np.searchsorted(total, u * total[-1], side="right")])
        assert whole.pick(u) == listed.pick(u) == wanted


class Noting(Logits):
    """Notes which levels are listed."""

    __slots__ = ("noted",)

    def listed(self, temperature, wanted):
        self.noted = [*getattr(self, "noted", []), *wanted]
        return super().listed(temperature, wanted)


def test_however_many_are_kept_few_levels_are_listed():
    values = (3 * np.random.default_rng(0).standard_normal(50_000)).astype(np.float32)
    for narrowed in (
        lambda c: c.first(5000), lambda c: c.reaching(0.9), lambda c: c.at_least(0.0),
        lambda c: c.below(1e-5), lambda c: c.typical(0.9), lambda c: c.at_least(0.0).typical(0.9),
        lambda c: c.reaching(0.9).first(300), lambda c: c.at_least(0.0).below(1e-5).cooled(2.0),
    ):  # fmt: skip
        row = Noting(ReferenceBackend(), values[None], 0)
        left = narrowed(Ranked.of(row))
        left.pick(0.5), left.logsumexp(), left.size(), left.entropy(), left.deviation()
        assert len(set(row.noted)) <= 10


def test_the_last_level_which_has_most_tokens_at_a_low_temperature_is_not_listed_for_a_bound():
    values = (3 * np.random.default_rng(0).standard_normal(50_000)).astype(np.float32)
    row = Noting(ReferenceBackend(), values[None], 0)
    left = Ranked(row, 0.1).at_least(float(values.max() - 5) / 0.1)  # 50 nats below
    left.pick(0.5), left.logsumexp(), left.few(300)
    assert LEVELS - 1 not in row.noted
    assert left.size() == np.count_nonzero(values >= values.max() - np.float32(5))


def test_a_count_is_kept_even_where_probabilities_are_too_small_for_a_number():
    values = np.array([0.0, -900.0, -1000.0, -1000.0, -np.inf])
    for count, kept in ((1, 1), (2, 2), (3, 3), (4, 4), (5, 4)):
        left = Ranked.of(row_of(values)).first(count)
        assert left.tokens()[0].tolist() == list(range(kept))
        assert left.size() == kept


def test_what_is_left_far_below_the_best_is_drawn_by_its_own_probabilities():
    # typical leaves the seven; at a temperature of 0.001 they lie 1,099 nats below the one dropped
    row = row_of(logits_of(0.3, *[0.1] * 7))
    left = Ranked.of(row).typical(0.2).cooled(0.001)
    assert [left.pick(u) for u in (0.0, 0.2, 0.5, 0.99)] == [1, 2, 4, 7]
    assert left.logsumexp() - left.best == pytest.approx(np.log(7))
    assert left.entropy() == pytest.approx(np.log(7))
    assert left.first(3).pick(0.99) == 3


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -30.0, -35.0, -90.0, 0.01]), min_size=2),
    first=st.integers(1, 20), share=st.floats(0.01, 0.3), heat=st.sampled_from([0.1, 1.0, 30.0]),
)  # fmt: skip
def test_sums_over_a_range_are_those_of_its_tokens(values, first, share, heat):
    row = row_of(np.array(values))
    left = Ranked.of(row).first(first).below(share).cooled(heat)
    ids, scores = left.tokens()
    assert len(ids) == left.size() >= 1
    listed = Listed(row, ids, scores, heat)
    assert left.best == listed.best
    assert left.logsumexp() == pytest.approx(listed.logsumexp(), abs=1e-6)
    assert left.entropy() == pytest.approx(listed.entropy(), abs=1e-6)
    assert left.deviation() == pytest.approx(listed.deviation(), abs=1e-4)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, max_value=0) | st.sampled_from([0.0, -0.0]),
                min_size=1))  # fmt: skip
def test_the_tokens_of_a_level_lie_best_first_and_of_equals_the_lower_id(values):
    array = np.array([*values, 0.0], np.float32)
    ids, logits = zip(*row_of(array).listed(1.0, range(LEVELS)), strict=True)
    wanted = np.argsort(-array.astype(np.float64), kind="stable")
    assert np.concatenate(ids).tolist() == wanted[array[wanted] > -np.inf].tolist()
    assert np.concatenate(logits).tolist() == array[np.concatenate(ids)].tolist()


def test_the_highest_number_never_draws_a_token_of_probability_0():
    highest = float(np.nextafter(1.0, 0.0))
    assert pick(np.array([0.0, 0.3, 0.7, 0.0]), highest) == 2
    for size in (5, 300, 1000):
        scores = np.full(size, -np.inf, np.float32)
        scores[1:3] = 1.0
        assert Ranked.of(row_of(scores)).pick(highest) == 2
        assert Ranked.of(row_of(scores)).pick(0.0) == 1


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.99}, {"min_p": 0.3}], ids=str)
def test_the_highest_number_draws_a_token_that_is_kept(options):
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    options = {"temperature": 1.0, **options}
    token = sampler(1000, Always(float(np.nextafter(1.0, 0.0))), **options)(row_of(values), [])
    assert probabilities(values, Sampling(**options))[token] > 0


def test_tokens_lie_best_first_under_the_cumulative_sum():
    values = logits_of(0.1, 0.4, 0.3, 0.2)
    for u, token in ((0.05, 1), (0.5, 2), (0.85, 3)):
        for options in ({}, {"top_k": 3}, {"top_p": 0.9}, {"typical_p": 0.99}):
            draws = sampler(4, Always(u), temperature=1.0, **options)
            assert draws(row_of(values), []) == token, options


# -- random numbers --------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"temperature": 1.0}, 1), ({"temperature": 1.0, "top_k": 3}, 1),
        ({"temperature": 0.7, "top_p": 0.5}, 1), ({"temperature": 1.0, "mirostat_tau": 2.0}, 1),
        ({"temperature": 1.0, "forced_prefix": [1, 1]}, 1), ({}, 0),
        ({"temperature": 1.0, "xtc_probability": 0.1}, 2),
        ({"temperature": 1.0, "xtc_probability": 0.1, "forced_prefix": [2]}, 2),
    ],
    ids=str,
)  # fmt: skip
def test_every_token_takes_as_many_numbers_so_that_streams_stay_in_step(options, numbers):
    rng, produced = Always(0.3), []
    draws, row = sampler(4, rng, **options), row_of(logits_of(0.5, 0.3, 0.1, 0.1))
    for count in range(1, 4):
        produced.append(draws(row, produced))
        assert rng.taken == count * numbers


def test_xtc_excludes_as_often_as_it_is_told_to():
    values = logits_of(0.5, 0.3, 0.15, 0.05)
    draws = sampler(4, temperature=1.0, xtc_probability=0.25, xtc_threshold=0.12, seed=3)
    counts = Counter(draws(row_of(values), []) for _ in range(4000))
    # excluded: 0 and 1, so that 0.75 and 0.25 are left of 2 and 3
    wanted = {0: 0.375, 1: 0.225, 2: 0.75 * 0.15 + 0.25 * 0.75, 3: 0.75 * 0.05 + 0.25 * 0.25}
    square = sum((counts[i] - 4000 * p) ** 2 / (4000 * p) for i, p in wanted.items())
    assert chi_square_p(square, 3) > 1e-6


# -- mirostat --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"temperature": 1.5}], ids=str)
def test_mirostat_follows_the_published_algorithm(options):
    tau, eta, rng = 3.0, 0.3, np.random.default_rng(0)
    options = {"temperature": 1.0, "mirostat_tau": tau, "mirostat_eta": eta, **options}
    numbers = Always(0.0)
    draws, bound = sampler(200, numbers, **options), 2 * tau
    bounds = []
    for _ in range(40):
        values = (2 * rng.standard_normal(200)).astype(np.float32)
        numbers.number = rng.random()
        wanted, _ = expected(values, Sampling(**options), surprise=bound)
        token = draws(row_of(values), [])
        assert wanted[token] > 0
        bound -= eta * (-np.log2(wanted[token]) - tau)
        assert draws._surprise == pytest.approx(bound, abs=1e-3)
        bounds.append(bound)
    assert np.ptp(bounds) > 0.5


def test_mirostat_keeps_the_mean_surprise_near_its_target():
    values = (2 * np.random.default_rng(1).standard_normal(5000)).astype(np.float32)
    p = np.exp(values.astype(np.float64))
    p /= p.sum()
    means = []
    for tau in (2.0, 5.0):
        draws = sampler(5000, temperature=1.0, mirostat_tau=tau, seed=0)
        kept = []
        for _ in range(300):
            before = draws._surprise
            token = draws(row_of(values), [])
            shown = p * (-np.log2(p) <= before)
            shown = shown if shown.any() else p * (p == p.max())
            kept.append(-np.log2(shown[token] / shown.sum()))
        means.append(np.mean(kept[50:]))
    assert means == pytest.approx([2.0, 5.0], abs=0.4)


# -- history ---------------------------------------------------------------------------------------


def test_a_sampler_sees_prompt_and_output_as_they_grow():
    values = np.array([3.0, 2.9, 2.8, 2.7], np.float32)
    made = Sampler(Sampling(repetition_penalty=2.0), [0], 0, 4)
    produced: list[int] = []
    for _ in range(3):
        produced.append(made(row_of(values), produced))
    assert produced == [1, 2, 3]


def test_a_long_output_is_followed_to_its_end():
    made = Sampler(Sampling(no_repeat_ngram_size=1), [], 0, 300)
    produced: list[int] = []
    row = row_of(-np.arange(300, dtype=np.float32))
    for _ in range(300):
        produced.append(made(row, produced))
    assert produced == list(range(300))
    with pytest.raises(UsageError, match="no token is left to choose: constraint, bad_words"):
        made(row, produced)


def test_a_forced_prefix_and_a_least_length_shape_the_beginning_alone():
    made = Sampler(Sampling(forced_prefix=[3], min_new_tokens=3), [0], 0, 4, ends=(2,))
    produced: list[int] = []
    for _ in range(4):
        produced.append(made(row_of(np.array([0, 1, 2, -1])), produced))
    assert produced == [3, 1, 1, 2]


def test_options_with_tokens_beyond_the_vocabulary_are_refused_before_the_first_token():
    with pytest.raises(UsageError, match="forced_prefix names token 9, this model's vocabulary"):
        Sampler(Sampling(forced_prefix=[9]), [0], 0, 9)


# -- constraints -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 3}], ids=str
)
def test_only_allowed_tokens_come_and_the_constraint_is_told_of_each(options):
    only = Only([1, 4], 6)
    draws = sampler(6, constraint=only, seed=1, **options)
    row = row_of(np.array([9, 1, 5, 3, 1.5, 0]))
    tokens = [draws(row, []) for _ in range(30)]
    assert set(tokens) <= {1, 4} and only.accepted == tokens
    assert (set(tokens) == {4}) == (not options)


def test_a_constraint_leaves_the_odds_of_what_it_allows():
    values = logits_of(0.4, 0.1, 0.3, 0.2)
    draws = sampler(4, Sweep(), Only([1, 3], 4), temperature=1.0)
    row = row_of(values)
    counts = np.bincount([draws(row, []) for _ in range(STEPS)], minlength=4) / STEPS
    assert counts == pytest.approx([0, 1 / 3, 0, 2 / 3], abs=2 / STEPS)


def test_greedy_looks_further_only_where_the_likeliest_token_is_not_allowed():
    for tokens, asked in (([1, 2], [1]), ([0, 2], [1, 1])):
        backend = Counting()
        token = sampler(3, constraint=Only(tokens, 3))(row_of(np.array([1, 3, 2]), backend), [])
        assert token == tokens[0] if tokens[0] else 2
        assert backend.tops == asked


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}])
def test_a_constraint_that_allows_nothing_is_an_error(options):
    draws = sampler(3, constraint=Only([], 3), **options)
    with pytest.raises(UsageError, match="no token is left to choose: constraint, bad_words"):
        draws(row_of(np.array([1, 3, 2])), [])


def test_a_forced_token_that_the_constraint_forbids_is_an_error():
    draws = sampler(3, constraint=Only([0], 3), forced_prefix=[1])
    with pytest.raises(UsageError, match="no token is left to choose: constraint, bad_words"):
        draws(row_of(np.array([1, 3, 2])), [])


def test_a_mask_of_another_vocabulary_is_refused():
    draws = sampler(3, constraint=Only([0], 4))
    with pytest.raises(UsageError, match=r"the constraint's mask is \(4,\), expected one truth"):
        draws(row_of(np.array([1, 3, 2])), [])


def test_a_mask_leaves_scores_as_they_are_and_forbids_the_rest():
    values = np.array([1.5, -2.0, 0.0, -np.inf, 3e38], np.float32)
    allowed = np.array([True, False, True, True, True])
    for backend in (ReferenceBackend(), NumbaBackend(1)):
        found = row_of(values, backend).masked(allowed).values()
        assert found.tolist() == [1.5, -np.inf, 0.0, -np.inf, np.float32(3e38)]
        assert found.dtype == np.float32 and values[1] == -2


# -- logits, and how much is asked of the backend --------------------------------------------------


@pytest.mark.parametrize("surveyed", [False, True], ids=["plain", "surveyed"])
def test_logits_are_one_row_of_many_and_no_copy(surveyed):
    rows = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    backend = NumbaBackend(1) if surveyed else ReferenceBackend()
    logits = Logits(backend, backend.survey(rows), 1)
    assert logits.vocab_size == 50
    assert np.shares_memory(logits.values(), rows)
    assert logits.values().tolist() == rows[1].tolist()
    assert logits.best(3)[0].tolist() == np.argsort(-rows[1])[:3].tolist()
    assert logits.logit(7) == rows[1, 7]
    assert logits.logsumexp(0.5) == pytest.approx(np.log(np.exp(rows[1] / 0.5).sum()))


def test_what_the_caller_found_for_all_rows_is_not_computed_again():
    rows = np.random.default_rng(0).standard_normal((3, 500)).astype(np.float32)
    for options in ({}, {"temperature": 0.7, "top_k": 9}, {"temperature": 1.0, "top_p": 0.5}):
        backend, draws = Counting(), sampler(500, seed=0, **options)
        best = ReferenceBackend().top(rows, draws.wants)
        tokens = [
            sampler(500, seed=0, **options)(Logits(backend, rows, 1, given), [])
            for given in (best, None)
        ]
        assert tokens[0] == tokens[1]
        assert len(backend.tops) == 1  # of the second


def test_a_temperature_alone_asks_for_levels_only_where_the_draw_is_not_among_the_few():
    values = np.zeros(20_000)
    values[7] = 30.0  # nearly sure
    backend, draws = Counting(), sampler(20_000, Always(0.5), temperature=1.0)
    assert draws(row_of(values, backend), []) == 7
    assert (backend.tops, backend.leveled) == ([FEW[0]], 0)
    backend = Counting()
    assert draws(row_of(np.zeros(20_000), backend), []) == 10_000
    assert (backend.tops, backend.leveled) == ([FEW[0]], 1)
    backend = Counting()
    assert draws(row_of(values, backend), []) == 7  # the last draw was not among the few
    assert (backend.tops, backend.leveled) == ([], 1)


@pytest.mark.parametrize(("scale", "large"), [(8.0, False), (0.1, True)], ids=["peaked", "flat"])
def test_a_nucleus_is_listed_only_where_the_few_reach_it(scale, large):
    values = (scale * np.random.default_rng(0).standard_normal(20_000)).astype(np.float32)
    backend = Counting()
    draws = sampler(20_000, Always(0.5), temperature=1.0, top_p=0.9)
    p = probabilities(values, Sampling(temperature=1.0, top_p=0.9))
    order = np.argsort(-values, kind="stable")
    wanted = order[np.searchsorted(np.cumsum(p[order]), 0.5, side="right")]
    assert draws(row_of(values, backend), []) == wanted
    assert (backend.tops, backend.leveled) == (list(FEW) if large else [FEW[0]], int(large))
    backend = Counting()
    assert draws(row_of(values, backend), []) == wanted  # this one begins as the last one ended
    assert (backend.tops, backend.leveled) == ([] if large else [FEW[0]], int(large))


EDITS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    {"logit_bias": {0: 3.0, 5: -9.0}, "bad_words": [[0], [6, 5]], "no_repeat_ngram_size": 2},
    {"dry_multiplier": 0.8, "repetition_penalty": 0.5, "logit_bias": {6: 1.0}},
    {"forced_prefix": [1, 2, 3, 4]},
    {"min_new_tokens": 9},
]


@pytest.mark.parametrize("options", EDITS, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_is_as_it_was_after_every_edit(options, temperature):
    values = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)
    values[:, 7], values[:, 9] = -0.0, -np.inf
    before, second = values.tobytes(), values[1].copy()
    numba = NumbaBackend(1)
    tokens = []
    for backend, rows in (
        (ReferenceBackend(), values), (numba, values), (numba, numba.survey(values))
    ):  # fmt: skip
        made = Sampler(
            Sampling(temperature=temperature, seed=1, **options), [5, 6, 7, 5, 6], 0, 40, ends=(2,)
        )
        produced: list[int] = []
        for _ in range(4):
            row = Logits(backend, rows, 1, backend.top(rows, 1))
            produced.append(made(row, produced))
            assert row.logit(produced[-1]) == second[produced[-1]]
            assert values.tobytes() == before
        tokens.append(produced)
    assert tokens[0] == tokens[1] == tokens[2]


def test_a_row_is_as_it_was_after_an_edit_that_ended_in_an_error():
    values = np.zeros((1, 3), np.float32)
    draws = sampler(3, constraint=Only([], 3), logit_bias={1: 2.0})
    with pytest.raises(UsageError, match="no token is left to choose"):
        draws(Logits(NumbaBackend(1), values, 0), [])
    assert values.tolist() == [[0, 0, 0]]


def test_a_mask_may_be_a_column_of_a_table():
    table = np.zeros((3, 2), np.bool_)
    table[2, 1] = True

    class Column(Only):
        def allowed(self) -> np.ndarray:
            return table[:, 1]

    row = Logits(NumbaBackend(1), np.array([[3, 2, 1]], np.float32), 0)
    assert sampler(3, constraint=Column([2], 3))(row, []) == 2


@pytest.mark.parametrize("top", [0.0, 9.0, 25.0], ids=["little", "half", "nearly all"])
def test_what_xtc_spares_is_drawn_by_its_own_probabilities(top):
    """A long row: against float64 over all of it, where the spared ones have little of it or nearly
    all."""
    values = (5 * np.random.default_rng(1).standard_normal(20_000)).astype(np.float32)
    order = np.argsort(-values, kind="stable")
    values[order[:2]] += np.float32(top)
    p = np.exp(values.astype(np.float64) - values.max())
    threshold = float(p[order[2]] / p.sum()) * 0.99
    left = order[2:]
    total = p[left].cumsum() / p[left].sum()
    options = {"temperature": 1.0, "xtc_probability": 1.0, "xtc_threshold": threshold}
    for backend in (ReferenceBackend(), NumbaBackend(1)):
        for u in np.linspace(0.01, 0.99, 37):
            token = sampler(20_000, Always(float(u)), **options)(row_of(values, backend), [])
            place = int(np.flatnonzero(left == token)[0])
            # Sums of float32 terms are good to 1e-7 of the row, of which 1 % is left at least.
            before = total[place - 1] if place else 0.0
            assert before - 2e-5 <= u <= total[place] + 2e-5


EVERYTHING: list[dict[str, Any]] = [
    {}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "typical_p": 0.5},
    {"temperature": 1.0, "top_n_sigma": 1.0}, {"temperature": 1.0, "xtc_probability": 0.5},
    {"temperature": 1.0, "dynamic_temperature": 0.5}, {"temperature": 1.0, "mirostat_tau": 4.0},
    {"temperature": 1.0, "repetition_penalty": 1.2, "dry_multiplier": 0.8, "min_p": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("options", EVERYTHING, ids=str)
def test_tokens_are_the_same_for_one_thread_and_two_and_in_any_batch(options):
    rows = (3 * np.random.default_rng(2).standard_normal((3, VOCABULARY))).astype(np.float32)
    tokens = []
    for threads, batched, surveyed in (
        (1, True, True), (2, True, True), (2, False, True), (1, False, False)
    ):  # fmt: skip
        backend = NumbaBackend(threads)
        draws = Sampler(Sampling(**options, seed=4), [5, 6, 7], 2, VOCABULARY)
        produced: list[int] = []
        for index in range(3):
            given = rows if batched else rows[index : index + 1]
            known = backend.survey(given) if surveyed else given
            best = backend.top(known, 2000 if batched else draws.wants)
            row = Logits(backend, known, index if batched else 0, best)
            produced.append(draws(row, produced))
        tokens.append(produced)
    assert all(found == tokens[0] for found in tokens)
