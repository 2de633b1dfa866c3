"""The threads of the CPU kernels: how many, through which of Numba's layers, and how they wait."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba

from bloomq.errors import BackendError

# Two parallel calls at once abort the process under Numba's workqueue layer; omp takes them. One
# lock for all models of the process, since the threads are the process's.
_WORKQUEUE = threading.RLock()


def entry(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel as it may be called from any thread: as it is, or in turn under workqueue."""
    if numba.threading_layer() != "workqueue":
        return kernel

    def in_turn(*args: Any) -> None:
        with _WORKQUEUE:
            kernel(*args)

    return in_turn


# How long idle OpenMP threads spin before they sleep, in GNU's unit of a few nanoseconds to a few
# tens. Measured with bloom-560m on 2 cores: 1,000 decodes as fast as GNU's default of 300,000,
# sleeping at once (OMP_WAIT_POLICY=passive) three times slower; but beside one other busy process
# the default is 70 times slower than 1,000, for each waits by spinning while the other needs the
# core.
_SPIN_COUNT = "1000"


def start_threads(threads: int) -> str:
    """Start Numba's threads and return the name of its threading layer: omp wherever it loads.

    A parallel region costs 1-2 us under omp, 60-100 us under workqueue, and a token has about a
    hundred.
    """
    try:
        layer = str(numba.threading_layer())  # another user of Numba has already started it
    except ValueError:
        with _spinning_briefly():
            layer = _first_layer_that_loads(threads)
    if layer == "workqueue":
        warnings.warn(
            "numba's omp threading layer does not load here; workqueue is used instead: small "
            "models decode several times slower, and calls from several threads wait in turn",
            RuntimeWarning,
            stacklevel=3,
        )
    return layer


def _first_layer_that_loads(threads: int) -> str:
    chosen = numba.config.THREADING_LAYER  # by the user, where it is not "default"
    for wanted in ("omp", "default") if chosen == "default" else (chosen,):
        numba.config.THREADING_LAYER = wanted
        try:
            numba.set_num_threads(threads)
            return str(numba.threading_layer())
        except ValueError as error:
            problem = error
    reason = " ".join(str(problem).split())
    raise BackendError(f"numba starts no threads here ({reason}): reinstall numba")


@contextmanager
def _spinning_briefly() -> Iterator[None]:
    """OpenMP reads its environment once, when it is loaded: set there unless the user has."""
    if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]


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
