"""Rows of a matrix rounded on the CPU: GPTQ, then descent, a few hundred rows by each thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.products import add_product
from bloomq.grids import GRIDS, Grid
from bloomq.schemes import Scheme, int8_scales

from .engine import Found
from .factor import column_order, factor
from .gptq import descend, gptq

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

SPAN = 256  # rows that a thread solves at a time: of 16,384 columns five times 17 MB
_REACH = 512  # columns of a product
_INT8 = Grid(tuple(range(-127, 128)), (127.0,))
# What int8's row scales are tried at, of that at which a row's largest weight gets 127.
ROW_SHRINK = (1.0, 0.97, 0.94, 0.9, 0.86)


class CpuRounding:
    """`Rounding`. moment: [K, K], taken over and overwritten; pool: the threads of the loops."""

    def __init__(
        self, moment: F32, scheme: Scheme, pool: ThreadPoolExecutor, *, damping: float, sweeps: int
    ) -> None:
        k = scheme.padded((1, len(moment)))[1]
        self._scheme, self._pool, self._sweeps = scheme, pool, sweeps
        self._h = moment if len(moment) == k else _bordered(moment, k)
        diagonal = np.einsum("kk->k", self._h)  # a view
        self._added = damping_of(diagonal, damping)
        diagonal += self._added
        self._group, self._grid = group_of(scheme, k), grid_of(scheme)
        order = column_order(diagonal.copy(), ordered_by(scheme))
        self._factor = factor(self._h, order, pool)

    def rows(self, w: F32, nearest: F32) -> list[Found]:
        return list(self._pool.map(lambda at: self._found(w[at], nearest[at]), spans_of(len(w))))

    def _found(self, w: F32, nearest: F32) -> Found:
        wt, others = (columns_first(rows, self._scheme) for rows in (w, nearest))  # [K, N]
        with np.errstate(over="ignore", invalid="ignore"):  # weights too large are refused
            int8 = self._scheme.name == "int8"
            fixed = row_scales(wt, np.diag(self._h)) if int8 else None
            found = gptq(wt, self._factor, self._group, self._grid, fixed=fixed)
            left = descend(wt, self._h, found, self._grid, self._sweeps)
            ours, theirs = np.split(self._errors(np.hstack([left, wt - others])), 2)
        return Found(found, np.flatnonzero(~(ours <= theirs)))  # also where ours is no number

    def _errors(self, e: F32) -> F64:
        """e [K, N] -> [N]: each row's error under the moment as it was, without damping. H is
        symmetric: what lies above its diagonal blocks counts twice."""
        total = -np.einsum("kn,kn,k->n", e, e, self._added, dtype=np.float64)
        for start in range(0, len(e), _REACH):
            own = slice(start, start + _REACH)
            product = np.zeros_like(e[own])
            add_product(product, self._h[:start, own], e[:start])
            product *= 2
            add_product(product, self._h[own, own], e[own])
            total += np.einsum("kn,kn->n", product, e[own], dtype=np.float64)
        return np.asarray(total)


def spans_of(n: int) -> list[slice]:
    """Of n rows, those that one `Found` is of."""
    return [slice(at, min(at + SPAN, n)) for at in range(0, n, SPAN)]


def columns_first(w: F32, scheme: Scheme) -> F32:
    """w [n, k] -> [K, N], bordered with zeros to what the scheme stores."""
    n, k = scheme.padded(w.shape)
    wt = np.zeros((k, n), np.float32)
    wt[: w.shape[1], : w.shape[0]] = w.T
    return wt


def damping_of(diagonal: F32, damping: float) -> F32:
    """What is added to H's diagonal [K]: damping times its mean, or the mean where an input is
    always 0."""
    mean = float(diagonal.mean(dtype=np.float64)) or 1.0
    return np.where(diagonal > 0, np.float32(damping * mean), np.float32(mean)).astype(np.float32)


def group_of(scheme: Scheme, k: int) -> int:
    """Columns that share a scale."""
    return k if scheme.name == "int8" else scheme.group_size


def ordered_by(scheme: Scheme) -> int:
    """Columns that stay together when columns are reordered."""
    return 1 if scheme.name == "int8" else scheme.group_size


def grid_of(scheme: Scheme) -> Grid:
    """What its codes are rounded to."""
    return _INT8 if scheme.name == "int8" else GRIDS[scheme.name]


def _bordered(moment: F32, k: int) -> F32:
    h = np.zeros((k, k), np.float32)
    h[: len(moment), : len(moment)] = moment
    return h


def row_scales(wt: F32, diagonal: F32) -> F32:
    """[1, N]: the scale of each of int8's rows, of a few by the error that H's diagonal weighs."""
    largest = int8_scales(np.abs(wt).max(axis=0))
    best, least = largest, np.full(wt.shape[1], np.inf)
    for shrink in ROW_SHRINK:
        scale = largest * np.float32(shrink)
        codes = np.clip(np.rint(wt / np.where(scale == 0, 1, scale)), -127, 127)
        error = np.einsum("kn,kn,k->n", wt - codes * scale, wt - codes * scale, diagonal)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return np.asarray(best[None], np.float32)
