"""The command perplexity: how well a model predicts a text, and how far it strays from another."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from bloomq import console
from bloomq.cli.options import Loading, load, load_adapters, lora_option, model_options
from bloomq.cli.records import text_of
from bloomq.cli.running import without_nan
from bloomq.console import INTERRUPTED
from bloomq.errors import UsageError
from bloomq.windows import WindowProtocol

if TYPE_CHECKING:
    from bloomq.perplexity import Comparison, Perplexity


@click.command()
@click.argument("file", type=Path)
@model_options
@lora_option
@click.option(
    "--base",
    type=Path,
    help="Another pack of the model: how far this one strays from "
    "it, as KL divergence and change of perplexity.",
)
@click.option(
    "--protocol",
    type=click.Choice(get_args(WindowProtocol)),
    default="fixed",
    show_default=True,
    help="fixed: windows side by side; sliding: overlapping ones; gptq: as in published tables.",
)
@click.option("--window", type=int, help="Tokens of a window.  [default: the context; gptq: 2048]")
@click.option(
    "--stride", type=int, help="From one sliding window to the next.  [default: half a window]"
)
@click.option("--tokens", "most_tokens", type=int, help="Read so many tokens.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
def perplexity(
    file: Path, model: Path | None, loading: Loading,
    lora: tuple[str, ...], base: Path | None, protocol: WindowProtocol,
    window: int | None, stride: int | None, most_tokens: int | None, as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Measure how well a model predicts the text of FILE (-: standard input), in windows.

    The interval is of 95 %, windows as independent samples. Ctrl-C prints what the windows so far
    give.
    """
    from bloomq import perplexity as measuring

    if most_tokens is not None and most_tokens < 1:
        raise UsageError(f"--tokens is {most_tokens}, expected 1 or more of the text")
    text = console.read_all() if str(file) == "-" else text_of(file)
    loaded = load(model, loading, quiet)
    adapters = load_adapters(loaded, lora)
    other = None if base is None else load(base, loading, quiet)
    with console.estimate_progress("perplexity", quiet) as progress:

        def show(read: int, total: int, so_far: Perplexity | None) -> None:
            progress(read, total, "" if so_far is None else f"{so_far.perplexity:.4g}")

        found = measuring.perplexity(
            loaded, text, protocol=protocol, window=window, stride=stride, base=other,
            most_tokens=most_tokens, adapters=adapters, progress=show,
        )  # fmt: skip
    if as_json:
        names = {"file": str(file), "model": str(loaded.pack.path), "base": base and str(base)}
        click.echo(json.dumps(without_nan({**names, **asdict(found)}), ensure_ascii=False))
    else:
        click.echo("\n".join(_facts(found)))
    if found.windows < found.windows_in_all:
        console.note(f"interrupted: {found.windows} of {found.windows_in_all} windows are done")
        return INTERRUPTED
    return 0


def _facts(found: Perplexity) -> list[str]:
    windows = f"{found.windows} window{'' if found.windows == 1 else 's'} of {found.window}"
    if found.protocol == "sliding":
        windows += f", {found.stride} apart"
    lines = [f"perplexity     {found.perplexity:.4f}{_between(found.interval, '.4f', 1)}"]
    if math.isfinite(found.standard_error):
        lines.append(f"loss           {found.nll:.4f} ± {found.standard_error:.4f} nats a token")
    else:
        lines.append(f"loss           {found.nll:.4f} nats a token")
    if found.bits_per_byte is not None:
        lines.append(f"bits per byte  {found.bits_per_byte:.4f}")
    lines.append(f"tokens         {found.tokens:,} in {windows} ({found.protocol})")
    return lines + ([] if found.comparison is None else _differences(found.comparison))


def _differences(found: Comparison) -> list[str]:
    quantiles = ", ".join(f"{name} {value:.6f}" for name, value in found.kl_quantiles.items())
    error = f" ± {found.kl_standard_error:.6f}" if math.isfinite(found.kl_standard_error) else ""
    return [
        f"base           {found.base_perplexity:.4f}",
        f"change         {100 * found.change:+.3f} %{_between(found.change_interval, '+.3f', 100)}",
        f"KL             {found.kl:.6f}{error} nats a token",
        f"KL quantiles   {quantiles}, most {found.kl_most:.6f}",
        f"same top-1     {100 * found.same_top:.2f} %",
        f"same top-10    {100 * found.same_best:.2f} %",
    ]


def _between(interval: Sequence[float], form: str, scale: float) -> str:
    """The interval, where there is one."""
    low, high = (scale * bound for bound in interval)
    return f"  ({low:{form}} to {high:{form}})" if math.isfinite(high - low) else ""
