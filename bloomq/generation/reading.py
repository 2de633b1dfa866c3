"""The text of sequences as they are produced: pieces that are certain, ends at stop strings."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import suppress
from dataclasses import dataclass

from bloomq.errors import BloomqError
from bloomq.generation.engine import Engine
from bloomq.generation.results import Alternatives, FinishReason, Generation
from bloomq.generation.sequence import Sequence
from bloomq.text import Decoder, TextAssembler

PrefillProgress = Callable[[int, int], None]  # (prompt tokens done, in all)


@dataclass(frozen=True, slots=True)
class Piece:
    """A token of a stream: its id, its logprob, the likeliest tokens of its place where they were
    asked for, and the text that it made certain ("" while a character or a possible stop string is
    incomplete)."""

    text: str
    id: int
    logprob: float
    top: Alternatives = ()


class Reader:
    """Reads one sequence. decoder: None where there is no tokenizer, and so no text."""

    def __init__(self, sequence: Sequence, decoder: Decoder | None, stop: Items[str]) -> None:
        self.sequence = sequence
        self._assembler = None if decoder is None else TextAssembler(decoder, stop)
        self._text = ""
        self._reason: FinishReason | None = None

    @property
    def has_ended(self) -> bool:
        """Is there nothing more to read?"""
        done = self.sequence.has_ended and self.sequence.is_awaited
        return self._reason is not None or (done and self.sequence.error is None)

    def take(self) -> Piece | None:
        """The next piece, if there is one yet. Raises: what ended the sequence."""
        if self.has_ended or (token := self.sequence.take()) is None:
            return None
        text = "" if self._assembler is None else self._assembler.push(token.id)
        if self._assembler is not None and self._assembler.stopped:
            self._reason = "stop"
            self.sequence.stop()
        elif self.sequence.is_awaited:
            self._reason = self.sequence.reason
        if self._reason is not None and self._assembler is not None:
            text += self._assembler.finish()
        self._text += text
        return Piece(text, token.id, token.logprob, token.top)

    def result(self, load_s: float) -> Generation:
        """What has been read; "interrupted" where it has not ended."""
        sequence, reason, text = self.sequence, self._reason, self._text
        if reason is None and self._assembler is not None:
            text += self._assembler.held
        tokens = sequence.produced[: sequence.taken]
        return Generation(
            text, tuple(token.id for token in tokens), tuple(token.logprob for token in tokens),
            reason or "interrupted", sequence.stats(load_s),
            tuple(token.top for token in tokens) if sequence.request.top_logprobs else (),
        )  # fmt: skip


def read(
    engine: Engine,
    readers: Items[Reader],
    progress: PrefillProgress = lambda done, total: None,
) -> Iterator[tuple[int, Piece]]:
    """(index of the reader, piece) as pieces come, until all have ended; each sequence ends with
    this iterator."""
    total = sum(len(reader.sequence.prompt) for reader in readers)
    done = 0
    try:
        left = list(enumerate(readers))
        while left:
            engine.advance(reader.sequence for _, reader in left)
            if done < total:
                now = sum(min(r.sequence.held, len(r.sequence.prompt)) for r in readers)
                if now > done:
                    progress(done := now, total)
            for index, reader in left:
                while (piece := reader.take()) is not None:
                    yield index, piece
            left = [(index, reader) for index, reader in left if not reader.has_ended]
    finally:
        for reader in readers:
            reader.sequence.stop()


def read_each(engine: Engine, readers: Iterator[Reader], parallel: int) -> Iterator[Reader]:
    """Readers in their order, each when it has ended. At most `parallel` run at a time: when one
    ends, the next takes its place, but none that lies too far behind the first under way.

    Raises: what ended a reader, or `readers`, when all before it have been yielded.
    """
    order: deque[Reader] = deque()
    running: list[Reader] = []
    broken: BloomqError | None = None
    coming = True
    try:
        while True:
            while coming and len(running) < parallel and len(order) < _AHEAD * parallel:
                try:
                    reader = next(readers, None)
                except BloomqError as error:
                    reader, broken = None, error
                if reader is None:
                    coming = False
                else:
                    order.append(reader)
                    running.append(reader)
            if not order:
                if broken is not None:
                    raise broken
                return
            engine.advance(reader.sequence for reader in running)
            for reader in running:
                with suppress(BloomqError):  # it is raised again in its turn
                    while reader.take() is not None:
                        pass
            running = [reader for reader in running if not reader.sequence.has_ended]
            while order and order[0].sequence.has_ended:
                order[0].take()  # raises what ended it
                yield order.popleft()
    finally:
        for reader in running:
            reader.sequence.stop()


_AHEAD = 4  # texts of each place that wait for an earlier one to end
