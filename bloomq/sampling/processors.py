"""Scores edited by what the text so far is: functions of the history alone.

Invariant: no random number, no state; the same text gives the same scores, so beams, guesses and
single sequences share these. Each processor changes a row in place: `edited` gives it a private
copy, the sampler a row that can be put back, since a copy of 250,880 scores takes longer than most
of these. Sequences are int64 arrays: text is prompt and output together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.sampling.dry import penalise_repetitions
from bloomq.sampling.options import Sampling
from bloomq.sampling.tally import Count, counted

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


def edited(
    sampling: Sampling,
    values: F32,
    prompt: Sequence[int] | I64,
    produced: Sequence[int] | I64,
    ends: Sequence[int] = (),
) -> F32:
    """Scores [V] behind `prompt` and `produced`; `values` [V] itself where nothing is asked for.

    ends: the end-of-text tokens, which min_new_tokens holds back. A token that is forbidden gets
    -infinity; of a forced one all others do, and it gets 0.
    """
    if not edits(sampling, len(produced)):
        return values
    out = np.array(values, np.float32)
    text = np.concatenate([np.asarray(prompt, np.int64), np.asarray(produced, np.int64)])
    edit(sampling, out, text, len(produced), ends)
    return out


def edits(sampling: Sampling, new: int) -> bool:
    """Is anything asked for, behind `new` tokens of output?"""
    return sampling.edits_always or new < max(sampling.min_new_tokens, len(sampling.forced_prefix))


def edit(
    sampling: Sampling, out: F32 | Restorable, text: I64, new: int, ends: Sequence[int] = (),
    count: Count = counted,
) -> None:  # fmt: skip
    """Change scores `out` [V] as `edited` does, behind a text whose last `new` are output. count:
    counts these, where no penalty_window cuts them."""
    if new < len(sampling.forced_prefix):
        out[:] = -np.inf
        out[sampling.forced_prefix[new]] = 0
        return
    if sampling.logit_bias:
        add_biases(out, dict(sampling.logit_bias))
    if sampling.penalised:
        _penalise(out, sampling, text, text[len(text) - new :], count)
    if sampling.dry_multiplier:
        penalise_repetitions(out, sampling, text)
    if sampling.no_repeat_ngram_size:
        out[ngram_ends(text, sampling.no_repeat_ngram_size)] = -np.inf
    if sampling.bad_words:
        out[word_ends(text, sampling.bad_words)] = -np.inf
    if new < sampling.min_new_tokens and len(ends):
        out[np.asarray(ends, np.int64)] = -np.inf


class Restorable:
    """Scores [V] whose entries can be read and written by their ids, and all be put back."""

    __slots__ = ("_before", "_values")

    def __init__(self, values: F32) -> None:
        self._values = values
        self._before: list[tuple[Any, Any]] = []

    def __getitem__(self, ids: Any) -> Any:
        return self._values[ids]

    def __setitem__(self, ids: Any, scores: Any) -> None:
        before = self._values[ids]  # of a slice a view, of ids a copy already
        self._before.append((ids, before.copy() if isinstance(ids, slice) else before))
        self._values[ids] = scores

    def restore(self) -> None:
        while self._before:
            ids, scores = self._before[-1]
            self._values[ids] = scores
            self._before.pop()  # last: interrupted before, it is put back again


def add_biases(out: F32 | Restorable, biases: dict[int, float]) -> None:
    """score += bias. Source: the OpenAI interface, logit_bias."""
    out[list(biases)] += np.array(list(biases.values()), np.float32)


def _penalise(
    out: F32 | Restorable, sampling: Sampling, text: I64, output: I64, count: Count
) -> None:
    """The penalties, over the last `penalty_window` tokens."""
    window = sampling.penalty_window
    seen = text[-window:] if window else text
    new = output[-window:] if window else output
    if sampling.repetition_penalty != 1.0:
        penalise_seen(out, seen, sampling.repetition_penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        ids, counts = (counted if window else count)(new)
        penalise_counts(out, ids, counts, sampling.presence_penalty, sampling.frequency_penalty)


def penalise_seen(out: F32 | Restorable, seen: I64, penalty: float) -> None:
    """The scores of the tokens `seen`: divided by the penalty where positive, multiplied where
    negative. Source: CTRL (arXiv 1909.05858), in transformers' form."""
    picked = out[seen]  # read before any is written: a token that occurs twice counts once
    out[seen] = np.where(picked > 0, picked / np.float32(penalty), picked * np.float32(penalty))


def penalise_counts(
    out: F32 | Restorable, ids: I64, counts: I64, presence: float, frequency: float
) -> None:
    """score -= presence + count * frequency, of tokens produced. Source: the OpenAI interface."""
    out[ids] -= (presence + counts * frequency).astype(np.float32)


def ngram_ends(text: I64, n: int) -> I64:
    """Tokens that would complete n in a row that the text has already.

    Source: transformers' NoRepeatNGramLogitsProcessor.
    """
    count = len(text) - n + 1  # of those that the text has
    if count < 1:
        return np.empty(0, np.int64)
    if n == 1:
        return text
    starts = np.flatnonzero(text[:count] == text[count])
    for i in range(1, n - 1):
        starts = starts[text[starts + i] == text[count + i]]
    return text[starts + n - 1]


def word_ends(text: I64, words: Sequence[Sequence[int]]) -> I64:
    """The last tokens of those words whose other tokens the text ends with.

    Source: transformers' NoBadWordsLogitsProcessor.
    """
    longest = max(map(len, words))
    tail = text[max(len(text) - longest + 1, 0) :].tolist()
    found = [word[-1] for word in words if tail[len(tail) - len(word) + 1 :] == list(word[:-1])]
    return np.array(found, np.int64)
