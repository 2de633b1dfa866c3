"""All that can be said about how the next token is chosen, checked once.

Every field carries what a command line shows of it: `metadata["help"]`; its flag is its name with
dashes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from bloomq.checks import check_number, is_whole
from bloomq.errors import UsageError

# The filters, in the order that transformers has for those it knows. top_n_sigma stands before what
# cuts, since it asks for the spread of all logits; XTC last, since it wants a cut tail.
ORDER = ("temperature", "top_n_sigma", "top_k", "top_p", "min_p", "typical", "xtc")


def _number(default: float, low: float, high: float, expected: str, text: str) -> Any:
    """A field that is a number from `low` to `high`, in words `expected`."""
    return field(default=default, metadata={"help": text, "range": (low, high, expected)})


def _whole(default: int, text: str, expected: str = "a whole number, 0 for off") -> Any:
    """A field that is a whole number from 0."""
    return field(default=default, metadata={"help": text, "whole": expected})


def _other(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen; by default the likeliest, of equals the lowest id.

    First the scores are edited by what the text so far is (`edited`): logit_bias,
    repetition_penalty, presence_penalty and frequency_penalty, DRY, no_repeat_ngram_size,
    bad_words, min_new_tokens, forced_prefix, in this order. Then, where temperature is not 0,
    filters cut and shape the distribution in the order `order`, mirostat last, and a token is drawn
    from what is left. Each field's metadata says what it does.

    repetition_penalty counts tokens of prompt and output, presence_penalty and frequency_penalty of
    the output alone, as the OpenAI interface and vLLM have it: a long prompt would otherwise forbid
    its own words. penalty_window limits all three to the last tokens of prompt and output.

    Lists and mappings are kept as tuples and sets, so that a Sampling stays as it is. seed None: a
    new one each time; sequence i of a call draws from a stream of (seed, i).

    Raises: UsageError for a value that cannot be.
    """

    temperature: float = _number(
        0.0, 0.0, 100.0, "0 (greedy) to 100",
        "Divides the scores: 0 takes the likeliest token, 1 draws as the model says.",
    )  # fmt: skip
    dynamic_temperature: float = _number(
        0.0, 0.0, 100.0, "0 (off) to 100",
        "Vary the temperature by up to this much: lower where the model is sure.",
    )  # fmt: skip
    dynamic_exponent: float = _number(
        1.0, 0.01, 100.0, "0.01 to 100",
        "How the varied temperature follows the model's unsureness.",
    )  # fmt: skip
    top_k: int = _whole(
        0, "Draw from the k likeliest tokens (0: all).", "a whole number, 0 for all"
    )
    top_p: float = _number(
        1.0, 1e-9, 1.0, "above 0, at most 1",
        "Draw from the fewest tokens that have this probability together.",
    )  # fmt: skip
    min_p: float = _number(
        0.0, 0.0, 1.0, "0 (off) to 1",
        "Draw from tokens at least this likely, relative to the likeliest (0: off).",
    )  # fmt: skip
    typical_p: float = _number(
        1.0, 1e-9, 1.0, "above 0, at most 1",
        "Draw from the tokens nearest to the expected surprise that have this probability.",
    )  # fmt: skip
    top_n_sigma: float = _number(
        0.0, 0.0, 100.0, "0 (off) to 100",
        "Draw from tokens within so many standard deviations of the best score (0: off).",
    )  # fmt: skip
    xtc_probability: float = _number(
        0.0, 0.0, 1.0, "0 (off) to 1",
        "How often to exclude top choices: all tokens above xtc-threshold but the last.",
    )  # fmt: skip
    xtc_threshold: float = _number(
        0.1, 0.0, 0.5, "0 to 0.5", "How likely a token must be for XTC to exclude it."
    )
    dry_multiplier: float = _number(
        0.0, 0.0, 100.0, "0 (off) to 100",
        "DRY: how much to penalise a token that would go on with a repetition (0: off).",
    )  # fmt: skip
    dry_base: float = _number(
        1.75, 1.0, 100.0, "1 to 100", "DRY: by what the penalty grows with each repeated token."
    )
    dry_allowed_length: int = _whole(
        2, "DRY: repetitions up to this long are free.", "a whole number from 0"
    )
    dry_range: int = _whole(
        0, "DRY: look for repetitions in the last n tokens (0: all).", "a whole number, 0 for all"
    )
    dry_sequence_breakers: Collection[int] = _other(
        frozenset(), "DRY: tokens that no repetition reaches across."
    )
    mirostat_tau: float = _number(
        0.0, 0.0, 100.0, "0 (off) to 100",
        "Mirostat 2: keep the surprise of tokens near this many bits (0: off).",
    )  # fmt: skip
    mirostat_eta: float = _number(
        0.1, 0.0, 10.0, "0 to 10", "Mirostat 2: how fast it corrects itself."
    )
    repetition_penalty: float = _number(
        1.0, 1e-3, 1e3, "0.001 to 1000",
        "Divides positive scores of tokens that occurred, multiplies negative ones (1: off).",
    )  # fmt: skip
    presence_penalty: float = _number(
        0.0, -100.0, 100.0, "-100 to 100", "Taken off the score of each token produced before."
    )
    frequency_penalty: float = _number(
        0.0, -100.0, 100.0, "-100 to 100",
        "Taken off a token's score for each time that it was produced.",
    )  # fmt: skip
    penalty_window: int = _whole(
        0, "Penalties look at the last n tokens of prompt and output (0: all).",
        "a whole number, 0 for all",
    )  # fmt: skip
    no_repeat_ngram_size: int = _whole(0, "No n tokens in a row occur twice (0: off).")
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = _other(
        (), "Added to the scores of tokens: 'ID=BIAS'."
    )
    bad_words: Sequence[Sequence[int]] = _other((), "Tokens in a row that must not occur.")
    min_new_tokens: int = _whole(
        0, "The text cannot end before this many tokens.", "a whole number from 0"
    )
    forced_prefix: Sequence[int] = _other((), "What the output begins with.")
    order: Sequence[str] = _other(
        ORDER, f"In which order the filters work, separated by commas: {','.join(ORDER)}."
    )
    seed: int | None = _other(None, "Seed of the draws; the same seed gives the same text.")

    def __post_init__(self) -> None:
        for each in fields(self):
            value, told = getattr(self, each.name), each.metadata
            if "range" in told:
                check_number(each.name, value, *told["range"])
            elif "whole" in told:
                _check_whole(each.name, value, told["whole"])
        if self.seed is not None:
            _check_whole("seed", self.seed, "a whole number from 0")
        if 0.0 < self.temperature < LEAST_TEMPERATURE:
            raise UsageError(
                f"temperature is {self.temperature!r}, expected 0 (greedy) or at least 0.001"
            )
        self._freeze()
        object.__setattr__(self, "order", _whole_order(self.order))

    def _freeze(self) -> None:
        """What was given as lists and mappings, as what cannot change."""
        breakers = frozenset(_ids("dry_sequence_breakers", self.dry_sequence_breakers))
        object.__setattr__(self, "dry_sequence_breakers", breakers)
        object.__setattr__(self, "forced_prefix", _ids("forced_prefix", self.forced_prefix))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if isinstance(self.bad_words, str) or not isinstance(self.bad_words, Iterable):
            raise UsageError(f"bad_words is {self.bad_words!r:.80}, expected lists of token ids")
        words = tuple(_ids("bad_words", word) for word in self.bad_words)
        if () in words:
            raise UsageError("bad_words has an empty one, expected at least one token id in each")
        object.__setattr__(self, "bad_words", words)
        if isinstance(self.order, list):
            object.__setattr__(self, "order", tuple(self.order))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Does a token's score depend on the tokens before it?"""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def edits(self) -> bool:
        """Are scores edited before a token is chosen?"""
        return bool(self.edits_always or self.min_new_tokens or self.forced_prefix)

    @property
    def edits_always(self) -> bool:
        """Are they beyond the first tokens too?"""
        return bool(
            self.penalised or self.dry_multiplier or self.no_repeat_ngram_size or self.logit_bias
            or self.bad_words
        )  # fmt: skip

    def check_ids(self, vocab_size: int) -> None:
        """Raises: UsageError for a token id that a vocabulary of this size has not."""
        given = {
            "logit_bias": dict(self.logit_bias),
            "bad_words": [token for word in self.bad_words for token in word],
            "forced_prefix": self.forced_prefix,
            "dry_sequence_breakers": self.dry_sequence_breakers,
        }
        for name, ids in given.items():
            if ids and max(ids) >= vocab_size:
                raise UsageError(
                    f"{name} names token {max(ids)}, this model's vocabulary ends at "
                    f"{vocab_size - 1}"
                )


LEAST_TEMPERATURE = 1e-3  # scores over less would exceed what float32 tells apart


def _check_whole(name: str, value: object, expected: str) -> None:
    if not is_whole(value) or value < 0:  # type: ignore[operator]
        raise UsageError(f"{name} is {value!r}, expected {expected}")


def _ids(name: str, value: object) -> tuple[int, ...]:
    """Token ids as a tuple of Python's numbers. Raises: UsageError."""
    items = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (None,)
    if not all(is_whole(item) and item >= 0 for item in items):
        raise UsageError(f"{name} has {value!r:.80} where a list of token ids is expected")
    return tuple(int(item) for item in items)


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    """A mapping, or pairs, of token ids and biases, as pairs in ascending order of ids.

    Raises: UsageError; for a token given twice, too.
    """
    pairs = tuple(value.items() if isinstance(value, Mapping) else _pairs(value))
    for token, bias in pairs:
        _check_whole("a token of logit_bias", token, "a token id")
        # -infinity forbids a token; +infinity would be no number in the softmax.
        check_number(f"logit_bias of token {token}", bias, float("-inf"), 1e6, "at most 1000000")
    biases = {int(token): float(bias) for token, bias in pairs}
    if len(biases) < len(pairs):
        raise UsageError("logit_bias has a token twice, expected one bias for each")
    return tuple(sorted(biases.items()))


def _pairs(value: object) -> Iterable[tuple[Any, Any]]:
    pairs = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (None,)
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise UsageError(f"logit_bias is {value!r:.80}, expected token ids with a bias for each")
    return pairs


def _whole_order(order: object) -> tuple[str, ...]:
    """All filters: those named first, then the others as usual. Raises: UsageError."""
    names = tuple(map(str, order)) if isinstance(order, tuple) else ()
    if not names or not set(names) <= set(ORDER) or len(set(names)) < len(names):
        raise UsageError(
            f"order is {order!r:.120}, expected some of {', '.join(ORDER)}, each once at most"
        )
    return (*names, *(name for name in ORDER if name not in names))
