"""A task over many texts: piece by piece to the screen or to a file, interruptible in between."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from bloomq import __version__, console
from bloomq.cli.partial import Layout, Lines, continued
from bloomq.cli.records import Record, Records
from bloomq.cli.text import INTERRUPTED

if TYPE_CHECKING:
    from bloomq.modeling import BloomPreTrainedModel

_CHUNK = 4  # batches of tokens, whose texts are sorted by length together: what Ctrl-C may lose


@dataclass(frozen=True, slots=True)
class Task:
    """lengths: tokens of each record; work: the results of some records; options: what results
    depend on, beside the records and the model."""

    name: str
    model: BloomPreTrainedModel
    options: Mapping[str, Any]
    records: Records
    lengths: Sequence[int]
    work: Callable[[list[Record]], Sequence[Any]]

    def job(self) -> dict[str, Any]:
        """What a file must have been begun with to be continued."""
        return {
            "command": self.name, "version": __version__, "input": self.records.digest,
            "model": self.model.pack.manifest["checksum"], "backend": self.model.backend.name,
            "options": dict(self.options),
        }  # fmt: skip

    def chunks(self, first: int, most: int) -> Iterator[list[Record]]:
        """The records from `first` on, so many tokens at a time."""
        items = self.records.items
        while first < len(items):
            stop, tokens = first + 1, self.lengths[first]
            while stop < len(items) and tokens + self.lengths[stop] <= most:
                tokens += self.lengths[stop]
                stop += 1
            yield items[first:stop]
            first = stop


@dataclass(frozen=True, slots=True)
class Output:
    """Where results go, and how. path: None for the screen; line: a result as JSON; show: one for
    people, and whether there are others; None: they get the JSON too."""

    path: Path | None
    as_json: bool
    quiet: bool
    line: Callable[[Record, Any], Mapping[str, Any]]
    show: Callable[[Record, Any, bool], str] | None = None

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

        return _run(task, output, most, partial.done, save)


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
            for records in task.chunks(first, most):
                put(records, task.work(records))
                done += len(records)
                progress(done, total)
    except KeyboardInterrupt:
        where = f" in {output.path}, the same command goes on" if output.path and done else ""
        console.note(f"interrupted: {done} of {total} are done{where}")
        return INTERRUPTED
    if not output.quiet:
        seconds, before = perf_counter() - started, f" behind {first} of before" if first else ""
        count = f"{done - first} text{'' if done - first == 1 else 's'}{before}"
        console.note(f"{count} in {seconds:.2f} s, {(done - first) / seconds:.1f} a second")
    return 0
