"""How often each token occurs in a text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
Count = Callable[[I64], tuple[I64, I64]]


def counted(tokens: I64) -> tuple[I64, I64]:
    """The tokens that occur, each once, and how often."""
    ids, counts = np.unique(tokens, return_counts=True)
    return ids, counts


class Tally:
    """`counted`, of a text that grows: what was counted before is not looked at again."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._ids, self._counts = np.empty(0, np.int64), np.empty(0, np.int64)
        self._known = 0

    def __call__(self, tokens: I64) -> tuple[I64, I64]:
        for token in tokens[self._known :].tolist():
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._ids):
                room = np.zeros(max(64, place), np.int64)
                self._ids = np.concatenate([self._ids, room])
                self._counts = np.concatenate([self._counts, room])
            self._ids[place] = token
            self._counts[place] += 1
        self._known = len(tokens)
        count = len(self._places)
        return self._ids[:count], self._counts[:count]
