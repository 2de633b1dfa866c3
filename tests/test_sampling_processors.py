"""Scores edited by the text so far: by hand, and DRY against llama.cpp's algorithm written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_oracle import dry

from bloomq.sampling import Sampling, edited
from bloomq.sampling.tally import Tally, counted

SCORES = np.array([2.0, -2.0, 0.0, 6.0, -6.0, 1.0, 3.0, 4.0], np.float32)


def changed(prompt: list[int], produced: list[int], ends: tuple[int, ...] = (), **options: Any):
    """The scores behind a text, as a list; the row itself must stay as it is."""
    before = SCORES.copy()
    out = edited(Sampling(**options), SCORES, prompt, produced, ends)
    assert SCORES.tolist() == before.tolist() and out.dtype == np.float32
    return out.tolist()


def forbidden(prompt: list[int], produced: list[int], ends: tuple[int, ...] = (), **options: Any):
    """The tokens that get -infinity; all others must keep their scores."""
    out = np.array(changed(prompt, produced, ends, **options))
    assert (out[out > -np.inf] == SCORES[out > -np.inf]).all()
    return np.flatnonzero(out == -np.inf).tolist()


def test_without_options_the_row_itself_comes_back():
    assert edited(Sampling(), SCORES, [1], [2]) is SCORES


def test_a_repetition_penalty_divides_positive_and_multiplies_negative_scores():
    found = changed([0, 1, 1], [2, 0], repetition_penalty=2.0)
    assert found == [1, -4, 0, 6, -6, 1, 3, 4]


def test_a_repetition_penalty_under_one_makes_seen_tokens_likelier():
    assert changed([0, 1], [], repetition_penalty=0.5)[:2] == [4, -1]


def test_presence_and_frequency_count_the_output_and_not_the_prompt():
    found = changed([0, 3, 3], [1, 1, 2], presence_penalty=0.5, frequency_penalty=0.25)
    assert found == [2, -3, -0.75, 6, -6, 1, 3, 4]


def test_negative_penalties_are_rewards():
    assert changed([], [2, 2], presence_penalty=-1.0, frequency_penalty=-0.5)[2] == 2


@pytest.mark.parametrize(("window", "halved"), [(1, [7]), (2, [7, 0]), (4, [7, 0, 3]), (9, None)])
def test_a_window_limits_the_repetition_penalty_to_the_last_of_prompt_and_output(window, halved):
    found = changed([6, 3], [3, 0, 7], repetition_penalty=2.0, penalty_window=window)
    for token in (0, 3, 6, 7):
        half = halved is None or token in halved
        assert found[token] == SCORES[token] / (2 if half else 1)


def test_a_window_limits_the_counts_too():
    found = changed([5], [7, 7, 7], frequency_penalty=1.0, penalty_window=2)
    assert found[7] == 2


def test_an_empty_text_is_not_penalised():
    options = {"repetition_penalty": 2.0, "frequency_penalty": 1.0, "dry_multiplier": 1.0}
    assert changed([], [], no_repeat_ngram_size=1, **options) == SCORES.tolist()


def test_a_bias_is_added_and_one_of_minus_infinity_forbids():
    found = changed([], [], logit_bias={0: 1.5, 3: -100, 4: -math.inf})
    assert found == [3.5, -2, 0, -94, -math.inf, 1, 3, 4]


def test_biases_come_before_penalties():
    assert changed([1], [], logit_bias={1: 6.0}, repetition_penalty=2.0)[1] == 2


@pytest.mark.parametrize(
    ("n", "text", "ends"),
    [
        (1, [3, 5, 3], [3, 5]), (2, [1, 2, 1], [2]), (2, [1, 2, 1, 3, 1], [2, 3]),
        (3, [1, 2, 3, 1, 2], [3]), (3, [1, 2, 3, 4, 2], []), (4, [1, 2], []), (2, [1, 1], [1]),
    ],
)  # fmt: skip
def test_no_ngram_is_completed_twice(n, text, ends):
    for cut in (0, len(text) // 2, len(text)):  # prompt and output are one text
        assert forbidden(text[:cut], text[cut:], no_repeat_ngram_size=n) == ends


@pytest.mark.parametrize(
    ("words", "text", "ends"),
    [
        ([[3]], [], [3]), ([[1, 2]], [1], [2]), ([[1, 2]], [2], []), ([[1, 2]], [], []),
        ([[1, 2, 3], [5]], [1, 2], [3, 5]), ([[1, 2, 3]], [2], []), ([[4, 4]], [0, 4], [4]),
    ],
)  # fmt: skip
def test_the_last_token_of_a_bad_word_is_forbidden_behind_its_others(words, text, ends):
    for cut in (0, len(text)):
        assert forbidden(text[:cut], text[cut:], bad_words=words) == ends


def test_the_text_cannot_end_before_the_least_number_of_new_tokens():
    assert forbidden([1, 1, 1], [2], (0, 5), min_new_tokens=2) == [0, 5]
    assert forbidden([1, 1, 1], [2, 2], (0, 5), min_new_tokens=2) == []
    assert forbidden([1], [], (), min_new_tokens=2) == []


def test_a_forced_prefix_is_the_only_way_even_through_a_bad_word():
    options = {"forced_prefix": [3, 1], "bad_words": [[3]], "repetition_penalty": 2.0}
    for produced, token in (([], 3), ([3], 1)):
        found = changed([0], produced, **options)
        assert [i for i, score in enumerate(found) if score > -math.inf] == [token]
        assert found[token] == 0
    assert changed([0], [3, 1], **options)[0] == 1


# -- DRY -------------------------------------------------------------------------------------------


def test_dry_penalises_what_would_go_on_with_a_repetition_by_its_length():
    # 1 2 3 occurred before 4: with 2 allowed that is 0.8 * 1.75 ** 1
    found = changed([1, 2, 3, 4, 0], [1, 2, 3], dry_multiplier=0.8)
    wanted = SCORES.copy()
    wanted[4] -= np.float32(0.8 * 1.75)
    assert found == pytest.approx(wanted.tolist())


def test_dry_leaves_repetitions_shorter_than_allowed():
    assert changed([1, 2, 0], [2], dry_multiplier=0.8) == SCORES.tolist()


def test_dry_stops_at_a_breaker():
    options: dict[str, Any] = {"dry_multiplier": 1.0, "dry_base": 2.0}
    text = [1, 2, 3, 4, 5, 1, 2, 3, 4]
    assert changed(text, [], **options)[5] == 1 - 4
    assert changed(text, [], **options, dry_sequence_breakers=[2])[5] == 1 - 1
    assert changed(text, [], **options, dry_sequence_breakers=[4])[5] == 1


def test_dry_looks_as_far_back_as_its_range():
    text = [1, 2, 3, 0, 0, 0, 1, 2]
    assert changed(text, [], dry_multiplier=1.0)[3] == 5
    assert changed(text, [], dry_multiplier=1.0, dry_range=7)[3] == 6


def test_a_long_repetition_is_penalised_by_a_finite_number():
    found = changed([1] * 5000, [], dry_multiplier=1.0, dry_base=100.0)
    assert -math.inf < found[1] < -1e30


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(st.integers(0, 3), max_size=40), allowed=st.integers(0, 5),
    base=st.sampled_from([1.0, 1.75, 30.0]), breakers=st.sets(st.integers(0, 4), max_size=2),
    window=st.integers(0, 30), cut=st.integers(0, 40),
)  # fmt: skip
def test_dry_equals_the_published_algorithm(text, allowed, base, breakers, window, cut):
    options = Sampling(
        dry_multiplier=0.5, dry_base=base, dry_allowed_length=allowed, dry_range=window,
        dry_sequence_breakers=breakers,
    )  # fmt: skip
    found = edited(options, SCORES, text[:cut], text[cut:])
    wanted = dry(SCORES, options, text)
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-6)


@given(tokens=st.lists(st.integers(0, 5), max_size=200), cuts=st.lists(st.integers(0, 200)))
def test_a_tally_of_a_text_that_grows_is_its_count(tokens, cuts):
    text, tally = np.array(tokens, np.int64), Tally()
    for stop in sorted(cuts):
        ids, counts = tally(text[:stop])
        order = np.argsort(ids)
        wanted = counted(text[:stop])
        assert (ids[order].tolist(), counts[order].tolist()) == tuple(x.tolist() for x in wanted)
