"""Attention in JAX: the softmax, the cache, and the ragged steps of the layer interface.

Invariant: a layer's attention only says what the queries, keys and values are; whoever is its cache
decides who sees whom. `JaxCache` is one such, `steps.Frame` lends it to a padded step, and
`dense.Columns` is a padded batch of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bloomq.config import BloomConfig
from bloomq.errors import BackendError, CapacityError
from bloomq.layers import Attention, Span, Stored, check_drop, slopes

Array = jax.Array
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
KeyValue = tuple[Array, Array]  # of a layer: keys and values, each [B, S, H, D]
LEAST_KEYS = 256  # that a step looks at: every doubling from here is a step to compile
LEAST_CAPACITY = 64
ADDRESSABLE_BYTES = 1 << 47  # of a process on x86-64; XLA aborts it for sizes beyond 63 bits


class Attended(Protocol):
    """What a layer's attention is given as its cache."""

    def attend(self, layer: int, q: Array, k: Array, v: Array, slope: Array, span: Span) -> Array:
        """Queries, keys and values of the new tokens, [M, H, D] -> [M, H, D]; the keys and values
        are stored."""
        ...


def attention(layer: int, n_head: int, head_dim: int, given: F32 | None = None) -> Attention:
    slope = jnp.asarray(slopes(n_head) if given is None else given)

    def call(qkv: Any, cache: Attended, span: Span) -> Array:
        split = jnp.reshape(qkv, (-1, n_head, 3, head_dim))
        q, k, v = split[:, :, 0], split[:, :, 1], split[:, :, 2]  # [M, H, D]
        return cache.attend(layer, q, k, v, slope, span).reshape(-1, n_head * head_dim)

    return call


def mix(
    q: Array, keys: Array, values: Array, slope: Array, distance: Array, visible: Array
) -> tuple[Array, Array]:
    """softmax(q . k / sqrt(D) + slope * distance) @ v over the visible keys; 0 if there are none.

    q [B, T, H, D], keys and values [B, S, H, D], slope [H], distance (key position - query
    position) and visible [B, T, S] -> ([B, T, H, D], weights [B, H, T, S]).
    """
    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)  # no TF32, no bfloat16
    scores = exact("bthd,bshd->bhts", q, keys) * np.float32(1 / math.sqrt(q.shape[-1]))
    scores = scores + slope[:, None, None] * distance[:, None].astype(jnp.float32)
    # Softmax written out, so that a score of -inf is not taken for a hidden one, and that a query
    # which sees nothing is not NaN, nor its gradient.
    seen = visible[:, None]  # [B, 1, T, S]
    sees = seen.any(axis=-1, keepdims=True)
    peak = jnp.max(scores, axis=-1, keepdims=True, where=seen, initial=-jnp.inf)
    shifted = scores - jax.lax.stop_gradient(jnp.where(sees, peak, 0))
    powers = jnp.where(seen, jnp.exp(jnp.where(seen, shifted, 0)), 0)
    weights = powers / jnp.where(sees, powers.sum(axis=-1, keepdims=True), 1)  # [B, H, T, S]
    return exact("bhts,bshd->bthd", weights, values), weights


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("rows", "past", "total", "row", "at"), meta_fields=("longest", "reach"),
)  # fmt: skip
@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where the tokens of a step lie: m is token at[m] of block row[m].

    A row's new tokens are cut into blocks of at most T, so that a long row among short ones does
    not make every row as long: of M tokens in R rows at most 5/4 R blocks, with T <= 4 M / R, thus
    scores for 5 M queries, and keys of a quarter more rows than there are.

    rows, past, total: int32 [R]: a block's row in the cache, the tokens there before the block, and
    after the step; row, at: int32 [M]; longest: T; reach: how many keys are looked at, S.
    Padding: rows beyond the cache's, and tokens of a block beyond R. What they store is dropped.
    """

    rows: Any  # NumPy's or jax's, or tracers
    past: Any
    total: Any
    row: Any
    at: Any
    longest: int
    reach: int

    @classmethod
    def of(cls, span: Span, cache: JaxCache, room: Callable[[int], int]) -> Places:
        """room(n) >= n: the size that n tokens, rows or keys are padded to."""
        counts, past = span.counts, cache.lengths[span.rows]
        total = past + counts
        tokens, rows = room(int(span.starts[-1])), room(len(span.rows))
        longest = min(room(int(counts.max())), -(-4 * tokens // rows))
        blocks = -(-counts // longest)  # of each row, [rows]
        first = np.cumsum(blocks) - blocks
        if blocks.max() > 1:
            rows += rows // 4  # (n - 1) // T more of n tokens, with T >= 4 M / R
        number = np.repeat(np.arange(len(blocks)), blocks)  # whose a block is
        before = longest * (np.arange(len(number)) - first[number])  # of its row's new tokens
        at = np.arange(span.starts[-1]) - np.repeat(span.starts[:-1], counts)
        return cls(
            padded(span.rows[number], rows, cache.batch), padded(past[number] + before, rows),
            padded(total[number], rows),
            padded(np.repeat(first, counts) + at // longest, tokens, rows),
            padded(at % longest, tokens), longest=longest,
            reach=min(cache.capacity, room(max(int(total.max()), LEAST_KEYS))),
        )  # fmt: skip


def padded(values: I64, size: int, filler: int = 0) -> I32:
    """values [n] -> int32 [size]."""
    out = np.full(size, filler, np.int32)
    out[: len(values)] = values
    return out


@partial(jax.jit, donate_argnums=0)  # the cache is written where it lies
def ragged(
    stored: KeyValue, q: Array, k: Array, v: Array, slope: Array, places: Places
) -> tuple[KeyValue, Array]:
    """A layer's keys and values with the new ones [M, H, D] stored, and what the queries get,
    [M, H, D]. Each block's queries meet its row's keys as [T, S]."""
    keys, values = stored
    rows, past, row, at = places.rows, places.past, places.row, places.at
    target = rows.at[row].get(mode="fill", fill_value=len(keys))  # [M]
    slot = past.at[row].get(mode="clip") + at  # [M]
    keys = keys.at[target, slot].set(k, mode="drop")
    values = values.at[target, slot].set(v, mode="drop")
    query = jnp.zeros((len(rows), places.longest, *q.shape[1:])).at[row, at].set(q, mode="drop")
    key_at, query_at = jnp.arange(places.reach), past[:, None] + jnp.arange(places.longest)
    distance = key_at - query_at[:, :, None]  # [R, T, S]
    # What a longer text has left behind, NaN perhaps, is not weighed with 0 but is 0.
    held = (key_at < places.total[:, None])[:, :, None, None]  # [R, S, 1, 1]
    seen = [x[:, : places.reach].at[rows].get(mode="clip") for x in (keys, values)]
    mixed, _ = mix(query, seen[0], jnp.where(held, seen[1], 0), slope, distance, distance <= 0)
    return (keys, values), mixed.at[row, at].get(mode="clip")


class JaxCache:
    """Keys and values: of each layer two arrays [B, S, H, D], float32, replaced as they change.

    What replaces them takes their memory, and what interrupts it in between (Ctrl-C, no memory)
    leaves neither: a cache that was lost so says so when it is next used.

    `lengths` and `gates` are NumPy's: who decides by them is not traced.
    """

    def __init__(self, config: BloomConfig, batch: int, capacity: int, ranks: int) -> None:
        self.batch, self.capacity = batch, _rounded(capacity)
        self.lengths: I64 = np.zeros(batch, np.int64)
        self.gates: F32 = np.zeros((batch, ranks), np.float32)
        self.layers = empty(config, batch, self.capacity)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in layer)

    @property
    def paged(self) -> bool:
        return False

    @property
    def token_bytes(self) -> int:
        return self.nbytes // (self.batch * self.capacity)

    def keys(self, layer: int, row: int, count: int) -> F32:
        self.check_kept()
        return np.asarray(self.layers[layer][0][row])[:count]

    def check_kept(self) -> None:
        """Raises: BackendError where an interruption has taken the arrays."""
        if any(part.is_deleted() for layer in self.layers for part in layer):
            raise BackendError(
                "the cache (past_key_values) was lost when a step on it was interrupted: start a "
                "new one"
            )

    def attend(self, layer: int, q: Array, k: Array, v: Array, slope: Array, span: Span) -> Array:
        self.check_kept()
        places = Places.of(span, self, room=lambda n: n)
        mixed: Array
        self.layers[layer], mixed = ragged(self.layers[layer], q, k, v, slope, places)
        return mixed

    def token_gates(self, span: Span) -> F32:
        """The gates of the row that each token belongs to, [M, ranks]."""
        return np.repeat(self.gates[span.rows], span.counts, axis=0)

    def grow(self, capacity: int, batch: int | None = None) -> None:
        self.check_kept()
        larger, batch = max(self.capacity, _rounded(capacity)), max(self.batch, batch or 0)
        if (larger, batch) != (self.capacity, self.batch):
            more = batch - self.batch
            room = ((0, more), (0, larger - self.capacity), (0, 0), (0, 0))
            self.layers = _allocated(
                lambda: [(jnp.pad(k, room), jnp.pad(v, room)) for k, v in self.layers],
                self.token_bytes * batch * larger,
            )
            self.lengths = np.pad(self.lengths, (0, more))
            self.gates = np.pad(self.gates, ((0, more), (0, 0)))
            self.capacity, self.batch = larger, batch

    def advance(self, span: Span) -> None:
        self.lengths[span.rows] += span.counts

    def truncate(self, row: int, length: int) -> None:
        self.lengths[row] = min(length, int(self.lengths[row]))

    def copy(self, source: int, target: int) -> None:
        self.check_kept()
        self.layers = _with_row_copied(self.layers, source, target)
        self.gates[target] = self.gates[source]
        self.lengths[target] = self.lengths[source]

    def drop(self, row: int, start: int, count: int) -> None:
        self.check_kept()
        check_drop(int(self.lengths[row]), start, count)
        self.layers = _with_tokens_dropped(self.layers, row, start, count)
        self.lengths[row] -= count

    def stored(self, row: int) -> Stored:
        self.check_kept()
        length = int(self.lengths[row])
        keys, values = (
            np.stack([np.asarray(part[row])[:length] for part in parts])
            for parts in zip(*self.layers, strict=True)
        )
        return Stored(keys, values, np.zeros(0, np.float32))

    def restore(self, row: int, stored: Stored) -> None:
        self.check_kept()
        _, _, n_head, head_dim = self.layers[0][0].shape
        places = (len(self.layers), n_head, head_dim)
        stored.check(places, np.dtype(np.float32), self.capacity)
        rest = ((0, 0), (0, self.capacity - stored.length), (0, 0), (0, 0))
        keys, values = np.pad(stored.keys, rest), np.pad(stored.values, rest)
        self.layers = _with_row_set(self.layers, row, keys, values)
        self.lengths[row] = stored.length


def _rounded(capacity: int) -> int:
    """The power of two from there on, so that caches of different texts share what is compiled."""
    return 1 << (max(capacity, LEAST_CAPACITY) - 1).bit_length()


@partial(jax.jit, donate_argnums=0)
def _with_row_copied(layers: list[KeyValue], source: int, target: int) -> list[KeyValue]:
    """Row `target` as row `source`; which they are is no part of what is compiled."""
    return [(k.at[target].set(k[source]), v.at[target].set(v[source])) for k, v in layers]


@partial(jax.jit, donate_argnums=0)
def _with_tokens_dropped(
    layers: list[KeyValue], row: int, start: int, count: int
) -> list[KeyValue]:
    """Row `row` without tokens from `start` on; those behind them move down."""

    def moved(part: Array) -> Array:
        at = jnp.arange(part.shape[1])
        return part.at[row].set(part[row, jnp.where(at < start, at, at + count)])

    return [(moved(k), moved(v)) for k, v in layers]


@partial(jax.jit, donate_argnums=0)
def _with_row_set(layers: list[KeyValue], row: int, keys: Array, values: Array) -> list[KeyValue]:
    """keys, values: [layer, S, H, D]."""
    return [(k.at[row].set(keys[i]), v.at[row].set(values[i])) for i, (k, v) in enumerate(layers)]


def empty(config: BloomConfig, batch: int, capacity: int) -> list[KeyValue]:
    """Keys and values of every layer, all 0. Raises: CapacityError."""
    shape = (batch, capacity, config.n_head, config.head_dim)
    return _allocated(
        lambda: [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.n_layer)],
        2 * config.n_layer * math.prod(shape) * 4,
    )


def _allocated(make: Callable[[], list[KeyValue]], size_bytes: int) -> list[KeyValue]:
    """What `make` makes. Raises: CapacityError where there is no such memory."""
    try:
        if size_bytes > ADDRESSABLE_BYTES:
            raise MemoryError
        layers = make()
        for array in jax.tree.leaves(layers):
            array.block_until_ready()
        return layers
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise CapacityError(
            f"no memory for a cache of {size_bytes / 1e9:.1f} GB: ask for fewer tokens or rows"
        ) from None
