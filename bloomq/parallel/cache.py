"""The cache of a rank: keys and values of its own heads, behind the interface of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.layers import Cache, Span, Stored
from bloomq.parallel.talk import Group, whole

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ParallelCache:
    """`Cache` over the cache of a rank's heads, heads[rank] .. heads[rank + 1].

    `keys` and `stored` have all heads, which the ranks give each other, so all must call them;
    `nbytes` and `token_bytes` are this rank's.
    """

    inner: Any  # the backend's own, which is what its layers are given
    group: Group
    heads: tuple[int, ...]

    @property
    def _mine(self) -> slice:
        return slice(self.heads[self.group.rank], self.heads[self.group.rank + 1])

    @property
    def _cache(self) -> Cache:
        cache: Cache = self.inner
        return cache

    @property
    def batch(self) -> int:
        return self._cache.batch

    @property
    def capacity(self) -> int:
        return self._cache.capacity

    @property
    def lengths(self) -> I64:
        return self._cache.lengths

    @property
    def gates(self) -> F32:
        return self._cache.gates

    @property
    def nbytes(self) -> int:
        return self._cache.nbytes

    @property
    def paged(self) -> bool:
        return self._cache.paged

    @property
    def token_bytes(self) -> int:
        return self._cache.token_bytes

    def keys(self, layer: int, row: int, count: int) -> F32:
        mine = np.asarray(self._cache.keys(layer, row, count))
        if not count:  # asked by who wants to know whether the cache is there: alone, perhaps
            return np.zeros((0, self.heads[-1], mine.shape[2]), mine.dtype)
        return whole(self.group, mine, self.heads, axis=1)

    def grow(self, capacity: int, batch: int | None = None) -> None:
        self._cache.grow(capacity, batch)

    def advance(self, span: Span) -> None:
        self._cache.advance(span)

    def truncate(self, row: int, length: int) -> None:
        self._cache.truncate(row, length)

    def copy(self, source: int, target: int) -> None:
        self._cache.copy(source, target)

    def drop(self, row: int, start: int, count: int) -> None:
        self._cache.drop(row, start, count)

    def stored(self, row: int) -> Stored:
        mine = self._cache.stored(row)
        scales = mine.scales
        if scales.size:
            scales = whole(self.group, scales, self.heads, axis=3)
        keys, values = (
            whole(self.group, array, self.heads, axis=2) for array in (mine.keys, mine.values)
        )
        return Stored(keys, values, scales)

    def restore(self, row: int, stored: Stored) -> None:
        layers, _, _, head_dim = (*stored.keys.shape, 0, 0, 0, 0)[:4]  # the inner cache checks
        stored.check((layers, self.heads[-1], head_dim), stored.keys.dtype, self.capacity)
        scales = stored.scales[..., self._mine] if stored.scales.size else stored.scales
        keys, values = stored.keys[:, :, self._mine], stored.values[:, :, self._mine]
        self._cache.restore(row, Stored(keys, values, scales))
