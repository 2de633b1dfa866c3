"""The loop: sequences enter, run together and leave, one step for all that are under way.

A step has the next token of sequences whose reader has seen the last one (and guesses behind it),
and pieces of the prompts that are still to be read. A finished sequence leaves its row to the next
in line at once. Invariant: a sequence's tokens do not depend on the others; and what the engine
knows is consistent whenever Ctrl-C may interrupt it, which is while the model runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import BackendError, BloomqError, CapacityError
from bloomq.generation.interrupts import uninterrupted
from bloomq.generation.results import Alternatives, Token
from bloomq.generation.rows import Kept, Rows
from bloomq.generation.sequence import Request, Sequence, check_request
from bloomq.heads import Head
from bloomq.layers import Span, Stored, Top, X
from bloomq.sampling import Logits
from bloomq.speculation import MOST_GUESSES

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
MOST_ROWS = 64  # texts at once: with more a step is bound by arithmetic, and no text gains
_BESIDE = 128  # prompt tokens in a step that others wait for: bloom-7b1 reads them in 1.5 s


@dataclass(frozen=True, slots=True)
class Share:
    """A sequence's tokens of a step. guesses: how many of the last are; draws: is a token drawn
    behind them?"""

    sequence: Sequence
    ids: list[int]
    guesses: int
    draws: bool

    @property
    def drawn_at_most(self) -> int:
        return (self.guesses + 1) * self.draws


class Engine:
    """Sequences on one head and one cache, from prompt to last token.

    context: most tokens of a sequence without a window; rows: most sequences in a step, the others
    take turns; idle_tokens: see `Rows`. Any thread may call any method.
    """

    def __init__(
        self, head: Head, *, context: int, rows: int = MOST_ROWS, idle_tokens: int = 0
    ) -> None:
        self.head, self.context = head, context
        self._most, self._rows = rows, Rows(head.cache, idle_tokens)
        self._sequences: list[Sequence] = []  # under way, in the order in which they got in line
        self._lock = threading.Lock()

    @property
    def used_rows(self) -> int:
        """How many rows of the cache sequences have that have not ended."""
        with self._lock:
            self._sweep()
            return len(self._used())

    @property
    def idle_tokens(self) -> int:
        """How many tokens unused rows have memory for."""
        with self._lock:
            self._sweep()
            return self._rows.idle_tokens

    def forget(self) -> None:
        """Give back the memory of texts that have ended."""
        with self._lock, uninterrupted():
            self._sweep()
            self._rows.forget(self._used())

    def sequence(self, request: Request) -> Sequence:
        """A sequence, which gets in line when `advance` is first called for it.

        Raises: UsageError for an empty prompt or no new tokens, CapacityError where a prompt and
        its new tokens exceed the context.
        """
        new_tokens = check_request(
            request.prompt, request.max_new_tokens, self.context, request.window is not None
        )
        gates = self._no_gates if request.gates is None else request.gates
        beginning = Kept.of(request.prompt, gates)
        return Sequence(replace(request, max_new_tokens=new_tokens), beginning)

    def advance(self, awaited: Iterable[Sequence]) -> bool:
        """Make a step, unless one of these has a token to take or has ended already. Is it so now?
        (A step may have read a piece of a prompt alone.)

        Raises: CapacityError where there is no memory for the step.
        """
        with self._lock:
            mine = list(awaited)
            known = {id(one) for one in self._sequences}
            new = [one for one in mine if not one.has_ended and id(one) not in known]
            if new:
                with uninterrupted():
                    self._sequences += new
            if not any(one.is_ready for one in mine):  # another thread's step may have had it
                self._step()
            return any(one.is_ready for one in mine)

    # -- what is kept ------------------------------------------------------------------------------

    def stored(self, ids: Items[int]) -> Stored | None:
        """The keys and values of a text without adapters, where a row that nobody uses holds it."""
        with self._lock:
            self._sweep()
            return self._rows.stored(Kept.of(ids, self._no_gates))

    def restore(self, ids: Items[int], stored: Stored) -> None:
        """Keep the keys and values of a text, as if it had just been read.

        Raises: UsageError for arrays of other shapes or kinds; CapacityError for more tokens than
        are kept, and where there is no memory.
        """
        with self._lock, uninterrupted():
            self._sweep()
            self._rows.restore(Kept.of(ids, self._no_gates), stored, self._used())

    @property
    def _no_gates(self) -> F32:
        return np.zeros(self.head.adapters.ranks, np.float32)

    # -- who runs ----------------------------------------------------------------------------------

    def _used(self) -> dict[int, Kept]:
        """The rows in use, and what their texts begin with, where others may share that."""
        return {one.row: one.shared for one in self._sequences if one.row is not None}

    def _sweep(self) -> None:
        """Take the rows of sequences that have ended."""
        if not any(one.has_ended for one in self._sequences):
            return
        with uninterrupted():
            for one in self._sequences:
                if one.has_ended and one.row is not None:
                    usable = one.error is None and not one.dropped
                    held = [*one.prompt, *one.ids][: one.held] if usable else []
                    self._rows.keep(one.row, one.beginning.with_ids(held))
                    one.row = None
                    one.guesser = None
            self._sequences = [one for one in self._sequences if not one.has_ended]

    def _admit(self) -> None:
        """Give rows to those in line, in their order, but for one that had better wait for another
        to read what both begin with."""
        room = self._most - sum(one.row is not None and one.is_awaited for one in self._sequences)
        for one in self._sequences:
            if room < 1:
                return
            if one.row is None:
                with uninterrupted():
                    room -= self._enter(one)

    def _enter(self, one: Sequence) -> bool:
        """Give a sequence a row; False where it waits, or where it ended for want of memory."""
        request = one.request
        tokens = len(request.prompt) + request.max_new_tokens - 1  # the last is not fed back
        if request.window is not None:
            tokens = min(tokens, request.window.tokens)
        try:
            place = self._rows.take(one.beginning, tokens, self._used())
            if place is None:
                return False
            one.guesser = None if request.guesser is None else request.guesser()
        except CapacityError as error:
            one.error = error
            return False
        one.enter(place.row, place.held)
        return True

    # -- a step ------------------------------------------------------------------------------------

    def _step(self) -> None:
        self._sweep()
        self._admit()
        shares = self._shares()
        if not shares:
            return
        self._tidy([share.sequence for share in shares])
        span = Span.of([share.sequence.place for share in shares], [len(s.ids) for s in shares])
        ids = np.array([token for share in shares for token in share.ids], np.int64)
        ends = span.starts[1:].tolist()
        wanted = [
            index
            for share, end in zip(shares, ends, strict=True)
            for index in range(end - share.drawn_at_most, end)
        ]
        logits = self._run(ids, span, np.array(wanted, np.int64))
        if wanted:
            count = max(share.sequence.wants for share in shares if share.draws)
            best = self.head.backend.top(logits, count)
            self._check_finite(shares, best)
        with uninterrupted():
            first = 0
            for share in shares:
                if not share.draws:
                    share.sequence.read += len(share.ids)
                elif not share.sequence.has_ended:
                    self._draw(share, logits, best, first)
                first += share.drawn_at_most

    def _run(self, ids: I64, span: Span, wanted: I64) -> X:
        """The model's step. Without memory for it, once more without what unused rows keep."""
        try:
            return self.head.step(ids, self._rows.cache, span, wanted)
        except CapacityError:
            if not self._rows.empty():
                raise
            return self.head.step(ids, self._rows.cache, span, wanted)
        except BaseException:
            with uninterrupted():
                if self._rows.is_lost():  # of JAX, whose steps take the cache's memory
                    lost = BackendError("a step was interrupted, and with it this text was lost")
                    for one in self._sequences:
                        if one.row is not None:
                            one.row, one.error = None, lost
            raise

    def _shares(self) -> list[Share]:
        """What the next step runs: a token of each that is awaited, then pieces of prompts."""
        under_way = [one for one in self._sequences if one.row is not None and not one.has_ended]
        decoding = [one for one in under_way if one.produced and one.is_awaited][: self._most]
        shares = [share for one in decoding if (share := self._next(one, len(decoding)))]
        room = self.head.backend.step_tokens - sum(len(share.ids) for share in shares)
        if shares:
            room = min(room, _BESIDE)
        for one in under_way:
            if one.produced or room < 1:
                continue
            count = min(room, len(one.prompt) - one.read, self._room(one))
            ids = list(one.prompt[one.read : one.read + count])
            shares.append(Share(one, ids, 0, one.read + count == len(one.prompt)))
            room -= count
        return shares

    def _next(self, one: Sequence, others: int) -> Share | None:
        """The last token, and guesses behind it; the last that is produced need not be guessed.
        None where the guesser failed, and with it the sequence."""
        last = one.ids[-1]
        if one.guesser is None:
            return Share(one, [last], 0, True)
        # A step of more than one block of tokens is paid for, right or wrong.
        fair = (MOST_GUESSES + 1) // others - 1
        left = one.request.max_new_tokens - len(one.ids) - 1
        most = min(one.pace.most(), fair, left, self._room(one) - 1)
        try:
            guesses = one.guesser.guess([*one.prompt, *one.ids], most) if most > 0 else []
        except BloomqError as error:
            one.error = error
            return None
        return Share(one, [last, *guesses], len(guesses), True)

    def _room(self, one: Sequence) -> int:
        """How many tokens may run before others must leave the window."""
        window = one.request.window
        return self.head.backend.step_tokens if window is None else window.room(one.held)

    def _tidy(self, sequences: list[Sequence]) -> None:
        """Take back what a step that was interrupted, or guessed wrong, has left in the cache, and
        drop what is out of a window."""
        cache = self._rows.cache
        more = [one for one in sequences if cache.lengths[one.place] > one.held - one.dropped]
        windowed = [one for one in sequences if one.request.window is not None]
        if more or windowed:
            with uninterrupted():
                for one in more:
                    cache.truncate(one.place, one.held - one.dropped)
                for one in windowed:
                    self._let_go(one)

    def _let_go(self, one: Sequence) -> None:
        """Drop what is out of the window when the next token runs."""
        window = one.request.window
        count = 0 if window is None else window.dropped(one.held) - one.dropped
        if window is not None and count:
            self._rows.cache.drop(one.place, window.sinks, count)
            one.dropped += count

    # -- drawing -----------------------------------------------------------------------------------

    def _draw(self, share: Share, logits: X, best: Top, first: int) -> None:
        """Produce the next tokens of a sequence, whose logits begin at logits[first]: one, and one
        more behind each guess as long as guesses are what was drawn."""
        one, request = share.sequence, share.sequence.request
        guesses = share.ids[len(share.ids) - share.guesses :]
        drawn = 0
        try:
            for at in range(first, first + share.guesses + 1):
                row = Logits(self.head.backend, logits, at, best)
                token = request.sampler(row, one.ids)
                logprob = row.logit(token) - row.logsumexp()
                one.produce(Token(token, logprob, _alternatives(row, request.top_logprobs)))
                drawn += 1
                if one.has_ended or drawn > share.guesses or token != guesses[drawn - 1]:
                    break
        except BloomqError as error:  # of its sampler or constraint: the others go on
            one.error = error
        one.pace.note(share.guesses, max(drawn - 1, 0))

    def _check_finite(self, shares: list[Share], best: Top) -> None:
        """End the sequences whose logits are no numbers, with the layer's name; the others go on.

        Their tokens run once more, layer by layer, in a row of their own.
        """
        first, sums = 0, best.logsumexp.tolist()
        for share in shares:
            end = first + share.drawn_at_most
            if not all(map(isfinite, sums[first:end])):
                cache, row = self._rows.cache, self._rows.scratch(self._used())
                cache.copy(share.sequence.place, row)
                span = Span.of([row], [len(share.ids)])
                ids = np.array(share.ids, np.int64)
                share.sequence.error = self.head.model.find_not_finite(ids, cache, span)
                cache.truncate(row, 0)
            first = end


def _alternatives(row: Logits, count: int) -> Alternatives:
    """The likeliest tokens of a place, as (id, logprob)."""
    if not count:
        return ()
    ids, logits = row.best(count)
    logprobs = logits.astype(np.float64) - row.logsumexp()
    return tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
