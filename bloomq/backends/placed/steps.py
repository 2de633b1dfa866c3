"""A step cut at the seams, so that each place can replay its own part of it.

A step does nothing with what its layers give but hand it to other layers: so it is run once on
promises, which write down the calls, and the calls of one place in a row become a step of its
backend. That step is given hidden states where a whole model's is given ids.

Invariant: the same calls in the same order as without. A step with more than one thing to carry
over a seam is run call by call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.placed.cache import PlacedCache
from bloomq.errors import CapacityError
from bloomq.layers import Backend, Span, Step, X

I64 = NDArray[np.int64]
Call = Callable[[Sequence[X], Any, Any], X]  # (what it is given, the place's cache, span)
Move = Callable[[X, int, int], X]  # (x, from place, to place)
HOST = -1  # where ids come from and rows of the embedding are looked up, in NumPy
_IDS, _WANTED = 0, 1


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """What a layer gave, in the array type of its place."""

    place: int
    values: X


@dataclass(frozen=True, slots=True, eq=False)
class Promise:
    """What a call that was written down will give, at its place."""

    record: Record
    number: int
    place: int


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """A call: given[i] the numbers of its promises, None for what is not given."""

    place: int
    call: Call
    given: tuple[int | None, ...]
    gives: int


@dataclass(slots=True, eq=False)
class Record:
    """The calls of a step, in order."""

    calls: list[Written] = field(default_factory=list)

    @classmethod
    def of(cls, step: Step) -> tuple[Record, int]:
        """The record of a step, and the number of its result."""
        record: Any = cls()
        nothing: Any = None  # for the cache and the span: layers alone look into them
        ids, wanted = Promise(record, _IDS, HOST), Promise(record, _WANTED, HOST)
        return record, step(ids, nothing, nothing, wanted).number

    def add(self, place: int, call: Call, given: Sequence[Promise | None]) -> Promise:
        numbers = tuple(None if promise is None else promise.number for promise in given)
        number = _WANTED + 1 + len(self.calls)
        self.calls.append(Written(place, call, numbers, number))
        return Promise(self, number, place)

    def sections(self, result: int) -> list[Section] | None:
        """The calls of each place in a row; None where one does not only read what the one before
        gives, or where `wanted` is read before the last."""
        runs: list[list[Written]] = []
        for call in self.calls:
            if not runs or runs[-1][-1].place != call.place:
                runs.append([])
            runs[-1].append(call)
        found: list[Section] = []
        start = _IDS
        for i, calls in enumerate(runs):
            last = i + 1 == len(runs)
            inside = {call.gives for call in calls}
            outer = {n for call in calls for n in call.given if n is not None} - inside
            if not outer <= ({start, _WANTED} if last else {start}):
                return None
            later = {n for run in runs[i + 1 :] for call in run for n in call.given}
            gives = {result} if last else (inside & later)
            if len(gives) != 1 or not gives <= inside:
                return None
            end = gives.pop()
            found.append(Section(calls[0].place, tuple(calls), start, end, last))
            start = end
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """Calls at one place, as a function of what the section before gives."""

    place: int
    calls: tuple[Written, ...]
    start: int
    end: int
    last: bool

    def run(self, x: X, cache: Any, span: Any, wanted: X) -> X:
        known = {self.start: x, _WANTED: wanted}
        for call in self.calls:
            given = [None if number is None else known[number] for number in call.given]
            known[call.gives] = call.call(given, cache, span)
        return known[self.end]

    def compiled(self, backend: Backend) -> Step:
        """A step of its backend. All but the last give every row, as what is wanted of them."""
        if self.last:
            return backend.compile(self.run)
        return backend.compile(
            lambda x, cache, span, wanted: backend.take(self.run(x, cache, span, wanted), wanted)
        )


class CutStep:
    """A step whose parts each place replays. The record is made when it is first called."""

    def __init__(self, step: Step, backends: Sequence[Backend], move: Move) -> None:
        self._step, self._backends, self._move = step, backends, move
        self._parts: list[tuple[Section, Step]] | None = None

    def _cut(self) -> list[tuple[Section, Step]]:
        record, result = Record.of(self._step)
        parts = []
        for section in record.sections(result) or []:
            host = section.place == HOST
            replay = section.run if host else section.compiled(self._backends[section.place])
            parts.append((section, replay))
        return parts

    def __call__(self, ids: X, cache: PlacedCache, span: Span, wanted: I64) -> X:
        if self._parts is None:
            self._parts = self._cut()
        try:
            return self._run(self._parts, ids, cache, span, wanted)
        except CapacityError:
            cache.forget(span.rows.tolist())
            raise

    def _run(
        self, parts: list[tuple[Section, Step]], ids: X, cache: PlacedCache, span: Span,
        wanted: I64,
    ) -> X:  # fmt: skip
        x, place = (ids.values, ids.place) if isinstance(ids, Held) else (ids, HOST)
        every = np.arange(int(span.starts[-1]))
        for section, replay in parts:
            x = self._move(x, place, section.place)
            place = section.place
            part: Any = None if place == HOST else cache.at(place)
            x = replay(x, part, span, wanted if section.last else every)
        if not parts:
            held = self._step(ids, cache, span, wanted)
            x, place = held.values, held.place
        return self._move(x, place, len(self._backends) - 1)
