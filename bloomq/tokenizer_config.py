"""What a tokenizer_config.json asks for beside its tokenizer.json, as far as BLOOM's has a choice.

A pack keeps it in its manifest. Invariant: settings that would change ids or text, and that the
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

FILE = "tokenizer_config.json"
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_MOST_BYTES = 64 << 20
# Values other than these would give other ids; of other settings nothing depends.
_EXPECTED = {
    "add_prefix_space": False, "add_bos_token": False, "add_eos_token": False,
    "split_special_tokens": False, "truncation_side": "right",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """The side that padding goes to, and what the special tokens are called."""

    padding_side: Side = "left"
    special: dict[str, str] = field(default_factory=lambda: dict(SPECIAL))

    def to_dict(self) -> dict[str, str]:
        """As a pack's manifest stores them, and `settings_of` reads them: what BLOOM has not."""
        side = {} if self.padding_side == "left" else {"padding_side": str(self.padding_side)}
        return side | {k: token for k, token in self.special.items() if token != SPECIAL[k]}


def settings_of(stored: object, where: str, error: type[BloomqError]) -> Settings:
    """The settings that a pack's manifest holds, BLOOM's for those that it does not.

    Raises: `error`, naming `where`, for a name or a value that is none of theirs.
    """
    if not isinstance(stored, dict):
        raise error(f"{where}: a {type(stored).__name__}, expected settings by name")
    for name, value in stored.items():
        if name not in ("padding_side", *SPECIAL):
            raise error(f"{where}: {shown(name):.40} is a setting that this tokenizer has not")
        if not isinstance(value, str):
            raise error(f"{where}: {name} is {value!r:.40}, expected a string")
    special = {name: stored.get(name, usual) for name, usual in SPECIAL.items()}
    return _checked(stored.get("padding_side", "left"), special, where, error)


def read_settings(folder: Path) -> Settings:
    """The settings of a folder's tokenizer_config.json; BLOOM's where there is none.

    Raises: TokenizerError for a damaged file and for settings that are not supported.
    """
    path = folder / FILE
    try:
        raw = json.loads(read_bounded(path, _MOST_BYTES, TokenizerError))
    except InputNotFound:
        return Settings()
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
    return _checked(raw.get("padding_side") or "left", special, str(path), TokenizerError)


def _checked(side: Any, special: dict[str, str], where: str, error: type[BloomqError]) -> Settings:
    if side not in ("left", "right"):
        raise error(f"{where}: padding_side is {side!r:.40}, neither 'left' nor 'right'")
    for name, token in special.items():
        if any("\ud800" <= char <= "\udfff" for char in token):  # JSON can spell these
            raise error(f"{where}: {name} {token!r:.40} holds half a surrogate pair: no text")
    return Settings(side, special)


def _token(value: Any, usual: str) -> str:
    """A special token as these files spell it: its text, or an object with it."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else usual
