"""A task over many texts: piece by piece to the screen or to a file, interruptible in between."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from bloomq import __version__, console
from bloomq.cli.partial import Layout, Lines, continued
from bloomq.cli.records import Record, Records

if TYPE_CHECKING:
    from bloomq.layers import Backend
    from bloomq.modeling import BloomPreTrainedModel
    from bloomq.pack import Pack

_CHUNK = 4  # batches of tokens, whose texts are sorted by length together: what Ctrl-C may lose
# What is tokenized at once: enough for every core, and 50 MB where tokens are of 4 characters.
_READ_RECORDS, _READ_CHARS = 1000, 1 << 20


def job(
    command: str, pack: Pack, backend: Backend, records: Records, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What results depend on, and so what a file must have been begun with to be continued."""
    return {
        "command": command, "version": __version__, "input": records.digest,
        "model": pack.manifest["checksum"], "backend": backend.arithmetic, "options": dict(options),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Task:
    """What is done with records.

    read: each record's texts as tokens, for `work` to take; size: how many tokens; work: the result
    of each; options: what results depend on, beside the records and the model.
    """

    name: str
    model: BloomPreTrainedModel
    options: Mapping[str, Any]
    records: Records
    read: Callable[[list[Record]], Sequence[Any]]
    size: Callable[[Any], int]
    work: Callable[[list[Any]], Sequence[Any]]

    def job(self) -> dict[str, Any]:
        return job(self.name, self.model.pack, self.model.backend, self.records, self.options)

    def chunks(self, first: int, most: int) -> Iterator[tuple[list[Record], list[Any]]]:
        """The records from `first` on, so many tokens at a time, and what was read of those with a
        text."""
        for block in _blocks(self.records.items, first):
            whole = iter(self.read([record for record in block if not record.is_empty]))
            chunk: list[Record] = []
            given: list[Any] = []
            tokens = 0
            for record in block:
                one = None if record.is_empty else next(whole)
                more = 0 if one is None else self.size(one)
                if chunk and tokens + more > most:
                    yield chunk, given
                    chunk, given, tokens = [], [], 0
                chunk.append(record)
                tokens += more
                if one is not None:
                    given.append(one)
            yield chunk, given

    def results(self, records: list[Record], given: list[Any], empty: Any) -> list[Any]:
        """Of each record of a chunk; `empty` of those without a text."""
        found = iter(self.work(given) if given else [])
        return [empty if record.is_empty else next(found) for record in records]


def _blocks(items: list[Record], first: int) -> Iterator[list[Record]]:
    """The records from `first` on, as many as are tokenized at once."""
    block: list[Record] = []
    chars = 0
    for record in islice(items, first, None):
        more = sum(map(len, record.fields))
        if block and (len(block) == _READ_RECORDS or chars + more > _READ_CHARS):
            yield block
            block, chars = [], 0
        block.append(record)
        chars += more
    if block:
        yield block


@dataclass(frozen=True, slots=True)
class Output:
    """Where results go, and how. path: None for the screen; line: a result as JSON; show: one for
    people, and whether there are others; None: they get the JSON too; empty: the result of a record
    without text."""

    path: Path | None
    as_json: bool
    quiet: bool
    line: Callable[[Record, Any], Mapping[str, Any]]
    show: Callable[[Record, Any, bool], str] | None = None
    empty: Any = ()

    def text(self, record: Record, result: Any, several: bool) -> str:
        """What is printed."""
        if self.show is not None and not self.as_json:
            return self.show(record, result, several)
        return json.dumps(self.line(record, result), ensure_ascii=False)

    def encode(self, record: Record, result: Any) -> bytes:
        """A line of a file."""
        return json.dumps(self.line(record, result), ensure_ascii=False).encode() + b"\n"


def run(
    task: Task,
    output: Output,
    batch_tokens: int,
    *,
    layout: Layout | None = None,
    encode: Callable[[Record, Any], bytes] | None = None,
) -> int:
    """Do a task; the exit code. layout, encode: of a file that is not lines of JSON."""
    most, several = _CHUNK * batch_tokens, len(task.records.items) > 1
    if output.path is None:

        def show(records: list[Record], results: Sequence[Any]) -> None:
            for pair in zip(records, results, strict=True):
                click.echo(output.text(*pair, several))

        return _run(task, output, most, 0, show)
    total, unit = len(task.records.items), encode or output.encode
    with continued(output.path, task.job(), total, layout or Lines()) as partial:

        def save(records: list[Record], results: Sequence[Any]) -> None:
            partial.append(b"".join(map(unit, records, results)), len(records))

        if partial.is_whole:
            return say_whole(output.path, total, output.quiet)
        return _run(task, output, most, partial.done, save)


def say_whole(path: Path, total: int, quiet: bool) -> int:
    """Of a file that a job has finished before; the exit code."""
    if not quiet:
        what = "the result is" if total == 1 else f"all {total} results are"
        console.note(f"{path}: is complete: {what} there")
    return 0


def say_interrupted(path: Path | None, done: int, total: int) -> int:
    """Of a job that Ctrl-C ended, which writes to a file or to the screen; the exit code."""
    where = f" in {path}, the same command goes on" if path is not None and done else ""
    console.note(f"interrupted: {done} of {total} are done{where}")
    return console.INTERRUPTED


def without_nan(value: Any) -> Any:
    """With None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _run(
    task: Task,
    output: Output,
    most: int,
    first: int,
    put: Callable[[list[Record], Sequence[Any]], None],
) -> int:
    """Do the records from `first` on."""
    started, done, total = perf_counter(), first, len(task.records.items)
    hidden = output.quiet or (output.path is None and console.is_terminal(sys.stdout))
    silent = nullcontext(lambda done, total: None)  # a bar would spoil what is printed
    try:
        with silent if hidden else console.text_progress(task.name, first) as progress:
            progress(done, total)
            for records, given in task.chunks(first, most):
                put(records, task.results(records, given, output.empty))
                done += len(records)
                progress(done, total)
    except KeyboardInterrupt:
        return say_interrupted(output.path, done, total)
    if not output.quiet:
        seconds, before = perf_counter() - started, f" behind {first} of before" if first else ""
        count = f"{done - first} text{'' if done - first == 1 else 's'}{before}"
        console.note(f"{count} in {seconds:.2f} s, {(done - first) / seconds:.1f} a second")
    return 0
