"""Steps that are recorded once for each shape, then run again and again.

Invariant: a recording belongs to whoever took it until it is put back; another thread that wants
the same shape meanwhile gets one of its own.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from bloomq.backends.numba_cpu.program import Buffer, Input, Program
from bloomq.backends.numba_cpu.surveyed import Survey

# Kept: decode in several shapes, a prompt's steps. Those with much memory, as a prompt's on a large
# model, or one whose every logit was asked for, are kept as long as they fit.
_PROGRAMS, _KEPT_BYTES = 16, 128 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """A step's program, where it finds its ids or hidden states and the index of what is wanted,
    and its result."""

    program: Program
    given: Input | Buffer
    wanted: Input
    result: Buffer | Survey


class Recorded:
    """Recordings by shape, of which those used longest ago are forgotten."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Recording] = OrderedDict()
        self._keeping = threading.Lock()

    def take(self, shape: Hashable, record: Callable[[], Recording]) -> Recording:
        """A recording of this shape, to be put back: a new one where none is kept."""
        with self._keeping:
            kept = self._kept.pop(shape, None)
        return record() if kept is None else kept

    def put_back(self, shape: Hashable, recording: Recording) -> None:
        """Counted anew each time: a signal between two lines must leave no sum that drifts."""
        with self._keeping:
            self._kept[shape] = recording  # another thread's, if there is one, goes
            self._kept.move_to_end(shape)
            total = sum(kept.program.nbytes for kept in self._kept.values())
            while self._kept and (len(self._kept) > _PROGRAMS or total > _KEPT_BYTES):
                total -= self._kept.popitem(last=False)[1].program.nbytes
