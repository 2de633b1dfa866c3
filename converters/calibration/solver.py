"""Codes and scales of a matrix that keep its outputs, not its weights: GPTQ, then descent.

The error of a matrix W [N, K] stored as V is tr((W - V) H (W - V).T), H [K, K] the second moment of
its inputs. Columns are rounded one after another, each with the errors of those before it fed
forward, which is GPTQ: with H = R D R.T, R unit upper triangular, column k is rounded at
w_k + sum_{j < k} (w_j - v_j) R_jk, and the whole error is the sum of D_k times the square of what
each rounding left. Neither the inverse of H nor its factor is needed. Then each code and each scale
is set anew to what is best given all the others, over and over: every step lowers the error.

Groups lie contiguous in a pack, so columns are reordered within that: whole groups by the mean of
H's diagonal, columns of a group by their own.

Invariant: no row's error, under the moment that was given, is above that of rounding it to nearest.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.products import add_product
from bloomq.errors import NumericError
from bloomq.schemes import (
    GROUP_LEVELS,
    TILE,
    Array,
    Scheme,
    int8_scales,
    tile_bytes,
    tile_nibbles,
    tile_rows,
    tile_sixes,
    to_half,
)

from ..quantize import all_finite, quantize_block
from .factor import Factor, column_order, factor
from .gptq import Codes, descend, gptq

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

DAMPING = 0.01  # of the mean diagonal, added to it. Source: GPTQ, section 3.3
SPAN = 256  # rows that a thread solves at a time: of 16,384 columns five times 17 MB
_REACH = 512  # columns of a product
SWEEPS = 2  # of descent: the second gains a fifth of the first, a third next to nothing
# What int8's row scales are tried at, of that at which a row's largest weight gets 127.
ROW_SHRINK = (1.0, 0.97, 0.94, 0.9, 0.86)
Calibrated = ("int4", "int6", "int8")  # schemes with even steps; others are rounded to nearest


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """Some rows of a matrix: as stored, and the values [n, K] that this stands for."""

    parts: dict[str, Array]
    values: F32


class Solver:
    """Rounds rows of matrices in one scheme that have the same inputs.

    moment: [K, K], of the inputs; taken over and overwritten. pool: the threads of the loops;
    name: of the matrix, for errors. Raises: NumericError where the moment is not finite.
    """

    def __init__(
        self, moment: F32, scheme: Scheme, pool: ThreadPoolExecutor, *,
        name: str = "matrix", damping: float = DAMPING, sweeps: int = SWEEPS,
    ) -> None:  # fmt: skip
        k = scheme.padded((1, len(moment)))[1]
        self.scheme, self._name, self._pool, self._sweeps = scheme, name, pool, sweeps
        self._h = moment if len(moment) == k else _bordered(moment, k)
        if not np.isfinite(np.trace(self._h, dtype=np.float64)):
            raise NumericError(
                f"{name}: its activations are not finite: the checkpoint is damaged or overflows"
            )
        self._added = _damp(self._h, damping)
        self._group = k if scheme.name == "int8" else scheme.group_size
        self._factor: Factor | None = None
        if scheme.name in Calibrated:
            self._low, self._high = _range(scheme)
            diagonal = np.diag(self._h).copy()
            whole = 1 if scheme.name == "int8" else self._group
            self._factor = factor(self._h, column_order(diagonal, whole), pool)

    def rows(self, w: F32) -> Solved:
        """w [n, K], n a multiple of 32 but for a matrix's last rows. Raises: NumericError."""
        shape, spans = w.shape, range(0, len(w), SPAN)
        values = np.empty(shape, np.float32)

        def run(start: int) -> dict[str, Array]:
            rows = w[start : start + SPAN]
            with np.errstate(over="ignore", invalid="ignore"):  # weights too large are refused
                parts = self._parts(rows)
                values[start : start + SPAN] = self.scheme.dequantize(parts, rows.shape)
            return parts

        found = list(self._pool.map(run, spans))
        return Solved({leaf: np.concatenate([p[leaf] for p in found]) for leaf in found[0]}, values)

    def _parts(self, w: F32) -> dict[str, Array]:
        stored = np.zeros(self.scheme.padded(w.shape), np.float32)
        stored[: w.shape[0], : w.shape[1]] = w
        nearest = quantize_block(stored, "F32", self.scheme)
        if self._factor is None:
            for leaf, part in self.scheme.parts(w.shape).items():
                if leaf in ("scales", "values") and not all_finite(nearest[leaf], part.dtype):
                    raise self._too_large()
            return nearest
        wt = np.ascontiguousarray(stored.T)  # [K, N]
        fixed = row_scales(wt, np.diag(self._h)) if self.scheme.name == "int8" else None
        found = gptq(wt, self._factor, self._group, self._low, self._high, fixed=fixed)
        left = descend(wt, self._h, found, self._low, self._high, self._sweeps)
        parts = self._stored(found)
        others = np.ascontiguousarray((stored - self.scheme.dequantize(nearest, stored.shape)).T)
        ours, theirs = np.split(self.errors(np.hstack([left, others])), 2)
        rows = np.flatnonzero(~(ours <= theirs))  # also where ours is no number
        for leaf, array in parts.items():  # rows that rounding to nearest does better, if any
            at = (rows,) if array.ndim == 1 else (rows // TILE, slice(None), rows % TILE)
            array[at] = nearest[leaf][at]
        return parts

    def _stored(self, found: Codes) -> dict[str, Array]:
        if self.scheme.name == "int8":
            return {"codes": tile_bytes(found.codes.T), "scales": found.scales[0].copy()}
        half = to_half(np.ascontiguousarray(found.scales.T))
        if not np.isfinite(half).all():
            raise self._too_large()
        codes = (found.codes.T - self._low).astype(np.uint8)
        tiled = tile_sixes(codes) if self.scheme.name == "int6" else tile_nibbles(codes)
        return {"codes": tiled, "scales": tile_rows(half)}

    def _too_large(self) -> NumericError:
        return NumericError(
            f"{self._name} holds weights too large for {self.scheme.name}: choose bf16, f32 or int8"
        )

    def errors(self, e: F32) -> F64:
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


def _bordered(moment: F32, k: int) -> F32:
    h = np.zeros((k, k), np.float32)
    h[: len(moment), : len(moment)] = moment
    return h


def _damp(h: F32, damping: float) -> F32:
    """Add damping * mean(diag h) to the diagonal, or the mean where an input is always 0; what was
    added, [K]."""
    diagonal = np.einsum("kk->k", h)  # a view
    mean = float(diagonal.mean(dtype=np.float64))
    mean = mean or 1.0
    added = np.where(diagonal > 0, np.float32(damping * mean), np.float32(mean))
    diagonal += added
    return np.asarray(added, np.float32)


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
