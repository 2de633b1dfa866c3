"""`Backend` in JAX: products with weights restored on the way, norms, embedding, the best tokens.

Layers are functions over the arrays they were built with; `jax.jit` compiles each of the few kinds
once for a shape, wherever it is called from.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bloomq.backends.jax.attention import JaxCache, attention
from bloomq.backends.jax.restore import Parts, picked, placed, whole
from bloomq.backends.jax.steps import in_few_shapes
from bloomq.config import BloomConfig
from bloomq.layers import (
    STEP_TOKENS,
    Activation,
    Attention,
    Embedding,
    LayerNorm,
    Linear,
    Span,
    Step,
    Top,
)
from bloomq.levels import Levels, Sums, levels_of, sums_of
from bloomq.schemes import Scheme
from bloomq.weights import Matrix, Norm

Array = jax.Array
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


class JaxBackend:
    """`Backend` over jax arrays; calls take NumPy's too."""

    name = "jax"
    step_tokens = STEP_TOKENS

    @property
    def description(self) -> str:
        device = jax.devices()[0]
        return f"JAX {jax.__version__}, {device.platform} ({device.device_kind}), float32"

    @property
    def arithmetic(self) -> str:
        return f"jax: {self.description}"

    def embedding(self, table: Matrix) -> Embedding:
        read = partial(_look_up, _placed_parts(table), scheme=table.scheme, shape=table.shape)
        return lambda ids: read(jnp.asarray(ids, jnp.int32))

    def norm(self, norm: Norm) -> LayerNorm:
        gain, bias = placed(norm.gain), placed(norm.bias)
        return lambda x: layer_norm(x, gain, bias, epsilon=norm.epsilon)

    def linear(
        self,
        weight: Matrix,
        bias: F32 | None = None,
        *,
        norm: Norm | None = None,
        act: Activation | None = None,
        limbs: int = 1,
    ) -> Linear:
        parts = _placed_parts(weight)
        shift = None if bias is None else placed(bias)
        before = None if norm is None else (placed(norm.gain), placed(norm.bias))

        def call(x: Any, add: Any | None = None, delta: Any | None = None) -> Array:
            y: Array = product(
                x, parts, shift, before, add, delta, scheme=weight.scheme, shape=weight.shape,
                epsilon=0.0 if norm is None else norm.epsilon, act=act,
            )  # fmt: skip
            return y

        return call

    def attention(
        self, layer: int, n_head: int, head_dim: int, *, slope: F32 | None = None
    ) -> Attention:
        return attention(layer, n_head, head_dim, slope)

    def cache(self, config: BloomConfig, batch: int, capacity: int, ranks: int = 0) -> JaxCache:
        return JaxCache(config, batch, capacity, ranks)

    def gate(self, x: Any, cache: Any, span: Span) -> Array:
        gated: Array = jnp.asarray(x) * cache.token_gates(span)
        return gated

    def compile(self, step: Step) -> Step:
        return in_few_shapes(step)

    def take(self, x: Any, index: Any) -> Array:
        rows: Array = jnp.asarray(x)[index]
        return rows

    def survey(self, logits: Any) -> Any:
        return logits

    def top(self, logits: Any, k: int) -> Top:
        """The sum is NumPy's: 250,880 terms in float32 may lose more than 1e-6."""
        best, ids = _best(jnp.asarray(logits), k=min(k, logits.shape[1]))
        scaled = np.asarray(logits).astype(np.float64)
        peak = scaled.max(axis=1)
        with np.errstate(invalid="ignore"):  # infinity less itself: the NaN is the answer
            total = np.exp(scaled - peak[:, None]).sum(axis=1)
        return Top(np.asarray(ids).astype(np.int64), np.asarray(best), peak + np.log(total))

    def best(self, logits: Any, k: int) -> tuple[I64, F32]:
        best, ids = _best(jnp.asarray(logits), k=min(k, logits.shape[1]))
        return np.asarray(ids[0]).astype(np.int64), np.asarray(best[0])

    def masked(self, logits: Any, allowed: NDArray[np.bool_]) -> Array:
        return jnp.where(allowed, jnp.asarray(logits), -jnp.inf)

    def sums(self, logits: Any, temperature: float = 1.0) -> Sums:
        return sums_of(np.asarray(logits)[0], temperature)

    def levels(self, logits: Any, temperature: float = 1.0) -> Levels:
        return levels_of(np.asarray(logits)[0], temperature)

    def numpy(self, x: Any) -> F32:
        return np.asarray(x, np.float32)


def _placed_parts(matrix: Matrix) -> Parts:
    return {name: placed(part) for name, part in matrix.parts.items()}


@partial(jax.jit, static_argnames=("scheme", "shape"))
def _look_up(parts: Parts, ids: Array, *, scheme: Scheme, shape: tuple[int, int]) -> Array:
    return picked(parts, scheme, shape, ids)


@partial(jax.jit, static_argnames=("epsilon",))
def layer_norm(x: Array, gain: Array, bias: Array, *, epsilon: float) -> Array:
    """(x - mean) / sqrt(variance + epsilon) * gain + bias, over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt(variance + epsilon) * gain + bias


def gelu(x: Array) -> Array:
    """BLOOM's tanh approximation, with its literal constants."""
    return x * 0.5 * (1 + jnp.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


@partial(jax.jit, static_argnames=("scheme", "shape", "epsilon", "act"))
def product(
    x: Array,
    parts: Parts,
    bias: Array | None,
    norm: tuple[Array, Array] | None,
    add: Array | None,
    delta: Array | None,
    *,
    scheme: Scheme,
    shape: tuple[int, int],
    epsilon: float,
    act: Activation | None,
) -> Array:
    """act(norm(x) @ W.T + bias + delta) + add, [M, K] -> [M, N]."""
    if norm is not None:
        x = layer_norm(x, *norm, epsilon=epsilon)
    # HIGHEST: float32 on devices that would round to TF32 or bfloat16
    y = jnp.matmul(x, whole(parts, scheme, shape).T, precision=jax.lax.Precision.HIGHEST)
    if bias is not None:
        y = y + bias
    if delta is not None:
        y = y + delta
    if act == "gelu":
        y = gelu(y)
    return y if add is None else y + add


@partial(jax.jit, static_argnames=("k",))
def _best(logits: Array, *, k: int) -> tuple[Array, Array]:
    """Values and ids [B, k] of the k largest of each row, of equals the lower id first.

    `top_k` does that too, but for it -0 is less than 0.
    """
    _, ids = jax.lax.top_k(jnp.where(logits == 0, 0, logits), k)
    return jnp.take_along_axis(logits, ids, axis=1), ids
