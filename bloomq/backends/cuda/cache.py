"""The memory of keys and values on a device.

Invariant: buffers stay where they are until the cache grows, and what was recorded over them is
dropped before that. Lengths and gates are NumPy's, on the host: a step is told of them by what is
copied to the device before it runs, so nothing within it waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

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
FAINT = 1e-30  # largest component of a vector that int8 holds as zeros: 127 / it is finite


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer's keys and values in slots: token t of row r lies in slot r * capacity + t, and the
    last slot is nobody's, for what padding writes.

    codes: [2, slots, H, D], keys and then values, float32, float16 or int8; scales: float32
    [2, slots, H], what int8 codes are multiplied with, of size 0 for others. by_triton: may
    Triton's kernel read them?
    """

    codes: torch.Tensor
    scales: torch.Tensor
    by_triton: bool = False

    def store(self, slots: torch.Tensor, vectors: torch.Tensor) -> None:
        """Keys and values [2, M, H, D] into slots [M]; int8 rounded half to even, with the scale
        peak / 127 for each vector."""
        if self.codes.dtype == torch.int8:
            wide = vectors.float()
            peak = wide.abs().amax(dim=-1, keepdim=True)  # [2, M, H, 1]
            faint = peak < FAINT
            vectors = torch.round(wide * (127 / peak).masked_fill(faint, 0))
            self.scales.index_copy_(1, slots, (peak / 127).masked_fill(faint, 0)[..., 0])
        self.codes.index_copy_(1, slots, vectors.to(self.codes.dtype))

    def restored(self, codes: torch.Tensor, scales: torch.Tensor, to: torch.dtype) -> torch.Tensor:
        """Parts of both, [..., H, D] and [..., H], as numbers [..., H, D]."""
        if not self.scales.numel():
            return codes.to(to)
        return (codes.float() * scales[..., None]).to(to)


def by_row(part: torch.Tensor, batch: int, capacity: int) -> torch.Tensor:
    """A view of a buffer [2, slots, ...] as [2, batch, capacity, ...]."""
    return part[:, :-1].view(2, batch, capacity, *part.shape[2:])


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
        self._head = (config.n_head, config.head_dim)
        self.layers = self._buffers(config.n_layer, batch, capacity)
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
        return self._layer_token_bytes * len(self.layers)

    @property
    def _layer_token_bytes(self) -> int:
        n_head, head_dim = self._head
        scale_bytes = 4 if self.dtype == "int8" else 0
        return 2 * n_head * (head_dim * np.dtype(ELEMENTS[self.dtype][1]).itemsize + scale_bytes)

    def _buffers(self, n_layer: int, batch: int, capacity: int) -> list[Layer]:
        """Raises: CapacityError where there is no such memory."""
        total_bytes = n_layer * (batch * capacity + 1) * self._layer_token_bytes
        try:
            if total_bytes > ADDRESSABLE_BYTES:
                raise MemoryError
            shape = (2, batch * capacity + 1, *self._head)
            scales = shape[:3] if self.dtype == "int8" else (0,)
            return [
                Layer(self._empty(shape, self.dtype), self._empty(scales, "f32"), self._by_triton)
                for _ in range(n_layer)
            ]
        except (torch.cuda.OutOfMemoryError, MemoryError, CapacityError):
            pass  # outside, so that the traceback does not keep what there was memory for
        where = "" if self.device.type == "cpu" else f" on {self.device}"
        raise CapacityError(
            f"no memory for a cache of {total_bytes / 1e9:.1f} GB{where}: ask for fewer tokens or "
            "rows"
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
        parts = [part for layer in self.layers for part in (layer.codes, layer.scales)]
        return [part for part in parts if part.numel()]

    def grow(self, capacity: int, batch: int | None = None) -> None:
        capacity, batch = max(self.capacity, capacity), max(self.batch, batch or 0)
        if (capacity, batch) == (self.capacity, self.batch):
            return
        before = self._parts()
        self.recorded.clear()  # first: what they have for work space may be what is missing
        self._known = None
        self.layers = self._buffers(len(self.layers), batch, capacity)
        for old, new in zip(before, self._parts(), strict=True):
            source = by_row(old, self.batch, self.capacity)
            by_row(new, batch, capacity)[:, : self.batch, : self.capacity] = source
        more = batch - self.batch
        self.lengths = np.pad(self.lengths, (0, more))
        self.gates = np.pad(self.gates, ((0, more), (0, 0)))
        self.capacity, self.batch = capacity, batch

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
