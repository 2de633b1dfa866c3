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
from numba import int64, void

from bloomq.backends.numba_cpu.jit import compiled
from bloomq.backends.numba_cpu.program import Program, pause, read, runner

# A program that reads less than this is done before a sleeping helper is awake (about 50 us).
_ALONE_BYTES = 1 << 20
# How long a helper looks out for the next program before it sleeps: the host's work between two
# steps (drawing a token, showing it) is some 100 us, and waking costs as much again.
_LOOKS = 6_000


@lru_cache(maxsize=1)
def _look_out() -> Any:
    """look_out(address, seen, looks): returns when the number there is another, or at the end."""

    @compiled(void(int64, int64, int64))
    def look_out(at, seen, looks):  # type: ignore[no-untyped-def]
        for _ in range(looks):
            if read(at) != seen:
                return
            pause(0)

    return look_out


class Pool:
    """`threads` threads that work on programs: the caller and helpers, started at the first need.

    Any number of Python threads may call `run` at once; helpers join the latest.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._helpers: _Helpers | None = None
        self._starting = threading.Lock()
        runner()  # compiled now, not at the first call
        _look_out()

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
                    self._helpers = _Helpers(self.threads - 1)
                    weakref.finalize(self, self._helpers.stop)
                helpers = self._helpers
        return helpers


_END = object()  # instead of a job: helpers shall end


class _Helpers:
    """Threads that sleep until a job is published."""

    def __init__(self, count: int) -> None:
        self.process = os.getpid()
        self._epoch: Any = np.zeros(1, np.int64)  # counts publications
        self._job: Any = None  # a Job, or _END
        self._bells = [threading.Lock() for _ in range(count)]
        self._publishing = threading.Lock()
        for who, bell in enumerate(self._bells, start=1):
            bell.acquire()
            thread = threading.Thread(
                target=self._help, args=(bell, who), name="bloomq", daemon=True
            )
            with suppress(RuntimeError):  # the system gives no more threads: fewer help
                thread.start()

    def publish(self, job: Any) -> None:
        with self._publishing:
            self._job = job
            self._epoch[0] += 1
            for bell in self._bells:
                if bell.locked():
                    bell.release()

    def stop(self) -> None:
        """Let the threads end."""
        if self.process == os.getpid():
            self.publish(_END)

    def _help(self, bell: threading.Lock, who: int) -> None:
        at, look_out = self._epoch.ctypes.data, _look_out()
        while True:
            bell.acquire()
            seen, job = int(self._epoch[0]), self._job
            if job is _END:
                return
            job.work(who)
            del job  # a sleeping helper keeps no program alive
            look_out(at, seen, _LOOKS)


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
