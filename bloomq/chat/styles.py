"""How a conversation becomes the text that a model continues: by a style of three texts, or by the
Jinja template that a model brings.

Invariant: a text ends where the answer begins, and an answer, put back, gives the same text again:
so a conversation that goes on begins with the tokens that it had.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bloomq.chat.template import ChatTemplate, Message
from bloomq.errors import InputNotFound, TokenizerError, UsageError
from bloomq.tokenizer import BloomTokenizer
from bloomq.tokenizer_config import read_template

_PROBE = "An answer, 42"  # what a template writes behind it is how answers end


class Template(Protocol):
    """Messages as text. stop: texts that an answer ends before; ends: tokens that it ends with."""

    @property
    def name(self) -> str: ...
    @property
    def stop(self) -> tuple[str, ...]: ...
    @property
    def ends(self) -> tuple[int, ...]: ...
    def prompt(self, messages: Sequence[Message]) -> str:
        """The text of messages of which the last awaits an answer. Raises: TokenizerError."""
        ...


@dataclass(frozen=True, slots=True)
class Style:
    """A template without Jinja. In each text {} is a message; what precedes {} in `assistant` is
    where an answer begins."""

    name: str
    system: str
    user: str
    assistant: str
    stop: tuple[str, ...]
    ends: tuple[int, ...] = ()

    def prompt(self, messages: Sequence[Message]) -> str:
        forms = {"system": self.system, "user": self.user, "assistant": self.assistant}
        written = [forms[one["role"]].replace("{}", one["content"]) for one in messages]
        # A space before the answer is the answer's first token's own.
        return "".join([*written, self.assistant.partition("{}")[0].rstrip(" ")])


STYLES = {
    style.name: style
    for style in (
        # BLOOMZ was tuned on a text and its answer, with no marks. Source: arXiv 2211.01786.
        Style("bloomz", "{}\n", "{}\n", "{}\n", stop=("\n",)),
        # Source: the model cards of BelleGroup/BELLE-7B-*.
        Style("belle", "{}\n\n", "Human: {}\n\n", "Assistant: {}\n\n", stop=("\nHuman:",)),
        # Source: Stanford Alpaca and alpaca-lora, the prompt without an input.
        Style(
            "alpaca", "{}\n\n", "### Instruction:\n{}\n\n", "### Response:\n{}\n\n",
            stop=("\n### ",),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Jinja:
    """A chat template, rendered with a tokenizer's special tokens. source: None for its own."""

    name: str
    tokenizer: BloomTokenizer
    source: str | None
    stop: tuple[str, ...]
    ends: tuple[int, ...]

    def prompt(self, messages: Sequence[Message]) -> str:
        text = self.tokenizer.apply_chat_template(list(messages), chat_template=self.source)
        assert isinstance(text, str)  # without `tokenize`
        return text


def jinja(name: str, tokenizer: BloomTokenizer, source: str | None) -> Jinja:
    """The template, and how its answers end: as it writes the end of one itself.

    Raises: TokenizerError for what is no Jinja.
    """
    ends = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    exchange = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": _PROBE}]
    plain = Jinja(name, tokenizer, source, (), tuple(ends))
    if source is not None:
        ChatTemplate(source, name)
    try:
        written = tokenizer.apply_chat_template(
            exchange, chat_template=source, add_generation_prompt=False
        )
    except TokenizerError:  # it asks for more than this, such as a system's message: eos remains
        return plain
    assert isinstance(written, str)  # without `tokenize`
    closing = written.rpartition(_PROBE)[2].strip() if _PROBE in written else ""
    ids = tokenizer.encode(closing) if closing else []
    if ids and ids[0] in tokenizer.all_special_ids:
        return Jinja(name, tokenizer, source, (), (*ends - {ids[0]}, ids[0]))
    return Jinja(name, tokenizer, source, (closing,) if closing else (), tuple(ends))


def is_named(name: str, tokenizer: BloomTokenizer) -> bool:
    """Is it the name of a style, or of one of the tokenizer's templates, and not of a file?"""
    return name in STYLES or name in _own(tokenizer)


def _own(tokenizer: BloomTokenizer) -> dict[str, str]:
    """The tokenizer's templates by their names."""
    ours = tokenizer.chat_template
    return {"default": ours} if isinstance(ours, str) else dict(ours or {})


def find_template(given: str | os.PathLike[str] | None, tokenizer: BloomTokenizer) -> Template:
    """A style by its name, the Jinja of a file, or the name of one of the tokenizer's templates;
    None: the tokenizer's own, BLOOMZ's style where it has none.

    Raises: UsageError for a name of nothing; TokenizerError for a template that is wrong.
    """
    named = _own(tokenizer)
    if given is None:
        return jinja("default", tokenizer, None) if "default" in named else STYLES["bloomz"]
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        raise UsageError(f"template is {given!r:.40}, expected a name, or that of a Jinja file")
    given = os.fspath(given)
    if given in STYLES:
        return STYLES[given]
    if given in named:
        return jinja(given, tokenizer, named[given])
    try:
        return jinja(given, tokenizer, read_template(Path(given)))
    except InputNotFound:
        known = ", ".join([*STYLES, *named])
        raise UsageError(f"template {given!r:.80} is no file, and none of {known}") from None
