"""Rows of a cache: which are free, and what those hold that nobody uses.

A text whose beginning a row holds takes it over, or shares it by `Cache.copy`: the same tokens have
the same keys and values, so this changes no bit of what follows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import BackendError, BloomqError, CapacityError
from bloomq.layers import PAGE_TOKENS, Cache, Stored

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
_WORTH = 16  # tokens that are worth a copy, or a step's wait
_MOST_IDLE = 64  # rows that are kept: each is looked at for every new text


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What a row holds, or will when its prompt is read: the gates are of its adapters."""

    ids: I64
    gates: bytes

    @classmethod
    def of(cls, ids: Sequence[int] | I64, gates: F32) -> Kept:
        return cls(np.array(ids, np.int64), gates.tobytes())

    def with_ids(self, ids: Sequence[int]) -> Kept:
        """Other tokens with the same adapters."""
        return Kept(np.array(ids, np.int64), self.gates)

    def common(self, other: Kept, most: int) -> int:
        """How many of the first `most` tokens both have; none with other adapters."""
        if self.gates != other.gates:
            return 0
        n = min(len(self.ids), len(other.ids), most)
        differ = np.flatnonzero(self.ids[:n] != other.ids[:n])
        return int(differ[0]) if len(differ) else n


@dataclass(frozen=True, slots=True)
class Place:
    """A row for a text, and how many of its tokens the row holds."""

    row: int
    held: int


class Rows:
    """The rows of one cache, as many as are needed. Who uses which is the caller's to know, and is
    told to each call as `used`: row -> what its text begins with.

    idle_tokens: how many tokens unused rows keep for later texts; those used longest ago go first.
    """

    def __init__(self, make: Callable[[int, int], Cache], idle_tokens: int) -> None:
        self._make, self._most_idle = make, idle_tokens
        self._cache: Cache | None = None
        self._idle: OrderedDict[int, Kept] = OrderedDict()  # used longest ago first

    @property
    def cache(self) -> Cache:
        assert self._cache is not None, "no row was taken yet"
        return self._cache

    @property
    def idle_tokens(self) -> int:
        """How many tokens the rows have memory for that nobody uses."""
        return sum(-(-len(kept.ids) // PAGE_TOKENS) * PAGE_TOKENS for kept in self._idle.values())

    def take(self, wanted: Kept, tokens: int, used: dict[int, Kept]) -> Place | None:
        """A row with room for `tokens` tokens; None where a row in use will soon hold a good part
        of what is wanted, so that it is better to wait.

        Raises: CapacityError where there is no memory, also without what unused rows keep.
        """
        most = min(len(wanted.ids) - 1, tokens)  # the last token runs in any case, for its logits
        self._make_room(tokens)
        source, held = None, 0
        for row, kept in [*self._idle.items(), *used.items()]:
            there = int(self.cache.lengths[row]) if row in used else most
            same = min(wanted.common(kept, most), there)
            if same > held:
                source, held = row, same
        coming = max((wanted.common(kept, most) for kept in used.values()), default=0)
        if coming >= held + _WORTH:
            return None
        kept_whole = self._idle.get(source) if source is not None else None
        if source is not None and kept_whole is not None and len(kept_whole.ids) - held < _WORTH:
            del self._idle[source]
            row = source
        else:
            row = self._free(used, source)
            if source is None or held < _WORTH:
                held = 0
            else:
                self.cache.copy(source, row)
                if source in self._idle:
                    self._idle.move_to_end(source)
        self.cache.truncate(row, held)
        self.cache.gates[row] = np.frombuffer(wanted.gates, np.float32)
        return Place(row, held)

    def scratch(self, used: dict[int, Kept]) -> int:
        """A row for a moment, of any content."""
        return self._free(used, None)

    def _free(self, used: Iterable[int], spare: int | None) -> int:
        """A row that nobody uses. Where a new one would take memory for all of its tokens, one that
        keeps something (but not `spare`) goes before it."""
        busy = {*used, *self._idle}
        batch = self.cache.batch
        free = next((row for row in range(batch) if row not in busy), None)
        if free is not None:
            return free
        oldest = next((row for row in self._idle if row != spare), None)
        if oldest is not None and not self.cache.paged:
            del self._idle[oldest]
            return oldest
        self._roomy(lambda: self.cache.grow(self.cache.capacity, 2 * batch))
        return batch

    def _make_room(self, tokens: int) -> None:
        """Room for so many tokens in each row. By doubling, so that texts that grow longer and
        longer copy each token once or twice in all, or by what is needed where memory is short."""
        if self._cache is None:
            self._cache = self._make(1, tokens)
        cache = self._cache
        if tokens > cache.capacity:
            with suppress(CapacityError):
                cache.grow(max(tokens, 2 * cache.capacity))
            self._roomy(lambda: cache.grow(tokens))

    def _roomy(self, change: Callable[[], None]) -> None:
        """A change that needs memory, without what unused rows keep if it must be."""
        try:
            change()
        except CapacityError:
            if not self.empty():
                raise
            change()

    def keep(self, row: int, kept: Kept) -> None:
        """Nobody uses `row` any more, which holds these tokens (none: what nobody can use)."""
        self.cache.truncate(row, len(kept.ids))
        if not len(kept.ids):
            return
        for other, theirs in list(self._idle.items()):  # what the new one has too
            if kept.common(theirs, len(theirs.ids)) == len(theirs.ids):
                self._empty(other)
        self._idle[row] = kept
        while self.idle_tokens > self._most_idle or len(self._idle) > _MOST_IDLE:
            self._empty(next(iter(self._idle)))

    def _empty(self, row: int) -> None:
        self._idle.pop(row, None)
        self.cache.truncate(row, 0)

    def empty(self) -> bool:
        """Empty the rows that nobody uses; was there one?"""
        had = list(self._idle)
        for row in had:
            self._empty(row)
        return bool(had)

    def forget(self, used: dict[int, Kept]) -> None:
        """Give back what nobody uses: the cache itself, where that is all of it."""
        self.empty()
        if not used:
            self._cache = None

    def is_lost(self) -> bool:
        """Has an interrupted step taken the cache's memory, as on JAX? Then there is none now."""
        if self._cache is not None:
            try:
                self._cache.keys(0, 0, 0)
            except BackendError:
                self._idle.clear()
                self._cache = None
                return True
        return False

    def stored(self, wanted: Kept) -> Stored | None:
        """What an unused row holds of a text that it holds whole."""
        count = len(wanted.ids)
        for row, kept in self._idle.items():
            if wanted.common(kept, count) == count:
                return self.cache.stored(row).first(count)
        return None

    def restore(self, kept: Kept, stored: Stored, used: dict[int, Kept]) -> None:
        """Keep what is stored of a text in a row that nobody uses.

        Raises: see `Cache.restore`; CapacityError also for more tokens than unused rows keep.
        """
        count = len(kept.ids)
        if count > self._most_idle:
            raise CapacityError(
                f"{count} tokens of a prompt, this model keeps {self._most_idle}: load with a "
                "larger context"
            )
        self._make_room(count)
        row = self._free(used, None)
        try:
            self.cache.restore(row, stored)
        except BloomqError:
            self.cache.truncate(row, 0)
            raise
        self.cache.gates[row] = np.frombuffer(kept.gates, np.float32)
        self.keep(row, kept)
