"""A checkpoint becomes a pack: a producer's pieces go, in order, into the writer.

Invariant: an interrupted run that is repeated gives the same bytes as one that was not interrupted;
a source that changed meanwhile gives no pack at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from bloomq.errors import CheckpointError, UsageError
from bloomq.pack import Pack
from bloomq.pack_writer import check_target, partial_folder, writing_pack
from bloomq.taken_folder import size_text
from bloomq.weight_files import PackWriter

from .pieces import Producer, round_to_nearest
from .plan import Plan, make_plan
from .source import Checkpoint

__all__ = ["Conversion", "convert", "run"]

Progress = Callable[[int, int], None]  # (source bytes done, source bytes in all)


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did. Bytes are of the weights; resumed_bytes: of the source, that an
    interrupted run had done before; notes are for the user."""

    pack: Path
    source_bytes: int
    pack_bytes: int
    bits_per_weight: float
    seconds: float
    notes: tuple[str, ...]
    resumed_bytes: int = 0


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
    fresh: bool = False,
    checksum_source: bool = False,
    calibrate: str | Path | None = None,
    calibration_tokens: int | None = None,
    bits: float | None = None,
    calibration_device: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert the checkpoint or the pack at `source` to a pack at `target`.

    scheme: int8, int6, nl4, int4, nf4, f32, bf16 or f16; None: that in which the checkpoint is
    quantized already, otherwise nl4; group_size: of nl4 and int4 (32, 64 or 128); head_scheme: of
    the embedding and the head, by default int6 for nl4, int4 and nf4, otherwise the scheme itself.
    lora: folders of PEFT adapters that are merged in, each times its scale.
    revision and stream: of a hub id, see `read_checkpoint`. `force` replaces a pack that is there,
    `fresh` begins anew where an interrupted run of the same conversion would be continued.
    checksum_source: put the SHA-256 of every file of the source into the pack's provenance, which
    reads them all once more.

    calibrate: a text, or a folder of .txt files, to choose codes and scales by what reaches each
    matrix (nl4, int4, int6 and int8); calibration_tokens: of it, None for 24,576. bits: instead of
    a scheme for all, one for each matrix, nl4, int6 or int8, so that the least is lost on that text
    with so many bits a weight, all in. calibration_device: that computes, "cpu" (None) or a GPU,
    "cuda" or "cuda:N".

    Raises: UsageError, InputNotFound, ConfigError, CheckpointError, TokenizerError, PackError,
    NumericError, OutputError, BackendError, CapacityError.
    """
    check_target(Path(target), force)  # before a calibration's hours
    plan, producer, method = prepare(
        source, target, scheme=scheme, group_size=group_size, head_scheme=head_scheme, lora=lora,
        revision=revision, stream=stream, threads=threads, calibrate=calibrate,
        calibration_tokens=calibration_tokens, bits=bits, calibration_device=calibration_device,
    )  # fmt: skip
    return run(
        plan, producer=producer, method=method, force=force, fresh=fresh,
        checksum_source=checksum_source, progress=progress,
    )  # fmt: skip


def prepare(
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
    calibrate: str | Path | None = None,
    calibration_tokens: int | None = None,
    bits: float | None = None,
    calibration_device: str | None = None,
    calibrating: Progress | None = None,
) -> tuple[Plan, Producer | None, Mapping[str, Any] | None]:
    """What `run` needs for a conversion with the options of `convert`: plan, producer, method.

    calibrating: told how far a calibration is, while it is prepared and while it runs, in steps
    done of all. Raises: as `convert`.
    """
    if calibrate is None:
        if bits is not None or calibration_tokens is not None:
            raise UsageError("bits and calibration_tokens need a text: name one with calibrate")
        if calibration_device is not None:
            raise UsageError("only a calibration has a device: name a text with calibrate")
        plan = make_plan(
            source, target, scheme=scheme, group_size=group_size, head_scheme=head_scheme,
            lora=lora, revision=revision, stream=stream, threads=threads,
        )  # fmt: skip
        return plan, None, None
    from .calibration.conversion import plan_calibrated
    from .calibration.engine import device_of

    if stream:
        raise UsageError("a calibration reads the checkpoint more than once: not with stream")
    return plan_calibrated(
        source, target, calibrate, tokens=calibration_tokens, bits=bits, scheme=scheme,
        group_size=group_size, head_scheme=head_scheme, lora=lora, revision=revision,
        threads=threads, device=device_of(calibration_device or "cpu"),
        progress=calibrating or (lambda done, total: None),
    )  # fmt: skip


def run(
    plan: Plan,
    *,
    producer: Producer | None = None,
    method: Mapping[str, Any] | None = None,
    force: bool = False,
    fresh: bool = False,
    checksum_source: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert as planned.

    producer: what makes the weights, by default `round_to_nearest`; method: what its bytes depend
    on beside the checkpoint and the schemes, as the pack's provenance names it. Raises: as
    `convert`.
    """
    started = perf_counter()
    checkpoint, show = plan.checkpoint, progress or (lambda done, total: None)
    producer = producer or round_to_nearest(plan.workers)
    fingerprint = plan.fingerprint()
    provenance = {**plan.provenance(fingerprint), **(method or {})}
    with writing_pack(
        plan.target, checkpoint.config, plan.schemes, force=force, fresh=fresh,
        job=plan.job({**provenance, "checksum_source": checksum_source}),
    ) as writer:  # fmt: skip
        resumed = _source_bytes(checkpoint, writer.done)
        notes = checkpoint.notes + _notes(plan, resumed, dropped=writer.dropped)
        _produce(plan, producer, writer, resumed, show)
        if checksum_source:
            provenance["source_files"] = plan.watch.digests(plan.workers)
        _check_source(plan, fingerprint)
        writer.finish(checkpoint.tokenizer, provenance, settings=checkpoint.settings)
    pack = Pack.open(plan.target)
    return Conversion(
        plan.target, checkpoint.nbytes, pack.nbytes, pack.bits_per_weight,
        perf_counter() - started, notes, resumed,
    )  # fmt: skip


def _produce(
    plan: Plan, producer: Producer, writer: PackWriter, done: int, progress: Progress
) -> None:
    """Write every weight that is not written yet."""
    total = plan.checkpoint.nbytes
    if done:
        progress(done, total)
    for weight in writer.done:
        _release(plan.checkpoint, weight)
    pieces, last = producer(plan.checkpoint, plan.schemes, writer.done), ""
    try:
        with closing(pieces):  # type: ignore[type-var]
            for piece in pieces:
                for key, array in piece.arrays.items():
                    writer.write(key, array)
                if piece.weight != last:  # a weight's pieces come one behind the other
                    _release(plan.checkpoint, last)
                    last = piece.weight
                done += piece.source_bytes
                progress(done, total)
        _release(plan.checkpoint, last)
    except CheckpointError as error:
        # A network's file system that fails for a while is no damage of the source.
        if isinstance(error.__context__, OSError) and plan.watch.is_undisturbed:
            writer.keep_work()
        raise


def _release(checkpoint: Checkpoint, weight: str) -> None:
    """What the weight was made of is not read again."""
    for key in (f"{weight}.weight", f"{weight}.bias"):
        if key in checkpoint.tensors:
            checkpoint.tensors[key].release()


def _check_source(plan: Plan, fingerprint: str) -> None:
    """Raises: CheckpointError where the source is not what it was."""
    plan.watch.check()
    if plan.fingerprint() != fingerprint:
        raise CheckpointError(
            f"{plan.source}: its weights changed while they were converted: convert again when "
            "nothing writes them"
        )


def _source_bytes(checkpoint: Checkpoint, weights: Collection[str]) -> int:
    return sum(
        checkpoint.tensors[key].nbytes
        for name in weights for key in (f"{name}.weight", f"{name}.bias")
        if key in checkpoint.tensors
    )  # fmt: skip


def _notes(plan: Plan, resumed: int, *, dropped: bool) -> tuple[str, ...]:
    folder = partial_folder(plan.target)
    if resumed:
        of = f"{size_text(resumed)} of {size_text(plan.checkpoint.nbytes)}"
        return (f"{folder}: an interrupted run had done {of}: went on from there",)
    if dropped:
        return (
            f"{folder}: what an interrupted run had left was of another source, other options or "
            "another version, or damaged: began anew",
        )
    return ()
