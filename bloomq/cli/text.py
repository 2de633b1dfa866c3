"""Commands that write text: generate and chat."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bloomq import console
from bloomq.cli.options import load, load_adapters, load_draft, model_options, sampling_options
from bloomq.errors import CapacityError, UsageError

if TYPE_CHECKING:
    from bloomq.language_model import LanguageModel, Stream

INTERRUPTED = 130


@click.command()
@click.argument("prompt", required=False)
@model_options
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON when it is done.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
def generate(
    prompt: str | None, model: Path | None, backend: str, threads: int | None, context: int | None,
    cache_dtype: str, max_new_tokens: int, temperature: float, top_k: int, top_p: float,
    repetition_penalty: float, seed: int | None, stop: tuple[str, ...], draft: str | None,
    lora: tuple[str, ...], as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Continue PROMPT (or standard input, when piped) and stream the text.

    One newline at the end of standard input is not part of the prompt.
    """
    text = _prompt_text(prompt)
    loaded = load(model, backend, threads, context, cache_dtype, quiet)
    adapters = load_adapters(loaded, lora)
    guesser = load_draft(draft, backend, threads)
    with console.prefill_progress(quiet) as progress:
        stream = loaded.stream(
            text, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            repetition_penalty=repetition_penalty, seed=seed, stop=stop, draft=guesser,
            adapters=adapters, progress=progress,
        )  # fmt: skip
        if not quiet and not as_json:
            console.echo_prompt(text)
        interrupted = _print_stream(stream, silent=as_json)
    if as_json:
        click.echo(json.dumps({"prompt": text, **asdict(stream.generation)}, ensure_ascii=False))
    if not quiet:
        console.note(console.stats_line(stream.generation))
    return INTERRUPTED if interrupted else 0


def _print_stream(stream: Stream, *, silent: bool) -> bool:
    """Print pieces as they come; did Ctrl-C end it?"""
    interrupted, shown = False, 0
    try:
        for piece in stream:
            if not silent:
                click.echo(piece.text, nl=False)
                shown += len(piece.text)
    except KeyboardInterrupt:
        interrupted = True
    if not silent:
        click.echo(stream.generation.text[shown:])  # what was held back, and the line's end
    return interrupted


def _prompt_text(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and (sys.stdin is None or console.is_terminal(sys.stdin)):
        raise UsageError("no prompt: give one as argument or on standard input")
    return console.read_all().removesuffix("\n")


@click.command()
@model_options
@sampling_options
def chat(
    model: Path | None, backend: str, threads: int | None, context: int | None, cache_dtype: str,
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, repetition_penalty: float,
    seed: int | None, stop: tuple[str, ...], draft: str | None, lora: tuple[str, ...],
) -> int:  # fmt: skip
    """Talk to a model, line by line: it continues the conversation so far.

    Plain BLOOMZ style: your line, a newline, the answer. Ctrl-C ends an answer, Ctrl-D (or the end
    of standard input) the conversation. The oldest lines go when the context is full.
    """
    quiet = not console.is_terminal(sys.stderr)
    loaded = load(model, backend, threads, context, cache_dtype, quiet)
    adapters = load_adapters(loaded, lora)
    guesser = load_draft(draft, backend, threads)
    turns: list[str] = []
    while (line := console.read_line()) is not None:
        if not line.strip():
            continue
        try:
            stream = loaded.stream(
                _conversation(loaded, [*turns, line], max_new_tokens),
                max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                repetition_penalty=repetition_penalty, seed=seed, stop=stop or ("\n",),
                draft=guesser, adapters=adapters,
            )  # fmt: skip
        except CapacityError as error:  # one line too long ends no conversation
            console.note(f"error: {error}")
            continue
        _print_stream(stream, silent=False)
        turns += [line, stream.generation.text.strip("\n")]
    return 0


def _conversation(loaded: LanguageModel, turns: list[str], new_tokens: int) -> str:
    """The latest turns, of which the last awaits an answer, that leave room for it."""
    while True:
        text = "\n".join(turns) + "\n"
        if len(turns) == 1 or len(loaded.prompt_ids(text)) + new_tokens <= loaded.context:
            return text
        turns = turns[2:]  # a line and its answer
