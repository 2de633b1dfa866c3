"""What generated text must be: JSON of a schema, a match of a regex, a sentence of a grammar.

Values that are checked when they are made; `matching` follows them token by token. Invariant: a
value is text alone, so that it can be compared, hashed, compiled once and used by many sequences.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from bloomq.constraints.engine import check, converted_gbnf, json_definition, text_definition
from bloomq.errors import UsageError

# llguidance's compiler recurses: chains of rules in texts of these sizes overflow 8 MB of stack,
# and take 20 to 60 MB of the 256 MB that it gets. Many chains are compiled in quadratic time.
MOST_BYTES = 64 << 10
MOST_SCHEMA_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """JSON that a schema describes: a mapping, its JSON text (kept as text), or True for any JSON.

    compact: without blanks; else there may be one space, or a line break and its indentation, at
    each place where JSON allows blanks, or what the schema's own "x-guidance" says. Properties come
    in the schema's order. A keyword that cannot be honoured is an error, never ignored.

    Raises: UsageError, BackendError where llguidance is not installed.
    Source: JSON Schema draft 2020-12, the part that llguidance has (its docs/json_schema.md).
    """

    schema: str | Mapping[str, object] | bool
    compact: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.compact, bool):
            raise UsageError(f"compact is {self.compact!r:.40}, expected True or False")
        text = _schema_text(self.schema)
        _check_size("the JSON schema", text, MOST_SCHEMA_BYTES)
        object.__setattr__(self, "schema", text)
        check("the JSON schema", self.definition)

    @classmethod
    def any_object(cls, *, compact: bool = False) -> JsonSchema:
        """Any JSON object."""
        return cls({"type": "object"}, compact=compact)

    def definition(self) -> str:
        """What llguidance compiles."""
        return json_definition(str(self.schema), self.compact)


@dataclass(frozen=True, slots=True)
class Regex:
    """Text that a regular expression matches from its first to its last character.

    Rust's syntax: Python's without look-around and back references; `\\d` and `\\w` are Unicode's.
    Raises: UsageError, BackendError where llguidance is not installed.
    """

    pattern: str

    def __post_init__(self) -> None:
        _check_text("the regular expression", self.pattern)
        check("the regular expression", self.definition)

    def definition(self) -> str:
        """What llguidance compiles."""
        return text_definition("regex", self.pattern)


@dataclass(frozen=True, slots=True)
class Grammar:
    """A sentence of a grammar: llguidance's Lark, which begins at `start`, or llama.cpp's
    GBNF, which begins at `root`.

    Raises: UsageError, BackendError where llguidance is not installed.
    Source: llguidance, docs/syntax.md; llama.cpp, grammars/README.md.
    """

    text: str

    def __post_init__(self) -> None:
        _check_text("the grammar", self.text)
        if "::=" in self.text and not _GBNF_ROOT.search(self.text):
            raise UsageError("the grammar is GBNF without a rule named root, where it begins")
        check("the grammar", self.definition)

    def definition(self) -> str:
        """What llguidance compiles."""
        lark = converted_gbnf(self.text) if _GBNF_ROOT.search(self.text) else self.text
        return text_definition("lark", lark)


AnyConstraint: TypeAlias = JsonSchema | Regex | Grammar
_GBNF_ROOT = re.compile(r"(?m)^[ \t]*root[ \t]*::=")


def _schema_text(schema: object) -> str:
    """A schema as the JSON text of an object, ASCII, so that nothing in it fails to be encoded."""
    if isinstance(schema, str):
        schema = _parsed(schema)
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise UsageError(
            f"the JSON schema is {schema!r:.40}, expected an object or true (false allows nothing)"
        )
    try:
        return json.dumps(schema, allow_nan=False, default=_as_dict, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the JSON schema cannot be written as JSON: {error}") from None


def _parsed(text: str) -> object:
    _check_size("the JSON schema", text, MOST_SCHEMA_BYTES)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the JSON schema is not JSON: {error}") from None


def _as_dict(value: object) -> dict[object, object]:
    """For json.dumps: a mapping that is no dict."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON type")


def _check_text(what: str, text: object) -> None:
    if not isinstance(text, str):
        raise UsageError(f"{what} is {text!r:.40}, expected a string")
    _check_size(what, text, MOST_BYTES)


def _check_size(what: str, text: str, most: int) -> None:
    """Raises: UsageError also for half a surrogate pair, which no UTF-8 text has."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UsageError(f"{what} holds a lone surrogate: give text that UTF-8 can hold") from None
    if size > most:
        raise UsageError(f"{what} has {size} bytes, expected at most {most}: make it shorter")
