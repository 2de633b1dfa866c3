"""GPTQ and the descent after it, on a matrix that lies columns first.

Invariant: rows are independent: their bits do not depend on how they are cut into arrays. So they
are solved a few hundred at a time, each by one thread.

Source: GPTQ (arXiv 2210.17323); QuIP (arXiv 2307.13304), theorem 6, for the factor; QuantEase
(arXiv 2309.01885) for the descent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.products import add_product
from bloomq.grids import Grid

from ..group_scales import book_of
from .factor import Factor

F32 = NDArray[np.float32]
I8 = NDArray[np.int8]

BLOCK = 128  # columns whose errors are fed forward by loops; to later ones by a product
_REACH = 512  # columns that get what all others feed them in one product, which are fastest so
# What the scale of a group is tried at, of that at which its largest weight is just not cut.
SHRINK: F32 = np.array([1.06, 1.0, 0.95, 0.9, 0.85, 0.8, 0.74, 0.67], np.float32)


@dataclass(slots=True, eq=False)
class Codes:
    """A matrix under way, columns first: codes [K, N], the grid's numbers; scales [K/group, N]."""

    codes: I8
    scales: F32
    group: int

    def values(self) -> F32:
        """[K, N]."""
        k, n = self.codes.shape
        q = self.codes.reshape(-1, self.group, n).astype(np.float32)
        return (q * self.scales[:, None]).reshape(k, n)


def gptq(wt: F32, by: Factor, group: int, grid: Grid, *, fixed: F32 | None = None) -> Codes:
    """Round wt [K, N] column by column. A group's scale is the one of a few with which it is
    rounded best when it is reached, errors fed forward included; or `fixed` [1, N], one a row."""
    from .compiled import round_block

    k, n = wt.shape
    w, codes, errors = wt[by.order], np.empty((k, n), np.int8), np.empty((k, n), np.float32)
    scales, book = np.empty((k // group, n), np.float32), book_of(grid)
    given = np.empty((0, n), np.float32) if fixed is None else fixed
    for first, last in _blocks(0, k, _REACH):
        fed = np.zeros((last - first, n), np.float32)
        add_product(fed, by.unit[:first, first:last], errors[:first])
        for start, stop in _blocks(first, last, BLOCK):
            round_block(
                0, n, w[start:stop], fed[start - first : stop - first],
                np.ascontiguousarray(by.unit[start:stop, start:stop]), by.weight[start:stop],
                min(group, stop - start), SHRINK, book, given, codes[start:stop],
                scales[start // group : -(-stop // group)], errors[start:stop],
            )  # fmt: skip
            add_product(fed[stop - first :], by.unit[start:stop, stop:last], errors[start:stop])
    back = np.argsort(by.order)
    if fixed is not None:
        return Codes(codes[back], fixed, group)
    return Codes(codes[back], scales[np.argsort(by.order[::group] // group)], group)


def descend(wt: F32, h: F32, found: Codes, grid: Grid, sweeps: int) -> F32:
    """Set every scale (but one that a whole row shares), then every code, to what is best given all
    the others, `sweeps` times over; the errors [K, N] that are left."""
    from .compiled import descend_block

    k, n = wt.shape
    group, free, book = found.group, found.group <= BLOCK, book_of(grid)
    errors = wt - found.values()
    for first, last in [at for _ in range(sweeps) for at in _blocks(0, k, _REACH)]:
        gradient = np.zeros((last - first, n), np.float32)
        add_product(gradient, h[:, first:last], errors)
        for start, stop in _blocks(first, last, BLOCK):
            own, before = errors[start:stop], errors[start:stop].copy()
            descend_block(
                0, n, gradient[start - first : stop - first],
                np.ascontiguousarray(h[start:stop, start:stop]), min(group, stop - start),
                book, free, found.codes[start:stop],
                found.scales[start // group : -(-stop // group)], own,
            )  # fmt: skip
            add_product(gradient[stop - first :], h[start:stop, stop:last], own - before)
    return errors


def _blocks(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]
