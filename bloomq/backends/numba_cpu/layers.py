"""The Numba backend: BLOOM's layers on the CPU, bound to mapped weights.

Kernels are compiled (or taken from the cache) when a layer is built, never on a call. Weights are
passed to them as addresses; each layer holds its arrays so that the addresses stay good.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.attention import attend
from bloomq.backends.numba_cpu.jit import best_tier, cpu_features
from bloomq.backends.numba_cpu.linear import float_linear, int_linear
from bloomq.backends.numba_cpu.norm import norm_rows
from bloomq.backends.numba_cpu.threads import entry, physical_cores, start_threads
from bloomq.backends.numba_cpu.top import top_rows
from bloomq.config import BloomConfig
from bloomq.errors import UsageError
from bloomq.layers import Activation, CacheDtype, Span, Step, Top, slopes, zeros
from bloomq.schemes import round_up
from bloomq.weights import Matrix, Norm

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
_NO_VECTOR = np.zeros(0, np.float32)
_NO_MATRIX = np.zeros((0, 0), np.float32)


class NumbaBackend:
    """`Backend` for CPUs. `threads` None: one for each physical core this process may use.

    Raises: UsageError for an impossible number of threads, BackendError without a threading layer.
    """

    name = "numba"

    def __init__(self, threads: int | None = None, cache_dtype: CacheDtype = "f16") -> None:
        most = int(numba.config.NUMBA_NUM_THREADS)
        self.threads = min(physical_cores(), most) if threads is None else threads
        whole = isinstance(self.threads, int) and not isinstance(self.threads, bool)
        if not whole or not 1 <= self.threads <= most:
            raise UsageError(f"threads is {threads!r}, expected 1 to {most} (this machine's cores)")
        self.tier = best_tier(cpu_features())
        self.threading_layer = start_threads(self.threads)
        self.cache_dtype: CacheDtype = cache_dtype
        self._top_rows = entry(top_rows(self.tier))

    @property
    def description(self) -> str:
        count = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.tier}, {count} ({self.threading_layer}), {self.cache_dtype} cache"

    def embedding(self, table: Matrix, norm: Norm) -> NumbaEmbedding:
        return NumbaEmbedding(table, norm)

    def linear(
        self,
        weight: Matrix,
        bias: F32 | None = None,
        *,
        norm: Norm | None = None,
        act: Activation | None = None,
    ) -> NumbaLinear:
        return NumbaLinear(self, weight, bias, norm, act)

    def attention(self, layer: int, n_head: int, head_dim: int) -> NumbaAttention:
        return NumbaAttention(self, layer, n_head, head_dim)

    def cache(self, config: BloomConfig, batch: int, capacity: int) -> NumbaCache:
        return NumbaCache(config, batch, capacity, self.cache_dtype)

    def compile(self, step: Step) -> Step:
        def run(ids: I64, cache: Any, span: Span) -> Any:
            numba.set_num_threads(self.threads)  # Numba's setting is the calling thread's own
            return step(ids, cache, span)

        return run

    def take(self, x: F32, index: I64) -> F32:
        return x[index]

    def top(self, logits: F32, k: int, temperature: float = 1.0) -> Top:
        batch = logits.shape[0]
        values, ids = np.empty((batch, k), np.float32), np.empty((batch, k), np.int64)
        logsumexp = np.empty(batch, np.float64)
        self._top_rows(logits, float(temperature), values, ids, logsumexp)
        return Top(ids, values, logsumexp)

    def numpy(self, x: F32) -> F32:
        return x


class NumbaLinear:
    """y = act(norm(x) @ W.T + bias) + add over one mapped matrix."""

    def __init__(
        self,
        backend: NumbaBackend,
        weight: Matrix,
        bias: F32 | None,
        norm: Norm | None,
        act: Activation | None,
    ) -> None:
        scheme = weight.scheme
        build = float_linear if scheme.is_float else int_linear
        self._kernel = entry(build(scheme.name, scheme.group_size, backend.tier))
        self._n = weight.shape[0]
        stored_n, self._k = scheme.padded(weight.shape)
        parts = list(weight.parts.values())  # codes and scales, or values alone
        first, last = parts[0], parts[-1]
        padded_bias = None if bias is None else _padded(bias, stored_n)
        self._alive = (first, last, padded_bias)  # what the addresses below point into
        self._codes, self._scales = first.ctypes.data, last.ctypes.data
        self._bias = 0 if padded_bias is None else padded_bias.ctypes.data
        self._gain = _NO_VECTOR if norm is None else _padded(norm.gain, len(norm.gain))
        self._shift = _NO_VECTOR if norm is None else _padded(norm.bias, len(norm.bias))
        self._epsilon = np.float32(0 if norm is None else norm.epsilon)
        self._gelu = int(act == "gelu")
        self._threads = backend.threads

    def __call__(self, x: F32, add: F32 | None = None) -> F32:
        y = np.empty((x.shape[0], self._n), np.float32)
        if not len(x):  # the kernels read at least one row
            return y
        self._kernel(
            x, self._gain, self._shift, self._epsilon, self._n, self._k, self._codes, self._scales,
            self._bias, self._gelu, _NO_MATRIX if add is None else add, y, self._threads,
        )  # fmt: skip
        return y


class NumbaEmbedding:
    """norm(table[ids]): the rows are restored in NumPy, the norm is compiled."""

    def __init__(self, table: Matrix, norm: Norm) -> None:
        self._table = table
        self._gain, self._shift = (
            _padded(norm.gain, len(norm.gain)),
            _padded(norm.bias, len(norm.bias)),
        )
        self._epsilon = np.float32(norm.epsilon)
        self._norm_rows = entry(norm_rows())

    def __call__(self, ids: I64) -> F32:
        rows = np.ascontiguousarray(self._table.rows(ids))
        out = np.empty_like(rows)
        self._norm_rows(rows, self._gain, self._shift, self._epsilon, out)
        return out


class NumbaAttention:
    """ALiBi attention of one layer."""

    def __init__(self, backend: NumbaBackend, layer: int, n_head: int, head_dim: int) -> None:
        self._layer, self._head_dim = layer, head_dim
        self._slopes = slopes(n_head)
        self._kernel = entry(attend(backend.cache_dtype, _width(head_dim), backend.tier))
        self._threads = backend.threads

    def __call__(self, qkv: F32, cache: NumbaCache, span: Span) -> F32:
        out = np.empty((qkv.shape[0], len(self._slopes) * self._head_dim), np.float32)
        self._kernel(
            qkv, cache.key_address(self._layer), cache.value_address(self._layer),
            cache.row_stride, span.rows, span.starts, cache.lengths[span.rows], self._slopes,
            self._head_dim, cache.capacity, out, self._threads,
        )  # fmt: skip
        return out


class NumbaCache:
    """Keys [layer, B, H, S/16, D, 16] and values [layer, B, H, S, D], as `attend` reads them.

    Memory comes from the system as it is first touched.
    """

    def __init__(self, config: BloomConfig, batch: int, capacity: int, dtype: CacheDtype) -> None:
        self.batch = batch
        self.capacity = round_up(capacity, 16)
        self.lengths: I64 = np.zeros(batch, np.int64)
        self.row_stride = config.n_head * self.capacity * _width(config.head_dim)
        shape = (2, config.n_layer, batch, self.row_stride)
        self._data = zeros(shape, np.float32 if dtype == "f32" else np.uint16)

    @property
    def nbytes(self) -> int:
        return int(self._data.nbytes)

    def key_address(self, layer: int) -> int:
        return int(self._data[0, layer].ctypes.data)

    def value_address(self, layer: int) -> int:
        return int(self._data[1, layer].ctypes.data)

    def advance(self, span: Span) -> None:
        self.lengths[span.rows] += span.counts

    def truncate(self, row: int, length: int) -> None:
        self.lengths[row] = min(length, int(self.lengths[row]))

    def copy(self, source: int, target: int) -> None:
        self._data[:, :, target] = self._data[:, :, source]
        self.lengths[target] = self.lengths[source]


def _width(head_dim: int) -> int:
    """head_dim as the cache pads it."""
    return round_up(head_dim, 16)


def _padded(vector: F32, length: int) -> F32:
    """A private float32 copy of a vector, with zeros up to `length`."""
    out = np.zeros(length, np.float32)
    out[: len(vector)] = vector
    return out
