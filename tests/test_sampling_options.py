"""The options of sampling: what they take, what they refuse, and that they stay as they are."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from bloomq.checks import is_whole
from bloomq.errors import UsageError
from bloomq.sampling import ORDER, Sampling, generator

WHOLE = ("a whole number, 0 for all", "a whole number from 0", "a whole number, 0 for off")
WRONG = [
    ("temperature", -0.1, "0 (greedy) to 100"),
    ("temperature", 100.5, "0 (greedy) to 100"),
    ("temperature", math.nan, "0 (greedy) to 100"),
    ("temperature", math.inf, "0 (greedy) to 100"),
    ("temperature", True, "0 (greedy) to 100"),
    ("temperature", "1", "0 (greedy) to 100"),
    ("temperature", None, "0 (greedy) to 100"),
    ("temperature", 1e-4, "0 (greedy) or at least 0.001"),
    ("dynamic_temperature", -1, "0 (off) to 100"),
    ("dynamic_temperature", math.nan, "0 (off) to 100"),
    ("dynamic_exponent", 0.0, "0.01 to 100"),
    ("dynamic_exponent", "1", "0.01 to 100"),
    ("top_k", -1, "a whole number, 0 for all"),
    ("top_k", 2.0, "a whole number, 0 for all"),
    ("top_k", "5", "a whole number, 0 for all"),
    ("top_p", 0.0, "above 0, at most 1"),
    ("top_p", 1.01, "above 0, at most 1"),
    ("top_p", -0.5, "above 0, at most 1"),
    ("top_p", math.nan, "above 0, at most 1"),
    ("top_p", False, "above 0, at most 1"),
    ("min_p", -0.1, "0 (off) to 1"),
    ("min_p", 1.5, "0 (off) to 1"),
    ("min_p", math.nan, "0 (off) to 1"),
    ("typical_p", 0, "above 0, at most 1"),
    ("typical_p", 2, "above 0, at most 1"),
    ("top_n_sigma", -1.0, "0 (off) to 100"),
    ("top_n_sigma", math.inf, "0 (off) to 100"),
    ("xtc_probability", 1.1, "0 (off) to 1"),
    ("xtc_probability", -0.1, "0 (off) to 1"),
    ("xtc_threshold", 0.6, "0 to 0.5"),
    ("xtc_threshold", -0.1, "0 to 0.5"),
    ("dry_multiplier", -1, "0 (off) to 100"),
    ("dry_base", 0.5, "1 to 100"),
    ("dry_allowed_length", -1, "a whole number from 0"),
    ("dry_allowed_length", 1.5, "a whole number from 0"),
    ("dry_range", -1, "a whole number, 0 for all"),
    ("mirostat_tau", -1, "0 (off) to 100"),
    ("mirostat_eta", -0.1, "0 to 10"),
    ("mirostat_eta", 11, "0 to 10"),
    ("repetition_penalty", 0.0, "0.001 to 1000"),
    ("repetition_penalty", -1.0, "0.001 to 1000"),
    ("repetition_penalty", 1001, "0.001 to 1000"),
    ("repetition_penalty", math.nan, "0.001 to 1000"),
    ("presence_penalty", -101, "-100 to 100"),
    ("presence_penalty", None, "-100 to 100"),
    ("frequency_penalty", 100.5, "-100 to 100"),
    ("frequency_penalty", math.nan, "-100 to 100"),
    ("penalty_window", -1, "a whole number, 0 for all"),
    ("no_repeat_ngram_size", -2, "a whole number, 0 for off"),
    ("no_repeat_ngram_size", 2.0, "a whole number, 0 for off"),
    ("min_new_tokens", -1, "a whole number from 0"),
    ("min_new_tokens", "3", "a whole number from 0"),
    ("seed", -1, "a whole number from 0"),
    ("seed", 1.5, "a whole number from 0"),
    ("seed", "1", "a whole number from 0"),
]


@pytest.mark.parametrize(("name", "value", "wanted"), WRONG, ids=str)
def test_an_impossible_value_is_refused_by_name(name, value, wanted):
    with pytest.raises(UsageError) as caught:
        Sampling(**{name: value})
    assert str(caught.value) == f"{name} is {value!r}, expected {wanted}"


def test_every_number_among_the_options_is_in_the_list_of_wrong_ones():
    checked = {field.name for field in fields(Sampling) if {"range", "whole"} & set(field.metadata)}
    assert checked | {"seed"} == {name for name, _, _ in WRONG}


@pytest.mark.parametrize("name", ["forced_prefix", "dry_sequence_breakers", "bad_words"])
@pytest.mark.parametrize("value", [[-1], [1.5], ["a"], [True], [None]], ids=repr)
def test_what_is_no_token_id_is_refused_by_the_name_of_its_option(name, value):
    given = [value] if name == "bad_words" else value
    with pytest.raises(UsageError, match=rf"^{name} has .* where a list of token ids is expected$"):
        Sampling(**{name: given})


@pytest.mark.parametrize("value", ["text", 5, None], ids=repr)
def test_bad_words_that_are_no_lists_are_refused(value):
    with pytest.raises(UsageError, match=r"^bad_words is .*, expected lists of token ids$"):
        Sampling(bad_words=value)


def test_an_empty_bad_word_is_refused_for_it_would_forbid_nothing_or_everything():
    with pytest.raises(UsageError, match="bad_words has an empty one, expected at least one token"):
        Sampling(bad_words=[[3], []])


@pytest.mark.parametrize("value", ["5=1", 5, [5], [(1, 2, 3)], None], ids=repr)
def test_biases_that_are_no_pairs_are_refused(value):
    with pytest.raises(UsageError, match=r"^logit_bias is .*, expected token ids with a bias for"):
        Sampling(logit_bias=value)


@pytest.mark.parametrize("bias", [math.nan, math.inf, 1e7, "1", True], ids=repr)
def test_a_bias_that_is_no_number_is_refused_with_its_token(bias):
    with pytest.raises(
        UsageError, match=r"^logit_bias of token 5 is .*, expected at most 1000000$"
    ):
        Sampling(logit_bias={5: bias})


@pytest.mark.parametrize("token", [-1, 1.0, "x", True], ids=repr)
def test_a_bias_for_what_is_no_token_is_refused(token):
    with pytest.raises(UsageError, match=r"^a token of logit_bias is .*, expected a token id$"):
        Sampling(logit_bias=[(token, 1.0)])


def test_a_token_with_two_biases_is_refused():
    with pytest.raises(UsageError, match="logit_bias has a token twice, expected one bias for"):
        Sampling(logit_bias=[(5, 1.0), (5, 2.0)])


@pytest.mark.parametrize(
    "order", ["top_k", (), (*ORDER, "top_k"), (*ORDER[:-1], "heat"), 5, [1] * 7], ids=repr
)
def test_an_order_of_what_are_no_filters_is_refused(order):
    with pytest.raises(
        UsageError, match=r"^order is .*, expected some of temperature, top_n_sigma, top_k"
    ):
        Sampling(order=order)


def test_filters_that_an_order_does_not_name_follow_as_usual():
    found = Sampling(order=("top_k", "temperature")).order
    assert found == ("top_k", "temperature", "top_n_sigma", "top_p", "min_p", "typical", "xtc")


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {70: 1.0}}, {"bad_words": [[1, 70]]}, {"forced_prefix": [70]},
        {"dry_sequence_breakers": [3, 70]},
    ],
    ids=str,
)  # fmt: skip
def test_a_token_beyond_the_vocabulary_is_refused_by_the_name_of_its_option(options):
    name = next(iter(options))
    sampling = Sampling(**options)
    sampling.check_ids(71)
    with pytest.raises(UsageError, match=f"^{name} names token 70, this model's vocabulary ends"):
        sampling.check_ids(70)


def test_lists_and_mappings_are_kept_as_what_cannot_change():
    words = [[1, 2], [3]]
    sampling = Sampling(
        bad_words=words, logit_bias={7: 1, 2: -math.inf}, forced_prefix=[np.int64(4)],
        dry_sequence_breakers=[5, 6], order=list(ORDER),
    )  # fmt: skip
    words[0].append(9)
    assert sampling.bad_words == ((1, 2), (3,))
    assert sampling.logit_bias == ((2, -math.inf), (7, 1.0))
    assert sampling.forced_prefix == (4,) and type(sampling.forced_prefix[0]) is int
    assert sampling.dry_sequence_breakers == {5, 6}
    assert sampling.order == ORDER
    assert hash(sampling) == hash(replace(sampling)) and sampling == replace(sampling)


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
@pytest.mark.parametrize("name", ["top_k", "seed", "min_new_tokens"])
def test_a_truth_value_is_not_a_whole_number(name, value):
    with pytest.raises(UsageError, match=rf"^{name} is .*, expected a whole number"):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0}, {"temperature": 0.001}, {"temperature": 100}, {"top_p": 1},
        {"seed": 0}, {"min_p": 1}, {"xtc_threshold": 0.5}, {"dry_base": 1}, {"logit_bias": {}},
        {"logit_bias": {0: -math.inf}}, {"mirostat_eta": 0},
    ],
    ids=str,
)  # fmt: skip
def test_values_at_the_edge_are_taken(options):
    sampling = Sampling(**options)
    assert sampling.greedy == (sampling.temperature == 0)
    assert not sampling.penalised


def test_every_option_says_in_a_line_what_it_does():
    for field in fields(Sampling):
        text = field.metadata["help"]
        assert text[0].isupper() and text.endswith((".", "'.")) and "\n" not in text, field.name
        assert len(text) < 130, field.name


def test_by_default_everything_is_off():
    sampling = Sampling()
    assert sampling.greedy and not sampling.edits and not sampling.penalised
