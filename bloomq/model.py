"""BLOOM, once: embedding, blocks, and the last norm left to whichever head reads the result.

Source: transformers' modeling_bloom.py; docs/architecture.md lists the differences.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import CapacityError, NumericError, UsageError
from bloomq.layers import Backend, Cache, LayerNorm, Linear, Span, Step, X
from bloomq.lora import Adapters
from bloomq.weights import Norm, Weights

I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """A linear of a block, and beside it what adapters add; without any, the linear and no more."""

    name: str
    backend: Backend
    linear: Linear
    norm: Norm | None  # the linear's prologue, which `down` shares
    down: Linear | None = None
    up: Linear | None = None

    def adapted(self, adapters: Adapters) -> Projection:
        """The same linear, beside it what `adapters` have for it."""
        factors = adapters.low_rank(self.name)
        if factors is None:
            return replace(self, down=None, up=None)
        return replace(
            self, down=self.backend.linear(factors.down, norm=self.norm),
            up=self.backend.linear(factors.up),
        )  # fmt: skip

    def __call__(self, x: X, cache: Cache, span: Span, add: X | None = None) -> X:
        """x [M, K] -> [M, N]."""
        if self.down is None or self.up is None:
            return self.linear(x, add=add)
        ranks = self.backend.gate(self.down(x), cache, span)  # [M, ranks]
        return self.linear(x, add=add, delta=self.up(ranks))


class Block:
    """One transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Norms are prologues of the products that read them; or layers of their own where the config has
    residuals taken behind the norm.
    """

    def __init__(self, weights: Weights, backend: Backend, layer: int) -> None:
        self.backend = backend
        config, h = weights.config, f"h.{layer}"
        c, post = config.hidden_size, config.apply_residual_connection_post_layernorm

        def linear(name: str, n: int, norm: str | None = None, gelu: bool = False) -> Projection:
            prologue = None if norm is None or post else weights.norm(f"{h}.{norm}")
            bound = backend.linear(
                weights.matrix(f"{h}.{name}"),
                weights.vector(f"{h}.{name}.bias", n),
                norm=prologue,
                act="gelu" if gelu else None,
            )
            return Projection(f"{h}.{name}", backend, bound, prologue)

        def norm(name: str) -> LayerNorm:
            return backend.norm(weights.norm(f"{h}.{name}")) if post else _unchanged

        self.ln_1, self.ln_2 = norm("ln_1"), norm("ln_2")
        self.qkv = linear("attn.qkv", 3 * c, norm="ln_1")  # rows lie as [H, 3, D]
        self.attention = backend.attention(layer, config.n_head, config.head_dim)
        self.out = linear("attn.out", c)
        self.up = linear("mlp.up", 4 * c, norm="ln_2", gelu=True)
        self.down = linear("mlp.down", c)

    def adapted(self, adapters: Adapters) -> Block:
        """The same layers, with other adapters."""
        block = copy(self)
        block.qkv, block.out = self.qkv.adapted(adapters), self.out.adapted(adapters)
        block.up, block.down = self.up.adapted(adapters), self.down.adapted(adapters)
        return block

    def __call__(self, x: X, cache: Cache, span: Span, wanted: X | None = None) -> X:
        """x [M, C] -> [M, C], or of the tokens `wanted` [W] alone [W, C]: the others need no MLP.
        (With adapters they do, whose gates go by the span.)"""
        x = self.ln_1(x)
        mixed = self.attention(self.qkv(x, cache, span), cache, span)  # [M, C]
        x = self.out(mixed, cache, span, add=x)
        gated = self.up.down is not None or self.down.down is not None
        if wanted is not None and not gated:
            x = self.backend.take(x, wanted)
        x = self.ln_2(x)
        x = self.down(self.up(x, cache, span), cache, span, add=x)  # through [M, 4C]
        return self.backend.take(x, wanted) if wanted is not None and gated else x


def _unchanged(x: X) -> X:
    return x


class Transformer:
    """ids -> hidden states before the last norm, on one backend.

    The backend says how a step runs; the model says what it is. ranks: of its adapters, so many
    gates a row of its caches has.
    """

    def __init__(self, weights: Weights, backend: Backend) -> None:
        self.config = weights.config
        self.backend = backend
        self.ranks = 0
        self.wte = backend.embedding(weights.matrix("wte"))
        self.emb_ln = backend.norm(weights.norm("emb_ln"))
        self.blocks = [Block(weights, backend, i) for i in range(self.config.n_layer)]

    def adapted(self, adapters: Adapters) -> Transformer:
        """The same layers, with other adapters."""
        model = copy(self)
        model.ranks = adapters.ranks
        model.blocks = [block.adapted(adapters) for block in self.blocks]
        return model

    def compile(self, read: Callable[[X], X]) -> Step:
        """A step of this model that ends in read(hidden [W, C]), of the wanted tokens' states.

        Called with ids [M], cache, span and wanted; the cache then holds these tokens. Raises:
        UsageError for an id outside the vocabulary or a cache of other adapters, CapacityError
        where a row is full. The cache is as before if anything is raised, or (on JAX, which
        writes it in place) says at its next use that it was lost.
        """
        replay = self.backend.compile(
            lambda ids, cache, span, wanted: read(self._forward(ids, cache, span, wanted))
        )

        def step(ids: I64, cache: Cache, span: Span, wanted: I64) -> X:
            self._check(ids, cache, span)
            result = replay(ids, cache, span, wanted)
            cache.advance(span)
            return result

        return step

    def _forward(self, ids: X, cache: Cache, span: Span, wanted: X) -> X:
        x = self.emb_ln(self.wte(ids))  # [M, C]
        for block in self.blocks[:-1]:
            x = block(x, cache, span)
        return self.blocks[-1](x, cache, span, wanted)  # [W, C]

    def check_gates(self, cache: Cache) -> None:
        """Raises: UsageError for a cache made when other adapters were loaded: kernels read as many
        gates of each row as this model has ranks."""
        found = cache.gates.shape[1]
        if found != self.ranks:
            raise UsageError(
                f"the cache (past_key_values) is of a model with {found} ranks of adapters, this "
                f"one has {self.ranks}: after loading or unloading adapters, start a new one"
            )

    def _check(self, ids: I64, cache: Cache, span: Span) -> None:
        self.check_gates(cache)
        # Between two steps all caches are cold, and a call of NumPy's costs ten of Python's.
        tokens, vocab_size = ids.tolist(), self.config.vocab_size
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < vocab_size)
            raise UsageError(f"token id {wrong}, expected 0 to {vocab_size - 1}")
        lengths = cache.lengths[span.rows].tolist()
        counts = span.counts.tolist()
        most = max(length + count for length, count in zip(lengths, counts, strict=True))
        if most > cache.capacity:
            raise CapacityError(
                f"{most} tokens in a row, the cache holds {cache.capacity}: use a shorter prompt, "
                "fewer new tokens or a larger context"
            )

    def find_not_finite(self, ids: I64, cache: Cache, span: Span) -> NumericError:
        """Take back a step that the cache has counted and run it again, one layer at a time, to
        name the first whose output is not finite."""
        for row, count in zip(span.rows.tolist(), span.counts.tolist(), strict=True):
            cache.truncate(row, int(cache.lengths[row]) - count)
        x = self.emb_ln(self.wte(ids))
        name = "emb_ln"
        for i, block in enumerate(self.blocks):
            if not np.isfinite(self.backend.numpy(x)).all():
                break
            x, name = block(x, cache, span), f"h.{i}"
        if np.isfinite(self.backend.numpy(x)).all():
            name = "ln_f or the head"
        return NumericError(
            f"NaN or infinity after {name}: the checkpoint is damaged or overflows: run 'bloomq "
            'verify\', load with cache_dtype="f32", or convert with another scheme'
        )
