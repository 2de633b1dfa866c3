"""The layer interface: what a backend is, as the model and the generation loop see it.

Every matrix product of BLOOM has one form, y = act(norm(x) @ W.T + b + delta) + add, so every
fusion worth having is a prologue or an epilogue of one `Linear`. Tokens of a step lie one after
another, [M, C], M the tokens of all rows together: a `Span` says which belong to which row of the
cache, so rows of different length cost nothing and never see each other.

The contract, which one test suite checks on every backend:
- decisions are made at construction: a scheme that a backend cannot run fails there;
- only attention writes, and only to the cache rows of its span, beyond their lengths;
- continuing a cache equals recomputing; the rows of a batch are independent;
- compiled equals eager; the same bits for any number of threads.

`X` stands for the backend's own array type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from bloomq.config import BloomConfig
from bloomq.errors import CapacityError, UsageError
from bloomq.levels import Levels, Sums
from bloomq.weights import Matrix, Norm

X = Any
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Activation = Literal["gelu"]
CacheDtype = Literal["f32", "f16", "int8"]
# Tokens of a prompt in one step: bounds the activations' memory. On a GPU more: a product of 512
# tokens with [4096, 4096] has 64 tiles of 128 x 256 for an H200's 132 multiprocessors, and what a
# step costs whatever its tokens are is paid as often. Of 7b1 in int8, 6.0e9 weights restored to 16
# bits are 5 bytes each, read, written and read, 7.5 ms at 4 TB/s; multiplied with 512 tokens 8.8 ms
# at 700 TFLOP/s, with 2,048 tokens 35 ms: 65 ms for 2,048 tokens in four steps, 43 ms in one.
STEP_TOKENS, GPU_STEP_TOKENS = 512, 2048
SURVEYED_ROWS = 64  # logits' rows of a step; in longer ones what is asked later costs little
PAGE_TOKENS = 64  # `Cache.drop` forgets multiples of it: the CPU kernels score so many keys at once


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """The tokens of one step: rows[r] of the cache gets tokens starts[r] .. starts[r + 1].

    rows: int64 [R], each at most once; starts: int64 [R + 1], starts[0] = 0, starts[R] = M; counts:
    int64 [R], the tokens of each.
    """

    rows: I64
    starts: I64
    counts: I64

    @classmethod
    def of(cls, rows: Sequence[int], counts: Sequence[int]) -> Span:
        """The span of counts[r] tokens for each rows[r]."""
        starts = np.array([0, *accumulate(counts)], np.int64)
        return cls(np.array(rows, np.int64), starts, np.array(counts, np.int64))

    @property
    def last(self) -> I64:
        """The index of each row's last token."""
        return self.starts[1:] - 1


@dataclass(frozen=True, slots=True, eq=False)
class Top:
    """The best tokens of each row. ids, logits: [B, k], best first (of equals the lower id);
    logsumexp: [B], NaN where a logit is."""

    ids: I64
    logits: F32
    logsumexp: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """What a row of a cache holds, as plain arrays: for a file, or a row elsewhere.

    keys, values: [layer, S, H, D] in the cache's dtype, float32, float16 or int8; scales: float32
    [2, layer, S, H], what int8 keys and values are multiplied with, of size 0 for others.
    """

    keys: NDArray[Any]
    values: NDArray[Any]
    scales: F32

    @property
    def length(self) -> int:
        """Tokens, where `check` finds nothing wrong."""
        return int(self.keys.shape[1])

    def first(self, count: int) -> Stored:
        """The first `count` tokens: views."""
        scales = self.scales[:, :, :count] if self.scales.size else self.scales
        return Stored(self.keys[:, :count], self.values[:, :count], scales)

    def check(self, places: tuple[int, int, int], dtype: np.dtype[Any], capacity: int) -> None:
        """Raises: UsageError where these are not arrays of such (layers, heads, head_dim) and
        dtype, CapacityError where there are more tokens than `capacity`."""
        layers, heads, head_dim = places
        count = self.keys.shape[1] if self.keys.ndim > 1 else 0
        of_scales = (2, layers, count, heads) if dtype == np.int8 else (0,)
        wanted = (layers, count, heads, head_dim)
        for name, found, shape, kind in (
            ("keys", self.keys, wanted, dtype),
            ("values", self.values, wanted, dtype),
            ("scales", self.scales, of_scales, np.dtype(np.float32)),
        ):
            if found.shape != shape or found.dtype != kind:
                raise UsageError(
                    f"stored {name} are {found.dtype} {list(found.shape)}, expected {kind} "
                    f"{list(shape)}: they are of another model or cache dtype"
                )
        if count > capacity:
            raise CapacityError(f"{count} stored tokens, the cache holds {capacity}: grow it first")


def check_drop(length: int, start: int, count: int) -> None:
    """Raises: UsageError where a row of `length` tokens cannot drop `count` from `start` on."""
    whole = start % PAGE_TOKENS == count % PAGE_TOKENS == 0
    if not whole or start < 0 or count < 0 or start + count > length:
        raise UsageError(
            f"{count} tokens to drop from {start} on, expected multiples of {PAGE_TOKENS} within "
            f"the {length} that the row holds"
        )


class Cache(Protocol):
    """Keys and values of every layer, for `batch` rows of up to `capacity` tokens."""

    @property
    def batch(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def lengths(self) -> I64:
        """Tokens held by each row, [batch]."""
        ...

    @property
    def gates(self) -> F32:
        """How much each row takes of each rank of the loaded adapters, [batch, ranks]: see
        `Backend.gate`. The caller's to fill; no row takes any at first."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory held for keys and values now."""
        ...

    @property
    def paged(self) -> bool:
        """Does memory come page by page, as tokens are stored? Else every row has all of it from
        the start."""
        ...

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token of one row, their scales included."""
        ...

    def keys(self, layer: int, row: int, count: int) -> F32:
        """The first `count` keys of a row, [count, H, D], as attention reads them."""
        ...

    def grow(self, capacity: int, batch: int | None = None) -> None:
        """Make room for `capacity` tokens in each of `batch` rows (None: of those there are),
        keeping what is there; never less than there is. `lengths` and `gates` of new rows are 0.

        Raises: CapacityError, the cache as before.
        """
        ...

    def advance(self, span: Span) -> None:
        """Count the tokens that every layer has now stored."""
        ...

    def truncate(self, row: int, length: int) -> None:
        """Forget what a row holds beyond `length` tokens."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Make row `target` hold what row `source` holds, its gates too. On the CPU rows share
        memory until one of them writes."""
        ...

    def drop(self, row: int, start: int, count: int) -> None:
        """Forget `count` tokens from `start` on, both multiples of PAGE_TOKENS; those behind them
        move down. Keys bear no position, ALiBi sees where they lie now: so the row is as if it had
        been given the other keys and values alone.

        Raises: UsageError for others than whole pages of what the row holds.
        """
        ...

    def stored(self, row: int) -> Stored:
        """A copy of a row's keys and values."""
        ...

    def restore(self, row: int, stored: Stored) -> None:
        """Make a row hold what `stored` gave, here or in another process; its gates stay.

        Raises: UsageError for arrays of another model or dtype; CapacityError for too many tokens,
        the row as before.
        """
        ...


class Linear(Protocol):
    def __call__(self, x: X, add: X | None = None, delta: X | None = None) -> X:
        """x [M, K] -> act(norm(x) @ W.T + b + delta) + add, [M, N]. delta: what adapters add."""
        ...


class Embedding(Protocol):
    def __call__(self, ids: I64) -> X:
        """ids [M] -> table[ids], [M, C]."""
        ...


class LayerNorm(Protocol):
    def __call__(self, x: X) -> X:
        """x [M, C] -> norm(x), [M, C]."""
        ...


class Attention(Protocol):
    def __call__(self, qkv: X, cache: Any, span: Span) -> X:
        """qkv [M, H * 3 * D] -> [M, H * D]; stores the new keys and values."""
        ...


Step = Callable[[X, Any, Span, X], X]  # (ids [M], cache, span, wanted [W]) -> [W, ...]


class Backend(Protocol):
    """A factory of layers, bound to their weights when the model is built."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str:
        """What was chosen: instruction tier, threads and the like, in a line."""
        ...

    @property
    def arithmetic(self) -> str:
        """What the bits of its results depend on, in a line: two backends that say the same give
        the same, and can continue each other's caches."""
        ...

    @property
    def step_tokens(self) -> int:
        """Of prompts, in one step at most."""
        ...

    def embedding(self, table: Matrix) -> Embedding: ...
    def norm(self, norm: Norm) -> LayerNorm: ...
    def linear(
        self,
        weight: Matrix,
        bias: F32 | None = None,
        *,
        norm: Norm | None = None,
        act: Activation | None = None,
        limbs: int = 1,
    ) -> Linear:
        """limbs: the int8 numbers that make an activation, where a backend rounds it to int8: with
        two it has 15 bits, and the product takes twice the arithmetic and the same weights."""
        ...

    def attention(
        self, layer: int, n_head: int, head_dim: int, *, slope: F32 | None = None
    ) -> Attention:
        """slope: ALiBi's of each head, where these are some of a model's; None: `slopes`."""
        ...

    def cache(self, config: BloomConfig, batch: int, capacity: int, ranks: int = 0) -> Cache:
        """An empty cache; ranks: of all adapters that the model has loaded."""
        ...

    def gate(self, x: X, cache: Any, span: Span) -> X:
        """x [M, ranks] times the gates of the row that each token belongs to."""
        ...

    def compile(self, step: Step) -> Step:
        """The same step, as fast as the backend can replay it; the identity is legal. A step may
        use its ids and `wanted` through `embedding` and `take` alone. It may also be one that is
        given hidden states for ids, NumPy's or the backend's own, float32 [M, C]: the part of a
        model behind the layers of another place."""
        ...

    def take(self, x: X, index: X) -> X:
        """Rows `index` of x [M, C]."""
        ...

    def survey(self, logits: X) -> X:
        """The same logits [W, V], about which a step may find out, while it makes them, what `top`
        will be asked; the identity is legal."""
        ...

    def top(self, logits: X, k: int) -> Top: ...

    def best(self, logits: X, k: int) -> tuple[I64, F32]:
        """Ids and logits [k] of one row, [1, V], as of `top`."""
        ...

    def masked(self, logits: X, allowed: NDArray[np.bool_]) -> X:
        """One row, [1, V], with -infinity where a token is not allowed, [V]."""
        ...

    def sums(self, logits: X, temperature: float = 1.0) -> Sums:
        """Of one row, [1, V]."""
        ...

    def levels(self, logits: X, temperature: float = 1.0) -> Levels:
        """Of one row, [1, V]."""
        ...

    def numpy(self, x: X) -> F32: ...


def zeros(shape: tuple[int, ...], dtype: type[np.generic], what: str = "a cache") -> NDArray[Any]:
    """Memory that the system hands out as it is first touched.

    Raises: CapacityError where there is none for `what`.
    """
    try:
        return np.zeros(shape, dtype)
    except (MemoryError, ValueError):  # ValueError: more than an address can say
        size = math.prod(shape) * np.dtype(dtype).itemsize
        raise CapacityError(
            f"no memory for {what} of {size / 1e9:.1f} GB: ask for fewer tokens or rows"
        ) from None


def slopes(n_head: int) -> F32:
    """The ALiBi slope of each head, float32 [H].

    p = 2**floor(log2 H): slopes are powers 1..p of 2**(-8/p), then the odd powers of 2**(-4/p),
    with the base rounded to float32 first, as transformers does.
    Source: ALiBi (arXiv 2108.12409); transformers' build_alibi_tensor.
    """
    power = 1 << (n_head.bit_length() - 1)
    base = np.float32(2.0 ** -(2.0 ** -(np.log2(power) - 3)))
    exponents = np.arange(1, power + 1, dtype=np.float32)
    result = np.power(base, exponents)
    if power < n_head:
        base = np.float32(2.0 ** -(2.0 ** -(np.log2(2 * power) - 3)))
        extra = np.arange(1, 2 * (n_head - power) + 1, 2, dtype=np.float32)
        result = np.concatenate([result, np.power(base, extra)])
    return result.astype(np.float32)
