"""`bloomq export`: a pack as a model of another program."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from bloomq import console


@click.command()
@click.argument("pack", type=Path)
@click.argument("out", type=Path)
@click.option(
    "--to",
    type=click.Choice(("huggingface", "gguf")),
    help="The format.  [default: gguf for OUT.gguf, else huggingface]",
)
@click.option(
    "--dtype", help="Of the weights: f32, bf16 or f16, and more for gguf.  [default: exact]"
)
@click.option("--force", is_flag=True, help="Replace an earlier export.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export(
    pack: Path, out: Path, to: str | None, dtype: str | None, force: bool, as_json: bool
) -> None:
    """Write PACK as a Hugging Face checkpoint, or as a GGUF file for llama.cpp, at OUT.

    A checkpoint is a folder with config.json, tokenizer and safetensors, in which transformers
    finds the weights that the pack computes with. What is interrupted leaves nothing at OUT.
    """
    from bloomq.converters.export import export as run

    with console.byte_progress("exporting") as progress:
        result = run(pack, out, to=to, dtype=dtype, force=force, progress=progress)
    if as_json:
        click.echo(json.dumps({**asdict(result), "target": str(result.target)}))
        return
    speed = result.nbytes / 1e6 / result.seconds
    click.echo(
        f"{result.target}: {result.to}, {result.nbytes / 1e6:.1f} MB, {result.seconds:.1f} s "
        f"({speed:.0f} MB/s)"
    )
    for note in result.notes:
        console.note(f"note: {note}")
