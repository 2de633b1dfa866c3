"""What a conversion will do, before it does: schemes, sizes, files, disk, memory and time.

Invariant: the plan that is shown is the plan that runs; making one writes nothing and reads no more
than headers and small files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from bloomq import __version__
from bloomq.config import weight_specs
from bloomq.errors import UsageError
from bloomq.pack import VERSION, stored_arrays
from bloomq.scheme_choice import DEFAULT_SCHEME, body_and_head, choose_schemes
from bloomq.schemes import DEFAULT_GROUP, Scheme
from bloomq.shards import Shard, array_bytes
from bloomq.taken_folder import size_text
from bloomq.weight_files import layout

from .merging import merged
from .packed import check_pack
from .pieces import Block, blocks, rounded_block
from .prequantized import stored_notes
from .source import Checkpoint
from .watch import Watch

# Raised whenever the same source and options give other bytes: an interrupted run of another
# version is not continued, and `verify --deep` can say why a pack differs.
CONVERTER_VERSION = 1
_DEFAULT_WORKERS, _MOST_WORKERS = 8, 64
_MANIFEST_BYTES = 320  # of each array, at most: its key twice, digest and shape
# Measured by benchmarks/conversion.py: Python, NumPy, Numba with its kernels; and what a worker
# has at hand for a block: as read, as float32, as stored, twice for the queue.
_LIBRARIES_BYTES, _WORKER_BYTES = 170 << 20, 24 << 20
_SAMPLED_BLOCKS = 8  # of each scheme, for each worker


@dataclass(frozen=True, slots=True)
class Share:
    """The weights that are stored in one scheme; vectors are float32. Bytes as stored."""

    scheme: str
    weights: int
    parameters: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A conversion of a checkpoint to a pack at `target`. options: as the pack's provenance names
    them; watch: the source's files as they were before it was read; scratch_bytes: of files that a
    calibration writes beside the pack and deletes; device: torch's name of one that calibrates,
    None for the CPU."""

    source: str
    target: Path
    checkpoint: Checkpoint
    schemes: Mapping[str, Scheme]
    options: Mapping[str, Any]
    workers: int
    watch: Watch
    scratch_bytes: int = 0
    device: str | None = None

    @property
    def shards(self) -> list[Shard]:
        """The pack's weights files."""
        return layout(self.checkpoint.config, self.schemes)

    @property
    def shares(self) -> list[Share]:
        """How many weights, parameters and bytes each scheme gets."""
        rows: dict[str, Share] = {}
        for spec in weight_specs(self.checkpoint.config):
            scheme = self.schemes.get(spec.name)
            matrix, vectors = math.prod(spec.shape), spec.shape[0] * spec.has_bias
            for key, part in stored_arrays(spec, scheme).items():
                is_matrix = scheme is not None and not key.endswith(".bias")
                label = scheme.label if scheme is not None and is_matrix else "vectors"
                row = rows.get(label, Share(label, 0, 0, 0))
                first = is_matrix and key.endswith((".codes", ".values"))
                count = matrix if first else 0 if is_matrix else vectors
                rows[label] = Share(
                    label, row.weights + (first or not is_matrix), row.parameters + count,
                    row.nbytes + array_bytes(part),
                )  # fmt: skip
        return list(rows.values())

    @property
    def pack_bytes(self) -> int:
        """Bytes of the arrays."""
        return sum(share.nbytes for share in self.shares)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.pack_bytes / sum(share.parameters for share in self.shares)

    @property
    def disk_needed_bytes(self) -> int:
        """Of all files; a pack that is replaced is deleted only when the new one is whole."""
        arrays = sum(len(shard.places) for shard in self.shards)
        text = len(self.checkpoint.tokenizer or b"") + _MANIFEST_BYTES * arrays
        return sum(shard.nbytes for shard in self.shards) + text + self.scratch_bytes

    @property
    def disk_free_bytes(self) -> int:
        folder = Path(os.path.realpath(self.target)).parent
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    @property
    def peak_memory_bytes(self) -> int:
        """An estimate."""
        if self.is_calibrated:
            from .calibration.estimate import peak_bytes

            return _LIBRARIES_BYTES + peak_bytes(self)
        return _LIBRARIES_BYTES + self.workers * _WORKER_BYTES

    @property
    def device_bytes(self) -> int:
        """Of the memory of the device that calibrates, an estimate; 0 without one."""
        if self.device is None:
            return 0
        from .calibration.estimate import device_bytes

        return device_bytes(self)

    @property
    def is_calibrated(self) -> bool:
        return "calibration" in self.options

    @property
    def summary(self) -> str:
        """What is read and written, in a line."""
        files = len(self.shards)
        return (
            f"{self.source}: {size_text(self.checkpoint.nbytes)} become "
            f"{size_text(self.pack_bytes)} in {files} file{'s' * (files > 1)}; "
            f"{size_text(self.disk_needed_bytes)} of disk needed, "
            f"{size_text(self.disk_free_bytes)} free"
        )

    def describe(self, seconds: float | None) -> dict[str, Any]:
        """All of it, for JSON; seconds: what `estimate_seconds` found, if it was asked."""
        config = self.checkpoint.config
        return {
            "source": self.source, "target": str(self.target),
            "form": self.checkpoint.provenance.get("format"),
            "dtypes": sorted({tensor.dtype for tensor in self.checkpoint.tensors.values()}),
            "source_bytes": self.checkpoint.nbytes, "architecture": config.architecture,
            "hidden_size": config.hidden_size, "n_layer": config.n_layer,
            "n_head": config.n_head, "vocab_size": config.vocab_size, **self.options,
            "schemes": [asdict(share) for share in self.shares],
            "pack_bytes": self.pack_bytes, "bits_per_weight": round(self.bits_per_weight, 4),
            "files": {shard.name: shard.nbytes for shard in self.shards},
            "disk_needed_bytes": self.disk_needed_bytes, "disk_free_bytes": self.disk_free_bytes,
            "threads": self.workers, "estimated_peak_memory_bytes": self.peak_memory_bytes,
            "estimated_device_bytes": self.device_bytes,
            "estimated_seconds": None if seconds is None else round(seconds, 1),
            "notes": list(self.checkpoint.notes),
        }  # fmt: skip

    def lines(self, seconds: float | None) -> list[str]:
        """All of it, for a person."""
        config, source = self.checkpoint.config, self.checkpoint
        dtypes = ", ".join(sorted({tensor.dtype for tensor in source.tensors.values()}))
        rows = [
            f"source   {self.source}: {source.provenance.get('format')}, {dtypes}, "
            f"{size_text(source.nbytes)}",
            f"model    {config.architecture}, {config.n_layer} layers of {config.hidden_size}, "
            f"{config.vocab_size} tokens",
            f"pack     {self.target}: {size_text(self.pack_bytes)}, "
            f"{self.bits_per_weight:.2f} bits per weight",
        ]
        for share in self.shares:
            rows.append(
                f"         {share.scheme:10} {share.weights:4} arrays {size_text(share.nbytes):>10}"
            )
        sizes = [shard.nbytes for shard in self.shards]
        enough = "" if self.disk_needed_bytes <= self.disk_free_bytes else ": NOT ENOUGH"
        rows += [
            f"files    {len(sizes)}, the largest {size_text(max(sizes))}",
            f"disk     {size_text(self.disk_needed_bytes)} needed, "
            f"{size_text(self.disk_free_bytes)} free{enough}",
        ]
        memory, threads = size_text(self.peak_memory_bytes), self.workers
        rows.append(f"memory   about {memory} at the peak, {threads} threads")
        if self.device is not None:
            rows.append(f"device   {self.device}: about {size_text(self.device_bytes)} at the peak")
        if seconds is None:
            return rows
        rate = source.nbytes / 1e6 / max(seconds, 1e-9)
        how = (
            f"a sample of reading and rounding ({rate:.0f} MB/s), if the disk writes as fast"
            if not self.is_calibrated
            else "its operations, at rates measured now"
        )
        return [*rows, f"time     about {_duration(seconds)} by {how}"]

    def fingerprint(self) -> str:
        """The checkpoint's, or what its reader knows it by."""
        known = self.checkpoint.provenance.get("fingerprint")
        return known if isinstance(known, str) else self.checkpoint.fingerprint

    def provenance(self, fingerprint: str) -> dict[str, Any]:
        """Where the pack will come from: what its manifest says."""
        return {
            **self.checkpoint.provenance, **self.options, "fingerprint": fingerprint,
            "bloomq": __version__, "converter": CONVERTER_VERSION,
        }  # fmt: skip

    def job(self, provenance: Mapping[str, Any]) -> str:
        """A digest of everything that the bytes to come depend on."""
        schemes = {name: scheme.label for name, scheme in self.schemes.items()}
        files = [[shard.name, shard.nbytes] for shard in self.shards]
        facts = [VERSION, provenance, self.watch.key, schemes, files]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def make_plan(
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
    checkpoint: Checkpoint | None = None,
    schemes: Mapping[str, Scheme] | None = None,
) -> Plan:
    """The plan for the checkpoint at `source`, with options as of `convert`.

    checkpoint: what to convert, where it is not what `read_checkpoint(source)` gives; schemes: of
    every matrix by name, in place of one for the body and one for the head.

    Raises: UsageError, InputNotFound, ConfigError, CheckpointError, TokenizerError.
    """
    from .reading import read_checkpoint

    workers = worker_count(threads)
    asked = DEFAULT_SCHEME if scheme is None else scheme
    body, head = body_and_head(asked, group_size, head_scheme)
    watch = Watch.of(Path(source))
    if checkpoint is None:
        checkpoint = read_checkpoint(source, revision=revision, stream=stream)
    checkpoint = merged(checkpoint, lora)
    kept = checkpoint.stored_scheme if scheme is None else None
    own: dict[str, Scheme] = {}
    if kept is not None and group_size is None:
        own = _own_schemes(checkpoint, head_scheme)
        body, head = kept, body_and_head(kept.name, None, head_scheme)[1]
        table = checkpoint.tensors["wte.weight"].stored
        if table is not None and head_scheme is None:
            head = table.scheme
    elif kept is not None and kept.name in DEFAULT_GROUP:  # the size of its own grid's groups
        body, head = body_and_head(kept.name, group_size, head_scheme)
    options: dict[str, Any] = {"method": "round-to-nearest"}
    if schemes is None:
        schemes = choose_schemes(checkpoint.config, body, head) | own
        options |= {"scheme": body.label, "head_scheme": head.label}
        notes = checkpoint.notes + stored_notes(checkpoint, body)
        checkpoint = replace(checkpoint, notes=notes)
    check_pack(checkpoint, source, target, schemes)
    return Plan(str(source), Path(target), checkpoint, schemes, options, workers, watch)


def _own_schemes(checkpoint: Checkpoint, head_scheme: str | None) -> dict[str, Scheme]:
    """The scheme of every matrix that has one of its own: a pack's may differ from each other."""
    chosen = () if head_scheme is None else ("embedding", "head")
    own = {}
    for spec in weight_specs(checkpoint.config):
        tensor = checkpoint.tensors[f"{spec.name}.weight"]
        if tensor.stored is not None and spec.kind not in chosen:
            own[spec.name] = tensor.stored.scheme
    return own


def worker_count(threads: int | None) -> int:
    """So many, or one for each core and one more. Raises: UsageError."""
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


def estimate_seconds(plan: Plan) -> float:
    """How long the conversion takes here, by reading and rounding a sample of it: some blocks of
    each scheme from all over the checkpoint. Writing is not measured, since nothing is written. Of
    a calibration, by its operations."""
    if plan.is_calibrated:
        from .calibration.estimate import measured_rates, seconds_of

        return seconds_of(plan, measured_rates(plan))
    groups: dict[tuple[str, str], list[Block]] = {}
    for block in blocks(plan.checkpoint, plan.schemes):
        if block.scheme is not None:
            groups.setdefault((block.scheme.label, block.tensor.dtype), []).append(block)
    seconds = 0.0
    with ThreadPoolExecutor(plan.workers) as pool:
        for found in groups.values():
            step = max(1, len(found) // (_SAMPLED_BLOCKS * plan.workers))
            sample = found[::step][: 2 * _SAMPLED_BLOCKS * plan.workers]
            _measured(sample[0])  # compiles, if need be
            started = perf_counter()
            done_bytes = sum(pool.map(_measured, sample))
            passed = perf_counter() - started
            seconds += passed * sum(block.nbytes for block in found) / max(done_bytes, 1)
    return seconds


def _measured(block: Block) -> int:
    """Do all that a conversion does with a block but write it; its bytes of source."""
    piece = rounded_block(block)
    for array in piece.arrays.values():
        hashlib.sha256(array).digest()  # type: ignore[arg-type]
    return piece.source_bytes
