"""Ranks as threads of one process, which meet at a barrier: what torch.distributed does, without
it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import numpy as np


class ThreadGroup:
    """`Group` of threads that share `slots`."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world, self._slots, self._barrier = rank, len(slots), slots, barrier

    def gather(self, mine: np.ndarray) -> np.ndarray:
        self._slots[self.rank] = np.array(mine)
        self._barrier.wait()
        found = np.stack(self._slots)
        self._barrier.wait()  # before anyone's next one
        return found

    def sum(self, mine: Any) -> Any:
        if isinstance(mine, np.ndarray):
            return reduce(add, self.gather(mine))
        return mine.new_tensor(reduce(add, self.gather(mine.numpy())))


def on_ranks(world: int, work: Callable[[ThreadGroup], Any]) -> list[Any]:
    """work(group) of every rank, or the error of the lowest that has one of its own."""
    slots, barrier = [None] * world, threading.Barrier(world, timeout=60)
    found: list[Any] = [None] * world

    def run(rank: int) -> None:
        try:
            found[rank] = work(ThreadGroup(rank, slots, barrier))
        except BaseException as error:
            found[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [one for one in found if isinstance(one, BaseException)]
    own = [one for one in errors if not isinstance(one, threading.BrokenBarrierError)]
    if errors:
        raise (own or errors)[0]
    return found
