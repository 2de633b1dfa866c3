"""Rows of a weight in the form a pack stores them, and the quick way to make them: each block of
rows rounded to nearest, by worker threads, in order.

Peak memory is a few blocks, whatever the model's size: no tensor is ever whole in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from bloomq.config import WeightSpec, weight_specs
from bloomq.errors import NumericError
from bloomq.schemes import ROW_MULTIPLE, Array, Scheme, bf16_to_f32, round_up

from .source import Checkpoint, SourceTensor

_BLOCK_BYTES = 4 << 20  # of source; with float32 copies about four times that in memory, a worker


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a weight. arrays: by pack key, each to be appended to what came before;
    source_bytes: of the checkpoint, that went into it."""

    weight: str
    arrays: Mapping[str, Array]
    source_bytes: int


# Makes every weight of a checkpoint but those done already, in the order of `weight_specs`, one
# behind the other, in the scheme of each matrix.
Producer = Callable[[Checkpoint, Mapping[str, Scheme], Collection[str]], Iterator[Piece]]


@dataclass(frozen=True, slots=True)
class Block:
    """Rows [start, stop) of one tensor, to be stored under `key`, or under the keys below it."""

    weight: str
    tensor: SourceTensor
    start: int
    stop: int
    key: str
    scheme: Scheme | None  # None: a vector, stored as padded float32

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes * (self.stop - self.start) // self.tensor.shape[0]


def round_to_nearest(workers: int) -> Producer:
    """The producer that rounds each block of rows by itself, in so many threads: the kernels, the
    digests and the reads of files all run beside each other in threads of one process."""
    return partial(_rounded, workers)


def _rounded(
    workers: int, checkpoint: Checkpoint, schemes: Mapping[str, Scheme], done: Collection[str]
) -> Iterator[Piece]:
    """Workers run a few blocks ahead."""
    window: deque[Future[Piece]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for block in blocks(checkpoint, schemes, done):
                window.append(pool.submit(rounded_block, block))
                if len(window) > workers + 1:
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def blocks(
    checkpoint: Checkpoint, schemes: Mapping[str, Scheme], done: Collection[str] = ()
) -> Iterator[Block]:
    """Every block of the weights that are not done."""
    for spec in weight_specs(checkpoint.config):
        if spec.name in done:
            continue
        yield from _matrix_blocks(checkpoint, spec, schemes.get(spec.name))
        if spec.has_bias:
            key = f"{spec.name}.bias"
            bias = checkpoint.tensors[key]
            yield Block(spec.name, bias, 0, bias.shape[0], key, None)


def _matrix_blocks(
    checkpoint: Checkpoint, spec: WeightSpec, scheme: Scheme | None
) -> Iterator[Block]:
    key = f"{spec.name}.weight"
    tensor = checkpoint.tensors[key]
    if scheme is None:
        yield Block(spec.name, tensor, 0, tensor.shape[0], key, None)
        return
    row_bytes = tensor.nbytes // tensor.shape[0]
    rows = max(ROW_MULTIPLE, _BLOCK_BYTES // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE)
    for start in range(0, tensor.shape[0], rows):
        stop = min(start + rows, tensor.shape[0])
        yield Block(spec.name, tensor, start, stop, spec.name, scheme)


def rounded_block(block: Block) -> Piece:
    """Read and round one block; runs in a worker thread.

    Raises: NumericError, naming tensor and row; CheckpointError.
    """
    stored = block.tensor.stored
    if stored is not None and stored.scheme == block.scheme:
        parts = stored.parts(block.start, block.stop)
        arrays = {f"{block.key}.{part}": array for part, array in parts.items()}
        return Piece(block.weight, arrays, block.nbytes)
    raw = block.tensor.rows(block.start, block.stop)
    _check_finite(raw, block)
    if block.scheme is None:
        arrays = {block.key: _vector(raw, block.tensor.dtype)}
    else:
        arrays = _matrix(raw, block, block.scheme)
    return Piece(block.weight, arrays, block.nbytes)


def _vector(raw: Array, dtype: str) -> Array:
    values = bf16_to_f32(raw.view(np.uint16)) if dtype == "BF16" else raw.astype(np.float32)
    padded = np.zeros(round_up(len(values), 32), np.float32)
    padded[: len(values)] = values
    return padded


def _matrix(raw: Array, block: Block, scheme: Scheme) -> dict[str, Array]:
    from .quantize import all_finite, quantize_block

    parts = quantize_block(raw, block.tensor.dtype, scheme)
    for name, part in scheme.parts((raw.shape[0], raw.shape[1])).items():
        if name in ("scales", "values") and not all_finite(parts[name], part.dtype):
            raise NumericError(
                f"{block.tensor.name} holds weights too large for {scheme.name}: "
                "choose bf16, f32 or int8"
            )
    return {f"{block.key}.{part}": array for part, array in parts.items()}


def _check_finite(raw: Array, block: Block) -> None:
    from .quantize import all_finite

    dtype = block.tensor.dtype
    if all_finite(raw, dtype):
        return
    row = next(i for i in range(len(raw)) if not all_finite(raw[i : i + 1], dtype))
    raise NumericError(
        f"{block.tensor.name} holds NaN or infinity in row {block.start + row}: the checkpoint is "
        "damaged"
    )
