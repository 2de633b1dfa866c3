"""The threads of the CPU kernels: how many, how they wait for work, and who wakes them.

They are Python's own threads inside compiled code that does not hold the GIL, so there is no second
runtime to choose, to warn about or to tune: no OpenMP, no workqueue. The thread that calls is
always one of them, and needs none of the others (see `program`).
"""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import boolean, int64

from bloomq.backends.numba_cpu.jit import compiled
from bloomq.backends.numba_cpu.memory import longs
from bloomq.backends.numba_cpu.program import (
    COUNTERS,
    LINE,
    SLICE,
    Job,
    Program,
    pause,
    read,
    runner,
    show,
    work_through,
)

# A program that reads less than this is done before a sleeping helper is awake (about 50 us).
_ALONE_BYTES = 1 << 20
# One that reads less than this is done before a helper that looks out for it has begun.
_SHARED_BYTES = 1 << 17
# How long a helper looks out for the next program before it sleeps: the host's work between two
# steps (drawing a token, showing it) is some 200 us, and waking costs as much as half of that.
_LOOKS = 6_000
# On the board: how many jobs were put up, and where the latest one's card is; then a line for each
# helper: the card that it looks at, and whether it sleeps.
_JOBS, _CARD, _LINE, _SLEEPS = 0, 1, LINE // 8, 1
_NOTHING, _END = 0, 1  # instead of a card: there is none; helpers shall end
_RECENT = 64  # jobs held for helpers that may still look at them, before it is seen which do


@lru_cache(maxsize=1)
def _begin() -> Any:
    """begin(board, helpers, card, share, wake): begins a run of the job with this card.

    board: 0 where there is none; share: put the job up there. Returns -1, nothing done, where a
    late helper still looks at what the job was before. Returns how many helpers sleep, the job put
    up and no more, if these are to be woken and some do. Else 0: the first slice is done.
    """

    @compiled(int64(int64, int64, int64, int64, int64))
    def begin(board, helpers, card, share, wake):  # type: ignore[no-untyped-def]
        asleep = 0
        if board:
            if read(board + 8 * _CARD) == card:  # take it down, then see who has seen it
                show(board + 8 * _CARD, _NOTHING)
            for helper in range(helpers):
                mine = board + 8 * _LINE * (helper + 1)
                if read(mine) == card:
                    return -1
                asleep += read(mine + 8 * _SLEEPS)
        operations, counters = read(card + 8), read(card + 16)
        longs(counters, (operations + 1) * COUNTERS)[:] = 0
        if share:
            show(board + 8 * _CARD, card)
            show(board + 8 * _JOBS, read(board + 8 * _JOBS) + 1)
            if wake and asleep:
                return asleep
        work_through(read(card), 0, min(operations, SLICE), counters, read(card + 24))
        return 0

    return begin


@lru_cache(maxsize=1)
def _help_out() -> Any:
    """help_out(board, mine, looks): works on the jobs of the board until there was none for so many
    looks; did it not end for good? `mine` is the address of the helper's line.

    All of it without Python: to get the GIL back takes as long as a small program. Invariant: a job
    whose card is in a helper's line is neither freed nor begun anew. The helper writes the card
    there first, then looks whether it is still up; who frees or begins, takes it down first, then
    reads the lines.
    """
    sleeps = 8 * _SLEEPS

    @compiled(boolean(int64, int64, int64))
    def help_out(board, mine, looks):  # type: ignore[no-untyped-def]
        show(mine + sleeps, 0)
        seen, looked = 0, 0  # at least one job is new to one who was woken
        while True:
            jobs = read(board + 8 * _JOBS)
            if jobs == seen:
                looked += 1
                pause(0)
                if looked < looks:
                    continue
                show(mine + sleeps, 1)
                if read(board + 8 * _JOBS) == seen:
                    return True
                show(mine + sleeps, 0)
                continue
            seen, looked = jobs, 0
            card = read(board + 8 * _CARD)
            if card == _END:
                return False
            if card == _NOTHING:
                continue
            show(mine, card)
            if read(board + 8 * _CARD) == card:
                work_through(read(card), 0, read(card + 8), read(card + 16), read(card + 24))
            show(mine, _NOTHING)

    return help_out


class Pool:
    """`threads` threads that work on programs: the caller and helpers, started at the first need.

    Any number of Python threads may call `run` at once; helpers join the latest.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._helpers: _Helpers | None = None
        self._starting = threading.Lock()
        self._begin = _begin()  # compiled now, not at the first call
        _help_out()
        runner()

    def run(self, program: Program) -> None:
        """Run a program to its end."""
        touched = program.bytes_touched + program.cache_bytes
        share = self.threads > 1 and touched >= _SHARED_BYTES
        helpers = self._running() if share else self._helpers
        job = program.job()
        try:
            asleep = self._begun(helpers, job, share, touched)
            if asleep < 0:
                job = program.new_job()
                asleep = self._begun(helpers, job, share, touched)
            if asleep and helpers is not None:
                helpers.wake()
            job.work(0 if asleep else SLICE)
        except BaseException:  # Ctrl-C: no helper may outlive the call
            job.stop()
            raise
        program.done(job)

    def _begun(self, helpers: _Helpers | None, job: Job, share: bool, touched: int) -> int:
        """What `begin` gives."""
        if helpers is None:
            asleep = self._begin(0, 0, job.card, False, False)
        else:
            if share:
                helpers.hold(job)
            count, wake = self.threads - 1, touched >= _ALONE_BYTES
            asleep = self._begin(helpers.board, count, job.card, share, wake)
        return int(asleep)

    def _running(self) -> _Helpers:
        """The helpers; new ones in a forked child, which has none of its parent's threads."""
        helpers = self._helpers
        if helpers is None or helpers.process != os.getpid():
            with self._starting:
                if self._helpers is None or self._helpers.process != os.getpid():
                    self._helpers = _Helpers(self.threads - 1)
                    weakref.finalize(self, self._helpers.stop)
                helpers = self._helpers
        return helpers


class _Helpers:
    """Threads that look out for jobs on a board, and sleep when there were none for a while."""

    def __init__(self, count: int) -> None:
        self.process = os.getpid()
        self._board: Any = np.zeros((count + 2) * _LINE, np.int64)
        first = -self._board.ctypes.data % LINE // 8
        self.board = int(self._board[first:].ctypes.data)
        self._head = self._board[first:][:_LINE]
        self._lines = self._board[first + _LINE :][: count * _LINE].reshape(count, _LINE)
        self._lines[:, _SLEEPS] = 1
        self._recent: list[Job] = []  # those of the last runs, and those that helpers look at
        self._bells = [threading.Lock() for _ in range(count)]
        self._waking = threading.Lock()
        for helper, bell in enumerate(self._bells):
            bell.acquire()
            mine = self.board + 8 * _LINE * (helper + 1)
            thread = threading.Thread(
                target=self._help, args=(bell, mine), name="bloomq", daemon=True
            )
            with suppress(RuntimeError):  # the system gives no more threads: fewer help
                thread.start()

    def hold(self, job: Job) -> None:
        """Keep what a late helper may look at of a job that is about to begin."""
        self._recent.append(job)
        if len(self._recent) > 2 * _RECENT:
            old, looked_at = self._recent[:_RECENT], self._lines[:, 0].tolist()
            self._recent[:_RECENT] = [late for late in old if late.card in looked_at]

    def wake(self) -> None:
        """Wake those who sleep."""
        with self._waking:
            for bell, sleeps in zip(self._bells, self._lines[:, _SLEEPS].tolist(), strict=True):
                if sleeps and bell.locked():
                    bell.release()

    def stop(self) -> None:
        """Let the threads end."""
        if self.process == os.getpid():
            self._head[[_CARD, _JOBS]] = _END, self._head[_JOBS] + 1
            self.wake()

    def _help(self, bell: threading.Lock, mine: int) -> None:
        help_out = _help_out()
        bell.acquire()
        while help_out(self.board, mine, _LOOKS):
            bell.acquire()


def physical_cores() -> int:
    """Physical cores among the processors that this process may use (two hyperthreads share the
    units that these kernels fill)."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if allowed is None:
        return os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)
