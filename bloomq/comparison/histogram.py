"""A matrix's weights as its scheme sees them: each in steps of its own scale, beside the grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bloomq.comparison.sides import Side
from bloomq.schemes import TILE

F32 = NDArray[np.float32]
_SAMPLED_WEIGHTS = 1 << 20  # of a matrix, in tiles spread over it: 8 MB
_BINS = 120
_RMS_LIMIT = 6.0
MARGIN = 1.16  # of space beside the outermost level, where clipped weights lie
_MOST_LEVELS = 64  # a finer grid cannot be seen


@dataclass(frozen=True, slots=True)
class Histogram:
    """unit: what 1 is, a step of the grid or the root mean square of the matrix; limit: counts are
    of bins of equal width from -limit to limit; beyond: weights that lie outside, of `weights` that
    were looked at; levels: where the pack's values lie, () where they are too many to be seen.
    """

    unit: Literal["step", "rms"]
    limit: float
    counts: tuple[int, ...]
    beyond: int
    weights: int
    levels: tuple[float, ...]


def histogram(
    ours: Side, theirs: Side, name: str, shape: tuple[int, int], factor: F32 | None, rms: float
) -> Histogram:
    """Of a sample of the original's weights; factor: see `weights._factor`."""
    values, levels = [], []
    limit = 0.0
    for start, stop in _sample(shape):
        original, step = theirs.rows(name, start, stop), ours.steps(name, start, stop)
        if step is None:
            values.append((original / np.float32(rms or 1)).ravel())
            continue
        coded = ours.rows(name, start, stop)
        used = np.broadcast_to(step != 0, original.shape)
        whole = np.broadcast_to(np.where(step == 0, np.float32(1), step), original.shape)
        level = np.round((coded / whole)[used], 3)
        limit = max(limit, float(np.abs(level).max(initial=0)))
        levels.append(np.unique(level))
        moved = whole if factor is None else whole * factor
        with np.errstate(divide="ignore", invalid="ignore"):  # a factor of 0
            values.append(np.nan_to_num((original / moved)[used], posinf=np.inf, neginf=-np.inf))
    unit: Literal["step", "rms"] = "step" if levels else "rms"
    limit = MARGIN * ((limit or 1.0) if levels else _RMS_LIMIT)
    found = np.concatenate(values)
    counts, _ = np.histogram(found, _BINS, (-limit, limit))
    grid = np.unique(np.concatenate(levels)) if levels else np.zeros(0)
    return Histogram(
        unit, limit, tuple(counts.tolist()), len(found) - int(counts.sum()), len(found),
        tuple(grid.tolist()) if len(grid) <= _MOST_LEVELS else (),
    )  # fmt: skip


def _sample(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Blocks of rows, each a tile, from the first to the last of the matrix, evenly between."""
    n, k = shape
    tiles = -(-n // TILE)
    count = max(1, min(tiles, _SAMPLED_WEIGHTS // (TILE * k)))
    first = np.unique(np.linspace(0, tiles - 1, count).astype(int)) * TILE
    return [(int(start), min(int(start) + TILE, n)) for start in first]
