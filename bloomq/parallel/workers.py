"""How the processes that torchrun has started run one command, or one program.

All of them do the same; rank 0 alone is heard, and reads for all. Invariant: where one ends, all
end, and what went wrong is said once.
"""

from __future__ import annotations

import importlib.util
import io
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np

from bloomq.errors import BackendError
from bloomq.layers import Backend
from bloomq.pack import Pack
from bloomq.parallel.cuts import Cuts
from bloomq.parallel.layers import ParallelBackend
from bloomq.parallel.place import Place
from bloomq.parallel.talk import check_alike

if TYPE_CHECKING:
    from bloomq.parallel.group import ProcessGroup

# Ranks that load 352 GB from one disk of 2 GB/s are 3 minutes apart at most.
TIMEOUT_S = 600.0
_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Workers:
    """This process and the others. As a context manager: parts from them in order at the end."""

    place: Place
    group: ProcessGroup

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world(self) -> int:
        return self.place.world

    def backend(self, inner: Backend, pack: Pack) -> ParallelBackend:
        """The layers of this rank, over a backend of its own.

        Raises: BackendError where ranks have other packs or backends; UsageError for so many ranks
        as the model has no pieces for.
        """
        remedy = "give every rank the same"
        check_alike(self.group, "the pack", f"{pack.manifest['checksum']!s:.16}", remedy)
        cuts = Cuts.of(pack.config, pack.schemes, self.world)
        backend = ParallelBackend(inner, self.group, cuts)
        check_alike(self.group, "the backend", backend.arithmetic, remedy)
        return backend

    @property
    def device(self) -> str:
        """The GPU of this rank, where machines have them."""
        return f"cuda:{self.place.local_rank}"

    def free_bytes(self) -> int:
        """Memory that is free on this rank's GPU."""
        return self.group.free_bytes()

    def threads(self, cores: int) -> int:
        """A rank's share of this machine's cores."""
        return max(1, cores // self.place.local_world)

    def seed(self) -> int:
        """A new seed, the same on every rank."""
        state = np.random.SeedSequence().generate_state(2)
        return int(self.group.gather(state)[0, 0])

    def may_report(self) -> bool:
        """Is this the rank that says what went wrong? The first one is. It ends by itself now: what
        torchrun tells it comes too late to matter."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return self.group.is_first_to("report")

    def speak_as_one(self) -> None:
        """From now on rank 0 alone prints, and what it reads on standard input all read. A torchrun
        that ends the others, since one has died, has them say so."""
        typed = self.rank == 0 and sys.stdin is not None and sys.stdin.isatty()
        source = sys.stdin.buffer if self.rank == 0 and sys.stdin is not None else None
        is_terminal = bool(self.group.gather(np.array([typed]))[0, 0])
        raw = SharedInput(self.group, source, is_terminal=is_terminal)
        sys.stdin = io.TextIOWrapper(io.BufferedReader(raw), encoding="utf-8")
        signal.signal(signal.SIGTERM, self._end)
        if self.rank:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            sys.excepthook = _say_aloud

    def _end(self, number: int, frame: FrameType | None) -> None:
        raise BackendError(
            f"rank {self.rank} of {self.world} was told to end, as when another one has died: see "
            "what that one says"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:  # else the others are no more, or learn by this one's end
            self.group.close()


def started(
    environment: Mapping[str, str] | None = None, *, timeout_s: float = TIMEOUT_S
) -> Workers | None:
    """This process among those that torchrun has started; None where it has started none, or one.

    timeout_s: how long a rank waits for the others before it gives up.
    Raises: BackendError without torch, or where the others do not come; UsageError for an
    environment that torchrun does not make.
    """
    place = Place.of(os.environ if environment is None else environment)
    if place is None:
        return None
    if importlib.util.find_spec("torch") is None:
        raise BackendError(
            f"{place.world} ranks need torch, which is not installed: pip install 'bloomq[cuda]'"
        )
    from bloomq.parallel.group import ProcessGroup

    return Workers(place, ProcessGroup(place, timeout_s))


class SharedInput(io.RawIOBase):
    """Standard input of rank 0, for every rank: all must read at the same moments."""

    def __init__(self, group: ProcessGroup, source: BinaryIO | None, *, is_terminal: bool) -> None:
        self._group, self._source, self._is_terminal = group, source, is_terminal

    def readable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._is_terminal

    def readinto(self, target: Any) -> int:
        room = memoryview(target)
        mine = b""
        if self._source is not None:
            mine = self._source.read1(min(len(room), _READ_BYTES))  # type: ignore[attr-defined]
        data = self._group.share(mine)
        room[: len(data)] = data
        return len(data)


def _say_aloud(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
    """A bug's traceback is heard from every rank."""
    traceback.print_exception(kind, error, trace, file=sys.__stderr__)
