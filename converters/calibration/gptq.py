"""GPTQ and the descent after it, on a matrix that lies columns first.

Invariant: rows are independent; the loops do not depend on threads. Products and the factor are
NumPy's, whose bits may depend on the machine and on how many threads its BLAS has.

Source: GPTQ (arXiv 2210.17323); QuIP (arXiv 2307.13304), theorem 6, for the factor; QuantEase
(arXiv 2309.01885) for the descent.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import NumericError

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
I8 = NDArray[np.int8]

BLOCK = 128  # columns whose errors are fed forward by loops; to later ones by a product
_SPAN = 256  # rows that a thread takes at a time
_WIDE_FACTOR = 8192  # columns up to which the factor is taken in float64: 0.5 GB
# What the scale of a group is tried at, of that at which its largest weight is just not cut.
SHRINK: F32 = np.array([1.06, 1.0, 0.95, 0.9, 0.85, 0.8, 0.74, 0.67], np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """H = R D R.T of the columns in `order`: unit [K, K] is R, weight [K] is D."""

    order: I64
    unit: F32
    weight: F32


@dataclass(slots=True, eq=False)
class Codes:
    """A matrix under way, columns first: codes [K, N], scales [K/group, N]."""

    codes: I8
    scales: F32
    group: int

    def values(self) -> F32:
        """[K, N]."""
        k, n = self.codes.shape
        q = self.codes.reshape(-1, self.group, n).astype(np.float32)
        return (q * self.scales[:, None]).reshape(k, n)


def column_order(diagonal: F32, group: int) -> I64:
    """Groups by their mean, largest first; columns of each by their own."""
    groups = diagonal.reshape(-1, group)
    first = np.argsort(-groups.mean(axis=1), kind="stable")
    within = np.argsort(-groups, axis=1, kind="stable")
    return (first[:, None] * group + within[first]).reshape(-1).astype(np.int64)


def factor(h: F32, order: I64) -> Factor:
    """The factor of h, with more of its own mean added where it is not positive definite.

    Raises: NumericError.
    """
    back = order[::-1]
    turned = h[np.ix_(back, back)]
    turned = turned.astype(np.float64) if len(h) <= _WIDE_FACTOR else turned
    extra = 0.01 * float(np.diag(h).mean(dtype=np.float64))
    for _ in range(6):
        try:
            lower = np.linalg.cholesky(turned)
            break
        except np.linalg.LinAlgError:
            turned[np.diag_indices(len(h))] += extra
            extra *= 10
    else:
        raise NumericError(
            "the moments of activations are not positive definite: the checkpoint is damaged"
        )
    del turned
    diagonal = np.diag(lower)[::-1].astype(np.float32)
    unit = np.ascontiguousarray(lower[::-1, ::-1], np.float32)
    unit /= diagonal
    return Factor(order, unit, np.square(diagonal))


def gptq(
    wt: F32, by: Factor, group: int, low: int, high: int, pool: ThreadPoolExecutor, *,
    fixed: F32 | None = None,
) -> Codes:  # fmt: skip
    """Round wt [K, N] column by column. A group's scale is the one of a few with which it is
    rounded best when it is reached, errors fed forward included; or `fixed` [1, N], one a row."""
    from .compiled import round_block

    k, n = wt.shape
    w = wt[by.order]
    codes, errors = np.empty((k, n), np.int8), np.empty((k, n), np.float32)
    scales = np.empty((k // group, n), np.float32)
    given = np.empty((0, n), np.float32) if fixed is None else fixed
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        fed = by.unit[:start, start:stop].T @ errors[:start]
        unit = np.ascontiguousarray(by.unit[start:stop, start:stop])
        own = scales[start // group : -(-stop // group)]

        def run(
            a: int, b: int, start: int = start, stop: int = stop, fed: F32 = fed, unit: F32 = unit,
            own: F32 = own,
        ) -> None:  # fmt: skip
            round_block(
                a, b, w[start:stop], fed, unit, by.weight[start:stop], min(group, stop - start),
                SHRINK, np.float32(low), np.float32(high), given, codes[start:stop], own,
                errors[start:stop],
            )  # fmt: skip

        _spread(run, n, pool)
    back = np.argsort(by.order)
    if fixed is not None:
        return Codes(codes[back], fixed, group)
    return Codes(codes[back], scales[np.argsort(by.order[::group] // group)], group)


def descend(
    wt: F32, h: F32, found: Codes, low: int, high: int, sweeps: int, pool: ThreadPoolExecutor
) -> None:
    """Set every scale (but one that a whole row shares), then every code, to what is best given all
    the others, `sweeps` times over."""
    from .compiled import descend_block

    k, n = wt.shape
    group, free = found.group, found.group <= BLOCK
    errors = wt - found.values()
    for start in [i for _ in range(sweeps) for i in range(0, k, BLOCK)]:
        stop = min(start + BLOCK, k)
        gradient = h[start:stop] @ errors
        part = np.ascontiguousarray(h[start:stop, start:stop])
        own = found.scales[start // group : -(-stop // group)]

        def run(
            a: int, b: int, start: int = start, stop: int = stop, gradient: F32 = gradient,
            part: F32 = part, own: F32 = own,
        ) -> None:  # fmt: skip
            descend_block(
                a, b, gradient, part, min(group, stop - start), np.float32(low), np.float32(high),
                free, found.codes[start:stop], own, errors[start:stop],
            )  # fmt: skip

        _spread(run, n, pool)


def _spread(run: Callable[[int, int], None], n: int, pool: ThreadPoolExecutor) -> None:
    """Call run(a, b) for spans of rows, on the pool's threads."""
    starts = range(0, n, _SPAN)
    list(pool.map(run, starts, [min(i + _SPAN, n) for i in starts]))
