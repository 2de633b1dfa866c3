"""The memory of keys and values on a device.

Invariant: buffers stay where they are until the cache grows, and what was recorded over them is
dropped before that. Lengths and gates are NumPy's, on the host: a step is told of them by what is
copied to the device before it runs, so nothing within it waits for the host.
"""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from bloomq.backends.cuda.buffers import Layer
from bloomq.backends.cuda.places import Places
from bloomq.config import BloomConfig
from bloomq.errors import CapacityError
from bloomq.layers import CacheDtype, Span, Stored, check_drop, zeros

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
ELEMENTS: dict[CacheDtype, tuple[torch.dtype, type[np.generic]]] = {
    "f32": (torch.float32, np.float32),
    "f16": (torch.float16, np.float16),
    "int8": (torch.int8, np.int8),
}
ADDRESSABLE_BYTES = 1 << 47  # of a process on x86-64; torch's sizes overflow at 63 bits


class Held(Protocol):
    """What a layer of a step is given as its cache."""

    @property
    def layers(self) -> list[Layer]: ...
    def places(self, span: Span) -> Places: ...
    def token_gates(self, span: Span) -> torch.Tensor:
        """The gates of the row that each token belongs to, [M, ranks]."""
        ...


class CudaCache:
    """Keys and values of every layer in buffers of a device, see `Layer`.

    recorded: what steps have recorded over these buffers, by who did; gone once they move.
    """

    def __init__(
        self, config: BloomConfig, batch: int, capacity: int, ranks: int, dtype: CacheDtype,
        device: torch.device, *, by_triton: bool = False,
    ) -> None:  # fmt: skip
        self.batch, self.capacity, self._by_triton = batch, capacity, by_triton
        self.dtype, self.device = dtype, device
        self.lengths: I64 = np.zeros(batch, np.int64)
        self.gates: F32 = np.zeros((batch, ranks), np.float32)
        self._head, self._n_layer = (config.n_head, config.head_dim), config.n_layer
        self.layers: list[Layer] = []
        for _ in range(config.n_layer):
            made = self._buffers(batch, capacity)
            if made is None:
                self.layers.clear()  # the error's traceback keeps this cache
                raise self._refusal(batch, capacity)
            self.layers.append(made)
        self.recorded: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._known: tuple[Span, I64, Places] | None = None

    @property
    def nbytes(self) -> int:
        parts = [part for layer in self.layers for part in (layer.codes, layer.scales)]
        return sum(part.numel() * part.element_size() for part in parts)

    @property
    def paged(self) -> bool:
        return False

    @property
    def token_bytes(self) -> int:
        return self._layer_token_bytes * self._n_layer

    @property
    def _layer_token_bytes(self) -> int:
        n_head, head_dim = self._head
        scale_bytes = 4 if self.dtype == "int8" else 0
        return 2 * n_head * (head_dim * np.dtype(ELEMENTS[self.dtype][1]).itemsize + scale_bytes)

    def _total_bytes(self, batch: int, capacity: int) -> int:
        return (batch * capacity + 1) * self.token_bytes

    def _buffers(self, batch: int, capacity: int) -> Layer | None:
        """A layer's; None where there is no memory for it, or no addresses for all layers."""
        if self._total_bytes(batch, capacity) > ADDRESSABLE_BYTES:
            return None
        shape = (2, batch * capacity + 1, *self._head)
        scales = shape[:3] if self.dtype == "int8" else (0,)
        try:
            codes, beside = self._empty(shape, self.dtype), self._empty(scales, "f32")
        except (torch.cuda.OutOfMemoryError, MemoryError, CapacityError):
            return None
        return Layer(codes, beside, self._by_triton)

    def _refusal(self, batch: int, capacity: int) -> CapacityError:
        where = "" if self.device.type == "cpu" else f" on {self.device}"
        return CapacityError(
            f"no memory for a cache of {self._total_bytes(batch, capacity) / 1e9:.1f} GB{where}: "
            "ask for fewer tokens or rows"
        )

    def _empty(self, shape: tuple[int, ...], dtype: CacheDtype) -> torch.Tensor:
        there, here = ELEMENTS[dtype]
        if self.device.type == "cpu":
            return torch.from_numpy(zeros(shape, here))  # comes as it is first touched
        return torch.zeros(shape, dtype=there, device=self.device)

    # -- a step ------------------------------------------------------------------------------------

    def places(self, span: Span) -> Places:
        """Where a step's tokens lie; all layers of a step ask with the same span."""
        past = self.lengths[span.rows]
        known = self._known
        if known is not None and known[0] is span and np.array_equal(known[1], past):
            return known[2]
        places = Places.of(span, self.lengths, self.batch, self.capacity, self.device)
        self._known = span, past, places
        return places

    def token_gates(self, span: Span) -> torch.Tensor:
        gates = np.repeat(self.gates[span.rows], span.counts, axis=0)
        return torch.from_numpy(gates).to(self.device)

    def advance(self, span: Span) -> None:
        self.lengths[span.rows] += span.counts

    # -- rows --------------------------------------------------------------------------------------

    def _parts(self) -> list[torch.Tensor]:
        """Every buffer, [2, slots, ...]."""
        return [part for layer in self.layers for part in layer.parts]

    def grow(self, capacity: int, batch: int | None = None) -> None:
        """Layer by layer: while it grows, two layers of the size before are there beside the whole
        of the new size. The second is the first layer's, kept so that where memory ends midway the
        others can go back.

        Raises: CapacityError, the cache as before, though elsewhere in memory.
        """
        capacity, batch = max(self.capacity, capacity), max(self.batch, batch or 0)
        before, after = (self.batch, self.capacity), (batch, capacity)
        if before == after:
            return
        self.recorded.clear()  # first: what they have for work space may be what is missing
        self._known = None
        self.layers, spare = list(self.layers), self.layers[0]
        try:
            for i in range(self._n_layer):
                new = self._buffers(*after)
                if new is None:
                    raise self._refusal(*after)
                self.layers[i].copy_to(new, before, after)
                self.layers[i] = new
        except BaseException:
            self._go_back(after, spare)
            raise
        del spare
        torch.cuda.empty_cache()  # what torch would hold in reserve of the old; not on the CPU
        more = batch - self.batch
        self.lengths = np.pad(self.lengths, (0, more))
        self.gates = np.pad(self.gates, ((0, more), (0, 0)))
        self.capacity, self.batch = capacity, batch

    def _go_back(self, shape: tuple[int, int], spare: Layer) -> None:
        """Bring the first layers, those that have grown to this shape, to what they were: without
        new memory, each where the one behind it was, and then in as much as they need."""
        before, slots = (self.batch, self.capacity), self.batch * self.capacity + 1
        grown = sum(layer.slots > slots for layer in self.layers)
        for i in reversed(range(grown)):
            larger = self.layers[i]
            larger.copy_to(spare, shape, before)
            self.layers[i], spare = spare, larger.first(slots)
            del larger
        del spare
        for i in range(grown - 1):
            exact = self._buffers(*before)
            if exact is None:
                return
            self.layers[i].copy_to(exact, before, before)
            self.layers[i] = exact

    def truncate(self, row: int, length: int) -> None:
        self.lengths[row] = min(length, int(self.lengths[row]))

    def _tokens(self, row: int, start: int, stop: int) -> slice:
        """The slots of some tokens of a row."""
        return slice(row * self.capacity + start, row * self.capacity + stop)

    def copy(self, source: int, target: int) -> None:
        length = int(self.lengths[source])
        if source != target:
            for part in self._parts():
                kept = part[:, self._tokens(source, 0, length)]
                part[:, self._tokens(target, 0, length)] = kept
        self.gates[target] = self.gates[source]
        self.lengths[target] = length

    def drop(self, row: int, start: int, count: int) -> None:
        length = int(self.lengths[row])
        check_drop(length, start, count)
        for part in self._parts():
            kept = part[:, self._tokens(row, start + count, length)].clone()
            part[:, self._tokens(row, start, length - count)] = kept
        self.lengths[row] -= count

    def keys(self, layer: int, row: int, count: int) -> F32:
        held, tokens = self.layers[layer], self._tokens(row, 0, count)
        scales = held.scales[0, tokens] if held.scales.numel() else held.scales
        keys: F32 = held.restored(held.codes[0, tokens], scales, torch.float32).cpu().numpy()
        return keys.copy()  # on the CPU it may be the buffer itself

    def stored(self, row: int) -> Stored:
        length = int(self.lengths[row])
        tokens, element = self._tokens(row, 0, length), ELEMENTS[self.dtype][1]
        codes = np.empty((2, len(self.layers), length, *self._head), element)
        scaled = self.dtype == "int8"
        scales = np.empty((2, len(self.layers), length, self._head[0]) if scaled else 0, np.float32)
        for i, layer in enumerate(self.layers):
            codes[:, i] = layer.codes[:, tokens].cpu().numpy()
            if scaled:
                scales[:, i] = layer.scales[:, tokens].cpu().numpy()
        return Stored(codes[0], codes[1], scales)

    def restore(self, row: int, stored: Stored) -> None:
        element = np.dtype(ELEMENTS[self.dtype][1])
        stored.check((len(self.layers), *self._head), element, self.capacity)
        tokens = self._tokens(row, 0, stored.length)
        for i, layer in enumerate(self.layers):
            both = np.stack([stored.keys[i], stored.values[i]])
            layer.codes[:, tokens] = torch.from_numpy(both).to(self.device)
            if stored.scales.size:
                scales = np.ascontiguousarray(stored.scales[:, i])
                layer.scales[:, tokens] = torch.from_numpy(scales).to(self.device)
        self.lengths[row] = stored.length
