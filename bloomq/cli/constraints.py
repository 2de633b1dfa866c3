"""The options that constrain what is written, as the value that `generate` takes."""

from __future__ import annotations

from pathlib import Path

from bloomq.constraints import MOST_SCHEMA_BYTES, AnyConstraint, Grammar, JsonSchema, Regex
from bloomq.errors import UsageError
from bloomq.files import read_bounded


def from_options(
    json_schema: Path | None, regex: str | None, grammar: Path | None, json_object: bool
) -> AnyConstraint | None:
    """The constraint that --json-schema, --regex, --grammar or --json-object asks for, or None.

    Raises: UsageError for two of them, and for a file that is no constraint, by its name;
    InputNotFound; BackendError where llguidance is not installed.
    """
    given = [
        name for name, value in (
            ("--json-schema", json_schema), ("--regex", regex), ("--grammar", grammar),
            ("--json-object", json_object or None),
        ) if value is not None
    ]  # fmt: skip
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} cannot both hold: give one constraint")
    if json_schema is not None:
        return _of_file(json_schema, JsonSchema)
    if grammar is not None:
        return _of_file(grammar, Grammar)
    if regex is not None:
        return Regex(regex)
    return JsonSchema.any_object() if json_object else None


def _of_file(path: Path, kind: type[JsonSchema] | type[Grammar]) -> AnyConstraint:
    data = read_bounded(path, MOST_SCHEMA_BYTES, UsageError)
    try:
        text = data.decode("utf-8-sig")  # a byte order mark is none of it
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: not UTF-8 text at byte {error.start}: save it as UTF-8"
        ) from None
    try:
        return kind(text)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
