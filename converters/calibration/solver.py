"""Codes and scales of a matrix that keep its outputs, not its weights: GPTQ, then descent.

The error of a matrix W [N, K] stored as V is tr((W - V) H (W - V).T), H [K, K] the second moment of
its inputs. Columns are rounded one after another, each with the errors of those before it fed
forward, which is GPTQ: with H = R D R.T, R unit upper triangular, column k is rounded at
w_k + sum_{j < k} (w_j - v_j) R_jk, and the whole error is the sum of D_k times the square of what
each rounding left. Neither the inverse of H nor its factor is needed. Then each code and each scale
is set anew to what is best given all the others, over and over: every step lowers the error.

Groups lie contiguous in a pack, so columns are reordered within that: whole groups by the mean of
H's diagonal, columns of a group by their own.

Invariant: no row's error is above that of rounding it to nearest. Bits: rows are independent, and
the loops do not depend on threads; products and the factor are NumPy's, whose bits may depend on
the machine and on how many threads its BLAS has.

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
from bloomq.schemes import (
    GROUP_LEVELS,
    Array,
    Scheme,
    int8_scales,
    tile_bytes,
    tile_nibbles,
    tile_rows,
    tile_sixes,
    to_half,
)

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
I8 = NDArray[np.int8]

BLOCK = 128  # columns whose errors are fed forward by loops; to later ones by a product
DAMPING = 0.01  # of the mean diagonal, added to it. Source: GPTQ, section 3.3
SWEEPS = 2  # of descent: the second gains a fifth of the first, a third next to nothing
_SPAN = 256  # rows that a thread takes at a time
_WIDE_FACTOR = 8192  # columns up to which the factor is taken in float64: 0.5 GB
# What the scale of a group is tried at, of that at which its largest weight is just not cut.
SHRINK: F32 = np.array([1.06, 1.0, 0.95, 0.9, 0.85, 0.8, 0.74, 0.67], np.float32)
ROW_SHRINK = (1.0, 0.97, 0.94, 0.9, 0.86)  # the same for int8's rows
Calibrated = ("int4", "int6", "int8")  # schemes with even steps; others are rounded to nearest


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


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """Some rows of a matrix: as stored, and the values [n, K] that this stands for."""

    parts: dict[str, Array]
    values: F32


class Solver:
    """Rounds rows of matrices in one scheme that have the same inputs.

    moment: [K, K], of the inputs; taken over and overwritten. pool: the threads of the loops.
    Raises: NumericError where the moment is not finite.
    """

    def __init__(
        self, moment: F32, scheme: Scheme, pool: ThreadPoolExecutor, *,
        damping: float = DAMPING, sweeps: int = SWEEPS,
    ) -> None:  # fmt: skip
        k = scheme.padded((1, len(moment)))[1]
        self.scheme, self._pool, self._sweeps = scheme, pool, sweeps
        self._h = moment if len(moment) == k else _bordered(moment, k)
        self._added = _damp(self._h, damping)
        self._group = k if scheme.name == "int8" else scheme.group_size
        self._factor: Factor | None = None
        if scheme.name in Calibrated:
            self._low, self._high = _range(scheme)
            diagonal = np.diag(self._h).copy()
            whole = 1 if scheme.name == "int8" else self._group
            self._factor = factor(self._h, column_order(diagonal, whole))

    def rows(self, w: F32) -> Solved:
        """w [n, K], n a multiple of 32 but for a matrix's last rows. Raises: NumericError."""
        n, k = w.shape
        stored = np.zeros(self.scheme.padded((n, k)), np.float32)
        stored[:n, :k] = w
        nearest = self.scheme.quantize(stored)
        if self._factor is None:
            return Solved(nearest, self.scheme.dequantize(nearest, (n, k)))
        wt = np.ascontiguousarray(stored.T)  # [K, N]
        found = self._first(wt, self._factor)
        descend(wt, self._h, found, self._low, self._high, self._sweeps, self._pool)
        parts = self._stored(found)
        self._keep_better(wt, parts, nearest)
        return Solved(parts, self.scheme.dequantize(parts, (n, k)))

    def _first(self, wt: F32, by: Factor) -> Codes:
        fixed = None
        if self.scheme.name == "int8":
            fixed = row_scales(wt, np.diag(self._h))
        return gptq(wt, by, self._group, self._low, self._high, self._pool, fixed=fixed)

    def _stored(self, found: Codes) -> dict[str, Array]:
        if self.scheme.name == "int8":
            return {"codes": tile_bytes(found.codes.T), "scales": found.scales[0].copy()}
        half = to_half(np.ascontiguousarray(found.scales.T))
        if not np.isfinite(half).all():
            raise NumericError(
                f"weights too large for {self.scheme.name}: choose bf16, f32 or int8"
            )
        codes = (found.codes.T - self._low).astype(np.uint8)
        tiled = tile_sixes(codes) if self.scheme.name == "int6" else tile_nibbles(codes)
        return {"codes": tiled, "scales": tile_rows(half)}

    def _keep_better(self, wt: F32, parts: dict[str, Array], nearest: dict[str, Array]) -> None:
        """Rows that rounding to nearest does better, if any: those are taken."""
        k, n = wt.shape
        ours, theirs = (self.scheme.dequantize(p, (n, k)).T for p in (parts, nearest))
        worse = self.errors(wt - ours) > self.errors(wt - theirs)
        if not worse.any():
            return
        rows = np.flatnonzero(worse)
        tile, lane = rows // 16, rows % 16
        for name, part in parts.items():
            at = (rows,) if part.ndim == 1 else (tile, slice(None), lane)
            part[at] = nearest[name][at]

    def errors(self, e: F32) -> F64:
        """e [K, N] -> [N]: each row's error under the moment as it was, without damping."""
        total = np.einsum("kn,kn->n", self._h @ e, e, dtype=np.float64)
        return np.asarray(total - np.einsum("kn,kn,k->n", e, e, self._added, dtype=np.float64))


def _bordered(moment: F32, k: int) -> F32:
    h = np.zeros((k, k), np.float32)
    h[: len(moment), : len(moment)] = moment
    return h


def _damp(h: F32, damping: float) -> F32:
    """Add damping * mean(diag h) to the diagonal, or the mean where an input is always 0; what was
    added, [K]. Raises: NumericError."""
    diagonal = np.einsum("kk->k", h)  # a view
    mean = float(diagonal.mean(dtype=np.float64))
    if not np.isfinite(mean):
        raise NumericError("activations are not finite: the checkpoint is damaged or overflows")
    mean = mean or 1.0
    added = np.where(diagonal > 0, np.float32(damping * mean), np.float32(mean))
    diagonal += added
    return np.asarray(added, np.float32)


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
        raise NumericError("the moments of activations have no factor: they are not finite")
    del turned
    diagonal = np.diag(lower)[::-1].astype(np.float32)
    unit = np.ascontiguousarray(lower[::-1, ::-1], np.float32)
    unit /= diagonal
    return Factor(order, unit, np.square(diagonal))


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


def _range(scheme: Scheme) -> tuple[int, int]:
    """The lowest and the highest code."""
    if scheme.name == "int8":
        return -127, 127
    low = int(GROUP_LEVELS[scheme.name][0])
    return low, -low - 1


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
                w[start:stop, a:b], fed[:, a:b], unit, by.weight[start:stop],
                min(group, stop - start), SHRINK, np.float32(low), np.float32(high),
                given[:, a:b], codes[start:stop, a:b], own[:, a:b], errors[start:stop, a:b],
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
                gradient[:, a:b], part, min(group, stop - start), np.float32(low),
                np.float32(high), free, found.codes[start:stop, a:b], own[:, a:b],
                errors[start:stop, a:b],
            )  # fmt: skip

        _spread(run, n, pool)


def _spread(run: Callable[[int, int], None], n: int, pool: ThreadPoolExecutor) -> None:
    """Call run(a, b) for spans of rows, on the pool's threads."""
    starts = range(0, n, _SPAN)
    list(pool.map(run, starts, [min(i + _SPAN, n) for i in starts]))
