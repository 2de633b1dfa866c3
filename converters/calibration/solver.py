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

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import NumericError
from bloomq.schemes import (
    TILE,
    Array,
    Scheme,
    tile_bytes,
    tile_nibbles,
    tile_rows,
    tile_sixes,
    to_half,
)

from ..quantize import all_finite, quantize_block
from .engine import Engine, Found, Rounding, X
from .gptq import Codes
from .rounding import grid_of, spans_of

F32 = NDArray[np.float32]

DAMPING = 0.01  # of the mean diagonal, added to it. Source: GPTQ, section 3.3
SWEEPS = 2  # of descent: the second gains a fifth of the first, a third next to nothing
# Schemes whose codes stand for whole numbers; others are rounded to nearest.
Calibrated = ("nl4", "int4", "int6", "int8")


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """Some rows of a matrix: as stored, and the values [n, K] that this stands for."""

    parts: dict[str, Array]
    values: F32


class Solver:
    """Rounds rows of matrices in one scheme that have the same inputs.

    moment: [K, K], of the inputs, the engine's or NumPy's; taken over and overwritten. engine:
    solves; name: of the matrix, for errors. Raises: NumericError where the moment is not finite.
    """

    def __init__(
        self, moment: X, scheme: Scheme, engine: Engine, *,
        name: str = "matrix", damping: float = DAMPING, sweeps: int = SWEEPS,
    ) -> None:  # fmt: skip
        self.scheme, self._name, self._pool = scheme, name, engine.pool
        if not np.isfinite(engine.layers.numpy(moment.diagonal()).sum(dtype=np.float64)):
            raise NumericError(
                f"{name}: its activations are not finite: the checkpoint is damaged or overflows"
            )
        self._rounding: Rounding | None = None
        if scheme.name in Calibrated:
            self._rounding = engine.rounding(moment, scheme, damping=damping, sweeps=sweeps)

    def rows(self, w: F32) -> Solved:
        """w [n, K], n a multiple of 32 but for a matrix's last rows. Raises: NumericError."""
        values, spans = np.empty(w.shape, np.float32), spans_of(len(w))
        into = [values[at] for at in spans]
        parts = list(self._pool.map(self._nearest, [w[at] for at in spans], into))
        if self._rounding is not None:
            found = self._rounding.rows(w, values)
            parts = list(self._pool.map(self._better, found, parts, into))
        return Solved({leaf: np.concatenate([p[leaf] for p in parts]) for leaf in parts[0]}, values)

    def _nearest(self, w: F32, values: F32) -> dict[str, Array]:
        """Rows rounded to nearest, as stored, and in `values` what this stands for."""
        stored = np.zeros(self.scheme.padded(w.shape), np.float32)
        stored[: w.shape[0], : w.shape[1]] = w
        with np.errstate(over="ignore", invalid="ignore"):  # weights too large are refused
            parts = quantize_block(stored, "F32", self.scheme)
            values[:] = self.scheme.dequantize(parts, w.shape)
        if self._rounding is None:
            for leaf, part in self.scheme.parts(w.shape).items():
                if leaf in ("scales", "values") and not all_finite(parts[leaf], part.dtype):
                    raise self._too_large()
        return parts

    def _better(self, found: Found, nearest: dict[str, Array], values: F32) -> dict[str, Array]:
        """Rows as stored, of two choices the better, and in `values` what this stands for."""
        with np.errstate(over="ignore", invalid="ignore"):
            parts, rows = self._stored(found.codes), found.nearest
            for leaf, array in parts.items():
                at = (rows,) if array.ndim == 1 else (rows // TILE, slice(None), rows % TILE)
                array[at] = nearest[leaf][at]
            values[:] = self.scheme.dequantize(parts, values.shape)
        return parts

    def _stored(self, found: Codes) -> dict[str, Array]:
        if self.scheme.name == "int8":
            return {"codes": tile_bytes(found.codes.T), "scales": found.scales[0].copy()}
        half = to_half(np.ascontiguousarray(found.scales.T))
        if not np.isfinite(half).all():
            raise self._too_large()
        codes = grid_of(self.scheme).codes(found.codes.T)
        tiled = tile_sixes(codes) if self.scheme.name == "int6" else tile_nibbles(codes)
        return {"codes": tiled, "scales": tile_rows(half)}

    def _too_large(self) -> NumericError:
        return NumericError(
            f"{self._name} holds weights too large for {self.scheme.name}: choose bf16, f32 or int8"
        )
