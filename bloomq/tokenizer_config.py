"""What a tokenizer_config.json asks for beside its tokenizer.json, as far as BLOOM's has a choice,
and the chat templates that it (or a chat_template.jinja) holds.

A pack keeps both in its manifest. Invariant: settings that would change ids or text, and that the
tokenizer does not have, are refused by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bloomq.encoding import Side
from bloomq.errors import BloomqError, InputNotFound, TokenizerError
from bloomq.files import read_bounded, shown

FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_MOST_BYTES = 64 << 20
MOST_TEMPLATE_CHARACTERS = 1 << 18  # of all chat templates: ten times the longest known ones
_MOST_TEMPLATES = 16
# Values other than these would give other ids; of other settings nothing depends.
_EXPECTED = {
    "add_prefix_space": False, "add_bos_token": False, "add_eos_token": False,
    "split_special_tokens": False, "truncation_side": "right",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """The side that padding goes to, what the special tokens are called, and the chat templates by
    name: the usual one is "default"."""

    padding_side: Side = "left"
    special: dict[str, str] = field(default_factory=lambda: dict(SPECIAL))
    chat_templates: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, str]:
        """As a pack's manifest stores them, and `settings_of` reads them: what BLOOM has not. The
        chat templates, which change neither ids nor text, lie beside them."""
        side = {} if self.padding_side == "left" else {"padding_side": str(self.padding_side)}
        return side | {k: token for k, token in self.special.items() if token != SPECIAL[k]}


def settings_of(
    stored: object, templates: object, where: str, error: type[BloomqError]
) -> Settings:
    """The settings that a pack's manifest holds, BLOOM's for those that it does not, and its chat
    templates.

    Raises: `error`, naming `where`, for a name or a value that is none of theirs.
    """
    named = templates_of(templates, where, error)
    if not isinstance(stored, dict):
        raise error(f"{where}: a {type(stored).__name__}, expected settings by name")
    for name, value in stored.items():
        if name not in ("padding_side", *SPECIAL):
            raise error(f"{where}: {shown(name):.40} is a setting that this tokenizer has not")
        if not isinstance(value, str):
            raise error(f"{where}: {name} is {value!r:.40}, expected a string")
    special = {name: stored.get(name, usual) for name, usual in SPECIAL.items()}
    return _checked(stored.get("padding_side", "left"), special, named, where, error)


def read_settings(folder: Path) -> Settings:
    """The settings of a folder's tokenizer_config.json; BLOOM's where there is none.

    Raises: TokenizerError for a damaged file and for settings that are not supported.
    """
    path, template = folder / FILE, _template_beside(folder)
    try:
        raw = json.loads(read_bounded(path, _MOST_BYTES, TokenizerError))
    except InputNotFound:
        return Settings(chat_templates=template or {})
    except (ValueError, RecursionError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(
            f"{path}: settings are no JSON ({str(error).splitlines()[0]})"
        ) from None
    if not isinstance(raw, dict):
        raise TokenizerError(f"{path}: a {type(raw).__name__}, expected settings by name")
    for name, expected in _EXPECTED.items():
        if raw.get(name) not in (None, expected):
            raise TokenizerError(
                f"{path}: {name} is {raw[name]!r:.40}, this tokenizer has {expected!r} alone"
            )
    special = {name: _token(raw.get(name), usual) for name, usual in SPECIAL.items()}
    side = raw.get("padding_side") or "left"
    if template is None:
        template = templates_of(raw.get("chat_template"), str(path), TokenizerError)
    return _checked(side, special, template, str(path), TokenizerError)


def templates_of(stored: object, where: str, error: type[BloomqError]) -> dict[str, str]:
    """Chat templates by name: of one text, of a list of objects with `name` and `template` (as
    transformers writes them), or by name already.

    Raises: `error`, naming `where`, for anything else, and for more than a conversation needs.
    """
    if stored is None:
        return {}
    named: Any = stored
    if isinstance(stored, str):
        named = {"default": stored}
    elif isinstance(stored, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) for one in stored
    ):
        named = {one["name"]: one.get("template") for one in stored}
    if not isinstance(named, dict) or not all(isinstance(one, str) for one in named.values()):
        raise error(f"{where}: chat_template is {stored!r:.40}, expected text, or texts by name")
    characters = sum(len(name) + len(text) for name, text in named.items())
    if len(named) > _MOST_TEMPLATES or characters > MOST_TEMPLATE_CHARACTERS:
        raise error(
            f"{where}: chat_template has {len(named)} texts of {characters} characters, expected "
            f"at most {_MOST_TEMPLATES} of {MOST_TEMPLATE_CHARACTERS}"
        )
    for name, text in named.items():
        if _has_surrogates(name + text):
            raise error(f"{where}: chat_template holds half a surrogate pair: no text")
    return dict(named)


def read_template(path: Path) -> str:
    """The Jinja of a file. Raises: InputNotFound, TokenizerError."""
    data = read_bounded(path, 4 * MOST_TEMPLATE_CHARACTERS, TokenizerError)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: byte {error.start} is no UTF-8: not a template") from None
    return templates_of(text, str(path), TokenizerError)["default"]


def _template_beside(folder: Path) -> dict[str, str] | None:
    """The template of chat_template.jinja, before which those of the settings do not count; None
    without the file."""
    try:
        return {"default": read_template(folder / TEMPLATE_FILE)}
    except InputNotFound:
        return None


def _has_surrogates(text: str) -> bool:
    """Does it hold half a character? JSON can spell these."""
    return any("\ud800" <= char <= "\udfff" for char in text)


def _checked(
    side: Any,
    special: dict[str, str],
    templates: dict[str, str],
    where: str,
    error: type[BloomqError],
) -> Settings:
    if side not in ("left", "right"):
        raise error(f"{where}: padding_side is {side!r:.40}, neither 'left' nor 'right'")
    for name, token in special.items():
        if _has_surrogates(token):
            raise error(f"{where}: {name} {token!r:.40} holds half a surrogate pair: no text")
    return Settings(side, special, templates)


def _token(value: Any, usual: str) -> str:
    """A special token as these files spell it: its text, or an object with it."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else usual
