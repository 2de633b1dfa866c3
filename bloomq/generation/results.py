"""What comes out of generation: tokens, texts, why they ended, and how long they took."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Literal

FinishReason = Literal["length", "stop", "eos", "interrupted"]
Alternatives = tuple[tuple[int, float], ...]  # (id, logprob), the likeliest first


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a sequence. logprob: under the model itself, before temperature and penalties,
    natural log; top: the likeliest tokens of its place, as many as were asked for."""

    id: int
    logprob: float
    top: Alternatives = ()


@dataclass(frozen=True, slots=True)
class Stats:
    """Times in seconds. prompt_s runs to the first token, generate_s from there to the last;
    reused_tokens: of the prompt, which an earlier text had in memory; guessed_tokens: by
    speculation, of which right_guesses came true."""

    prompt_tokens: int
    generated_tokens: int
    prompt_s: float
    generate_s: float
    load_s: float
    guessed_tokens: int = 0
    right_guesses: int = 0
    reused_tokens: int = 0

    @property
    def prompt_tokens_per_s(self) -> float:
        """Of the tokens that were read."""
        read = self.prompt_tokens - self.reused_tokens
        return read / self.prompt_s if self.prompt_s else 0.0

    @property
    def generated_tokens_per_s(self) -> float:
        """Of the tokens after the first, which is the prompt's."""
        return max(self.generated_tokens - 1, 0) / self.generate_s if self.generate_s else 0.0


@dataclass(frozen=True, slots=True)
class Generation:
    """What was produced for one prompt.

    text: decoded output, without the prompt, special tokens and the stop string; ids: every token
    produced, the end-of-text token included; logprobs: of each under the model itself (before
    temperature and penalties), natural log; top_logprobs: of each, the likeliest tokens of its
    place as (id, logprob), where they were asked for; score: what a search ranked it by.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    stats: Stats
    top_logprobs: tuple[Alternatives, ...] = ()
    score: float | None = None


class Clock:
    """When a sequence was asked for, and when it got its first and its latest token."""

    __slots__ = ("_first", "_last", "_started")

    def __init__(self) -> None:
        self._started = perf_counter()
        self._first = self._last = 0.0

    def tick(self) -> None:
        """A token is there."""
        self._last = perf_counter()
        self._first = self._first or self._last

    @property
    def prompt_s(self) -> float:
        return (self._first or perf_counter()) - self._started

    @property
    def generate_s(self) -> float:
        return self._last - self._first
