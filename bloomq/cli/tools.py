"""Commands about packs and this machine: info, verify, warmup and bench."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bloomq import __version__, console
from bloomq.cli.options import Loading, engine_options, load
from bloomq.errors import UsageError
from bloomq.files import shown

if TYPE_CHECKING:
    from bloomq.pack import Pack


@click.command()
@click.argument("pack", type=Path, required=False)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def info(pack: Path | None, as_json: bool) -> None:
    """Describe PACK (default: the embedded demo) and what this machine runs it on."""
    from bloomq.describe import describe

    facts = describe(pack)
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
    else:
        console.print_facts(facts)


@click.command()
@click.argument("pack", type=Path)
@click.argument("checkpoint", type=Path, required=False)
@click.option("--deep", is_flag=True, help="Check every value, and compare with CHECKPOINT.")
@click.option("-t", "--threads", type=int, help="Of --deep.  [default: all cores]")
def verify(pack: Path, checkpoint: Path | None, deep: bool, threads: int | None) -> None:
    """Read every byte of PACK and compare it with its checksums.

    --deep: also check that every number is one that a converter would write, that padding is zero
    and the tokenizer fits; and with CHECKPOINT, that these are the numbers it gives.
    """
    from bloomq.pack import Pack

    if checkpoint is not None and not deep:
        raise UsageError("a checkpoint to compare with: add --deep")
    opened = Pack.open(pack)
    with console.byte_progress("verifying") as progress:
        opened.verify(_counted(progress, opened.nbytes))
    click.echo(f"{pack}: whole, {opened.nbytes / 1e6:.1f} MB match their checksums")
    if deep:
        _verify_deep(opened, checkpoint, threads)


def _counted(progress: console.Progress, total: int) -> Callable[[int], None]:
    """A callback (fresh bytes) for one that wants (done, total)."""
    done = 0

    def count(fresh: int) -> None:
        nonlocal done
        done += fresh
        progress(done, total)

    return count


def _verify_deep(pack: Pack, checkpoint: Path | None, threads: int | None) -> None:
    from bloomq.converters.deep_verify import deep_verify
    from bloomq.converters.reading import read_checkpoint

    source = None if checkpoint is None else read_checkpoint(checkpoint)
    with console.byte_progress("looking through") as progress:
        count = _counted(progress, pack.nbytes)
        report = deep_verify(pack, source, threads=threads, progress=count)
    for line in report.notes:
        console.note(f"note: {line}")
    click.echo(f"{pack.path}: every value is in order")
    if report.is_exact:
        click.echo(f"{pack.path}: every byte is what {checkpoint} gives")
    if report.differences:
        method = pack.manifest.get("provenance", {}).get("method")
        console.note(
            f"note: {pack.path}: was made by {shown(str(method))}, or by another version, so bytes "
            f"are not compared: how far each matrix is from {checkpoint}"
        )
    for row in report.differences:
        click.echo(f"{row.weight:20} {row.scheme:10} relative error {row.relative_error:.5f}")


@click.command()
@click.option("-m", "--model", type=Path, help="Pack to load.  [default: the embedded demo]")
@engine_options
def warmup(model: Path | None, backend: str, threads: int | None, cache_dtype: str) -> None:
    """Compile the kernels that a pack needs, so that its first use is as fast as the next."""
    import numpy as np

    from bloomq import backends
    from bloomq.heads import Head
    from bloomq.layers import Span
    from bloomq.loading import demo_pack
    from bloomq.pack import Pack

    console.announce_compilation()
    pack = Pack.open(demo_pack() if model is None else model)
    loaded = backends.choose(backend, pack, threads, cache_dtype).backend
    head = Head(pack, loaded, pack.config.architecture)
    cache = head.cache(1, 17)
    for count in (16, 1):  # one prefill step, one decode step
        span = Span.of([0], [count])
        loaded.numpy(head.step(np.ones(count, np.int64), cache, span, span.last))
    click.echo(f"ready: {loaded.name} ({loaded.description})")


class _Numbers(click.ParamType[list[int]]):
    """Whole numbers with commas between them."""

    name = "N,..."

    def convert(self, value: Any, param: Any, context: Any) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return [int(item) for item in value.split(",")]
        except ValueError:
            self.fail(f"{value!r}, expected whole numbers with commas between them", param, context)


@click.command()
@click.option("-m", "--model", type=Path, help="Pack to load.  [default: the embedded demo]")
@click.option(
    "-p", "--prompt", type=_Numbers(), default="512", help="Prompt tokens; 0: none.  [512]"
)
@click.option(
    "-n",
    "--generate",
    "generated",
    type=_Numbers(),
    default="64",
    help="Tokens to produce; 0: none.  [64]",
)
@click.option("-d", "--depth", type=_Numbers(), default="0", help="Tokens of context before.  [0]")
@click.option("-b", "--batch", type=_Numbers(), default="1", help="Rows.  [1]")
@click.option("-t", "--threads", type=int, help="CPU threads.  [default: physical cores]")
@click.option(
    "-r", "--repetitions", type=int, default=5, show_default=True, help="Samples of each."
)
@click.option("--cache-dtype", default="auto", show_default=True, help="auto, f16, f32 or int8.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line for each test.")
def bench(
    model: Path | None, prompt: list[int], generated: list[int], depth: list[int], batch: list[int],
    threads: int | None, repetitions: int, cache_dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Measure prefill and decode beside this machine's ceilings.

    pp512: a prompt of 512 tokens; tg64: 64 tokens produced; @ d2048: behind so many; x 8: in 8 rows
    (prompts one after another, tokens in one step). Ceilings are measured before every sample; %:
    of memory bandwidth for tg, of int8 products for pp.
    """
    from bloomq.bench import Bench, peak_rss_mb, plan

    tests = plan(prompt, generated, depth, batch)
    loaded = load(model, Loading("numba", threads, cache_dtype), quiet=as_json)
    run = Bench(loaded.head, loaded.pack)
    facts = {
        "model": loaded.pack.path.name if model else "demo", "pack_mb": loaded.pack.nbytes / 1e6,
        "bits_per_weight": round(loaded.pack.bits_per_weight, 2), "bloomq": __version__,
        "backend": loaded.backend.description, "load_s": round(loaded.load_s, 3),
    }  # fmt: skip
    if not as_json:
        console.bench_header(facts, *run.ceilings())
    for result in run.run(tests, repetitions):
        row = run.row(result)
        if as_json:
            click.echo(json.dumps({**facts, **row, "peak_rss_mb": round(peak_rss_mb())}))
        else:
            console.bench_row(row)
    if not as_json:
        click.echo(
            f"peak memory {peak_rss_mb():.0f} MB: the pack {facts['pack_mb']:.0f}, what ceilings "
            f"are measured on {run.measuring_mb:.0f}, the rest libraries, caches, intermediates"
        )
