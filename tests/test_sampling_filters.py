"""What filters keep: by hand, against plain float64 over the whole vocabulary, however few tokens
are listed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sampling_oracle import expected, left_of, logits_of, probabilities

from bloomq.backends.numba_cpu.layers import NumbaBackend
from bloomq.errors import UsageError
from bloomq.sampling import ORDER, Sampling
from bloomq.sampling.filters import Turn

VOCABULARY = 250_880
EXCLUDE = Turn(exclude=True)


def sampling(**options: Any) -> Sampling:
    return Sampling(**{"temperature": 1.0, **options})


# -- by hand ---------------------------------------------------------------------------------------


def test_temperature_one_leaves_the_softmax():
    found = probabilities(logits_of(0.5, 0.125, 0.25, 0.125), sampling())
    assert found == pytest.approx([0.5, 0.125, 0.25, 0.125])


def test_temperature_a_half_squares_the_odds():
    found = probabilities(logits_of(0.6, 0.3, 0.1), sampling(temperature=0.5))
    assert found == pytest.approx([36 / 46, 9 / 46, 1 / 46])


def test_a_high_temperature_is_nearly_flat():
    found = probabilities(np.array([3, 0, -3, 1]), sampling(temperature=100.0))
    assert found == pytest.approx([0.25] * 4, abs=0.01)


def test_a_low_temperature_is_nearly_greedy():
    found = probabilities(np.array([3, 3.01, -80, 80, 79.9]), sampling(temperature=0.001))
    assert found[3] == pytest.approx(1)


@pytest.mark.parametrize(
    ("values", "heat"),
    [([2, 2, 2, 2], 1.5), ([50, 0, 0, 0], 0.5)],
    ids=["all equal: the highest", "one has all: the lowest"],
)
def test_a_dynamic_temperature_runs_over_its_range_with_the_entropy(values, heat):
    options = sampling(dynamic_temperature=0.5)
    assert left_of(np.array(values), options).temperature == pytest.approx(heat)


def test_a_dynamic_temperature_in_between_follows_the_exponent():
    # two of four tokens, equally likely: ln 2 of at most ln 4 nats, a half; 0.5 ** 2 of 1 to 3
    options = sampling(temperature=2.0, dynamic_temperature=1.0, dynamic_exponent=2.0)
    found = left_of(np.array([1, 1, -90, -90]), options)
    assert found.temperature == pytest.approx(1.5, rel=1e-5)


def test_a_dynamic_temperature_never_falls_to_nothing():
    found = left_of(np.array([80, 0, 0]), sampling(temperature=1.0, dynamic_temperature=3.0))
    assert found.temperature == 0.001


def test_top_k_keeps_the_k_likeliest_and_renormalises():
    found = probabilities(logits_of(0.1, 0.5, 0.15, 0.25), sampling(top_k=2))
    assert found == pytest.approx([0, 2 / 3, 0, 1 / 3])


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert probabilities(logits_of(0.1, 0.9), sampling(top_k=50)) == pytest.approx([0.1, 0.9])


def test_top_k_of_ties_keeps_the_lowest_ids():
    found = probabilities(logits_of(0.1, 0.3, 0.3, 0.3), sampling(top_k=2))
    assert found == pytest.approx([0, 0.5, 0.5, 0])


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-9, [1]), (0.4, [1]), (0.6, [1, 3]), (0.79, [1, 3]), (0.81, [1, 2, 3]), (0.96, range(4))],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    found = probabilities(logits_of(0.05, 0.5, 0.15, 0.3), sampling(top_p=top_p))
    assert np.flatnonzero(found).tolist() == list(kept)


def test_top_p_cuts_what_top_k_left_renormalised():
    # of 0.4 0.3 0.2 0.1 top_k 3 leaves 4/9 3/9 2/9; 0.75 is reached by the first two
    found = probabilities(logits_of(0.1, 0.4, 0.3, 0.2), sampling(top_k=3, top_p=0.75))
    assert found == pytest.approx([0, 4 / 7, 3 / 7, 0])


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest():
    found = probabilities(logits_of(0.5, 0.2, 0.24, 0.06), sampling(min_p=0.45))
    assert found == pytest.approx([0.5 / 0.74, 0, 0.24 / 0.74, 0])


def test_min_p_of_one_keeps_the_likeliest_and_its_equals():
    found = probabilities(logits_of(0.4, 0.2, 0.4), sampling(min_p=1.0))
    assert found == pytest.approx([0.5, 0, 0.5])


def test_top_n_sigma_keeps_scores_near_the_best_whatever_the_temperature():
    # mean 2, deviation 2: of 4, one deviation down is 2
    values = np.array([4, 4, 0, 0])
    for heat in (0.5, 1.0, 3.0):
        found = probabilities(values, sampling(temperature=heat, top_n_sigma=1.5))
        assert found == pytest.approx([0.5, 0.5, 0, 0])
    assert probabilities(values, sampling(top_n_sigma=2.1)).all()


def test_top_n_sigma_does_not_count_forbidden_tokens():
    found = probabilities(np.array([4, -np.inf, 4, 0, 0]), sampling(top_n_sigma=1.5))
    assert found == pytest.approx([0.5, 0, 0.5, 0, 0])


def test_typical_drops_the_likeliest_where_it_is_surprisingly_likely():
    # surprises of 1.20 and seven times 2.30 nats, an entropy of 1.97: 0.77 and 0.33 off
    found = probabilities(logits_of(0.3, *[0.1] * 7), sampling(typical_p=0.2))
    assert found == pytest.approx([0, *[1 / 7] * 7])  # equally near ones are kept together


def test_typical_keeps_the_likeliest_alone_where_it_is_nearest_to_the_entropy():
    # surprises of 0.51 and eight times 3.00 nats, an entropy of 1.50: 0.99 and 1.49 off
    found = probabilities(logits_of(0.6, *[0.05] * 8), sampling(typical_p=0.5))
    assert found[0] == 1


def test_xtc_excludes_all_likely_tokens_but_the_last():
    options = sampling(xtc_probability=1.0, xtc_threshold=0.15)
    values = logits_of(0.1, 0.4, 0.3, 0.2)
    assert probabilities(values, options, turn=EXCLUDE) == pytest.approx([1 / 3, 0, 0, 2 / 3])
    assert probabilities(values, options, turn=Turn()) == pytest.approx([0.1, 0.4, 0.3, 0.2])


def test_xtc_excludes_nothing_where_one_token_alone_is_likely():
    options = sampling(xtc_probability=1.0, xtc_threshold=0.45)
    found = probabilities(logits_of(0.1, 0.9), options, turn=EXCLUDE)
    assert found == pytest.approx([0.1, 0.9])


def test_what_xtc_leaves_of_nearly_nothing_is_summed_anew():
    # 0.5 and 0.5 - 2e-9 go but one; of the rest 1e-9 each, a difference of sums would know little
    options = sampling(xtc_probability=1.0, xtc_threshold=0.1, top_p=0.9, order=("xtc", *ORDER[:6]))
    values = np.array([20.0, 20.0, 0.0, 0.0])
    for few in (0, 4):
        found = probabilities(values, options, turn=EXCLUDE, few=few)
        assert found == pytest.approx([0, 1, 0, 0])
        left = left_of(values, sampling(xtc_probability=1.0), turn=EXCLUDE, few=few).cooled(0.5)
        assert left.logsumexp() == pytest.approx(40 + 2 * np.exp(-40))


def test_what_is_too_unlikely_for_a_number_is_still_drawn_where_nothing_else_is_left():
    options = sampling(xtc_probability=1.0, xtc_threshold=0.0)
    for few in (0, 3):
        left = left_of(np.array([0.0, -900.0, -1000.0]), options, EXCLUDE, few)
        assert left.pick(0.5) == 2
        assert left.best == -1000


def test_the_least_likely_token_that_xtc_spares_stays_whatever_the_temperature():
    # score * temperature is not always the logit that was divided
    options = {"xtc_probability": 1.0, "xtc_threshold": 0.01}
    rng = np.random.default_rng(0)
    for heat in rng.uniform(0.3, 2, 200).tolist():
        values = (3 * rng.standard_normal(300)).astype(np.float32)
        kept = [
            left_of(values, sampling(temperature=heat, **options), EXCLUDE, few).tokens()[0]
            for few in (100, 300)
        ]
        assert kept[0].tolist() == kept[1].tolist()


def test_mirostat_keeps_what_is_at_most_so_surprising():
    values = logits_of(0.5, 0.25, 0.125, 0.125)  # 1, 2, 3 and 3 bits
    for bits, kept in ((2.5, [0, 1]), (1.5, [0]), (0.5, [0]), (3.5, [0, 1, 2, 3])):
        found = probabilities(values, sampling(mirostat_tau=3.0), turn=Turn(surprise=bits))
        assert np.flatnonzero(found).tolist() == kept, bits


def test_the_order_of_filters_is_the_one_that_is_asked_for():
    # heat first makes 0.5 0.3 0.2 flatter, so that more are needed to reach a share of 0.75
    values = logits_of(0.6, 0.3, 0.1)
    heated = sampling(temperature=5.0, top_p=0.75)
    last = sampling(temperature=5.0, top_p=0.75, order=(*ORDER[1:], "temperature"))
    assert np.count_nonzero(probabilities(values, heated)) == 3
    assert np.count_nonzero(probabilities(values, last)) == 2


def test_a_forbidden_token_is_never_kept():
    values = np.array([-np.inf, 1, -np.inf, 0])
    for options in ({"top_k": 4}, {"top_p": 0.999}, {"min_p": 0.01}, {"typical_p": 0.99}):
        found = probabilities(values, sampling(**options))
        assert np.flatnonzero(found).tolist() == [1, 3], options


def test_a_row_of_forbidden_tokens_is_an_error():
    with pytest.raises(UsageError, match="no token is left to choose: constraint, bad_words and"):
        left_of(np.full(5, -np.inf), sampling(top_k=3))


# -- against the oracle, and whatever is listed ----------------------------------------------------


@st.composite
def rows(draw: st.DrawFn) -> np.ndarray:
    size = draw(st.integers(1, 40))
    elements = draw(
        st.sampled_from([
            st.floats(-12, 12, width=32),
            st.sampled_from([0.0, -0.0, 1.0, 2.5, 3.0]),  # many ties
            st.sampled_from([-np.inf, 0.5, 1.0, 4.0]),
        ])
    )  # fmt: skip
    values = draw(arrays(np.float32, size, elements=elements))
    assume((values > -np.inf).any())
    return values


@st.composite
def settings_of(draw: st.DrawFn) -> Sampling:
    """Some filters at some strength, in some order."""
    choices = {
        "temperature": st.sampled_from([0.3, 0.8, 1.0, 1.7]),
        "dynamic_temperature": st.sampled_from([0.2, 0.5]),
        "top_k": st.integers(1, 50),
        "top_p": st.floats(0.05, 0.999),
        "min_p": st.floats(0.001, 1.0),
        "typical_p": st.floats(0.05, 0.999),
        "top_n_sigma": st.floats(0.1, 3.0),
        "xtc_threshold": st.floats(0.01, 0.5),
    }
    names = draw(st.sets(st.sampled_from(sorted(choices)), max_size=5))
    options = {name: draw(choices[name]) for name in sorted(names)}
    if "xtc_threshold" in options:
        options["xtc_probability"] = 0.5
    return sampling(order=draw(st.permutations(ORDER)), **options)


@settings(max_examples=300, deadline=None)
@given(values=rows(), options=settings_of(), few=st.integers(1, 8), exclude=st.booleans(),
       surprise=st.none() | st.floats(0.5, 6))  # fmt: skip
def test_few_listed_tokens_decide_as_all_of_them(values, options, few, exclude, surprise):
    turn = Turn(exclude and options.xtc_probability > 0, surprise)
    least = left_of(values, options, turn, few)
    most = left_of(values, options, turn, len(values))
    assume(expected(values, options, turn.exclude, surprise)[1] > 1e-4)  # ties, within rounding
    ids, scores = least.tokens()
    others, wanted = most.tokens()
    assert ids.tolist() == others.tolist()
    assert scores == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    for u in (0.0, 0.3, 0.9):
        assert least.pick(u) == most.pick(u) or abs(cumulated(scores) - u).min() < 1e-5


def cumulated(scores):
    exponentials = np.exp(scores - scores.max())
    return np.cumsum(exponentials) / exponentials.sum()


@settings(max_examples=300, deadline=None)
@given(values=rows(), options=settings_of(), exclude=st.booleans(),
       surprise=st.none() | st.floats(0.5, 6))  # fmt: skip
def test_probabilities_are_those_of_plain_float64(values, options, exclude, surprise):
    exclude = exclude and options.xtc_probability > 0
    wanted, margin = expected(values, options, exclude, surprise)
    assume(margin > 1e-4)  # else rounding may decide otherwise
    found = probabilities(values, options, turn=Turn(exclude, surprise), few=2)
    assert np.abs(found - wanted).max() < 1e-4 * (1 + np.abs(values[values > -np.inf]).max())
    assert ((found > 0) == (wanted > 0)).all() or wanted[(found > 0) != (wanted > 0)].max() < 1e-30


LARGE = [
    {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "temperature": 0.8},
    {"top_p": 0.9},
    {"top_p": 0.5, "temperature": 0.7, "min_p": 0.01},
    {"min_p": 0.02, "temperature": 1.3},
    {"typical_p": 0.9},
    {"typical_p": 0.2, "top_k": 500},
    {"top_n_sigma": 1.0, "temperature": 2.0},
    {"dynamic_temperature": 0.5, "top_p": 0.8},
    {"xtc_probability": 1.0, "xtc_threshold": 0.0005, "top_p": 0.9, "order": ("xtc", *ORDER[:6])},
]


@pytest.mark.parametrize("options", LARGE, ids=str)
@pytest.mark.parametrize("scale", [0.5, 3.0, 8.0], ids=["flat", "as usual", "peaked"])
def test_few_listed_of_a_large_vocabulary_decide_as_plain_float64_over_all(options, scale):
    values = (scale * np.random.default_rng(5).standard_normal(VOCABULARY)).astype(np.float32)
    chosen, exclude = sampling(**options), "xtc_probability" in options
    found = probabilities(values, chosen, turn=Turn(exclude), backend=NumbaBackend(2))
    wanted, _ = expected(values, chosen, exclude)
    # float32 sums are good to some 1e-5: of many thousand kept tokens the last may differ
    differing = (found > 0) != (wanted > 0)
    assert differing.sum() <= 1e-4 * np.count_nonzero(wanted)
    assert np.abs(found - wanted)[~differing].max() <= 1e-4 * wanted.max()


@pytest.mark.parametrize("options", LARGE, ids=str)
def test_few_listed_of_a_large_vocabulary_decide_as_many(options):
    values = (3 * np.random.default_rng(6).standard_normal(VOCABULARY)).astype(np.float32)
    backend, turn = NumbaBackend(2), Turn("xtc_probability" in options)
    few, many = (
        left_of(values, sampling(**options), turn, size, backend) for size in (16, VOCABULARY)
    )
    ids, others = few.tokens()[0], many.tokens()[0]
    count = min(len(ids), len(others))
    assert ids[:count].tolist() == others[:count].tolist()
    assert len(ids) == pytest.approx(len(others), rel=1e-4)
