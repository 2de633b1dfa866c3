"""The command `compare`: what a pack lost against its checkpoint, as lines, JSON or a page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bloomq import console
from bloomq.cli.options import engine_options, is_given
from bloomq.cli.records import text_of
from bloomq.cli.running import without_nan
from bloomq.errors import UsageError

if TYPE_CHECKING:
    from bloomq.comparison import Report
    from bloomq.comparison.labels import Labels
    from bloomq.comparison.outputs import Outputs

_WORST = 5  # matrices that are listed


@click.command()
@click.argument("pack", type=Path)
@click.argument("original", type=Path)
@click.option(
    "--text",
    "texts",
    type=Path,
    multiple=True,
    help="Compare predictions on this text, or on each .txt of this folder; may be repeated.  "
    "[default: a small sample in ten languages]",
)
@click.option("--tokens", type=int, default=2000, show_default=True, help="Of each text, at most.")
@click.option("--window", type=int, default=512, show_default=True, help="Tokens that are seen.")
@click.option("--weights-only", is_flag=True, help="Run neither model: compare matrices alone.")
@click.option(
    "--report", type=Path, help="Write an HTML page that opens in any browser and needs no other."
)
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
def compare(
    pack: Path, original: Path, texts: tuple[Path, ...], tokens: int, window: int,
    weights_only: bool, report: Path | None, backend: str, threads: int | None, cache_dtype: str,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Say what PACK lost against ORIGINAL, the checkpoint it was made from, or another pack.

    For every matrix its error and outliers; on texts KL divergence, agreement and perplexity. A
    checkpoint runs in full precision from a temporary pack of its own size (in $TMPDIR).
    """
    from bloomq.comparison import check_target
    from bloomq.comparison import compare as compared

    if weights_only and (texts or is_given("tokens") or is_given("window")):
        raise UsageError("found --weights-only and options of texts, expected one of them")
    if report is not None:
        check_target(report)
    given = _read(texts) if texts else None
    if not (quiet or weights_only):
        console.announce_compilation()
    with _bars(quiet) as progress:
        found = compared(
            pack, original, texts=given, tokens=tokens, window=window, weights_only=weights_only,
            backend=backend, threads=threads, cache_dtype=cache_dtype, progress=progress,
        )  # fmt: skip
    if not quiet:
        for line in found.notes:
            console.note(f"note: {line}")
    if report is not None:
        found.save(report)
        if not quiet:
            console.note(f"{report}: {report.stat().st_size / 1e3:.0f} kB")
    if as_json:
        click.echo(json.dumps(without_nan(found.facts()), ensure_ascii=False, default=str))
    else:
        click.echo("\n".join(_facts(found)))


def write_report(
    pack: Path, original: Path, report: Path, *, tokens: int = 2000, quiet: bool = False
) -> None:
    """The page of a comparison on the sample, for a command that has made the pack itself; call
    `comparison.check_target` before such work.

    Raises: see `bloomq.comparison.compare`; OutputError.
    """
    from bloomq.comparison import compare as compared

    with _bars(quiet) as progress:
        found = compared(pack, original, tokens=tokens, progress=progress)
    found.save(report)
    if not quiet:
        console.note(f"{report}: {found.verdict}. {found.headline}")


def _read(paths: tuple[Path, ...]) -> dict[str, str]:
    """The texts by their files' names. Raises: UsageError, InputNotFound."""
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(path.glob("*.txt"))
        if not inside:
            raise UsageError(f"{path}: there is no .txt in this folder to compare on")
        files += inside
    names = [path.stem for path in files]
    if len(set(names)) < len(names):
        names = [str(path) for path in files]
    found = dict(zip(names, map(text_of, files), strict=True))
    for path, text in zip(files, found.values(), strict=False):
        if not text.strip():
            raise UsageError(f"{path}: is empty, expected a text to compare on")
    return found


@contextmanager
def _bars(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for what is measured, and then one for what is measured next."""
    with ExitStack() as stack:
        label, show = "", None

        def progress(what: str, done: int, total: int) -> None:
            nonlocal label, show
            if what != label or show is None:
                stack.close()
                label, show = what, stack.enter_context(console.estimate_progress(what, quiet))
            show(done, total, "")

        yield progress


def _facts(found: Report) -> list[str]:
    from bloomq.comparison.outputs import Outputs
    from bloomq.comparison.words import decibels, size, small

    lines = [f"{found.verdict}. {found.headline}", ""]
    if isinstance(found.outputs, Outputs):
        lines += _predictions(found.outputs)
    elif found.outputs is not None:
        lines += _labels(found.outputs)
    ours, theirs = found.pack, found.original
    lines += [
        f"size           {size(ours.nbytes)} of {size(theirs.nbytes)}, "
        f"{ours.bits_per_weight:.2f} of {theirs.bits_per_weight:.2f} bits a weight", ""
    ]  # fmt: skip
    shown = sorted(found.tensors, key=lambda tensor: -tensor.relative_error)[:_WORST]
    lines.append(f"{'worst matrices':18} {'stored':9} {'error':>10} {'SNR':>9} {'largest':>9}")
    lines += [
        f"{t.name:18} {t.stored:9} {small(t.relative_error):>10} {decibels(t.snr_db):>9} "
        f"{t.largest:5.1f} rms"
        for t in shown
    ]
    return lines


def _predictions(found: Outputs) -> list[str]:
    from bloomq.comparison.words import percent

    total, ties = found.total, found.ties
    low, high = (100 * bound for bound in total.change_interval)
    between = f"  ({low:+.3f} to {high:+.3f})" if math.isfinite(high - low) else ""
    lines = [
        f"original       {total.base_perplexity:.4f}", f"perplexity     {total.perplexity:.4f}",
        f"change         {100 * total.change:+.3f} %{between}",
        f"KL             {total.kl:.6f} nats a token, 99 % of places below "
        f"{total.kl_quantiles['99%']:.6f}",
        f"same top-1     {percent(total.same_top)}",
        f"same top-5     {percent(total.same_few)}",
    ]  # fmt: skip
    if ties.places:
        lines.append(
            f"where it changed  the original's two best are within {ties.median_gap:.3f} nats at "
            f"half of {ties.places:,} places"
        )
    return lines


def _labels(found: Labels) -> list[str]:
    from bloomq.comparison.words import percent, small

    lines = [f"results' error {small(found.relative_error)}, largest {small(found.max_error)}"]
    if found.same_label is not None:
        lines.append(f"same label     {percent(found.same_label)} of {found.places:,} places")
    return lines
