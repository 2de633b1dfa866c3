"""The command `chat`: a conversation on a terminal, or line by line through a pipe."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bloomq import console
from bloomq.chat.stored import USUAL_NEW_TOKENS
from bloomq.cli.chat_commands import Session, restore, run_command
from bloomq.cli.colours import Painter, colours_shown, legend
from bloomq.cli.generation_options import Asked, Ready, generation_options, ids_with
from bloomq.cli.lines import Lines, as_entry, history
from bloomq.cli.options import Loading, is_given, load, model_options
from bloomq.console import INTERRUPTED
from bloomq.errors import BloomqError, UsageError
from bloomq.sampling import Sampling

if TYPE_CHECKING:
    from bloomq.chat.answer import Answer


@click.command()
@model_options
@generation_options(max_new_tokens=USUAL_NEW_TOKENS)
@click.option("--system", help="What stands before the conversation.")
@click.option(
    "--template",
    help="bloomz, belle, alpaca, a Jinja file, or the name of one of the "
    "model's templates.  [default: the model's own, else bloomz]",
)
@click.option(
    "--load",
    "saved",
    type=Path,
    help="Go on with a conversation that /save wrote, with "
    "its settings where no option says otherwise.",
)
@click.option(
    "--show-probs",
    is_flag=True,
    help="Colour tokens by their probability; without colours, in brackets behind them.",
)
@click.option(
    "-q", "--quiet", is_flag=True, help="Nothing on stderr but errors and what commands say."
)
def chat(
    model: Path | None, loading: Loading,
    asked: Asked, system: str | None, template: str | None, saved: Path | None, show_probs: bool,
    quiet: bool,
) -> int:  # fmt: skip
    """Talk to a model, turn by turn: it continues the conversation so far.

    Without a chat template of the model's, plain BLOOMZ style: your line, a newline, the answer, of
    one line unless --stop says otherwise. A line that ends in \\ goes on in the next; three quotes
    begin and end a block. /help lists commands: save, load, undo, regenerate, set temperature.

    Ctrl-C ends an answer, which is kept as far as it came, or takes away what is typed; at an empty
    prompt it leaves, as Ctrl-D and the end of standard input do. The oldest turns go when the
    context is full. In a pipe each line is a turn, standard output has the answers alone, and the
    exit code is 1 if a line failed. Without -n an answer has at most 256 tokens, or half the
    context.
    """
    from bloomq.chat.conversation import Conversation

    if asked.window is not None:
        raise UsageError("a chat keeps within the context by its oldest turns: no --window")
    quiet = quiet or not console.is_terminal(sys.stderr)
    loaded = load(model, loading, quiet)
    ready = asked.ready(loaded, loading)
    new_tokens = asked.max_new_tokens if is_given("max_new_tokens") else None
    talk = Conversation(
        loaded, template=template, system=system, sampling=ready.sampling,
        max_new_tokens=new_tokens, stop=asked.stop, constraint=asked.constraint, draft=ready.draft,
        adapters=ready.adapters,
    )  # fmt: skip
    if saved is not None:
        restore(talk, saved)
        talk.system = (system or None) if is_given("system") else talk.system
        talk.sampling = replace(talk.sampling, **_said(ready, talk.sampling))
        talk.set(max_new_tokens=new_tokens, stop=asked.stop if is_given("stop") else None)
    lines = Lines()
    if lines.is_terminal and not quiet:
        console.note(f"template {talk.template.name}; /help lists commands, Ctrl-D leaves")
    if show_probs and colours_shown() and not quiet:
        click.echo(legend(), err=True)
    with history(lines):
        return _converse(Session(talk), lines, quiet, show_probs)


def _said(ready: Ready, before: Sampling) -> dict[str, Any]:
    """The fields of Sampling that the command line names, be it with their usual values."""
    found = {f.name: getattr(ready.sampling, f.name) for f in fields(Sampling) if is_given(f.name)}
    if is_given("dry_sequence_breakers"):
        texts = ready.asked.texts["dry_sequence_breakers"]
        found["dry_sequence_breakers"] = ids_with(texts, ready.model)
    elif is_given("dry_multiplier") and not before.dry_multiplier:  # with DRY come its breakers
        found["dry_sequence_breakers"] = ready.sampling.dry_sequence_breakers
    return found


def _converse(session: Session, lines: Lines, quiet: bool, show_probs: bool) -> int:
    """Turn after turn; the exit code."""
    while True:
        start = as_entry(session.edited) if session.edited is not None else ""
        try:
            entry = lines.entry(start)
        except KeyboardInterrupt:
            click.echo(err=True)
            if not (lines.is_terminal and lines.was_typing()):
                return INTERRUPTED
            session.edited = None
            console.note("Ctrl-C again, or Ctrl-D, leaves")
            continue
        interrupted = entry is not None and _turn(session, entry, quiet, show_probs)
        if interrupted and not lines.is_terminal:
            return INTERRUPTED
        if entry is None or session.over:
            return int(session.failed and not lines.is_terminal)


def _turn(session: Session, entry: str, quiet: bool, show_probs: bool) -> bool:
    """Answer an entry or do what it commands; did Ctrl-C end that? Whatever is wrong with one entry
    ends no conversation."""
    edited, session.edited = session.edited, None
    if not entry.strip():
        return False
    talk = session.talk
    try:
        if entry.startswith("/") and not entry.startswith("//"):
            answer = run_command(session, entry)
        else:
            answer = (talk.say if edited is None else talk.edit)(entry.removeprefix("/"))
        return answer is not None and _print_answer(answer, quiet, show_probs)
    except BloomqError as error:
        console.note(f"error: {' '.join(str(error).split())}")
        session.failed = True
        return False


def _print_answer(answer: Answer, quiet: bool, show_probs: bool) -> bool:
    """Print pieces as they come, and the end of the line; did Ctrl-C end it?"""
    painter = Painter(colours_shown()) if show_probs else None
    interrupted = False
    try:
        for piece in answer:
            click.echo(piece.text if painter is None else painter.paint(piece), nl=False)
    except KeyboardInterrupt:
        interrupted = True
    except BloomqError:
        click.echo()
        raise
    rest = answer.rest
    click.echo(rest if painter is None else painter.rest(rest))
    if not quiet:
        found = answer.generation
        console.note(
            f"{found.stats.generated_tokens} tokens, {found.stats.generated_tokens_per_s:.1f}/s, "
            f"ended by {found.finish_reason}"
        )
    return interrupted
