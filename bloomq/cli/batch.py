"""`bloomq generate --batch-file`: a text for each line of a file, many at a time, resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from time import perf_counter

import click

from bloomq import console
from bloomq.cli.generation_options import Ready
from bloomq.cli.partial import Lines, continued
from bloomq.cli.records import Field, Record, Records, from_file
from bloomq.cli.running import job, say_interrupted, say_whole
from bloomq.errors import UsageError
from bloomq.generation.results import Generation, Stats

_NOTHING = Generation("", (), (), "stop", Stats(0, 0, 0.0, 0.0, 0.0))  # of a line without text


def prompts_of(path: Path, field: str) -> Records:
    """A prompt of each line. Raises: UsageError, InputNotFound."""
    return from_file(path, (Field(field, "--field"),))


def generate_all(
    ready: Ready, records: Records, out: Path | None, parallel: int, quiet: bool
) -> int:
    """Continue every prompt; the exit code. Results go to `out`, or to the screen, in order."""
    if ready.sampling.seed is None:  # so that a run which goes on draws what it would have drawn
        ready = replace(ready, sampling=replace(ready.sampling, seed=0))
    # Each text's tokens, before any is run: one that is too long is said at once, by its line.
    items = records.items
    prompts = [_ids(ready, record) for record in items if not record.is_empty]

    def results(first: int) -> Iterator[tuple[Record, Generation]]:
        before = sum(not record.is_empty for record in items[:first])
        found = ready.each(prompts, before, parallel)
        for record in islice(items, first, None):
            yield record, _NOTHING if record.is_empty else next(found)

    def line(record: Record, found: Generation) -> str:
        fields = {"line": record.line, "prompt": record.fields[0], **asdict(found)}
        return json.dumps(fields, ensure_ascii=False)

    if out is None:
        return _run(results(0), len(items), 0, quiet, lambda *pair: click.echo(line(*pair)), None)
    options = {**ready.options, "prompts": _digest(records)}
    begun = job("generate", ready.model.pack, ready.model.backend, records, options)
    with continued(out, begun, len(items), Lines()) as partial:
        if partial.is_whole:
            return say_whole(out, len(items), quiet)

        def save(record: Record, found: Generation) -> None:
            partial.append(line(record, found).encode() + b"\n", 1)

        return _run(results(partial.done), len(items), partial.done, quiet, save, out)


def _digest(records: Records) -> str:
    """Of the prompts themselves: another field of the same file has others."""
    texts = json.dumps([record.fields for record in records.items])
    return hashlib.sha256(texts.encode()).hexdigest()


def _ids(ready: Ready, record: Record) -> list[int]:
    model, asked = ready.model, ready.asked
    ids = model.prompt_ids(record.fields[0])
    room = model.context - asked.max_new_tokens
    if len(ids) > room and asked.window is None:
        raise UsageError(
            f"{record.where}: {len(ids)} tokens and {asked.max_new_tokens} new ones exceed the "
            f"context of {model.context}: shorten it, or load with a larger --context"
        )
    return ids


def _run(
    results: Iterator[tuple[Record, Generation]], total: int, first: int, quiet: bool,
    put: Callable[[Record, Generation], None], out: Path | None,
) -> int:  # fmt: skip
    started, done, tokens = perf_counter(), first, 0
    try:
        with console.estimate_progress("generating", quiet) as progress:
            progress(done, total, "")
            for record, found in results:
                put(record, found)
                done, tokens = done + 1, tokens + len(found.ids)
                rate = tokens / (perf_counter() - started)
                progress(done, total, f"{rate:.1f} tokens/s")
    except KeyboardInterrupt:
        return say_interrupted(out, done, total)
    if not quiet:
        seconds = perf_counter() - started
        before = f" behind {first} of before" if first else ""
        console.note(
            f"{done - first} texts{before}, {tokens} tokens in {seconds:.2f} s "
            f"({tokens / seconds:.1f}/s)"
        )
    return 0
