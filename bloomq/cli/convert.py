"""The command `convert`: a checkpoint becomes a pack."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import click

from bloomq import console
from bloomq.errors import UsageError
from bloomq.schemes import GROUP_SIZES, SCHEME_NAMES


@click.command()
@click.argument("source")
@click.argument("target", type=Path)
@click.option(
    "--scheme",
    type=click.Choice(SCHEME_NAMES),
    help="How matrices are stored.  [default: int4; for GPTQ and AWQ their own]",
)
@click.option(
    "--group-size",
    type=click.Choice([str(g) for g in GROUP_SIZES]),
    help="Columns that share a scale, for int4.  [default: 32]",
)
@click.option(
    "--head-scheme",
    type=click.Choice(SCHEME_NAMES),
    help="For the embedding and the head.  [default: int6 for int4 and nf4, else as --scheme]",
)
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
@click.option("-t", "--threads", type=int, help="Worker threads.  [default: all cores]")
@click.option("--force", is_flag=True, help="Replace a pack that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def convert(
    source: str, target: Path, scheme: str | None, group_size: str | None, head_scheme: str | None,
    adapters: tuple[Path, ...], scales: tuple[float, ...], revision: str | None, stream: bool,
    threads: int | None, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Convert the checkpoint SOURCE to a pack at TARGET.

    SOURCE: a folder in Hugging Face format, safetensors in one file or sharded, GPTQ and AWQ too;
    or the id of one at the hub, OWNER/NAME (needs bloomq[hub]). The model is never whole in
    memory, and a run that is interrupted leaves no pack.
    """
    from bloomq.converters.convert import convert as run

    # huggingface_hub reads it when it is imported; without, it asks the hub for more than files.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with console.byte_progress("converting") as progress:
        result = run(
            source, target, scheme=scheme, group_size=int(group_size) if group_size else None,
            head_scheme=head_scheme, lora=_pairs(adapters, scales), revision=revision,
            stream=stream, threads=threads, force=force, progress=progress,
        )  # fmt: skip
    for line in result.notes:
        console.note(f"note: {line}")
    if as_json:
        click.echo(json.dumps({**asdict(result), "pack": str(result.pack)}))
        return
    speed = result.source_bytes / 1e6 / result.seconds
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
