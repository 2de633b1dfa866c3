"""What a conversation's /commands do."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bloomq import console
from bloomq.cli.chat_settings import change, settings
from bloomq.errors import UsageError
from bloomq.files import shown

if TYPE_CHECKING:
    from bloomq.chat.answer import Answer
    from bloomq.chat.conversation import Conversation


@dataclass(slots=True)
class Session:
    """A conversation and those it was forked from. edited: the message that the next entry
    replaces; failed: was there an error?"""

    talk: Conversation
    forks: list[Conversation] = field(default_factory=list)
    over: bool = False
    failed: bool = False
    edited: str | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """argument: how the help names it, "" for none; run: with a session and the argument."""

    argument: str
    help: str
    run: Callable[[Session, str], Answer | None]


def run_command(session: Session, entry: str) -> Answer | None:
    """Do what "/name argument" says; an answer to be shown, if it makes one.

    Raises: UsageError, and whatever the command does.
    """
    name, argument = _halves(entry.removeprefix("/"), r"\s+")
    command = COMMANDS.get(_ALIASES.get(name, name))
    if command is None:
        raise UsageError(
            f"no command /{shown(name):.40}: /help lists them, and // begins a message with /"
        )
    argument = argument.strip()
    if argument and not command.argument:
        raise UsageError(f"/{name} takes nothing, found {argument!r:.40}")
    if not argument and command.argument and not command.argument.startswith("["):
        raise UsageError(f"/{name} lacks its {command.argument}")
    return command.run(session, argument)


def _halves(text: str, at: str) -> tuple[str, str]:
    """What stands before the first match of a pattern, and behind it."""
    before, *behind = re.split(at, text, maxsplit=1)
    return before, "".join(behind)


def _help(session: Session, argument: str) -> None:
    for name, command in COMMANDS.items():
        _say(f"/{name + ' ' + command.argument:22} {command.help}")
    _say('A line that ends in \\ goes on in the next; """ begins and ends a block of lines.')


def _quit(session: Session, argument: str) -> None:
    session.over = True


def _clear(session: Session, argument: str) -> None:
    session.talk.clear()


def _undo(session: Session, argument: str) -> None:
    console.note(f"forgotten: {_visible(session.talk.undo()):.60}")


def _regenerate(session: Session, argument: str) -> Answer:
    if session.talk.sampling.temperature == 0:
        console.note("temperature 0 gives the same answer: /set temperature 0.7")
    return session.talk.regenerate()


def _edit(session: Session, argument: str) -> Answer | None:
    if argument:
        return session.talk.edit(argument)
    said = [one["content"] for one in session.talk.messages if one["role"] == "user"]
    if not said:
        raise UsageError("there is nothing to edit: nothing was said yet")
    session.edited = said[-1]
    console.note("what is entered next takes its place; an empty line, or Ctrl-C, leaves it")
    return None


def _save(session: Session, argument: str) -> None:
    talk, path = session.talk, _path(argument)
    talk.save(path)
    console.note(f"saved: {shown(str(path))}")
    if not talk.keeps_template:
        console.note(f"without its template: --template {shown(talk.template.name)} has it again")


def _load(session: Session, argument: str) -> None:
    restore(session.talk, _path(argument))
    console.note(f"{len(session.talk.messages)} messages")


def restore(talk: Conversation, path: Path) -> None:
    """Take a saved conversation; says on stderr what is not as it was."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        talk.restore(path)
    for warning in told:
        console.note(f"warning: {warning.message}")


def _path(argument: str) -> Path:
    """A file's name, maybe in quotes, maybe in the folder of a user."""
    quoted = len(argument) > 1 and argument[0] in "\"'" and argument[0] == argument[-1]
    return Path(os.path.expanduser(argument[1:-1] if quoted else argument))


def _system(session: Session, argument: str) -> None:
    session.talk.system = argument or None


def _set(session: Session, argument: str) -> None:
    talk = session.talk
    name, text = _halves(argument, r"\s*=\s*|\s+")
    if argument:
        change(talk, name.replace("-", "_"), text)
        return
    for one, value in settings(talk).items():
        _say(f"{one:22} {_short(repr(value))}")


def _short(text: str) -> str:
    return text if len(text) <= _COLUMNS else f"{text[: _COLUMNS - 3]}..."


_COLUMNS = 72  # of a value: DRY's breakers can be thousands of tokens


def _show(session: Session, argument: str) -> None:
    for message in session.talk.messages:
        console.heading(f"{message['role']}:", sys.stderr)
        _say(_visible(message["content"]))


def _tokens(session: Session, argument: str) -> None:
    talk = session.talk
    _say(
        f"{talk.prompt_tokens()} of {talk.model.context} tokens, and up to {talk.max_new_tokens} "
        "for an answer"
    )


def _fork(session: Session, argument: str) -> None:
    session.forks.append(session.talk)
    session.talk = session.talk.fork()
    console.note("a copy: /back leaves it")


def _back(session: Session, argument: str) -> None:
    if not session.forks:
        raise UsageError("this conversation was not forked: there is nothing to go back to")
    session.talk = session.forks.pop()


def _say(text: str) -> None:
    """On stderr: standard output has the answers alone."""
    click.echo(text, err=True)


def _visible(text: str) -> str:
    """Text that cannot command a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


COMMANDS = {
    "help": Command("", "list the commands", _help),
    "quit": Command("", "leave (Ctrl-D too)", _quit),
    "regenerate": Command("", "answer the last message again", _regenerate),
    "edit": Command("[TEXT]", "say TEXT in place of the last message, or edit that", _edit),
    "undo": Command("", "forget the last message and its answer", _undo),
    "clear": Command("", "forget all messages", _clear),
    "system": Command("[TEXT]", "set what stands before the conversation", _system),
    "set": Command("[NAME VALUE]", "change a setting, as in /set temperature 0.7; list them", _set),
    "show": Command("", "the conversation so far", _show),
    "tokens": Command("", "how much of the context is in use", _tokens),
    "save": Command("FILE", "write messages and settings", _save),
    "load": Command("FILE", "go on with what was saved", _load),
    "fork": Command("", "try something on a copy", _fork),
    "back": Command("", "return to where /fork was said", _back),
}
_ALIASES = {"exit": "quit", "bye": "quit", "retry": "regenerate", "?": "help", "h": "help"}
