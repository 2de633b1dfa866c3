"""The command `convert`: a checkpoint becomes a pack."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bloomq import console
from bloomq.cli.compare import write_report
from bloomq.cli.options import grid_options
from bloomq.errors import UsageError
from bloomq.files import exists
from bloomq.schemes import SCHEME_NAMES

if TYPE_CHECKING:
    from bloomq.converters.plan import Plan

_LARGE_BYTES = 1 << 30  # of a pack: whoever writes so much is told so before, on a pipe too


@click.command()
@click.argument("source")
@click.argument("target", type=Path)
@click.option(
    "--scheme",
    type=click.Choice(SCHEME_NAMES),
    help="How matrices are stored.  [default: nl4; for GPTQ and AWQ their own]",
)
@grid_options
@click.option(
    "--lora",
    "adapters",
    type=Path,
    multiple=True,
    metavar="DIR",
    help="Merge this PEFT adapter into the weights; several are added up.",
)
@click.option(
    "--lora-scale",
    "scales",
    type=float,
    multiple=True,
    help="How much of it: one for each --lora.  [default: 1]",
)
@click.option("--revision", help="Of a hub id: a branch, a tag or a commit.  [default: main]")
@click.option(
    "--stream",
    is_flag=True,
    help="Of a hub id: download a file when it is wanted, delete it when it is converted.",
)
@click.option(
    "--calibrate",
    type=Path,
    metavar="TEXT",
    help="Choose codes and scales by what this text, or a folder of .txt, makes of them (GPTQ).",
)
@click.option(
    "--calibration-tokens",
    type=int,
    help="From the start of each text, in equal shares.  [default: 24,576]",
)
@click.option(
    "--bits",
    type=float,
    help="With --calibrate: a scheme for each matrix, that so many bits a weight lose least.",
)
@click.option("--device", help="That --calibrate computes on: cpu, cuda or cuda:N.  [default: cpu]")
@click.option("-t", "--threads", type=int, help="Worker threads.  [default: all cores]")
@click.option("--force", is_flag=True, help="Replace a pack that is there.")
@click.option("--fresh", is_flag=True, help="Begin anew where an interrupted run had stopped.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and write nothing.")
@click.option(
    "--checksum-source", is_flag=True, help="Note the SHA-256 of every source file in the pack."
)
@click.option("--report", type=Path, help="Write a page that compares the pack with SOURCE.")
@click.option("--json", "as_json", is_flag=True, help="Print the result, or the plan, as JSON.")
def convert(
    source: str, target: Path, scheme: str | None, group_size: str | None, head_scheme: str | None,
    adapters: tuple[Path, ...], scales: tuple[float, ...], revision: str | None, stream: bool,
    calibrate: Path | None, calibration_tokens: int | None, bits: float | None,
    device: str | None, threads: int | None, force: bool, fresh: bool, dry_run: bool,
    checksum_source: bool, report: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Convert the checkpoint SOURCE to a pack at TARGET.

    SOURCE: a folder with safetensors, PyTorch .bin files or Flax msgpack, in one file or sharded,
    GPTQ and AWQ too; Megatron-DeepSpeed's layer files; a GGUF file (quantized ones need
    bloomq[gguf]); another pack; or the id of a checkpoint at the hub, OWNER/NAME (needs
    bloomq[hub]). The model is never whole in memory, and nothing is unpickled. A run that is
    interrupted leaves no pack, but its work: the same command goes on from there, and gives the
    same bytes.
    """
    from bloomq.comparison import check_target as check_report
    from bloomq.converters.convert import prepare, run
    from bloomq.pack_writer import check_target

    # huggingface_hub reads it when it is imported; without, it asks the hub for more than files.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if report is not None:
        check_report(report)
        if adapters or not exists(Path(source)):
            raise UsageError(
                f"--report compares with {source} as it lies on this disk: not for a hub id, and "
                "not with --lora"
            )
    check_target(target, force)  # before a calibration's hours
    with ExitStack() as bars:
        steps = None
        if calibrate is not None:
            steps = bars.enter_context(console.step_progress("calibrating"))
        plan, producer, method = prepare(
            source, target, scheme=scheme, group_size=int(group_size) if group_size else None,
            head_scheme=head_scheme, lora=_pairs(adapters, scales), revision=revision,
            stream=stream, threads=threads, calibrate=calibrate,
            calibration_tokens=calibration_tokens, bits=bits, calibration_device=device,
            calibrating=steps,
        )  # fmt: skip
        if dry_run:
            _print_plan(plan, as_json)
            return
        if console.is_terminal(sys.stderr) or plan.pack_bytes > _LARGE_BYTES:
            console.note(plan.summary)
        loaded = None
        if calibrate is None:
            loaded = bars.enter_context(console.byte_progress("converting"))
        try:
            result = run(
                plan, producer=producer, method=method, force=force, fresh=fresh,
                checksum_source=checksum_source, progress=loaded,
            )  # fmt: skip
        except KeyboardInterrupt:
            _say_how_to_go_on(target)
            raise
    for line in result.notes:
        console.note(f"note: {line}")
    if report is not None:
        write_report(target, Path(source), report, quiet=as_json)
    if as_json:
        click.echo(json.dumps({**asdict(result), "pack": str(result.pack)}))
        return
    speed = (result.source_bytes - result.resumed_bytes) / 1e6 / result.seconds
    click.echo(
        f"{result.pack}: {result.pack_bytes / 1e6:.1f} MB of {result.source_bytes / 1e6:.1f} MB, "
        f"{result.bits_per_weight:.2f} bits per weight, {result.seconds:.1f} s ({speed:.0f} MB/s)"
    )


def _pairs(adapters: tuple[Path, ...], scales: tuple[float, ...]) -> list[tuple[Path, float]]:
    if scales and len(scales) != len(adapters):
        raise UsageError(
            f"{len(scales)} --lora-scale for {len(adapters)} --lora: give one for each, or none"
        )
    return list(zip(adapters, scales or [1.0] * len(adapters), strict=True))


def _say_how_to_go_on(target: Path) -> None:
    from bloomq.pack_writer import kept_work, partial_folder

    if kept_work(target):
        console.note(
            "interrupted: the same command goes on from here; with --fresh it begins anew; "
            f"to drop the work, delete {partial_folder(target)}"
        )


def _print_plan(plan: Plan, as_json: bool) -> None:
    from bloomq.converters.plan import estimate_seconds

    seconds = estimate_seconds(plan)
    if as_json:
        click.echo(json.dumps(plan.describe(seconds)))
        return
    for line in plan.lines(seconds):
        click.echo(line)
    for line in plan.checkpoint.notes:
        console.note(f"note: {line}")
