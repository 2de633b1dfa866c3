"""A calibrated conversion: its plan, its producer, and what the pack's provenance says of it."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bloomq.errors import OutputError, UsageError
from bloomq.files import exists
from bloomq.pack_writer import partial_folder

from ..pieces import Producer
from ..plan import Plan, make_plan
from .budget import check_bits, choose
from .engine import CPU, Device, threads_of
from .producer import VERSION, Settings, calibrated, making_up, streams
from .scratch import FILES
from .sensitivity import Progress, measure
from .text import TOKENS, read_windows, spread

METHOD = "gptq"  # as provenance names it; the version of the method is the converter's


def plan_calibrated(
    source: str | Path, target: str | Path, text: str | Path, *, tokens: int | None = None,
    window: int | None = None, bits: float | None = None, scheme: str | None = None,
    group_size: int | None = None, head_scheme: str | None = None,
    lora: Sequence[tuple[str | Path, float]] = (), revision: str | None = None,
    threads: int | None = None, device: Device = CPU,
    settings: Settings | None = None, progress: Progress = lambda done, total: None,
) -> tuple[Plan, Producer, Mapping[str, Any]]:  # fmt: skip
    """What `convert.run` needs to calibrate on a text: plan, producer and method.

    tokens, window: see `read_windows`; bits: choose each matrix's scheme under this budget, by
    sensitivities that are measured here and now; device: that computes; progress: of the
    measuring, and then of the blocks, in blocks done of all. Raises: as `make_plan`,
    `read_windows`, `measure` and `choose`.
    """
    settings = settings or Settings()
    if bits is not None and (scheme, group_size, head_scheme) != (None, None, None):
        raise UsageError(
            "found bits beside a scheme, group size or head scheme, expected one or the other: bits"
            " has them chosen"
        )
    plan = make_plan(
        source, target, scheme=scheme, group_size=group_size, head_scheme=head_scheme,
        lora=lora, revision=revision, threads=threads,
    )  # fmt: skip
    checkpoint = plan.checkpoint
    if bits is not None:
        check_bits(checkpoint.config, bits)
    elif all(scheme.is_float for scheme in plan.schemes.values()):
        raise UsageError(
            f"scheme is {scheme}, which a calibration leaves as it is: choose nl4, int4, int6 "
            "or int8, or drop the text"
        )
    ids = read_windows(checkpoint, text, tokens=TOKENS if tokens is None else tokens, window=window)
    folder = partial_folder(Path(target))
    wanted = TOKENS if tokens is None else tokens
    if 2 * ids.size < wanted:
        note = f"{text}: calibrates on {ids.size} tokens of {wanted}: a longer text does better"
        plan = replace(plan, checkpoint=replace(checkpoint, notes=(*checkpoint.notes, note)))
    if bits is not None:
        with _scratch_beside(folder) as scratch:
            costs = measure(
                checkpoint, spread(ids), scratch, threads=threads, device=device, progress=progress
            )
        options = {k: v for k, v in plan.options.items() if "scheme" not in k}
        plan = replace(
            plan, schemes=choose(checkpoint.config, costs, bits), options={**options, "bits": bits}
        )
    method = {
        "method": METHOD,
        "calibration": {
            "version": VERSION, "device": device.label, "tokens": int(ids.size),
            "window": int(ids.shape[1]), **asdict(settings),
            "sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
        },
    }  # fmt: skip
    along = streams(making_up(checkpoint.config, plan.schemes, settings, ids.size))
    plan = replace(
        plan, options={**plan.options, **method}, workers=threads_of(threads), device=device.torch,
        scratch_bytes=FILES * along * 4 * ids.size * checkpoint.config.hidden_size,
    )  # fmt: skip
    producer = calibrated(
        ids, folder / "calibration", settings=settings, threads=threads, device=device,
        progress=progress,
    )  # fmt: skip
    return plan, producer, method


@contextmanager
def _scratch_beside(folder: Path) -> Iterator[Path]:
    """A folder on the target's disk, gone in the end. Not in the one where an interrupted run's
    work lies: whether that can go on is known when the schemes are. Raises: OutputError."""
    parent = folder.parent
    while not exists(parent):
        parent = parent.parent
    try:
        made = tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=parent)
    except OSError as error:
        raise OutputError(f"{parent}: cannot be written: {error.strerror}") from None
    with made as name:
        yield Path(name) / "versions"
