"""Chat templates: messages as the text that a model was trained to continue.

A template is Jinja, as transformers keeps it in a tokenizer's settings, and is rendered as there.
It is untrusted: see `sandbox`. Invariant: whatever it does ends in text, or in one TokenizerError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from bloomq.errors import TokenizerError, UsageError

Message = Mapping[str, Any]
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names that templates read it by


class ChatTemplate:
    """A compiled template. where: as errors name it.

    Raises: TokenizerError for what is no Jinja, and where jinja2 is not installed.
    """

    def __init__(self, source: str, where: str = "the chat template") -> None:
        self.source, self.where = source, where
        self._sandbox, self._failures = _sandbox()
        try:
            self._template = self._sandbox.from_string(source)
        except self._failures as error:
            raise TokenizerError(f"{where} is no Jinja that runs: {_line(error)}") from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation; with add_generation_prompt it ends where an answer begins.

        Raises: UsageError for messages that are none; TokenizerError for what the template refuses,
        gets wrong, or makes too much of.
        """
        from bloomq.chat.sandbox import MOST_CHARACTERS

        given = {
            "messages": checked(messages), "tools": plain(tools, "tools"),
            "documents": plain(documents, "documents"),
            "add_generation_prompt": bool(add_generation_prompt),
            **plain(dict(variables or {}), "variables"),
        }  # fmt: skip
        pieces, length = [], 0
        self._sandbox.begin()
        try:
            for piece in self._template.generate(given):
                length += len(piece)
                if length > MOST_CHARACTERS:
                    raise TokenizerError(
                        f"{self.where} writes more than {MOST_CHARACTERS} characters"
                    )
                pieces.append(piece)
        except TokenizerError:
            raise
        except self._failures as error:
            raise TokenizerError(f"{self.where} cannot write this: {_line(error)}") from None
        text = "".join(pieces)
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise TokenizerError(f"{self.where} writes half a surrogate pair: no text")
        return text


def _sandbox() -> tuple[Any, tuple[type[BaseException], ...]]:
    """A sandbox, and every error that code in it can end with. Raises: TokenizerError."""
    try:
        import jinja2
    except ImportError:
        raise TokenizerError(
            "chat templates need jinja2, which is not installed: pip install 'bloomq[chat]'"
        ) from None
    found = version("jinja2")
    if [int(part) for part in re.findall(r"\d+", found)[:3]] < [3, 1, 6]:
        raise TokenizerError(
            f"jinja2 {found} lets templates out of its sandbox: install 3.1.6 or newer"
        )
    from bloomq.chat.sandbox import Sandbox

    return Sandbox(), (
        jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError,
        MemoryError, RuntimeError, SyntaxError, TypeError, ValueError,
    )  # fmt: skip


def _line(error: BaseException) -> str:
    """What an error says, in a line that a terminal can show."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(char if char.isprintable() else "?" for char in text)[:200].rstrip(".")


def checked(messages: object) -> list[dict[str, Any]]:
    """Messages as plain data, what is None left out. Raises: UsageError."""
    if not isinstance(messages, list | tuple) or not messages:
        raise UsageError(f"messages are {messages!r:.60}, expected a list of at least one")
    found = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UsageError(f"message {number} is {message!r:.60}, expected a role and a content")
        kept = {key: value for key, value in message.items() if value is not None}
        for name in _REASONING:
            if name in kept:
                kept = {"thinking": kept[name], **kept, "reasoning_content": kept[name]}
                break
        found.append(plain(kept, f"message {number}"))
    return found


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of data made of text, numbers, lists and mappings. Raises: UsageError."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > 32:
        raise UsageError(f"{where}: lists and mappings lie more than 32 deep")
    if isinstance(value, str):
        return str.__str__(value)  # without what a class of the caller's adds to it
    if isinstance(value, np.generic):
        return plain(value.item(), where, depth + 1)
    if isinstance(value, list | tuple):
        return type(value)([plain(one, where, depth + 1) for one in value])
    if isinstance(value, Mapping):
        return {str(key): plain(one, where, depth + 1) for key, one in value.items()}
    kind = type(value).__name__
    raise UsageError(f"{where}: holds a {kind}, expected text, numbers, lists and mappings")
