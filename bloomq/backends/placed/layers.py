"""`Backend` over several: each layer is built by the backend of its place.

Where a layer belongs is in its name (`h.3.mlp.up`) or its number: a block where its range is,
`emb_ln` with the first place, `ln_f` and the head with the last. The embedding is read in host
memory, from the mapped pack: a step needs a few of its rows, [M, C], which cost less to carry to
the first place than its table costs to hold there, and a tied table is the head's at the last.

What a layer gives stays where it was computed, and goes to where it is next needed: from one device
of a library to another at once, by `Receives`, else as a NumPy array.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.placed.cache import PlacedCache, joined_kind
from bloomq.backends.placed.steps import HOST, Call, CutStep, Held, Promise
from bloomq.config import BloomConfig
from bloomq.errors import UsageError
from bloomq.layers import (
    Activation,
    Attention,
    Backend,
    Embedding,
    LayerNorm,
    Linear,
    Span,
    Step,
    Top,
    X,
)
from bloomq.levels import Levels, Sums
from bloomq.weights import Matrix, Norm

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
_BLOCK = re.compile(r"h\.(\d+)\.")


@runtime_checkable
class Receives(Protocol):
    """A backend that takes the arrays of others of its library, wherever they lie."""

    def receive(self, x: X) -> X:
        """The same array on this backend's device, without waiting for it."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A backend, and the layers (blocks) that it computes."""

    backend: Backend
    layers: range


class PlacedBackend:
    """A model's layers over places, in order.

    Raises: UsageError where the places' layers are not ranges that follow one another from 0, or
    some caches are int8 and others not.
    """

    name = "placed"

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = tuple(places)
        _check_ranges([place.layers for place in places])
        self._backends = [place.backend for place in places]
        self._last = len(self.places) - 1
        least = BloomConfig(hidden_size=8, n_layer=1, n_head=1)
        self._kinds = [b.cache(least, 1, 1).stored(0).keys.dtype for b in self._backends]
        if joined_kind(self._kinds) is None:
            raise UsageError(
                f"the caches of the places are {', '.join(map(str, self._kinds))}, expected int8 "
                "at all of them or at none: choose one cache dtype"
            )

    @property
    def description(self) -> str:
        return "; ".join(
            f"layers {_words(place.layers)} on {place.backend.name} ({place.backend.description})"
            for place in self.places
        )

    @property
    def arithmetic(self) -> str:
        """As one backend's where all are alike: a seam changes no bit."""
        found = [backend.arithmetic for backend in self._backends]
        if len(set(found)) == 1:
            return found[0]
        told = zip(self.places, found, strict=True)
        return "placed: " + "; ".join(f"{_words(place.layers)} {text}" for place, text in told)

    @property
    def step_tokens(self) -> int:
        """Of the place that takes the fewest."""
        return min(backend.step_tokens for backend in self._backends)

    # -- layers ------------------------------------------------------------------------------------

    def embedding(self, table: Matrix) -> Embedding:
        def look_up(ids: Any) -> Any:
            return self._call(HOST, lambda given, *_: table.rows(given[0]), ids)

        return look_up

    def norm(self, norm: Norm) -> LayerNorm:
        place = 0 if norm.name == "emb_ln" else self._place(norm.name)
        layer = self._backends[place].norm(norm)
        return lambda x: self._call(place, lambda given, *_: layer(*given), x)

    def linear(
        self,
        weight: Matrix,
        bias: F32 | None = None,
        *,
        norm: Norm | None = None,
        act: Activation | None = None,
        limbs: int = 1,
    ) -> Linear:
        place = self._place(weight.name)
        layer = self._backends[place].linear(weight, bias, norm=norm, act=act, limbs=limbs)

        def call(x: X, add: X | None = None, delta: X | None = None) -> X:
            return self._call(place, lambda given, *_: layer(*given), x, add, delta)

        return call

    def attention(
        self, layer: int, n_head: int, head_dim: int, *, slope: F32 | None = None
    ) -> Attention:
        place = self._place_of(layer)
        inner = layer - self.places[place].layers.start
        attend = self._backends[place].attention(inner, n_head, head_dim, slope=slope)

        def call(qkv: X, cache: Any, span: Span) -> X:
            def run(given: Sequence[X], part: Any, span: Any) -> X:
                return attend(given[0], part, span)

            return self._call(place, run, qkv, cache=cache, span=span)

        return call

    def _place(self, name: str) -> int:
        """Of a matrix or norm; what is of no block belongs to the last place, with the head."""
        block = _BLOCK.match(name)
        return self._last if block is None else self._place_of(int(block[1]))

    def _place_of(self, layer: int) -> int:
        for i, place in enumerate(self.places):
            if layer in place.layers:
                return i
        raise UsageError(
            f"layer {layer} has no place, the places hold {self.places[-1].layers.stop} layers: "
            "give each layer of the model to one"
        )

    def cache(self, config: BloomConfig, batch: int, capacity: int, ranks: int = 0) -> PlacedCache:
        """Raises: UsageError where the places hold another number of layers, CapacityError."""
        count = self.places[-1].layers.stop
        if config.n_layer != count:
            raise UsageError(f"the places hold {count} layers, the model has {config.n_layer}")
        parts = [
            place.backend.cache(replace(config, n_layer=len(place.layers)), batch, capacity, ranks)
            for place in self.places
        ]
        layers = [place.layers for place in self.places]
        return PlacedCache(config, parts, layers, self._kinds, ranks)

    # -- what has no place of its own: where its first argument lies -------------------------------

    def gate(self, x: X, cache: Any, span: Span) -> X:
        place = max(0, self._where(x))
        gate = self._backends[place].gate

        def run(given: Sequence[X], part: Any, span: Any) -> X:
            return gate(given[0], part, span)

        return self._call(place, run, x, cache=cache, span=span)

    def take(self, x: X, index: X) -> X:
        place = max(0, self._where(x))
        take = self._backends[place].take
        if not isinstance(x, Promise):
            return Held(place, take(self._moved(x, place), index))
        return self._call(place, lambda given, *_: take(*given), x, index)

    def compile(self, step: Step) -> Step:
        return CutStep(step, self._backends, self._carried)

    def survey(self, logits: X) -> X:
        survey = self._backends[self._last].survey
        return self._call(self._last, lambda given, *_: survey(*given), logits)

    def top(self, logits: X, k: int) -> Top:
        return self._backends[self._last].top(self._moved(logits, self._last), k)

    def best(self, logits: X, k: int) -> tuple[I64, F32]:
        return self._backends[self._last].best(self._moved(logits, self._last), k)

    def masked(self, logits: X, allowed: NDArray[np.bool_]) -> X:
        return self._backends[self._last].masked(self._moved(logits, self._last), allowed)

    def sums(self, logits: X, temperature: float = 1.0) -> Sums:
        return self._backends[self._last].sums(self._moved(logits, self._last), temperature)

    def levels(self, logits: X, temperature: float = 1.0) -> Levels:
        return self._backends[self._last].levels(self._moved(logits, self._last), temperature)

    def numpy(self, x: X) -> F32:
        return np.asarray(self._moved(x, HOST), np.float32)

    # -- moving ------------------------------------------------------------------------------------

    def _call(
        self, place: int, call: Call, *given: X | None, cache: Any = None, span: Any = None
    ) -> X:
        """Run a layer's call at its place, or write it down where a step is recorded."""
        promise = next((x for x in given if isinstance(x, Promise)), None)
        if promise is not None:
            return promise.record.add(place, call, given)
        part = None if cache is None else cache.at(place)
        return Held(place, call([self._moved(x, place) for x in given], part, span))

    def _where(self, x: X) -> int:
        """The place of an array: a bare one is the caller's, or a step's result."""
        if isinstance(x, Held | Promise):
            return x.place
        return HOST if isinstance(x, np.ndarray) else self._last

    def _moved(self, x: X | None, place: int) -> X | None:
        if x is None:
            return None
        return self._carried(x.values if isinstance(x, Held) else x, self._where(x), place)

    def _carried(self, x: X, source: int, target: int) -> X:
        """The values of an array of one place for another; HOST: as NumPy's."""
        if source in (HOST, target):
            return x
        giver = self._backends[source]
        taker = None if target == HOST else self._backends[target]
        if taker is giver:
            return x
        if isinstance(taker, Receives) and isinstance(giver, Receives):
            return taker.receive(x)
        return giver.numpy(x)


def _check_ranges(ranges: Sequence[range]) -> None:
    whole = all(len(layers) and layers.step == 1 for layers in ranges)
    follow = all(one.stop == other.start for one, other in pairwise(ranges))
    if not ranges or not whole or not follow or ranges[0].start:
        told = ", ".join(f"{layers.start} to {layers.stop}" for layers in ranges) or "none"
        raise UsageError(
            f"the places have layers {told}, expected ranges that follow one another from 0 on, "
            "none of them empty"
        )


def _words(layers: range) -> str:
    """The first and last of some layers."""
    return f"{layers.start}-{layers.stop - 1}" if len(layers) > 1 else str(layers.start)
