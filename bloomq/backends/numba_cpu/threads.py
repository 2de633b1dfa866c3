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
from pathlib import Path
from typing import Any

import numpy as np

from bloomq.backends.numba_cpu.program import Job, Program, helper, runner

# A program that reads less than this is done before a sleeping helper is awake (about 50 us).
_ALONE_BYTES = 1 << 20
# How long a helper looks out for the next program before it sleeps, some 0.8 ms: the host's work
# between two steps (drawing a token, showing it) is 0.3 to 0.5 ms, and waking costs 0.1 to 0.4.
_LOOKS = 30_000


class Pool:
    """`threads` threads that work on programs: the caller and helpers, started at the first need.

    Any number of Python threads may call `run` at once; helpers join the latest.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._helpers: _Helpers | None = None
        self._starting = threading.Lock()
        runner()  # compiled now, not at the first call
        helper()

    def run(self, program: Program) -> None:
        """Run a program to its end."""
        shared = program.bytes_touched + program.cache_bytes >= _ALONE_BYTES
        job = program.job(self.threads if shared else 1)
        try:
            if shared and self.threads > 1:
                self._running().publish(job)
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
                    made = _Helpers(self.threads - 1)
                    weakref.finalize(self, made.stop)
                    made.start()
                    self._helpers = made
                helpers = self._helpers
        return helpers


class _Helpers:
    """Threads that sleep until a job is published."""

    def __init__(self, count: int) -> None:
        self.process = os.getpid()
        self._announced: Any = np.zeros(1, np.int64)  # the number of the latest job that began
        self._published = 0  # the number of the latest job
        self._job: Job | None = None  # None: helpers shall end
        self._bells = [threading.Lock() for _ in range(count)]
        self._publishing = threading.Lock()

    def start(self) -> None:
        """Let the threads begin; where Ctrl-C cuts that off, none stays."""
        try:
            for who, bell in enumerate(self._bells, start=1):
                bell.acquire()
                thread = threading.Thread(
                    target=self._help, args=(bell, who), name="bloomq", daemon=True
                )
                with suppress(RuntimeError):  # the system gives no more threads: fewer help
                    thread.start()
        except BaseException:
            self.stop()
            raise

    def publish(self, job: Job | None) -> None:
        with self._publishing:
            self._published += 1
            if job is not None:  # announced when it begins, without the GIL, so that it is free
                job.announced, job.number = self._announced.ctypes.data, self._published
            self._job = job
            for bell in self._bells:
                if bell.locked():
                    bell.release()

    def stop(self) -> None:
        """Let the threads end."""
        if self.process == os.getpid():
            self.publish(None)
            self._announced[0] = self._published

    def _help(self, bell: threading.Lock, who: int) -> None:
        while True:
            bell.acquire()
            job = self._job
            if job is None:
                return
            job.help(who, _LOOKS)
            del job  # a sleeping helper keeps no program alive


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
