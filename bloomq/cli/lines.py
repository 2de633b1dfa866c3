"""What a person, or a pipe, enters: lines and blocks of lines; on a terminal with a history.

A line that ends in \\ goes on in the next one; three quotes begin a block, and three end it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from bloomq import console
from bloomq.errors import UsageError

_BLOCK = '"""'
_MOST_LINES = 1000  # of the history


class Lines:
    """Entries, one at a time."""

    def __init__(self) -> None:
        self.is_terminal = console.is_terminal(sys.stdin)
        self._readline = _readline() if self.is_terminal else None
        self._open = False  # an entry of which a line was entered, and that goes on

    def entry(self, start: str = "") -> str | None:
        """The next entry, maybe of several lines; None at the end of the input. start: what stands
        on a terminal's line already, to be edited.

        Raises: UsageError for bytes that are no text; KeyboardInterrupt.
        """
        self._open = False
        line = self._line("> ", start)
        if line is None:
            return None
        self._open = True
        if line.lstrip().startswith(_BLOCK):
            return self._block(line.lstrip().removeprefix(_BLOCK))
        parts = []
        while line is not None and line.endswith("\\"):
            parts.append(line[:-1])
            line = self._line(". ")
        return "\n".join([*parts, *([] if line is None else [line])])

    def was_typing(self) -> bool:
        """Did Ctrl-C take some text, of this line or of lines before it?"""
        typed = self._readline is not None and self._readline.get_line_buffer()
        return self._open or bool(typed)

    def _block(self, line: str | None) -> str:
        parts = []
        while line is not None:
            if line.rstrip().endswith(_BLOCK):
                parts.append(line.rstrip().removesuffix(_BLOCK))
                break
            parts.append(line)
            line = self._line(". ")
        return "\n".join(parts).strip("\n")

    def _line(self, prompt: str, start: str = "") -> str | None:
        if not self.is_terminal:
            return console.read_line()
        if not console.is_terminal(sys.stdout):  # where input() would write its prompt
            click.echo(console.dimmed(prompt), nl=False, err=True)
            prompt = ""
        if self._readline is not None and start:
            self._readline.set_startup_hook(lambda: self._readline.insert_text(start))
        try:
            return input(prompt)
        except EOFError:
            click.echo(err=True)
            return None
        except UnicodeDecodeError as error:
            raise UsageError(f"the terminal's input is no UTF-8 (byte {error.start})") from None
        finally:
            if self._readline is not None:
                self._readline.set_startup_hook(None)


def as_entry(text: str) -> str:
    """What gives this message when it is entered: several lines as a block."""
    text = f"/{text}" if text.startswith("/") else text
    if "\n" in text or text.endswith("\\") or text.lstrip().startswith(_BLOCK):
        return f"{_BLOCK}{text}{_BLOCK}"
    return text


def _readline() -> Any:
    """The module, None where there is none (Windows)."""
    try:
        import readline
    except ImportError:
        return None
    return readline


def history_file() -> Path:
    """Where the history of chat is kept: bloomq/chat-history in the user's folder for state."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(base) / "bloomq" / "chat-history"


@contextmanager
def history(lines: Lines) -> Iterator[None]:
    """Lines entered before, and those of this time kept for the next one, for the user's eyes
    alone; where the file cannot be read or written there is none."""
    readline, path = lines._readline, history_file()
    if readline is None:
        yield
        return
    readline.set_history_length(_MOST_LINES)
    with suppress(OSError, ValueError):
        if path.is_file() and path.stat().st_size < 1 << 22:
            readline.read_history_file(path)
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            os.chmod(path, 0o600)
            readline.write_history_file(path)
