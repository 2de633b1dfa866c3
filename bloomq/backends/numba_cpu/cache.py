"""The memory of keys and values, as the attention kernels read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.attention import CHUNK
from bloomq.backends.numba_cpu.program import Program
from bloomq.config import BloomConfig
from bloomq.layers import CacheDtype, Span, zeros
from bloomq.schemes import round_up

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
BOUND = 11  # inputs of a program that `NumbaCache.bind` writes


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """Arrays that belong together, for `capacity` tokens a row."""

    capacity: int
    data: NDArray[Any]  # keys, then values
    scales: F32
    key_lengths: F32

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        return self.data, self.scales, self.key_lengths


class NumbaCache:
    """Keys [layer, B, H, S/16, D, 16] and values [layer, B, H, S, D], as `attend` reads them.

    int8: with a float32 scale for each. `key_lengths` [layer, B, H, S/256]: the largest |k| of each
    chunk. Memory comes from the system as it is first touched, and is exchanged as a whole: what a
    program was told of it stays true while it runs, and a cache that cannot grow is as before.
    """

    def __init__(
        self, config: BloomConfig, batch: int, capacity: int, dtype: CacheDtype, ranks: int = 0
    ) -> None:
        self.batch, self.dtype = batch, dtype
        self.lengths: I64 = np.zeros(batch, np.int64)
        self.gates: F32 = np.zeros((batch, ranks), np.float32)
        self._places = (config.n_layer, batch, config.n_head)
        self._head_dim = config.head_dim
        self.memory = self._allocated(capacity)

    def _allocated(self, capacity: int) -> Memory:
        capacity = round_up(capacity, 64)  # keys are scored up to 64 at a time
        width, scaled = padded_head(self._head_dim), self.dtype == "int8"
        return Memory(
            capacity, zeros((2, *self._places, capacity * width), _ELEMENTS[self.dtype]),
            zeros((2, *self._places, capacity if scaled else 0), np.float32),
            zeros((*self._places, -(-capacity // CHUNK)), np.float32),
        )  # fmt: skip

    @property
    def capacity(self) -> int:
        return self.memory.capacity

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.memory.arrays)

    def keys(self, layer: int, row: int, count: int) -> F32:
        memory, n_head = self.memory, self._places[2]
        tiles, width = -(-count // 16), padded_head(self._head_dim)
        stored = memory.data[0, layer, row].reshape(n_head, -1, width, 16)[:, :tiles]
        keys = np.moveaxis(stored, 3, 2).reshape(n_head, -1, width)  # [H, S, D]
        keys = keys[:, :count, : self._head_dim].astype(np.float32)
        if self.dtype == "int8":
            keys *= memory.scales[0, layer, row, :, :count, None]
        return np.asarray(keys.transpose(1, 0, 2), np.float32)

    def grow(self, capacity: int) -> None:
        if capacity > self.capacity:
            larger = self._allocated(capacity)
            for before, now in zip(self.memory.arrays, larger.arrays, strict=True):
                now[..., : before.shape[-1]] = before  # positions lie outermost in a head's memory
            self.memory = larger

    def bind(self, program: Program, span: Span, *others: I64) -> None:
        """Tell a program where this cache lies and what a step does to it; the program holds these
        arrays, and `others`, while it runs. The first inputs are, in this order: addresses of the
        data, the scales and the key lengths; heads of a layer, capacity, heads of all layers; rows
        of the step, and addresses of their numbers, starts and past lengths; the gates' address."""
        memory = self.memory
        tokens = int(self.lengths[span.rows].sum() + span.starts[-1])
        program.cache_bytes = tokens * self.nbytes // (self.batch * memory.capacity)
        heads = self.batch * self._places[2]
        held = [np.ascontiguousarray(a) for a in (span.rows, span.starts, self.lengths[span.rows])]
        inputs = (
            *(array.ctypes.data for array in memory.arrays), heads, memory.capacity,
            heads * self._places[0], len(span.rows), *(array.ctypes.data for array in held),
            self.gates.ctypes.data,
        )  # fmt: skip
        program.inputs[: len(inputs)] = inputs
        program.held = (memory, self.gates, *held, *others)

    def advance(self, span: Span) -> None:
        self.lengths[span.rows] += span.counts

    def truncate(self, row: int, length: int) -> None:
        self.lengths[row] = min(length, int(self.lengths[row]))

    def copy(self, source: int, target: int) -> None:
        memory = self.memory
        memory.data[:, :, target] = memory.data[:, :, source]
        memory.scales[:, :, target] = memory.scales[:, :, source]
        memory.key_lengths[:, target] = memory.key_lengths[:, source]
        self.gates[target] = self.gates[source]
        self.lengths[target] = self.lengths[source]


_ELEMENTS: dict[str, type[np.generic]] = {"f32": np.float32, "f16": np.float16, "int8": np.int8}


def padded_head(head_dim: int) -> int:
    """head_dim as the cache pads it."""
    return round_up(head_dim, 16)
