"""Texts from the command line, from a file or from standard input, each with where it came from."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bloomq import console
from bloomq.errors import UsageError
from bloomq.files import read_bounded, shown

MOST_BYTES = 1 << 28  # of a file, whose texts are all in memory: days of work for bloom-560m


@dataclass(frozen=True, slots=True)
class Field:
    """A field or column with a text, and the option that names it."""

    name: str
    option: str


Fields = tuple[Field, ...]
_ONE = (Field("text", "--field"),)  # of a line, which has no names for what it holds


@dataclass(frozen=True, slots=True)
class Record:
    """One text, or several that belong together. where: as errors name it, "reviews.csv:17"; line:
    where results say that it comes from, from 1: a line, a row below a .csv's header, an argument.
    """

    where: str
    fields: tuple[str, ...]
    line: int

    @property
    def is_empty(self) -> bool:
        """Is one of its texts white space alone?"""
        return not all(text.strip() for text in self.fields)


@dataclass(frozen=True, slots=True)
class Records:
    """digest: SHA-256 of all that the records were read from."""

    items: list[Record]
    digest: str


def read_texts(texts: Sequence[str], file: Path | None, field: str) -> Records:
    """The texts of the command line, or of a file, or a text for each line of standard input.

    Raises: UsageError, InputNotFound.
    """
    if texts and file is not None:
        raise UsageError(f"found texts and --file {file}, expected one of them")
    if file is not None:
        return from_file(file, (Field(field, "--field"),))
    if texts:
        return _given([(text,) for text in texts])
    if not _is_piped():
        raise UsageError("no texts: give some as arguments, with --file or on standard input")
    return _from_standard_input(_ONE)


def read_pairs(
    given: tuple[str | None, str | None], file: Path | None, fields: tuple[str, str]
) -> Records:
    """Questions and contexts: those that are given, and the others from a file, or the context
    from standard input, as a whole.

    Raises: UsageError, InputNotFound.
    """
    question, context = given
    if file is None:
        if question is None:
            raise UsageError("no question: give it with --question, or a file of them with --file")
        if context is None and not _is_piped():
            raise UsageError("no context: give it with --context or on standard input")
        return _given([(question, console.read_all() if context is None else context)])
    both = Field(fields[0], "--question-field"), Field(fields[1], "--context-field")
    wanted = tuple(field for field, one in zip(both, given, strict=True) if one is None)
    if not wanted:
        raise UsageError(f"found --question, --context and --file {file}, expected two at most")
    read = from_file(file, wanted)
    items = []
    for record in read.items:
        rest = iter(record.fields)
        texts = tuple(next(rest) if one is None else one for one in given)
        items.append(Record(record.where, texts, record.line))
    names = [field.name for field in wanted]
    return Records(items, _digest(json.dumps([read.digest, *given, *names]).encode()))


def _given(texts: Sequence[tuple[str, ...]]) -> Records:
    """Records of the command line."""
    items = [Record(f"text {i}", fields, i) for i, fields in enumerate(texts, 1)]
    return _some(items, "the command line", json.dumps(texts).encode())


def _is_piped() -> bool:
    return sys.stdin is not None and not console.is_terminal(sys.stdin)


def _from_standard_input(fields: Fields) -> Records:
    text = console.read_all()
    return _some(list(_lines(text, "standard input", fields)), "standard input", text.encode())


def from_file(path: Path, fields: Fields) -> Records:
    """A text a line of a .txt, or these fields of each line of a .jsonl or each row of a .csv; of
    "-", standard input, a text a line.

    Raises: UsageError, which names the line; InputNotFound.
    """
    if str(path) == "-":
        return _from_standard_input(fields)
    read = _READERS.get(path.suffix.lower())
    data = read_bounded(path, MOST_BYTES, UsageError)
    if read is None:
        raise UsageError(f"{path}: ends in {path.suffix!r}, expected {', '.join(_READERS)}")
    text = _decoded(data, path)
    return _some(list(read(text, str(path), fields)), str(path), data)


def text_of(path: Path) -> str:
    """All of a file of text. Raises: UsageError, InputNotFound."""
    return _decoded(read_bounded(path, MOST_BYTES, UsageError), path)


def _decoded(data: bytes, path: Path) -> str:
    try:
        text = data.decode("utf-8-sig")  # as Excel writes it, too
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is no UTF-8: convert the file") from None
    if "\0" in text:
        raise UsageError(f"{path}: has NUL bytes: it is no text file")
    return text


def _some(items: list[Record], where: str, data: bytes) -> Records:
    if all(record.is_empty for record in items):
        raise UsageError(f"{where}: has no texts: every line is empty")
    for record in items:
        for text in record.fields:
            if any("\ud800" <= char <= "\udfff" for char in text):
                raise UsageError(f"{record.where}: holds half a character (a lone surrogate)")
    return Records(items, _digest(data))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _lines(text: str, where: str, fields: Fields) -> Iterator[Record]:
    """Other line ends than these, such as U+2028, are part of a text."""
    if len(fields) != 1:
        wanted = " and ".join(shown(field.name) for field in fields)
        raise UsageError(f"{where}: has one text a line, expected {wanted}: use a .jsonl or a .csv")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        yield Record(f"{where}:{number}", (line.removesuffix("\r"),), number)


def _json_lines(text: str, where: str, fields: Fields) -> Iterator[Record]:
    for line in _lines(text, where, _ONE):
        if line.is_empty:
            continue
        try:
            row = json.loads(line.fields[0])
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{line.where}: is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise UsageError(f"{line.where}: is a {type(row).__name__}, expected an object")
        texts = tuple(_field(row, field, line.where) for field in fields)
        yield Record(line.where, texts, line.line)


def _field(row: dict[str, object], field: Field, where: str) -> str:
    if field.name not in row:
        raise UsageError(
            f"{where}: no field {shown(field.name)}, found {_listed(row)}: name it with "
            f"{field.option}"
        )
    value = row[field.name]
    if not isinstance(value, str):
        raise UsageError(f"{where}: {shown(field.name)} is {value!r:.40}, expected a text")
    return value


def _csv(text: str, where: str, fields: Fields) -> Iterator[Record]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    before = csv.field_size_limit(MOST_BYTES)  # of the whole process: 131,072 characters a cell
    try:
        for field in fields:
            if field.name not in (rows.fieldnames or ()):
                raise UsageError(
                    f"{where}: no column {shown(field.name)}, found "
                    f"{_listed(rows.fieldnames or ())}: name it with {field.option}"
                )
        for number, row in enumerate(rows, 1):
            at = f"{where}:{rows.line_num}"
            if any(row[field.name] is None for field in fields):
                last = shown(fields[-1].name)
                raise UsageError(f"{at}: the row ends before {last}: complete it")
            yield Record(at, tuple(row[field.name] for field in fields), number)
    except csv.Error as error:
        raise UsageError(f"{where}:{rows.reader.line_num}: is no CSV: {error}") from None
    finally:
        csv.field_size_limit(before)


def _listed(names: object) -> str:
    listed = ", ".join(shown(str(name)) for name in names)  # type: ignore[attr-defined]
    return f"{listed:.200}" or "none"


_READERS: dict[str, Callable[[str, str, Fields], Iterator[Record]]] = {
    ".txt": _lines, ".jsonl": _json_lines, ".csv": _csv,
}  # fmt: skip
