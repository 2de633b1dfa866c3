"""The NumPy reference: every layer in its plainest form, in float32. The oracle of the others.

`activations="int8"` rounds the activations of quantized linears as the integer kernels do, which
makes it their twin up to the order of float32 sums; "f32" is what the dequantized weights compute.
Matrices are restored to float32 at each call, so it is slow and needs no memory beyond one matrix.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bloomq.config import BloomConfig
from bloomq.layers import (
    STEP_TOKENS,
    Activation,
    Span,
    Step,
    Stored,
    Top,
    check_drop,
    slopes,
    zeros,
)
from bloomq.levels import Levels, Sums, levels_of, sums_of
from bloomq.schemes import F32, NF4_CODEBOOK, NF4_INT8_CODEBOOK, Scheme, round_up, untile_rows
from bloomq.weights import Matrix, Norm

I64 = NDArray[np.int64]


class ReferenceBackend:
    """`Backend` in NumPy."""

    name = "reference"
    step_tokens = STEP_TOKENS

    def __init__(self, activations: Literal["f32", "int8"] = "f32") -> None:
        self.activations = activations

    @property
    def description(self) -> str:
        return f"NumPy float32, {self.activations} activations"

    @property
    def arithmetic(self) -> str:
        return f"reference: {self.description}"

    def embedding(self, table: Matrix) -> Any:
        return table.rows

    def norm(self, norm: Norm) -> Any:
        return lambda x: layer_norm(x, norm)

    def linear(
        self,
        weight: Matrix,
        bias: F32 | None = None,
        *,
        norm: Norm | None = None,
        act: Activation | None = None,
        limbs: int = 1,
    ) -> ReferenceLinear:
        rounded = self.activations == "int8" and not weight.scheme.is_float
        return ReferenceLinear(weight, bias, norm, act, limbs if rounded else 0)

    def attention(
        self, layer: int, n_head: int, head_dim: int, *, slope: F32 | None = None
    ) -> ReferenceAttention:
        return ReferenceAttention(layer, n_head, head_dim, slope)

    def cache(
        self, config: BloomConfig, batch: int, capacity: int, ranks: int = 0
    ) -> ReferenceCache:
        return ReferenceCache(config, batch, capacity, ranks)

    def gate(self, x: F32, cache: ReferenceCache, span: Span) -> F32:
        return x * np.repeat(cache.gates[span.rows], span.counts, axis=0)

    def compile(self, step: Step) -> Step:
        return step

    def take(self, x: F32, index: I64) -> F32:
        return x[index]

    def survey(self, logits: F32) -> F32:
        return logits

    def top(self, logits: F32, k: int) -> Top:
        ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]
        scaled = logits.astype(np.float64)
        peak = scaled.max(axis=1)
        with np.errstate(invalid="ignore"):  # infinity less itself: the NaN is the answer
            logsumexp = peak + np.log(np.exp(scaled - peak[:, None]).sum(axis=1))
        return Top(ids, np.take_along_axis(logits, ids, axis=1), logsumexp)

    def best(self, logits: F32, k: int) -> tuple[I64, F32]:
        top = self.top(logits, k)
        return top.ids[0], top.logits[0]

    def masked(self, logits: F32, allowed: NDArray[np.bool_]) -> F32:
        return np.where(allowed, logits, np.float32(-np.inf))

    def sums(self, logits: F32, temperature: float = 1.0) -> Sums:
        return sums_of(logits[0], temperature)

    def levels(self, logits: F32, temperature: float = 1.0) -> Levels:
        return levels_of(logits[0], temperature)

    def numpy(self, x: F32) -> F32:
        return x


def layer_norm(x: F32, norm: Norm) -> F32:
    """(x - mean) / sqrt(variance + epsilon) * gain + bias, over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    y = centred / np.sqrt(variance + np.float32(norm.epsilon)) * norm.gain + norm.bias
    return np.asarray(y, np.float32)


def gelu(x: F32) -> F32:
    """BLOOM's tanh approximation, with its literal constants."""
    inner = np.float32(0.79788456) * x * (1 + np.float32(0.044715) * x * x)
    return np.asarray(x * np.float32(0.5) * (1 + np.tanh(inner)), np.float32)


def round_activations(x: F32, group: int, limbs: int = 1) -> F32:
    """x [M, K] as int8 codes with one scale a group of columns would restore it; two limbs: as
    these and 1/254 of the codes of what they leave."""
    m, k = x.shape
    padded = np.zeros((m, round_up(k, group)), np.float32)
    padded[:, :k] = x
    groups = padded.reshape(m, -1, group)
    peak = np.abs(groups).max(axis=2, keepdims=True)
    inverse = np.where(peak < 1e-30, 0, np.float32(127) / np.where(peak == 0, 1, peak))
    scaled = groups * inverse.astype(np.float32)
    codes = np.rint(scaled)
    if limbs == 2:
        codes += np.rint((scaled - codes) * np.float32(254)) / np.float32(254)
    restored = codes * (peak / np.float32(127))
    return np.asarray(restored.reshape(m, -1)[:, :k], np.float32)


def integer_weights(weight: Matrix) -> F32:
    """The weights that the integer kernels compute with: NF4's code book rounded to 1/127."""
    w = weight.dequantize()
    if weight.scheme.name != "nf4":
        return w
    scale = _nf4_scales(weight.parts["scales"], weight.shape, weight.scheme)
    index = np.abs(w[..., None] - scale[..., None] * NF4_CODEBOOK).argmin(axis=-1)
    return np.asarray(np.array(NF4_INT8_CODEBOOK, np.float32)[index] / 127 * scale, np.float32)


def _nf4_scales(scales: Any, shape: tuple[int, int], scheme: Scheme) -> F32:
    wide = np.repeat(untile_rows(scales).astype(np.float32), scheme.group_size, axis=1)
    return wide[: shape[0], : shape[1]]


class ReferenceLinear:
    """act(norm(x) @ W.T + bias + delta) + add."""

    def __init__(
        self,
        weight: Matrix,
        bias: F32 | None,
        norm: Norm | None,
        act: Activation | None,
        limbs: int,
    ) -> None:
        self._weight, self._bias, self._norm, self._act = weight, bias, norm, act
        self._limbs = limbs  # 0: activations stay as they are

    def __call__(self, x: F32, add: F32 | None = None, delta: F32 | None = None) -> F32:
        if self._norm is not None:
            x = layer_norm(x, self._norm)
        if self._limbs:
            x = round_activations(x, self._weight.scheme.group_size, self._limbs)
            y = x @ integer_weights(self._weight).T
        else:
            y = x @ self._weight.dequantize().T  # [M, N]
        if self._bias is not None:
            y = y + self._bias
        if delta is not None:
            y = y + delta
        if self._act == "gelu":
            y = gelu(y)
        return y if add is None else y + add


class ReferenceAttention:
    """Softmax over q . k / sqrt(D) + slope * key position, one row and head at a time."""

    def __init__(self, layer: int, n_head: int, head_dim: int, slope: F32 | None = None) -> None:
        self._layer, self._shape = layer, (n_head, 3, head_dim)
        self._slopes = slopes(n_head) if slope is None else slope

    def __call__(self, qkv: F32, cache: ReferenceCache, span: Span) -> F32:
        split = qkv.reshape(-1, *self._shape)  # [M, H, 3, D]
        out = np.empty((len(qkv), self._shape[0], self._shape[2]), np.float32)  # [M, H, D]
        for row, start, stop in zip(span.rows, span.starts[:-1], span.starts[1:], strict=True):
            past = int(cache.lengths[row])
            total = past + int(stop - start)
            keys, values = cache.data[:, self._layer, row, :total]  # [S, H, D]
            keys[past:], values[past:] = split[start:stop, :, 1], split[start:stop, :, 2]
            out[start:stop] = self._attend(split[start:stop, :, 0], keys, values, past)
        return out.reshape(len(qkv), -1)

    def _attend(self, q: F32, keys: F32, values: F32, past: int) -> F32:
        """q [T, H, D], keys and values [S, H, D] -> [T, H, D]."""
        scale = np.float32(1 / np.sqrt(self._shape[2]))
        scores = np.einsum("thd,shd->hts", q, keys) * scale  # [H, T, S]
        at = np.arange(len(keys))
        query_at = past + np.arange(len(q))
        distance = (at[None, :] - query_at[:, None]).astype(np.float32)  # [T, S], <= 0 if visible
        scores = scores + self._slopes[:, None, None] * distance
        scores = np.where(distance > 0, np.float32(-np.inf), scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.asarray(np.einsum("hts,shd->thd", weights, values), np.float32)


class ReferenceCache:
    """Keys and values: `data` [2, layer, B, S, H, D], float32."""

    def __init__(self, config: BloomConfig, batch: int, capacity: int, ranks: int) -> None:
        self.batch, self.capacity = batch, capacity
        self.lengths: I64 = np.zeros(batch, np.int64)
        self.gates: F32 = np.zeros((batch, ranks), np.float32)
        shape = (2, config.n_layer, batch, capacity, config.n_head, config.head_dim)
        self.data: F32 = zeros(shape, np.float32)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def paged(self) -> bool:
        return False

    @property
    def token_bytes(self) -> int:
        _, layers, _, _, n_head, head_dim = self.data.shape
        return int(2 * layers * n_head * head_dim * 4)

    def keys(self, layer: int, row: int, count: int) -> F32:
        return self.data[0, layer, row, :count]

    def grow(self, capacity: int, batch: int | None = None) -> None:
        capacity, batch = max(self.capacity, capacity), max(self.batch, batch or 0)
        if (capacity, batch) != (self.capacity, self.batch):
            old, places = self.data, self.data.shape
            self.data = zeros((*places[:2], batch, capacity, *places[4:]), np.float32)
            self.data[:, :, : self.batch, : self.capacity] = old
            more = batch - self.batch
            self.lengths = np.pad(self.lengths, (0, more))
            self.gates = np.pad(self.gates, ((0, more), (0, 0)))
            self.capacity, self.batch = capacity, batch

    def advance(self, span: Span) -> None:
        self.lengths[span.rows] += span.counts

    def truncate(self, row: int, length: int) -> None:
        self.lengths[row] = min(length, int(self.lengths[row]))

    def copy(self, source: int, target: int) -> None:
        self.data[:, :, target] = self.data[:, :, source]
        self.gates[target] = self.gates[source]
        self.lengths[target] = self.lengths[source]

    def drop(self, row: int, start: int, count: int) -> None:
        length = int(self.lengths[row])
        check_drop(length, start, count)
        kept = self.data[:, :, row, start + count : length].copy()
        self.data[:, :, row, start : length - count] = kept
        self.lengths[row] -= count

    def stored(self, row: int) -> Stored:
        keys, values = self.data[:, :, row, : self.lengths[row]].copy()  # [layer, S, H, D]
        return Stored(keys, values, np.zeros(0, np.float32))

    def restore(self, row: int, stored: Stored) -> None:
        layers, _, _, n_head, head_dim = self.data.shape[1:]
        stored.check((layers, n_head, head_dim), self.data.dtype, self.capacity)
        self.data[0, :, row, : stored.length] = stored.keys
        self.data[1, :, row, : stored.length] = stored.values
        self.lengths[row] = stored.length
