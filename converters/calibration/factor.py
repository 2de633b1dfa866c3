"""The factor of a moment by which GPTQ feeds errors forward: H = R D R.T, R unit upper triangular.

It is Cholesky's of H turned round, last column first, transposed back over the other diagonal; in
one array, a block of rows after another, in float32 but for a block's own corner. Invariant: it
does not depend on threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.products import add_product
from bloomq.errors import NumericError

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

_SPAN = 512  # columns that a thread takes at a time
_BLOCK = 256  # rows of the factor that are made at a time
_TILE = 256  # of an array that is transposed: two of them stay in a level-2 cache
# What is added to the diagonal, of its mean, until there is a factor.
EXTRA = (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """H = R D R.T of the columns in `order`: unit [K, K] is R, weight [K] is D."""

    order: I64
    unit: F32
    weight: F32


def spread(run: Callable[[int, int], None], n: int, pool: ThreadPoolExecutor) -> None:
    """Call run(a, b) for spans of n, on the pool's threads."""
    starts = range(0, n, _SPAN)
    list(pool.map(run, starts, [min(i + _SPAN, n) for i in starts]))


def column_order(diagonal: F32, group: int) -> I64:
    """Groups by their mean, largest first; columns of each by their own."""
    groups = diagonal.reshape(-1, group)
    first = np.argsort(-groups.mean(axis=1), kind="stable")
    within = np.argsort(-groups, axis=1, kind="stable")
    return (first[:, None] * group + within[first]).reshape(-1).astype(np.int64)


def factor(h: F32, order: I64, pool: ThreadPoolExecutor) -> Factor:
    """The factor of h, with more of its own mean added where it is not positive definite.

    Raises: NumericError.
    """
    upper = _decomposed(h, order, pool)
    diagonal = np.diag(upper)[::-1].copy()
    _turn_back(upper, pool)
    spread(lambda a, b: _divide(upper[a:b], a, diagonal), len(h), pool)
    return Factor(order, upper, np.square(diagonal))


def _decomposed(h: F32, order: I64, pool: ThreadPoolExecutor) -> F32:
    """Cholesky's upper factor of h turned round. Raises: NumericError."""
    mean = float(np.diag(h).mean(dtype=np.float64))
    for extra in EXTRA:
        upper = _turned(h, order[::-1], pool)
        np.einsum("kk->k", upper)[:] += np.float32(extra * mean)
        if _cholesky(upper, pool):
            return upper
    raise not_definite()


def not_definite() -> NumericError:
    return NumericError(
        "the moments of activations are not positive definite: the checkpoint is damaged"
    )


def _turned(h: F32, back: I64, pool: ThreadPoolExecutor) -> F32:
    """The upper triangle of h with its columns and rows in the order `back`; zeros below."""
    upper = np.zeros(h.shape, np.float32)

    def run(a: int, b: int) -> None:
        for i in range(a, b):
            np.take(h[back[i]], back[i:], out=upper[i, i:], mode="clip")

    spread(run, len(h), pool)
    return upper


def _cholesky(u: F32, pool: ThreadPoolExecutor) -> bool:
    """u's upper triangle becomes U, of which U.T @ U was that; whether it is positive definite."""
    from .compiled import corner

    k = len(u)
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)

        def subtract(a: int, b: int, start: int = start, stop: int = stop) -> None:
            at = slice(start + a, start + b)
            add_product(u[start:stop, at], u[:start, start:stop], u[:start, at], negative=True)

        spread(subtract, k - start, pool)
        inverse = np.empty((stop - start, stop - start), np.float32)
        if not corner(u[start:stop, start:stop], inverse):
            return False

        def divide(
            a: int, b: int, start: int = start, stop: int = stop, inverse: F32 = inverse
        ) -> None:
            part = u[start:stop, stop + a : stop + b]
            rest = part.copy()
            part[:] = 0
            add_product(part, inverse, rest)

        spread(divide, k - stop, pool)
    return True


def _turn_back(u: F32, pool: ThreadPoolExecutor) -> None:
    """Transpose u over its other diagonal: u[i, j] goes to u[-1 - j, -1 - i]. Of an upper triangle
    the lower one is not touched."""
    k = len(u)
    half = range(0, k // 2 // _TILE * _TILE + 1, _TILE)
    cuts = sorted({*half, *(k - i for i in half)})  # the same from both ends
    tiles = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    last = len(tiles) - 1

    def run(i: int) -> None:
        for j in range(i, len(tiles)):
            other = (last - j, last - i)
            if (i, j) <= other:
                here = u[tiles[i], tiles[j]]
                there, kept = u[tiles[other[0]], tiles[other[1]]], here.copy()
                here[:] = there[::-1, ::-1].T if (i, j) != other else kept[::-1, ::-1].T
                if (i, j) != other:
                    there[:] = kept[::-1, ::-1].T

    list(pool.map(run, range(len(tiles))))


def _divide(rows: F32, start: int, diagonal: F32) -> None:
    """Rows of a triangle, the first of which is row `start`, by the diagonal of their columns."""
    rows[:, start:] /= diagonal[start:]
