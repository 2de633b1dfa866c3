"""What people see on stderr: progress bars, tables, and lines about a run."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any, TextIO

import click

from bloomq.errors import UsageError
from bloomq.files import shown
from bloomq.generation import Generation

Progress = Callable[[int, int], None]
INTERRUPTED = 130  # exit code after Ctrl-C
_BAR_AFTER_TOKENS = 512  # shorter prompts are through before a bar could be read


def is_terminal(stream: TextIO | None) -> bool:
    """Is a person there? A closed stream is None."""
    return stream is not None and stream.isatty()


def colours_shown(stream: TextIO | None) -> bool:
    """Does it show colours, and dim and bold text? Source: no-color.org."""
    allowed = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return allowed and is_terminal(stream)


def dimmed(text: str) -> str:
    """A text for stderr, dim where that is shown."""
    return click.style(text, dim=True) if colours_shown(sys.stderr) else text


def note(text: str) -> None:
    """A dim line on stderr."""
    click.echo(dimmed(text), err=True)


def heading(text: str, stream: TextIO) -> None:
    """A line of its own, bold where that is shown."""
    click.echo(click.style(text, bold=True) if colours_shown(stream) else text, file=stream)


def echo_prompt(text: str) -> None:
    """Show the prompt before its continuation, to a person only: a pipe gets the continuation."""
    if is_terminal(sys.stdout) and is_terminal(sys.stderr):
        click.echo(dimmed(text), err=True, nl=False)


def stats_line(generation: Generation) -> str:
    """Tokens, times and rates of a generation, in a line."""
    s = generation.stats
    guesses = f", {s.right_guesses} of {s.guessed_tokens} guesses right" if s.guessed_tokens else ""
    return (
        f"prompt {s.prompt_tokens} tokens in {s.prompt_s:.2f} s ({s.prompt_tokens_per_s:.0f}/s), "
        f"output {s.generated_tokens} in {s.generate_s:.2f} s ({s.generated_tokens_per_s:.1f}/s)"
        f"{guesses}, load {s.load_s:.2f} s, ended by {generation.finish_reason}"
    )


def announce_compilation() -> None:
    """Show each kernel that is compiled, and how long it took: seconds, once for each machine."""
    logger = logging.getLogger("bloomq.compile")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def read_line() -> str | None:
    """The next line of a pipe, None at the end. Raises: UsageError for bytes that are no text."""
    line = b"" if sys.stdin is None else sys.stdin.buffer.readline()
    return decoded(line).rstrip("\n") if line else None


def read_all() -> str:
    """All of standard input. Raises: UsageError for bytes that are no text."""
    return decoded(b"" if sys.stdin is None else sys.stdin.buffer.read())


def decoded(data: bytes) -> str:
    """UTF-8 as text. Raises: UsageError."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 (byte {error.start}): convert it") from None


@contextmanager
def _bar(*columns: Any) -> Iterator[Any]:
    """A rich progress bar on stderr, None where stderr is no terminal."""
    if not is_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, redirect_stdout=False,
    ) as progress:  # fmt: skip
        yield progress


@contextmanager
def byte_progress(label: str) -> Iterator[Progress]:
    """A bar over bytes, for callbacks (done, total)."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _bar(DownloadColumn(), TransferSpeedColumn()) as bar:
        if bar is None:
            yield lambda done, total: None
            return
        task, begun = bar.add_task(label, total=None), False

        def show(done: int, total: int) -> None:
            nonlocal begun
            if not begun:  # what an earlier run has done says nothing of this one's speed
                bar.reset(task, completed=done, total=total)
            begun = True
            bar.update(task, completed=done, total=total)

        yield show


@contextmanager
def step_progress(label: str) -> Iterator[Progress]:
    """A bar over steps of any kind, for callbacks (done, total)."""
    from rich.progress import MofNCompleteColumn

    with _bar(MofNCompleteColumn()) as bar:
        if bar is None:
            yield lambda done, total: None
            return
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def text_progress(label: str, begun_at: int = 0) -> Iterator[Progress]:
    """A bar over texts and how many a second, for callbacks (done, total). begun_at: those that an
    earlier run has done."""
    from rich.progress import MofNCompleteColumn, TextColumn

    started = perf_counter()
    with _bar(MofNCompleteColumn(), TextColumn("{task.fields[rate]}")) as bar:
        if bar is None:
            yield lambda done, total: None
            return
        task = bar.add_task(label, total=None, rate="")

        def show(done: int, total: int) -> None:
            rate = (done - begun_at) / (perf_counter() - started)
            bar.update(task, completed=done, total=total, rate=f"{rate:.1f} texts/s")

        yield show


@contextmanager
def estimate_progress(label: str, quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with an estimate that settles, for callbacks (done, total, estimate)."""
    from rich.progress import TaskProgressColumn, TextColumn

    columns = TaskProgressColumn(), TextColumn("{task.fields[estimate]}")
    with nullcontext() if quiet else _bar(*columns) as bar:
        if bar is None:
            yield lambda done, total, estimate: None
            return
        task = bar.add_task(label, total=None, estimate="")
        yield lambda done, total, estimate: bar.update(
            task, completed=done, total=total, estimate=estimate
        )


@contextmanager
def prefill_progress(quiet: bool) -> Iterator[Progress]:
    """A bar while a long prompt is read, gone before the first token is printed."""
    if quiet or not is_terminal(sys.stderr):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task("reading the prompt", start=True)

    def show(done: int, total: int) -> None:
        if total <= _BAR_AFTER_TOKENS:
            return
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=done, total=total)
        if done == total:
            bar.stop()

    try:
        yield show
    finally:
        bar.stop()


def print_facts(facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Facts in sections, aligned, on stdout: plain text, since names come from files."""
    width = max(len(name) for rows in facts.values() for name in rows)
    for section, rows in facts.items():
        heading(section, sys.stdout)
        for name, value in rows.items():
            click.echo(f"  {name:{width}}  {shown(str(value))}")


def bench_header(facts: Mapping[str, Any], read_gb_s: float, dot_gmac_s: float) -> None:
    """What is measured, the machine's ceilings, and the names of the columns."""
    click.echo(
        f"{facts['model']}: {facts['pack_mb']:.0f} MB, {facts['bits_per_weight']} bits per weight; "
        f"{facts['backend']}\n"
        f"ceilings: {read_gb_s:.1f} GB/s read, {dot_gmac_s:.0f} GMAC/s int8\n\n"
        f"{'test':<20} {'tok/s':>9} {'+-':>7} {'ms p50':>8} {'p90':>8} {'rate':>12} {'of':>8} "
        f"{'%':>6}"
    )


def bench_row(row: Mapping[str, Any]) -> None:
    """One test's line."""
    if "gb_s" in row:
        steps = f"{row['ms_p50']:8.2f} {row['ms_p90']:8.2f}"
        rate, ceiling = f"{row['gb_s']:.1f} GB/s", f"{row['bandwidth_gb_s']:.1f}"
    else:
        steps = f"{'':>8} {'':>8}"
        rate, ceiling = f"{row['gmac_s']} GMAC/s", f"{row['dot_gmac_s']}"
    click.echo(
        f"{row['test']:<20} {row['tokens_per_s']:9.1f} {row['spread']:7.1f} {steps} {rate:>12} "
        f"{ceiling:>8} {row['percent']:6.1f}"
    )
