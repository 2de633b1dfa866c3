"""Looks a pack through beyond its checksums: is every number one that a converter would write, and,
beside the checkpoint, are they the very ones?

A checksum says that the bytes are those that were written; this says that what was written makes
sense. Reads a few MB of rows at a time, whatever the pack's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bloomq.config import WeightSpec, weight_specs
from bloomq.errors import PackError, UsageError
from bloomq.files import shown
from bloomq.pack import Pack
from bloomq.schemes import F32, ROW_MULTIPLE, TILE, Array, Scheme, bf16_to_f32

from .pieces import Block, blocks, rounded_block
from .plan import CONVERTER_VERSION, worker_count
from .source import Checkpoint

_BLOCK_VALUES = 1 << 21  # as float32, 8 MB
# Trained weights have a root mean square between 0.001 and 1, norms' gains up to some hundreds.
_LEAST_RMS, _MOST_RMS, _MOST_VECTOR = 1e-6, 10.0, 1e4
Progress = Callable[[int], None]  # called with the bytes done since the last call


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a matrix of a pack is from the checkpoint's: the root of the mean squared error over
    that of the weights."""

    weight: str
    scheme: str
    relative_error: float


@dataclass(frozen=True, slots=True)
class DeepReport:
    """What was found beside errors, which are raised. notes: tensors that are possible, and odd;
    is_exact: every byte is what the checkpoint gives; differences: where bytes cannot be compared,
    since the pack was not made by rounding to nearest by this version."""

    notes: tuple[str, ...]
    is_exact: bool = False
    differences: tuple[Difference, ...] = ()


def deep_verify(
    pack: Pack,
    checkpoint: Checkpoint | None = None,
    *,
    threads: int | None = None,
    progress: Progress = lambda done: None,
) -> DeepReport:
    """Check every value of a pack, and compare it with the checkpoint that it was made of.

    Raises: PackError, naming tensor and row; TokenizerError; UsageError; NumericError and
    CheckpointError for a damaged checkpoint.
    """
    from bloomq.tokenizer import BloomTokenizer

    if pack.has_tokenizer:
        BloomTokenizer.of_pack(pack)  # which checks its size against the vocabulary
    notes: list[str] = []
    with ThreadPoolExecutor(worker_count(threads)) as pool:
        for spec in weight_specs(pack.config):
            notes += _check_vectors(pack, spec)
            if spec.is_matrix:
                notes += _check_matrix(pack, spec, pool, progress)
        if checkpoint is None:
            return DeepReport(tuple(notes))
        _check_same_model(pack, checkpoint)
        if _is_repeatable(pack):
            for _ in pool.map(partial(_compare, pack), blocks(checkpoint, pack.schemes)):
                pass
            return DeepReport(tuple(notes), is_exact=True)
        return DeepReport(tuple(notes), differences=_differences(pack, checkpoint, pool))


def _check_vectors(pack: Pack, spec: WeightSpec) -> list[str]:
    notes = []
    for leaf in ("weight", "bias"):
        if spec.kind != "norm" and (leaf == "weight" or not spec.has_bias):
            continue
        key, length = f"{spec.name}.{leaf}", spec.shape[0]
        values = np.asarray(pack.array(key), np.float32)
        _refuse(pack, key, ~np.isfinite(values), "is NaN or infinite")
        _refuse(pack, key, np.r_[np.zeros(length, bool), values[length:] != 0], _PADDING)
        if np.abs(values).max() > _MOST_VECTOR:
            notes.append(f"{key} holds {np.abs(values).max():.3g}: implausibly large")
    return notes


_PADDING = "is padding and not zero"


def _refuse(pack: Pack, key: str, bad: Any, what: str, first_row: int = 0) -> None:
    if bad.any():
        raise PackError(f"{pack.path}: {key}: row {first_row + int(bad.argmax())} {what}")


def _check_matrix(
    pack: Pack, spec: WeightSpec, pool: ThreadPoolExecutor, progress: Progress
) -> list[str]:
    squares, largest = 0.0, 0.0
    for size, block_squares, peak in pool.map(
        partial(_check_rows, pack, spec), _row_blocks(pack.schemes[spec.name], spec)
    ):
        progress(size)
        squares, largest = squares + block_squares, max(largest, peak)
    rms = (squares / (spec.shape[0] * spec.shape[1])) ** 0.5
    if not _LEAST_RMS <= rms <= _MOST_RMS:
        size_of = "all zeros" if rms == 0 else f"a root mean square of {rms:.3g}, implausible"
        return [f"{spec.name} holds {size_of}"]
    return []


def _row_blocks(scheme: Scheme, spec: WeightSpec) -> Iterator[tuple[int, int]]:
    n, k = scheme.padded((spec.shape[0], spec.shape[1]))
    rows = max(ROW_MULTIPLE, _BLOCK_VALUES // k // ROW_MULTIPLE * ROW_MULTIPLE)
    return ((start, min(start + rows, n)) for start in range(0, n, rows))


def _check_rows(pack: Pack, spec: WeightSpec, rows: tuple[int, int]) -> tuple[int, float, float]:
    """Stored bytes, sum of squares and largest magnitude of some rows, once they are in order."""
    start, stop = rows
    scheme, name = pack.schemes[spec.name], spec.name
    parts = {part: _stored_rows(pack, f"{name}.{part}", start, stop) for part in _parts(pack, spec)}
    refuse = partial(_refuse, pack, name, first_row=start)
    if "scales" in parts:
        scales = np.asarray(parts["scales"], np.float32)
        by_row: F32 = scales[:, None] if scales.ndim == 1 else _by_row(scales)
        refuse(~np.isfinite(by_row).all(axis=1), "has a scale that is NaN or infinite")
        if scheme.name in ("int8", "nf4"):  # a grid's bear the sign of the largest weight
            refuse((by_row < 0).any(axis=1), "has a negative scale")
    if scheme.name == "int8":
        lowest = (np.asarray(parts["codes"]) == -128).any(axis=(1, 3)).reshape(-1)
        refuse(lowest, "has a code of -128, expected -127 to 127")
    n, k = spec.shape
    w = scheme.dequantize(parts, (stop - start, scheme.padded((n, k))[1]))
    refuse(~np.isfinite(w).all(axis=1), "holds NaN or infinity")
    inside = min(max(n - start, 0), stop - start)
    refuse((w[:, k:] != 0).any(axis=1), _PADDING)
    refuse(np.r_[np.zeros(inside, bool), (w[inside:] != 0).any(axis=1)], _PADDING)
    squares = float(np.einsum("ij,ij->", w, w, dtype=np.float64))
    return sum(part.nbytes for part in parts.values()), squares, float(np.abs(w).max())


def _parts(pack: Pack, spec: WeightSpec) -> Mapping[str, object]:
    return pack.schemes[spec.name].parts((spec.shape[0], spec.shape[1]))


def _stored_rows(pack: Pack, key: str, start: int, stop: int) -> Array:
    """Rows of a stored array, which has a value for each row, or tiles of 16."""
    array = pack.array(key)
    return array[start:stop] if array.ndim == 1 else array[start // TILE : stop // TILE]


def _by_row(tiled: F32) -> F32:
    """[tiles, J, 16] -> [rows, J]."""
    return tiled.transpose(0, 2, 1).reshape(-1, tiled.shape[1])


def _check_same_model(pack: Pack, checkpoint: Checkpoint) -> None:
    """Raises: PackError; UsageError where no checkpoint has the pack's numbers."""
    ours, theirs = weight_specs(pack.config), weight_specs(checkpoint.config)
    made = pack.manifest.get("provenance", {})
    if made.get("lora") and not checkpoint.provenance.get("lora"):
        raise UsageError(
            f"{pack.path}: has adapters merged in, so its numbers are not the checkpoint's: leave "
            "the checkpoint out, or look at both with 'bloomq compare'"
        )
    known = made.get("fingerprint")
    if ours != theirs or (known is not None and known != checkpoint.fingerprint):
        name = shown(str(checkpoint.provenance.get("name")))
        raise PackError(f"{pack.path}: was not made of the checkpoint {name}, as it is now")


def _is_repeatable(pack: Pack) -> bool:
    made = pack.manifest.get("provenance", {})
    found = (made.get("method"), made.get("converter"))
    return found == ("round-to-nearest", CONVERTER_VERSION)


def _compare(pack: Pack, block: Block) -> None:
    """Raises: PackError where the block's rows are not stored as rounding them gives."""
    for key, array in rounded_block(block).arrays.items():
        start = block.start if block.scheme is not None else 0
        rows = len(array) * (TILE if array.ndim > 1 else 1)
        stored = _stored_rows(pack, key, start, start + rows)
        if stored.tobytes() == array.tobytes():
            continue
        bits = f"u{array.itemsize}"  # NaN and -0 too are what they are
        at = np.argwhere(stored.view(bits) != array.view(bits))[0]
        row = int(at[0]) if array.ndim == 1 else int(at[0]) * TILE + int(at[2])
        raise PackError(
            f"{pack.path}: {key}: row {start + row} is not what the checkpoint gives: convert again"
        )


def _differences(
    pack: Pack, checkpoint: Checkpoint, pool: ThreadPoolExecutor
) -> tuple[Difference, ...]:
    sums: dict[str, tuple[float, float]] = {}
    matrices = (block for block in blocks(checkpoint, pack.schemes) if block.scheme is not None)
    for name, error, whole in pool.map(partial(_error_of, pack), matrices):
        before = sums.get(name, (0.0, 0.0))
        sums[name] = (before[0] + error, before[1] + whole)
    return tuple(
        Difference(name, pack.schemes[name].label, (error / whole) ** 0.5 if whole else 0.0)
        for name, (error, whole) in sums.items()
    )


def _error_of(pack: Pack, block: Block) -> tuple[str, float, float]:
    """The weight, its rows' squared error, and their squares."""
    raw = block.tensor.rows(block.start, block.stop)
    w = bf16_to_f32(raw) if block.tensor.dtype == "BF16" else raw.astype(np.float32)  # type: ignore[arg-type]
    found = pack.matrix(block.weight).rows(np.arange(block.start, block.stop))
    error = np.asarray(found - w, np.float64)
    return block.weight, float(np.square(error).sum()), float(np.square(w, dtype=np.float64).sum())
