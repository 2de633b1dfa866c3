"""The generation loop: prompts in, tokens out, one step for all rows that are not finished.

`Batch.run` yields tokens; who calls it (`loading`) makes them text. Invariant: a row's tokens do
not depend on the other rows of its batch (but on its index there, which seeds its draws).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bloomq.checks import is_whole
from bloomq.errors import CapacityError, UsageError
from bloomq.forward import STEP_TOKENS, cut
from bloomq.heads import Head
from bloomq.layers import Span, Top, X
from bloomq.sampling import Sampling, draw, generator, penalise, top_of
from bloomq.speculation import MOST_GUESSES, Guesser, Pace

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
FinishReason = Literal["length", "stop", "eos", "interrupted"]
PrefillProgress = Callable[[int, int], None]  # (prompt tokens done, in all)


@dataclass(frozen=True, slots=True)
class Stats:
    """Times in seconds. prompt_s runs to the first token, generate_s from there to the last;
    guessed_tokens: by speculation, of which right_guesses came true."""

    prompt_tokens: int
    generated_tokens: int
    prompt_s: float
    generate_s: float
    load_s: float
    guessed_tokens: int = 0
    right_guesses: int = 0

    @property
    def prompt_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prompt_s if self.prompt_s else 0.0

    @property
    def generated_tokens_per_s(self) -> float:
        """Of the tokens after the first, which is the prompt's."""
        return max(self.generated_tokens - 1, 0) / self.generate_s if self.generate_s else 0.0


@dataclass(frozen=True, slots=True)
class Generation:
    """What was produced for one prompt.

    text: decoded output, without the prompt, special tokens and the stop string; ids: every token
    produced, the end-of-text token included; logprobs: of each under the model itself (before
    temperature and penalties), natural log.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    stats: Stats


@dataclass(frozen=True, slots=True)
class Token:
    """One token of one sequence of the batch."""

    index: int
    id: int
    logprob: float


@dataclass(slots=True)
class Row:
    """A row under way: its prompt, what it produced, its random numbers, and who guesses for it."""

    prompt: I64
    rng: np.random.Generator
    guesser: Guesser | None = None
    pace: Pace = field(default_factory=Pace)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Batch:
    """Some prompts in one cache, from prefill to the last token.

    guessers: makes the guesser of a sequence of at most so many tokens (see `speculation`);
    gates: of the prompts' adapters (see `lora`), None: of none.
    Raises: UsageError for an empty prompt or no new tokens, CapacityError where a prompt and its
    new tokens exceed `context`.
    """

    def __init__(
        self,
        lm: Head,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        context: int,
        guessers: Callable[[int], Guesser] | None = None,
        gates: F32 | None = None,
    ) -> None:
        if not is_whole(max_new_tokens) or max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens!r}, expected at least 1")
        max_new_tokens, context = int(max_new_tokens), int(context)  # NumPy's kinds wrap around
        if not prompts:
            raise UsageError("no prompts: give at least one")
        for prompt in prompts:
            _check_prompt(prompt, max_new_tokens, context)
        self._lm, self._sampling, self._most = lm, sampling, max_new_tokens
        self.sequences = [
            Row(np.array(prompt, np.int64), generator(sampling, index),
                None if guessers is None else guessers(len(prompt) + max_new_tokens))
            for index, prompt in enumerate(prompts)
        ]  # fmt: skip
        longest = max(len(prompt) for prompt in prompts)
        # The last token is produced, not fed back: it needs no place.
        self._cache = lm.cache(len(prompts), longest + max_new_tokens - 1)
        if gates is not None:
            self._cache.gates[:] = gates
        self._active = list(range(len(prompts)))

    def stop(self, index: int) -> None:
        """Sequence `index` takes part in no further step."""
        if index in self._active:
            self._active.remove(index)

    def run(self, progress: PrefillProgress = lambda done, total: None) -> Iterator[Token]:
        """Tokens as they are produced, sequence by sequence within a step; ends when every sequence
        has its max_new_tokens or was stopped."""
        yield from self._prefill(progress)
        while self._active:
            rows = list(self._active)
            guesses = [self._guess(self.sequences[row]) for row in rows]
            pieces = [
                [self.sequences[row].ids[-1], *guess]
                for row, guess in zip(rows, guesses, strict=True)
            ]
            span = Span.of(rows, [len(piece) for piece in pieces])
            ids = np.array([token for piece in pieces for token in piece], np.int64)
            yield from self._hand_out(self._step(ids, span, rows, guesses))

    def _guess(self, sequence: Row) -> list[int]:
        """Tokens that may come next; the last one that is produced need not be guessed."""
        # A step of more than one block of tokens is paid for, right or wrong.
        share = (MOST_GUESSES + 1) // len(self._active) - 1
        most = min(sequence.pace.most(), share, self._most - len(sequence.ids) - 1)
        if sequence.guesser is None or most < 1:
            return []
        return sequence.guesser.guess([*sequence.prompt.tolist(), *sequence.ids], most)

    def _prefill(self, progress: PrefillProgress) -> Iterator[Token]:
        """The prompts in steps of at most STEP_TOKENS; a row's first token as soon as its prompt
        is through."""
        total = sum(len(s.prompt) for s in self.sequences)
        done = 0
        for step in cut([len(s.prompt) for s in self.sequences], STEP_TOKENS):
            ids = np.concatenate([self.sequences[row].prompt[a:b] for row, a, b in step])
            span = Span.of([row for row, _, _ in step], [b - a for _, a, b in step])
            ended = [row for row, _, b in step if b == len(self.sequences[row].prompt)]
            tokens = self._step(ids, span, ended, [[] for _ in ended])
            done += len(ids)
            progress(done, total)
            yield from self._hand_out(tokens)

    def _step(self, ids: I64, span: Span, rows: list[int], guesses: list[list[int]]) -> list[Token]:
        """Run the tokens of `span`, and draw what follows in each of `rows`: a token behind its
        last, and one behind every guess that came true. guesses: a row's last tokens in `span`."""
        ends = span.starts[1:][np.isin(span.rows, rows)].tolist()
        starts = [end - len(guess) - 1 for end, guess in zip(ends, guesses, strict=True)]
        wanted = [i for start, end in zip(starts, ends, strict=True) for i in range(start, end)]
        logits = self._lm.step(ids, self._cache, span, np.array(wanted, np.int64))
        if not wanted:  # a prompt's first part: nobody reads its logits
            return []
        best = self._lm.backend.top(logits, 1)
        if not np.isfinite(best.logsumexp).all():
            raise self._lm.model.find_not_finite(ids, self._cache, span)
        tokens, first = [], 0
        for row, guess in zip(rows, guesses, strict=True):
            drawn = self._choose(row, guess, logits, best, first)
            wrong = len(guess) + 1 - len(drawn)
            self._cache.truncate(row, int(self._cache.lengths[row]) - wrong)
            self.sequences[row].pace.note(len(guess), len(drawn) - 1)
            tokens += drawn
            first += len(guess) + 1
        return tokens

    def _choose(self, row: int, guess: list[int], logits: X, best: Top, first: int) -> list[Token]:
        """The next tokens of a row, whose logits begin at logits[first]: one, and one more behind
        each guess as long as guesses are what was drawn."""
        tokens: list[Token] = []
        for i in range(len(guess) + 1):
            before = [token.id for token in tokens]
            token, logit = self._draw(self.sequences[row], before, logits, best, first + i)
            logprob = float(np.float64(logit) - best.logsumexp[first + i])
            tokens.append(Token(row, token, logprob))
            if i < len(guess) and token != guess[i]:
                break
        return tokens

    def _hand_out(self, tokens: list[Token]) -> Iterator[Token]:
        """Count each token as it is handed out, so that an interruption leaves none that was drawn
        and never seen."""
        for token in tokens:
            if token.index not in self._active:  # it ended with an earlier one of these
                continue
            sequence = self.sequences[token.index]
            sequence.ids.append(token.id)
            sequence.logprobs.append(token.logprob)
            if len(sequence.ids) == self._most:
                self.stop(token.index)
            yield token

    def _draw(
        self, sequence: Row, before: list[int], logits: X, best: Top, i: int
    ) -> tuple[int, float]:
        """A token and its logit, from logits[i]; before: drawn in this step, not handed out yet."""
        sampling, backend = self._sampling, self._lm.backend
        if sampling.greedy and not sampling.penalised:
            return int(best.ids[i, 0]), float(best.logits[i, 0])
        row = backend.take(logits, np.array([i]))  # [1, V]
        plain = backend.numpy(row)[0]
        if sampling.penalised:
            new = np.array([*sequence.ids, *before], np.int64)
            seen = np.unique(np.concatenate([sequence.prompt, new]))
            changed = penalise(plain, seen, sampling.repetition_penalty)
            token = draw(
                sampling, sequence.rng, len(plain), lambda k, t: top_of(changed, k, t),
                lambda: changed,
            )  # fmt: skip
        else:
            token = draw(
                sampling, sequence.rng, len(plain), lambda k, t: backend.top(row, k, t),
                lambda: plain,
            )  # fmt: skip
        return token, float(plain[token])


def _check_prompt(prompt: Sequence[int], new_tokens: int, context: int) -> None:
    if not len(prompt):
        raise UsageError("the prompt is empty: BLOOM needs at least one token to continue from")
    if len(prompt) + new_tokens > context:
        room = context - len(prompt)
        remedy = f"ask for at most {room} new tokens" if room > 0 else "shorten it"
        raise CapacityError(
            f"a prompt of {len(prompt)} tokens and {new_tokens} new ones exceed the context of "
            f"{context}: {remedy}, or load with a larger context"
        )


class Clock:
    """When a call began, and when each of its sequences got its first and its latest token."""

    def __init__(self, sequences: int) -> None:
        self._started = perf_counter()
        self._first: list[float | None] = [None] * sequences
        self._last: list[float | None] = [None] * sequences

    def tick(self, index: int) -> None:
        """A token of sequence `index` is there."""
        now = perf_counter()
        if self._first[index] is None:
            self._first[index] = now
        self._last[index] = now

    def stats(self, index: int, sequence: Row, load_s: float) -> Stats:
        first, last = self._first[index], self._last[index]
        if first is None or last is None:
            prompt_s, generate_s = perf_counter() - self._started, 0.0
        else:
            prompt_s, generate_s = first - self._started, last - first
        return Stats(
            len(sequence.prompt), len(sequence.ids), prompt_s, generate_s, load_s,
            sequence.pace.guessed, sequence.pace.right,
        )  # fmt: skip
