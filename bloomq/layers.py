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
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from bloomq.config import BloomConfig
from bloomq.errors import CapacityError
from bloomq.weights import Matrix, Norm

X = Any
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Activation = Literal["gelu"]
CacheDtype = Literal["f32", "f16", "int8"]


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """The tokens of one step: rows[r] of the cache gets tokens starts[r] .. starts[r + 1].

    rows: int64 [R], each at most once; starts: int64 [R + 1], starts[0] = 0, starts[R] = M.
    """

    rows: I64
    starts: I64

    @classmethod
    def of(cls, rows: Sequence[int], counts: Sequence[int]) -> Span:
        """The span of counts[r] tokens for each rows[r]."""
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(np.array(rows, np.int64), starts)

    @property
    def counts(self) -> I64:
        return np.diff(self.starts)

    @property
    def last(self) -> I64:
        """The index of each row's last token."""
        return self.starts[1:] - 1


@dataclass(frozen=True, slots=True, eq=False)
class Top:
    """The best tokens of each row. ids, logits: [B, k], best first (of equals the lower id);
    logsumexp: [B], of logits / temperature, NaN where a logit is."""

    ids: I64
    logits: F32
    logsumexp: NDArray[np.float64]


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
    def nbytes(self) -> int: ...
    def keys(self, layer: int, row: int, count: int) -> F32:
        """The first `count` keys of a row, [count, H, D], as attention reads them."""
        ...

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens in every row, keeping what is there."""
        ...

    def advance(self, span: Span) -> None:
        """Count the tokens that every layer has now stored."""
        ...

    def truncate(self, row: int, length: int) -> None:
        """Forget what a row holds beyond `length` tokens."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Make row `target` hold what row `source` holds, its gates too."""
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

    def embedding(self, table: Matrix) -> Embedding: ...
    def norm(self, norm: Norm) -> LayerNorm: ...
    def linear(
        self,
        weight: Matrix,
        bias: F32 | None = None,
        *,
        norm: Norm | None = None,
        act: Activation | None = None,
    ) -> Linear: ...
    def attention(self, layer: int, n_head: int, head_dim: int) -> Attention: ...
    def cache(self, config: BloomConfig, batch: int, capacity: int, ranks: int = 0) -> Cache:
        """An empty cache; ranks: of all adapters that the model has loaded."""
        ...

    def gate(self, x: X, cache: Any, span: Span) -> X:
        """x [M, ranks] times the gates of the row that each token belongs to."""
        ...

    def compile(self, step: Step) -> Step:
        """The same step, as fast as the backend can replay it; the identity is legal. A step may
        use its ids and `wanted` through `embedding` and `take` alone."""
        ...

    def take(self, x: X, index: X) -> X:
        """Rows `index` of x [M, C]."""
        ...

    def top(self, logits: X, k: int, temperature: float = 1.0) -> Top: ...
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
