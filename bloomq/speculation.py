"""Guesses at the next tokens, so that one step of the model can check several of them.

A step of eight tokens reads the same weights as a step of one, so guesses that turn out right are
nearly free. The loop (`generation`) draws each token from the model's own logits, exactly as it
would without guesses, and goes on behind a guess only where the token drawn is the one guessed. So
text, logprobs and use of random numbers are the same with and without speculation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from bloomq.heads import Head
from bloomq.layers import Span

MOST_GUESSES = 7  # with the token before them a block of eight, the largest of the CPU's kernels
_FEW_GUESSES = 3  # a block of four, which costs hardly more than one token


class Guesser(Protocol):
    """Guesses for one sequence."""

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `ids`, the prompt and all tokens so far."""
        ...


class Lookup:
    """What followed the last time the latest few tokens occurred: right for text that repeats
    itself, such as code, lists and quotations. Source: prompt lookup decoding (A. Saxena, 2023)."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where it was last followed
        self._known = 0  # tokens whose n-grams are in there

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        for end in range(max(self._known, 1), len(ids)):  # ids[end] follows the n-grams before it
            for n in _NGRAMS:
                if end >= n:
                    self._after[tuple(ids[end - n : end])] = end
        self._known = len(ids)
        for n in _NGRAMS:
            at = self._after.get(tuple(ids[-n:])) if len(ids) >= n else None
            if at is not None:  # what followed may go on into its own repetition
                period = len(ids) - at
                return [ids[at + i % period] for i in range(most)]
        return []


_NGRAMS = (3, 2)  # longest first; single tokens recur too often to say anything


class DraftModel:
    """What a smaller model of the same vocabulary would write."""

    def __init__(self, lm: Head, capacity: int) -> None:
        self._lm = lm
        self._cache = lm.cache(1, capacity)
        self._held: list[int] = []  # tokens whose keys and values the cache holds

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        same = 0
        for ours, theirs in zip(self._held, ids[:-1], strict=False):  # the last is fed anew
            if ours != theirs:
                break
            same += 1
        self._cache.truncate(0, same)
        del self._held[same:]
        guesses: list[int] = []
        fresh = list(ids[same:])
        while len(guesses) < most:
            token = self._feed(fresh)
            if token is None:
                break
            guesses.append(token)
            fresh = [token]
        return guesses

    def _feed(self, ids: list[int]) -> int | None:
        """Run tokens; the likeliest next one, None where the logits are no numbers."""
        most = self._lm.backend.step_tokens
        for start in range(0, len(ids), most):
            part = np.array(ids[start : start + most], np.int64)
            logits = self._lm.step(
                part, self._cache, Span.of([0], [len(part)]), np.array([len(part) - 1])
            )
        self._held += ids
        best = self._lm.backend.top(logits, 1)
        return int(best.ids[0, 0]) if np.isfinite(best.logsumexp[0]) else None


class Pace:
    """How many tokens to guess: many while guesses come true, few after one that did not."""

    def __init__(self) -> None:
        self._next = _FEW_GUESSES
        self.guessed = self.right = 0

    def most(self) -> int:
        return self._next

    def note(self, guessed: int, right: int) -> None:
        """So many of the latest guesses came true."""
        if guessed:
            self._next = MOST_GUESSES if right == guessed else _FEW_GUESSES
            self.guessed += guessed
            self.right += right
