"""A checkpoint becomes a pack: blocks of rows go through worker threads, in order, into the writer.

Peak memory is a few blocks, whatever the model's size: no tensor is ever whole in memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from bloomq import __version__
from bloomq.config import BloomConfig, WeightSpec, weight_specs
from bloomq.errors import NumericError, UsageError
from bloomq.pack import Pack
from bloomq.pack_writer import writing_pack
from bloomq.schemes import ROW_MULTIPLE, Array, Scheme, bf16_to_f32, get_scheme, round_up

from .merging import merged
from .prequantized import stored_notes
from .source import Checkpoint, SourceTensor

_BLOCK_BYTES = 4 << 20  # of source; with float32 copies about five times that in memory, a worker
# A worker needs some 100 MB, and a few of them are faster than any disk.
_DEFAULT_WORKERS, _MOST_WORKERS = 8, 64
Progress = Callable[[int, int], None]  # (source bytes done, source bytes in all)


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did. Bytes are of the weights; notes are for the user."""

    pack: Path
    source_bytes: int
    pack_bytes: int
    bits_per_weight: float
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows [start, stop) of one tensor, to be stored under `keys`."""

    tensor: SourceTensor
    start: int
    stop: int
    name: str
    scheme: Scheme | None  # None: a vector, stored as padded float32

    @property
    def nbytes(self) -> int:
        rows = self.tensor.shape[0]
        return int(self.tensor.nbytes * (self.stop - self.start) // rows)


# The embedding, which is also the head, suffers most from few bits; in int6 it loses next to
# nothing (docs/experiments.md).
_HEAD_OF = {"int4": "int6", "nf4": "int6"}


def convert(
    source: str | Path,
    target: str | Path,
    *,
    scheme: str | None = None,
    group_size: int | None = None,
    head_scheme: str | None = None,
    lora: Sequence[tuple[str | Path, float]] = (),
    revision: str | None = None,
    stream: bool = False,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert the Hugging Face checkpoint in folder `source` to a pack at `target`.

    scheme: int8, int6, int4, nf4, f32, bf16 or f16; None: that in which the checkpoint is quantized
    already (unless a group_size is given), otherwise int4; group_size: of int4 (32, 64 or 128);
    head_scheme: of the embedding and the head, by default int6 for int4 and nf4, otherwise the
    scheme itself. lora: folders of PEFT adapters that are merged in, each times its scale.
    revision and stream: of a hub id, see `read_checkpoint`. `force` replaces a pack that is there.

    Raises: UsageError, InputNotFound, ConfigError, CheckpointError, TokenizerError, NumericError,
    OutputError.
    """
    from .reading import read_checkpoint

    started = perf_counter()
    workers = _workers(threads)
    body, head = _body_and_head("int4" if scheme is None else scheme, group_size, head_scheme)
    checkpoint = merged(read_checkpoint(source, revision=revision, stream=stream), lora)
    kept = checkpoint.stored_scheme
    if kept is not None and scheme is None and group_size is None:
        body, head = kept, _body_and_head(kept.name, None, head_scheme)[1]
    schemes = choose_schemes(checkpoint.config, body, head)
    with writing_pack(Path(target), checkpoint.config, schemes, force=force) as writer:
        done = 0
        for block, arrays in _quantized(checkpoint, schemes, workers):
            for key, array in arrays.items():
                writer.write(key, array)
            if block.stop == block.tensor.shape[0]:
                block.tensor.release()
            done += block.nbytes
            if progress is not None:
                progress(done, checkpoint.nbytes)
        options = {"scheme": body.label, "head_scheme": head.label}
        writer.finish(
            checkpoint.tokenizer,
            {
                **checkpoint.provenance,
                **options,
                "fingerprint": checkpoint.fingerprint,
                "bloomq": __version__,
            },
            settings=checkpoint.settings,
        )
    pack = Pack.open(target)
    return Conversion(
        Path(target), checkpoint.nbytes, pack.nbytes, pack.bits_per_weight,
        perf_counter() - started, checkpoint.notes + stored_notes(checkpoint, body),
    )  # fmt: skip


def _body_and_head(
    scheme: str, group_size: int | None, head_scheme: str | None
) -> tuple[Scheme, Scheme]:
    """Both schemes; the group size belongs to whichever is int4."""
    head_scheme = _HEAD_OF.get(scheme, scheme) if head_scheme is None else head_scheme
    if "int4" not in (scheme, head_scheme):
        return get_scheme(scheme, group_size), get_scheme(head_scheme, group_size)
    return (
        get_scheme(scheme, group_size if scheme == "int4" else None),
        get_scheme(head_scheme, group_size if head_scheme == "int4" else None),
    )


def _workers(threads: int | None) -> int:
    if threads is None:
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        cores = allowed or os.cpu_count() or 1
        return min(cores + 1, _DEFAULT_WORKERS)  # one more: some wait for the disk
    if (
        isinstance(threads, bool)
        or not isinstance(threads, int)
        or not 1 <= threads <= _MOST_WORKERS
    ):
        raise UsageError(f"threads is {threads!r}, expected 1 to {_MOST_WORKERS}")
    return threads


def choose_schemes(config: BloomConfig, body: Scheme, head: Scheme) -> dict[str, Scheme]:
    """The scheme of every matrix: `head` for the embedding and the language model's head; a
    classifier's few rows stay as they are."""
    scheme_of = {
        "embedding": head, "head": head, "linear": body, "classifier": get_scheme("f32")
    }  # fmt: skip
    return {s.name: scheme_of[s.kind] for s in weight_specs(config) if s.is_matrix}


def _quantized(
    checkpoint: Checkpoint, schemes: dict[str, Scheme], threads: int
) -> Iterator[tuple[_Block, dict[str, Array]]]:
    """Every block with its arrays, in order; workers run a few blocks ahead."""
    blocks = _blocks(checkpoint, schemes)
    window: deque[tuple[_Block, Future[dict[str, Array]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for block in blocks:
                window.append((block, pool.submit(_run, block)))
                if len(window) > threads + 1:
                    oldest, future = window.popleft()
                    yield oldest, future.result()
            while window:
                oldest, future = window.popleft()
                yield oldest, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _blocks(checkpoint: Checkpoint, schemes: dict[str, Scheme]) -> Iterator[_Block]:
    for spec in weight_specs(checkpoint.config):
        scheme = schemes.get(spec.name)
        yield from _weight_blocks(checkpoint, spec, scheme)
        if spec.has_bias:
            bias = checkpoint.tensors[f"{spec.name}.bias"]
            yield _Block(bias, 0, bias.shape[0], f"{spec.name}.bias", None)


def _weight_blocks(
    checkpoint: Checkpoint, spec: WeightSpec, scheme: Scheme | None
) -> Iterator[_Block]:
    tensor = checkpoint.tensors[f"{spec.name}.weight"]
    if scheme is None:
        yield _Block(tensor, 0, tensor.shape[0], f"{spec.name}.weight", None)
        return
    row_bytes = tensor.nbytes // tensor.shape[0]
    rows = max(ROW_MULTIPLE, _BLOCK_BYTES // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE)
    for start in range(0, tensor.shape[0], rows):
        stop = min(start + rows, tensor.shape[0])
        yield _Block(tensor, start, stop, spec.name, scheme)


def _run(block: _Block) -> dict[str, Array]:
    """Read and quantize one block; runs in a worker thread."""
    from .quantize import all_finite, quantize_block

    stored = block.tensor.stored
    if stored is not None and stored.scheme == block.scheme:
        arrays = stored.parts(block.start, block.stop)
        return {f"{block.name}.{part}": array for part, array in arrays.items()}
    raw = block.tensor.rows(block.start, block.stop)
    if not all_finite(raw, block.tensor.dtype):
        raise NumericError(f"{block.tensor.name} holds NaN or infinity: the checkpoint is damaged")
    if block.scheme is None:
        values = (
            bf16_to_f32(raw.view(np.uint16))
            if block.tensor.dtype == "BF16"
            else raw.astype(np.float32)
        )
        padded = np.zeros(round_up(len(values), 32), np.float32)
        padded[: len(values)] = values
        return {block.name: padded}
    parts = quantize_block(raw, block.tensor.dtype, block.scheme)
    for name, part in block.scheme.parts((len(raw), raw.shape[1])).items():
        if name in ("scales", "values") and not all_finite(parts[name], part.dtype):
            raise NumericError(
                f"{block.tensor.name} holds weights too large for {block.scheme.name}: "
                "choose bf16, f32 or int8"
            )
    return {f"{block.name}.{part}": array for part, array in parts.items()}
