"""The keys and values of a model whose layers lie at several places: a cache at each.

Invariant: `lengths` and `gates` here are the truth. A part is brought to them when it is next used,
so a step that was broken off after some of the places leaves all of them as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.config import BloomConfig
from bloomq.errors import BackendError, CapacityError
from bloomq.layers import Cache, Span, Stored, check_drop

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


class PlacedCache:
    """`Cache` over the caches of places: parts[i] holds the layers layers[i], its first as 0.

    kinds: what the parts' keys are in `Stored`; rows are stored in the one that holds them all.
    """

    def __init__(
        self,
        config: BloomConfig,
        parts: Sequence[Cache],
        layers: Sequence[range],
        kinds: Sequence[np.dtype[Any]],
        ranks: int,
    ) -> None:
        self._parts, self._layers, self._kinds = tuple(parts), tuple(layers), tuple(kinds)
        self._shape = (config.n_layer, config.n_head, config.head_dim)
        self._torn = False
        self.batch = parts[0].batch
        self.capacity = min(part.capacity for part in parts)
        self.lengths: I64 = np.zeros(self.batch, np.int64)
        self.gates: F32 = np.zeros((self.batch, ranks), np.float32)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    @property
    def paged(self) -> bool:
        return all(part.paged for part in self._parts)

    @property
    def token_bytes(self) -> int:
        return sum(part.token_bytes for part in self._parts)

    def at(self, place: int) -> Cache:
        """The part of a place, with the lengths and gates of the whole.

        Raises: BackendError where a change of all parts was broken off.
        """
        if self._torn:
            raise BackendError(
                "the cache (past_key_values) was lost when a change of its rows was interrupted: "
                "start a new one"
            )
        part = self._parts[place]
        missing = self.lengths - part.lengths[: self.batch]
        if missing.any():
            for row in np.flatnonzero(missing < 0).tolist():
                part.truncate(row, int(self.lengths[row]))
            rows = np.flatnonzero(missing > 0)
            part.advance(Span.of(rows.tolist(), missing[rows].tolist()))
        if self.gates.size:
            part.gates[: self.batch] = self.gates
        return part

    def _all(self) -> list[Cache]:
        return [self.at(place) for place in range(len(self._parts))]

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """What is broken off in here has changed some parts and not others."""
        self._torn = True
        yield
        self._torn = False

    def keys(self, layer: int, row: int, count: int) -> F32:
        place = next(i for i, layers in enumerate(self._layers) if layer in layers)
        return self.at(place).keys(layer - self._layers[place].start, row, count)

    def grow(self, capacity: int, batch: int | None = None) -> None:
        """Parts that have grown when another cannot stay so, unseen: caches do not shrink."""
        for part in self._all():
            part.grow(capacity, batch)
        more = max(0, (batch or 0) - self.batch)
        self.lengths = np.pad(self.lengths, (0, more))
        self.gates = np.pad(self.gates, ((0, more), (0, 0)))
        self.capacity, self.batch = min(part.capacity for part in self._parts), self.batch + more

    def advance(self, span: Span) -> None:
        self.lengths[span.rows] += span.counts

    def truncate(self, row: int, length: int) -> None:
        self.lengths[row] = min(length, int(self.lengths[row]))
        self.forget([row])

    def forget(self, rows: Sequence[int]) -> None:
        """Give back what parts hold of rows beyond their lengths: of a step that was broken off."""
        for row in rows:
            for part in self._parts:
                part.truncate(row, int(self.lengths[row]))

    def copy(self, source: int, target: int) -> None:
        parts = self._all()
        with self._changing():
            for part in parts:
                part.copy(source, target)
            self.gates[target] = self.gates[source]
            self.lengths[target] = self.lengths[source]

    def drop(self, row: int, start: int, count: int) -> None:
        check_drop(int(self.lengths[row]), start, count)
        parts = self._all()
        with self._changing():
            for part in parts:
                part.drop(row, start, count)
            self.lengths[row] -= count

    def stored(self, row: int) -> Stored:
        parts, dtype = [part.stored(row) for part in self._all()], joined_kind(self._kinds)
        assert dtype is not None  # such places are refused when the backend is made
        return Stored(
            np.concatenate([part.keys.astype(dtype, copy=False) for part in parts]),
            np.concatenate([part.values.astype(dtype, copy=False) for part in parts]),
            np.concatenate([part.scales for part in parts], axis=1 if dtype == np.int8 else 0),
        )

    def restore(self, row: int, stored: Stored) -> None:
        dtype = joined_kind(self._kinds)
        assert dtype is not None
        stored.check(self._shape, dtype, self.capacity)
        parts = self._all()
        before = [part.stored(row) if self.lengths[row] else None for part in parts]
        with self._changing():
            done: list[int] = []
            try:
                for i, part in enumerate(parts):
                    part.restore(row, self._share(stored, i))
                    done.append(i)
            except CapacityError:
                for i in done:
                    _put_back(parts[i], row, before[i])
                self._torn = False
                raise
            self.lengths[row] = stored.length

    def _share(self, stored: Stored, place: int) -> Stored:
        """The layers of a place. Floats come from the same dtype, or a narrower: no bit is lost."""
        layers, kind = self._layers[place], self._kinds[place]
        at = slice(layers.start, layers.stop)
        keys, values = (x[at].astype(kind, copy=False) for x in (stored.keys, stored.values))
        return Stored(keys, values, stored.scales[:, at] if stored.scales.size else stored.scales)


def _put_back(part: Cache, row: int, before: Stored | None) -> None:
    part.truncate(row, 0)
    if before is not None:
        part.restore(row, before)


def joined_kind(kinds: Sequence[np.dtype[Any]]) -> np.dtype[Any] | None:
    """What holds keys of all these without loss; None where int8, which has scales, is among others
    that have none."""
    if len(set(kinds)) > 1 and any(kind == np.int8 for kind in kinds):
        return None
    return np.result_type(*kinds)
