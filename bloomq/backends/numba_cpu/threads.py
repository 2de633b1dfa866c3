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
from numba import boolean, int64, void

from bloomq.backends.numba_cpu.jit import compiled
from bloomq.backends.numba_cpu.program import (
    LINE,
    Job,
    Program,
    pause,
    read,
    runner,
    show,
)

# A program that reads less than this is done before a sleeping helper is awake (about 50 us).
_ALONE_BYTES = 1 << 20
# One that reads less than this is done before a helper that looks out for it has begun.
_SHARED_BYTES = 1 << 17
# How long a helper looks out for the next program before it sleeps: the host's work between two
# steps (drawing a token, showing it) is some 200 us, and waking costs as much as half of that.
_LOOKS = 6_000
# On the board: how many jobs were put up, where the latest one's card is (0: helpers shall end),
# then a line for each helper: the card that it looks at (0: none), and whether it sleeps.
_JOBS, _CARD, _FIRST, _SLEEPS = 0, 1, LINE // 8, 1


@lru_cache(maxsize=1)
def _put_up() -> Any:
    """put_up(board, card): from now on helpers that look out work on the job of this card."""

    @compiled(void(int64, int64))
    def put_up(board, card):  # type: ignore[no-untyped-def]
        show(board + 8 * _CARD, card)
        show(board + 8 * _JOBS, read(board + 8 * _JOBS) + 1)

    return put_up


@lru_cache(maxsize=1)
def _help_out() -> Any:
    """help_out(board, mine, looks): works on the jobs of the board until there was none for so many
    looks; did it not end for good? `mine` is the address of the helper's line.

    All of it without Python: to get the GIL back takes as long as a small program. Invariant: a job
    whose card is in a helper's line is not freed. The helper writes the card there first, then
    looks whether it is still up; who replaces it, first puts up the next one, then reads the lines.
    """
    run, sleeps = runner(), 8 * _SLEEPS

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
            if card == 0:
                return False
            show(mine, card)
            if read(board + 8 * _CARD) == card:
                operations = read(card + 8)
                run(read(card), 0, operations, read(card + 16), read(card + 24))
            show(mine, 0)

    return help_out


class Pool:
    """`threads` threads that work on programs: the caller and helpers, started at the first need.

    Any number of Python threads may call `run` at once; helpers join the latest.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._helpers: _Helpers | None = None
        self._starting = threading.Lock()
        for function in (runner, _put_up, _help_out):
            function()  # compiled now, not at the first call

    def run(self, program: Program) -> None:
        """Run a program to its end."""
        job = program.job()
        try:
            touched = program.bytes_touched + program.cache_bytes
            if self.threads > 1 and touched >= _SHARED_BYTES:
                self._running().publish(job, wake=touched >= _ALONE_BYTES)
            job.work()
        except BaseException:  # Ctrl-C: no helper may outlive the call
            job.stop()
            raise

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
        self._board: Any = np.zeros((count + 2) * _FIRST, np.int64)
        self._board_at = self._board.ctypes.data
        self._lines = self._board[_FIRST:].reshape(-1, _FIRST)[:count]
        self._lines[:, _SLEEPS] = 1
        self._put_up = _put_up()
        self._jobs: list[Job] = []  # the latest, and those that a late helper still looks at
        self._bells = [threading.Lock() for _ in range(count)]
        self._publishing = threading.Lock()
        for helper, bell in enumerate(self._bells):
            bell.acquire()
            mine = self._lines[helper].ctypes.data
            thread = threading.Thread(
                target=self._help, args=(bell, mine), name="bloomq", daemon=True
            )
            with suppress(RuntimeError):  # the system gives no more threads: fewer help
                thread.start()

    def publish(self, job: Job, wake: bool = True) -> None:
        """Let helpers that look out work on a job; wake: those that sleep too."""
        with self._publishing:
            self._put_up(self._board_at, job.card)
            looked_at = self._lines[:, 0].tolist()
            self._jobs = [job, *(late for late in self._jobs if late.card in looked_at)]
            if wake:
                self._wake()

    def stop(self) -> None:
        """Let the threads end."""
        if self.process == os.getpid():
            with self._publishing:
                self._put_up(self._board_at, 0)
                self._wake()

    def _wake(self) -> None:
        for bell, sleeps in zip(self._bells, self._lines[:, _SLEEPS].tolist(), strict=True):
            if sleeps and bell.locked():
                bell.release()

    def _help(self, bell: threading.Lock, mine: int) -> None:
        help_out = _help_out()
        bell.acquire()
        while help_out(self._board_at, mine, _LOOKS):
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
