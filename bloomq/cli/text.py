"""The command generate: text that follows a prompt, or each prompt of a file."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import click

from bloomq import console
from bloomq.cli.batch import generate_all, prompts_of
from bloomq.cli.colours import Painter, colours_shown, legend
from bloomq.cli.generation_options import Asked, Ready, generation_options
from bloomq.cli.options import Loading, is_given, load, model_options, option_group
from bloomq.cli.search_options import search_options
from bloomq.cli.sections import Sectioned
from bloomq.errors import OutputError, UsageError
from bloomq.files import exists

if TYPE_CHECKING:
    from bloomq.generation import Generation
    from bloomq.language_model import LanguageModel
    from bloomq.search import AnySearch

_batch_options = option_group(
    click.option("--batch-file", type=Path, help="Continue the prompt of each line of a .txt, "
                 ".jsonl or .csv file, many at a time, and write JSON lines."),
    click.option("--field", default="prompt", show_default=True,
                 help="What holds the prompt in a .jsonl or a .csv."),
    click.option("-o", "--out", type=Path, help="Of a --batch-file: write here; after an "
                 "interruption the same command goes on with it."),
    click.option("--parallel", type=int, default=8, show_default=True,
                 help="Of a --batch-file: texts at a time."),
)  # fmt: skip
_output_options = option_group(
    click.option("--best-of", type=int, default=1, show_default=True,
                 help="Draw so many texts, and print the one with the likeliest tokens."),
    click.option("--top-logprobs", type=int, default=0, show_default=True,
                 help="Alternatives of each token in the JSON."),
    click.option("--prompt-cache", type=Path, help="Take what is known of the prompt from this "
                 "file, and write it there for the next time."),
    click.option("--show-probs", is_flag=True, help="Colour tokens by their probability; without "
                 "colours, in brackets behind them."),
    click.option("--json", "as_json", is_flag=True,
                 help="Print the result as JSON when it is done."),
    click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors."),
)  # fmt: skip


@click.command(cls=Sectioned)
@click.argument("prompt", required=False)
@model_options
@search_options
@generation_options(max_new_tokens=64)
@_batch_options
@_output_options
def generate(
    prompt: str | None, model: Path | None, loading: Loading, asked: Asked,
    search: AnySearch | None, num_return_sequences: int,
    batch_file: Path | None, field: str, out: Path | None, parallel: int, best_of: int,
    top_logprobs: int, prompt_cache: Path | None, show_probs: bool, as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Continue PROMPT (or standard input, when piped) and stream the text.

    One newline at the end of standard input is not part of the prompt.
    """
    several = search is not None or best_of != 1 or num_return_sequences != 1
    if batch_file is not None:
        if prompt is not None or prompt_cache is not None:
            raise UsageError("--batch-file has the prompts: give no other, and no --prompt-cache")
        if several or show_probs:
            raise UsageError(
                "a --batch-file has one text a prompt, as JSON: no search, no --best-of, no "
                "--show-probs"
            )
        records = prompts_of(batch_file, field)
        loaded = load(model, loading, quiet)
        ready = asked.ready(loaded, loading, top_logprobs)
        return generate_all(ready, records, out, parallel, quiet)
    _check_alone(asked, several, prompt_cache, show_probs, as_json)
    text = prompt_text(prompt)
    if not text:
        raise UsageError("the prompt is empty: BLOOM needs at least one token to continue from")
    if prompt_cache is not None and not prompt_cache.absolute().parent.is_dir():
        raise OutputError(f"{prompt_cache}: cannot be written: there is no such folder")
    loaded = load(model, loading, quiet)
    ready = _fitted(asked.ready(loaded, loading, top_logprobs), text)
    known = None if prompt_cache is None else _warm(loaded, prompt_cache, quiet)
    if several:
        found = _print_found(ready, text, search, best_of, num_return_sequences, as_json, quiet)
    else:
        found = _print_stream(ready, text, as_json, show_probs, quiet)
    if not quiet:
        console.note(console.stats_line(found))
    if asked.constraint is not None and found.finish_reason == "length" and not quiet:
        console.note("note: the text ends before its constraint does: raise --max-new-tokens")
    if found.finish_reason == "interrupted":
        return console.INTERRUPTED
    ids = loaded.prompt_ids(text)
    if prompt_cache is not None and (known or [])[: len(ids)] != ids:
        _keep(loaded, text, prompt_cache, quiet)
    return 0


def _fitted(ready: Ready, text: str) -> Ready:
    """With as many new tokens as there is room for, where the command line does not say how
    many."""
    room = ready.model.context - len(ready.model.prompt_ids(text))
    asked = ready.asked
    if is_given("max_new_tokens") or asked.window or not 1 <= room < asked.max_new_tokens:
        return ready
    return replace(ready, asked=replace(asked, max_new_tokens=room))


def _check_alone(
    asked: Asked, several: bool, prompt_cache: Path | None, show_probs: bool, as_json: bool
) -> None:
    """Raises: UsageError for options that this call would not heed."""
    for option in ("out", "field", "parallel"):
        if is_given(option):
            raise UsageError(f"--{option} belongs to a --batch-file")
    if is_given("top_logprobs") and not as_json:
        raise UsageError("--top-logprobs are shown by --json alone")
    if show_probs and (several or as_json):
        raise UsageError("--show-probs colours one text as it comes: no search, no --json")
    if prompt_cache is not None and (several or asked.lora or asked.window is not None):
        raise UsageError("--prompt-cache is of the model alone: no search, --lora or --window")


def _print_stream(
    ready: Ready, text: str, as_json: bool, show_probs: bool, quiet: bool
) -> Generation:
    """Print pieces as they come, or all of it as JSON."""
    painter = Painter(colours_shown()) if show_probs else None
    if painter is not None and colours_shown() and not quiet:
        click.echo(legend(), err=True)
    shown = 0
    with console.prefill_progress(quiet) as progress:
        stream = ready.stream(text, progress)
        if not quiet and not as_json:
            console.echo_prompt(text)
        with suppress(KeyboardInterrupt):  # what was produced is worth more than a traceback
            for piece in stream:
                if not as_json:
                    click.echo(piece.text if painter is None else painter.paint(piece), nl=False)
                    shown += len(piece.text)
    found = stream.generation
    if as_json:
        _print_json(text, found)
    else:
        rest = found.text[shown:]  # what was held back
        click.echo(rest if painter is None or not rest else painter.rest(rest))
    return found


def _print_found(
    ready: Ready, text: str, search: AnySearch | None, best_of: int, count: int, as_json: bool,
    quiet: bool,
) -> Generation:  # fmt: skip
    """Print what a search, or the best of several draws, gives, best first; the best of it."""
    with console.prefill_progress(quiet) as progress:
        found = ready.generate(text, search, best_of, count, progress)
    results: list[Generation] = found if isinstance(found, list) else [found]
    for number, one in enumerate(results, 1):
        if as_json:
            _print_json(text, one)
        else:
            score = fmean(one.logprobs) if one.score is None else one.score
            click.echo(f"[{number}: {score:.4f}] {one.text}" if found is results else one.text)
    return results[0]


def _print_json(text: str, found: Generation) -> None:
    click.echo(json.dumps({"prompt": text, **asdict(found)}, ensure_ascii=False))


def _warm(loaded: LanguageModel, path: Path, quiet: bool) -> list[int] | None:
    """Take a prompt's keys and values from a file that an earlier run may have left; its ids."""
    from bloomq import prompt_cache

    if not exists(path):
        return None
    ids = prompt_cache.load(loaded, path)
    if not quiet:
        console.note(f"{path}: {len(ids)} tokens need no reading")
    return ids


def _keep(loaded: LanguageModel, text: str, path: Path, quiet: bool) -> None:
    from bloomq import prompt_cache

    count = prompt_cache.save(loaded, text, path)
    if not quiet:
        console.note(f"{path}: {count} tokens of the prompt kept")


def prompt_text(prompt: str | None) -> str:
    """A command's PROMPT, or standard input. Raises: UsageError without either."""
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and (sys.stdin is None or console.is_terminal(sys.stdin)):
        raise UsageError("no prompt: give one as argument or on standard input")
    return console.read_all().removesuffix("\n")
