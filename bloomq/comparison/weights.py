"""How far each matrix of a pack lies from the original's, and how far its outliers reach.

Matrices come in blocks of rows through worker threads; sums are added in the blocks' order, so
figures have the same bits for any number of threads.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.comparison.histogram import Histogram, histogram
from bloomq.comparison.sides import Side
from bloomq.config import WeightSpec, weight_specs
from bloomq.errors import NumericError
from bloomq.schemes import ROW_MULTIPLE

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
# Weights of a block: 4 MB as float32, with float64 squares some 40 MB a worker.
_BLOCK_WEIGHTS = 1 << 20
WORST = 3  # rows and columns that are named
SIGMAS = 6  # beyond so many times the root mean square a weight counts as an outlier
# The norm in front of a matrix: what a converter multiplies into its columns it divides out there.
_NORM_OF = {"attn.qkv": "ln_1", "mlp.up": "ln_2"}
Progress = Callable[[int, int], None]  # (weights done, in all)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A matrix W of the original beside W' of the pack.

    kind: the weight's name without its layer; stored: the scheme of W'; bits: of W' for each
    weight, scales counted; relative_error: |W - W'|^2 / |W|^2; snr_db: the same in decibels;
    max_error: the largest |W - W'|; rms: of W; largest: the largest |W| / rms; kurtosis: of W, 3 of
    a normal distribution; beyond: the share of W beyond 6 rms; worst_rows, worst_columns: (index,
    its relative error), worst first; folded: did the converter move a scale of the columns into the
    norm in front? Then W' is what they are together.
    """

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, int]
    stored: str
    original: str
    bits: float
    relative_error: float
    snr_db: float
    max_error: float
    rms: float
    largest: float
    kurtosis: float
    beyond: float
    worst_rows: tuple[tuple[int, float], ...]
    worst_columns: tuple[tuple[int, float], ...]
    folded: bool
    histogram: Histogram


@dataclass(slots=True, eq=False)
class _Sums:
    """Of a block of rows. patterns: how many |w| have each pattern of their upper 15 bits."""

    row_error: F64
    row_square: F64
    column_error: F64
    column_square: F64
    fourth: float
    max_error: float
    most: float
    patterns: I64


def measure(ours: Side, theirs: Side, threads: int, progress: Progress) -> Iterator[Tensor]:
    """Every matrix, in the model's order. Raises: NumericError."""
    specs = [spec for spec in weight_specs(ours.config) if spec.is_matrix]
    total, done = sum(math.prod(spec.shape) for spec in specs), 0
    with ThreadPoolExecutor(threads) as pool:
        try:
            for spec in specs:
                sums: list[_Sums] = []
                factor = _factor(ours, theirs, spec.name)
                for part in _in_order(pool, threads, ours, theirs, spec, factor):
                    sums.append(part)
                    done += len(part.row_error) * spec.shape[1]
                    progress(done, total)
                yield _tensor(ours, theirs, spec, factor, sums)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _factor(ours: Side, theirs: Side, name: str) -> F32 | None:
    """What the pack's columns are to be multiplied with, [K], where a scale of theirs was moved
    into the norm in front; None: nothing was."""
    layer, _, leaf = name.partition(".")[2].partition(".")
    if leaf not in _NORM_OF:
        return None
    key, length = f"h.{layer}.{_NORM_OF[leaf]}.weight", ours.config.hidden_size
    mine, original = ours.vector(key, length), theirs.vector(key, length)
    if np.array_equal(mine, original):
        return None
    return np.divide(mine, original, out=np.ones(length, np.float32), where=original != 0)


def _in_order(
    pool: ThreadPoolExecutor, threads: int, ours: Side, theirs: Side, spec: WeightSpec,
    factor: F32 | None,
) -> Iterator[_Sums]:  # fmt: skip
    """The sums of a matrix's blocks; workers run a few blocks ahead."""
    n, k = spec.shape
    rows = max(ROW_MULTIPLE, _BLOCK_WEIGHTS // k // ROW_MULTIPLE * ROW_MULTIPLE)
    waiting: deque[Future[_Sums]] = deque()
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        waiting.append(pool.submit(_sums, ours, theirs, spec.name, start, stop, factor))
        if len(waiting) > threads:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _sums(ours: Side, theirs: Side, name: str, start: int, stop: int, factor: F32 | None) -> _Sums:
    """Of one block; runs in a worker thread."""
    original, coded = theirs.rows(name, start, stop), ours.rows(name, start, stop)
    for side, found in ((theirs, original), (ours, coded)):
        if not np.isfinite(found).all():
            raise NumericError(
                f"{side.path}: {name} holds NaN or infinity, which no error can be measured of: "
                "convert it again"
            )
    if factor is not None:
        coded = coded * factor
    error = original - coded
    square, lost = np.square(original, dtype=np.float64), np.square(error, dtype=np.float64)
    patterns = np.ascontiguousarray(np.abs(original)).view(np.uint32).ravel() >> 16
    return _Sums(
        lost.sum(axis=1), square.sum(axis=1), lost.sum(axis=0), square.sum(axis=0),
        float(np.square(square).sum()), float(np.abs(error).max()), float(np.abs(original).max()),
        np.bincount(patterns, minlength=1 << 15),
    )  # fmt: skip


def _tensor(
    ours: Side, theirs: Side, spec: WeightSpec, factor: F32 | None, sums: list[_Sums]
) -> Tensor:
    n, k = spec.shape
    row_error = np.concatenate([part.row_error for part in sums])
    row_square = np.concatenate([part.row_square for part in sums])
    column_error = np.sum([part.column_error for part in sums], axis=0)
    column_square = np.sum([part.column_square for part in sums], axis=0)
    error, square = float(row_error.sum()), float(row_square.sum())
    relative = ratio(error, square)
    rms = math.sqrt(square / (n * k))
    fourth = sum(part.fourth for part in sums)
    beyond = _count_beyond(np.sum([part.patterns for part in sums], axis=0), SIGMAS * rms)
    stored, nbytes = ours.stored(spec.name)
    layer, kind = layer_and_kind(spec.name)
    return Tensor(
        spec.name, kind, layer, (n, k), stored, theirs.stored(spec.name)[0], 8 * nbytes / (n * k),
        relative, -10 * math.log10(relative) if relative else math.inf,
        max(part.max_error for part in sums), rms,
        ratio(max(part.most for part in sums), rms), ratio(fourth * n * k, square * square),
        beyond / (n * k), _worst(row_error, row_square), _worst(column_error, column_square),
        factor is not None, histogram(ours, theirs, spec.name, (n, k), factor, rms),
    )  # fmt: skip


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """h.3.attn.qkv -> (3, attn.qkv); wte -> (None, wte)."""
    if not name.startswith("h."):
        return None, name
    layer, _, kind = name[2:].partition(".")
    return int(layer), kind


def ratio(part: float, whole: float) -> float:
    """part / whole; of nothing 0, or infinity."""
    return part / whole if whole else (math.inf if part else 0.0)


def _count_beyond(patterns: I64, limit: float) -> int:
    """Weights whose magnitude is above `limit`, to the 0.8 % that two patterns lie apart."""
    if not limit:
        return 0
    return int(patterns[(int(np.float32(limit).view(np.uint32)) >> 16) + 1 :].sum())


def _worst(error: F64, square: F64) -> tuple[tuple[int, float], ...]:
    """Of rows or columns that are not zero, those with the largest relative error."""
    relative = np.divide(error, square, out=np.zeros(len(error)), where=square > 0)
    order = np.argsort(-relative, kind="stable")[:WORST]
    return tuple((int(i), float(relative[i])) for i in order if relative[i] > 0)
