"""The cache rows of one prompt's beams: a beam that goes on stays where it is, and only where it
splits is its row copied (by reference, where the cache can).

Invariant: copies go to rows that no beam needs, so none is overwritten before it is read.
"""

from __future__ import annotations

from collections.abc import Sequence

from bloomq.layers import Cache


class Rows:
    """`count` rows of a cache from `first` on, of which the first holds the prompt."""

    def __init__(self, cache: Cache, first: int, count: int) -> None:
        self._cache, self._all = cache, range(first, first + count)
        self.used = [first]  # row of each beam

    def follow(self, parents: Sequence[int]) -> None:
        """Give each new beam a row that holds what its parent's does; parents: indices of `used`.
        Rows that no beam has are emptied."""
        before, taken = self.used, set[int]()
        kept = {before[parent] for parent in parents}
        free = [row for row in self._all if row not in kept]
        after: list[int] = []
        for parent in parents:
            row = before[parent]
            if row in taken:
                row = free.pop(0)
                self._cache.copy(before[parent], row)
            taken.add(row)
            after.append(row)
        for row in free:
            self._cache.truncate(row, 0)
        self.used = after
