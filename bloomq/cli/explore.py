"""The command `explore`: a table on the terminal, or a page to walk through."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bloomq import console
from bloomq.cli.colours import coloured, colours_shown
from bloomq.cli.options import Loading, load, model_options
from bloomq.cli.text import prompt_text

if TYPE_CHECKING:
    from bloomq.exploration import Exploration

_BAR = 20  # characters of a probability of 1
_TOKEN, _ALTERNATIVE = 16, 12  # columns on a terminal


@click.command()
@click.argument("prompt", required=False)
@model_options
@click.option(
    "-n",
    "--max-new-tokens",
    type=int,
    default=32,
    show_default=True,
    help="Tokens to produce behind the prompt; 0: look at the prompt alone.",
)
@click.option("--top", type=int, default=5, show_default=True, help="Alternatives of each token.")
@click.option(
    "--temperature",
    type=float,
    default=0.0,
    show_default=True,
    help="0: always the likeliest token.",
)
@click.option("--seed", type=int, help="Same seed, same text.  [default: a new one]")
@click.option(
    "-o",
    "--out",
    type=Path,
    help="Write an HTML page, with attention by layer and head, "
    "that opens in any browser and needs nothing else.",
)
@click.option("--json", "as_json", is_flag=True, help="Print tokens and alternatives as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
def explore(
    prompt: str | None, model: Path | None, loading: Loading,
    max_new_tokens: int, top: int, temperature: float, seed: int | None,
    out: Path | None, as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Show what a model makes of PROMPT (or standard input) and of its own continuation.

    For each token its probability after those before it, and what else was likely; with --out also
    where each head looks, and how far ALiBi lets it. 256 tokens at most.
    """
    from bloomq.exploration import explore as explored
    from bloomq.sampling import Sampling

    text = prompt_text(prompt)
    sampling = Sampling(temperature=temperature, seed=seed)
    loaded = load(model, loading, quiet)
    found = explored(loaded, text, max_new_tokens=max_new_tokens, top=top, sampling=sampling)
    if out is not None:
        found.save(out)
        if not quiet:
            console.note(f"{out}: {len(found.ids)} tokens, {_size(out.stat().st_size)}")
    if as_json:
        click.echo(json.dumps(_facts(found), ensure_ascii=False))
    elif out is None:
        _print_table(found)
    return 0


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e3:.0f} kB" if nbytes < 1e6 else f"{nbytes / 1e6:.1f} MB"


def _facts(found: Exploration) -> dict[str, object]:
    """An exploration without its attention, for machines. escaped, alternatives_escaped: is the
    text not the token's own, but an escape, as of a part of a character?"""
    rows = zip(found.alternative_tokens, found.alternative_logprobs.tolist(), strict=True)
    return {
        "prompt_tokens": found.prompt_tokens,
        "ids": found.ids.tolist(),
        "tokens": found.tokens,
        "logprobs": [None if math.isnan(p) else p for p in found.logprobs.tolist()],
        "alternatives": [list(zip(texts, row, strict=False)) for texts, row in rows],
        "escaped": [token in found.escaped for token in found.ids.tolist()],
        "alternatives_escaped": [
            [token in found.escaped for token in row if token >= 0]
            for row in found.alternatives.tolist()
        ],
    }


def _print_table(found: Exploration) -> None:
    """A line for each token: its probability as a bar, and what else could have come."""
    from bloomq.exploration.page import visible

    colours = colours_shown()
    for i, token in enumerate(found.tokens):
        if i == found.prompt_tokens:
            click.echo("-" * (_TOKEN + 8 + _BAR))
        p = float(found.probabilities[i])
        bar = "" if math.isnan(p) else "█" * max(1, round(p * _BAR)) if p >= 0.01 else "·"
        rate = "" if math.isnan(p) else f"{p:.3f}"
        name, bar = _fitted(visible(token), _TOKEN), f"{bar:{_BAR}}"
        if colours and not math.isnan(p):
            name, bar = _painted(name, p), _painted(bar, p)
        others = zip(found.alternative_tokens[i], found.alternative_logprobs[i], strict=False)
        cells = [
            f"{_fitted(visible(text), _ALTERNATIVE)} {math.exp(q):.2f}"
            for text, q in others if text != token
        ]  # fmt: skip
        click.echo("  ".join([f"{name} {rate:5}", bar, *cells]).rstrip())


def _painted(cell: str, probability: float) -> str:
    """A column in colour, but not its empty end."""
    body = cell.rstrip()
    return coloured(body, probability) + cell[len(body) :]


def _fitted(text: str, columns: int) -> str:
    """A text in so many columns of a terminal, where Chinese takes two a character."""
    from rich.cells import set_cell_size

    return set_cell_size(text, columns)
