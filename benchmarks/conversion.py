"""How fast round to nearest converts, beside the machine's ceiling, and in how much memory.

    python benchmarks/conversion.py                                   the embedded demo
    python benchmarks/conversion.py --checkpoint DIR                  to a pack, deleted again
    python benchmarks/conversion.py --checkpoint DIR --sink --gb 4    so many GB, to nowhere
    python benchmarks/conversion.py --shape bloom-176b --sink         table and one block, made up
    BLOOMQ_KILLS=100 pytest -s tests/test_resume.py -k random_instants    kill -9 and go on

Each repetition measures the ceiling first: the same bytes, read by as many threads and dropped
(made up: copied). --sink takes digests as the writer does, and writes nothing. CPU seconds are of
all threads: on a busy machine they say more than the clock. Peak memory is of the process so far.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import numpy as np
from bloomq.converters.convert import run
from bloomq.converters.names import expected_tensors
from bloomq.converters.pieces import Block, blocks, round_to_nearest
from bloomq.converters.plan import Plan, make_plan
from bloomq.converters.source import Checkpoint, SourceTensor
from make_checkpoint import random_block

from bloomq.config import weight_specs
from bloomq.placement.models import PUBLISHED, published
from bloomq.schemes import f32_to_bf16

DEMO = Path(__file__).resolve().parent.parent / "tests" / "data" / "bloom-demo"


@dataclass(frozen=True, slots=True)
class Row:
    """One repetition. Rates in MB/s of source."""

    source_mb: float
    ceiling_mb_s: float
    mb_s: float
    cpu_s: float
    peak_rss_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=DEMO)
    parser.add_argument("--shape", choices=PUBLISHED, help="made up: the embedding and --layers")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--scheme", default="nl4")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--sink", action="store_true", help="write nothing")
    parser.add_argument("--gb", type=float, help="with --sink: at most about so much of the source")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="append the rows here, as JSON lines")
    args = parser.parse_args()
    checkpoint = made_up(args.shape, args.layers) if args.shape else None
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(
            args.checkpoint, Path(folder) / "pack", scheme=args.scheme, threads=args.threads,
            checkpoint=checkpoint,
        )  # fmt: skip
        left_out = beyond(plan, args.gb) if args.sink else frozenset()
        kept = list(blocks(plan.checkpoint, plan.schemes, left_out))
        job = (lambda: to_nowhere(plan, left_out)) if args.sink else (lambda: to_pack(plan))
        rows = [measured(kept, plan.workers, job) for _ in range(args.repeat)]
    show(args.shape or args.checkpoint.name, plan, rows)
    if args.json:
        with args.json.open("a") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def made_up(shape: str, layers: int) -> Checkpoint:
    """A checkpoint of a published shape whose rows are copied from one block of random values."""
    config = replace(published(shape), n_layer=layers)
    values = f32_to_bf16(random_block(np.random.default_rng(0)))

    def tensor(name: str, shape: tuple[int, ...]) -> SourceTensor:
        width = shape[1] if len(shape) > 1 else 1

        def rows(start: int, stop: int) -> np.ndarray:
            count = (stop - start) * width
            at = 61 * start % (len(values) - count)
            return values[at : at + count].reshape(stop - start, *shape[1:]).copy()

        return SourceTensor(name, "BF16", shape, rows)

    tensors = {name: tensor(name, shape) for name, shape in expected_tensors(config).items()}
    return Checkpoint(config, tensors, None, {"format": "made up"})


def beyond(plan: Plan, gb: float | None) -> frozenset[str]:
    """The weights behind the first so many GB."""
    left, names = (gb or float("inf")) * 1e9, set()
    for spec in weight_specs(plan.checkpoint.config):
        left -= plan.checkpoint.tensors[f"{spec.name}.weight"].nbytes
        if left < 0:
            names.add(spec.name)
    return frozenset(names)


def to_nowhere(plan: Plan, left_out: frozenset[str]) -> None:
    for piece in round_to_nearest(plan.workers)(plan.checkpoint, plan.schemes, left_out):
        for array in piece.arrays.values():
            hashlib.sha256(array).digest()  # type: ignore[arg-type]


def to_pack(plan: Plan) -> None:
    run(plan, force=True, fresh=True)


def measured(kept: list[Block], workers: int, job: Callable[[], None]) -> Row:
    """One repetition: the ceiling, then the conversion of the same bytes."""
    source_bytes = sum(block.nbytes for block in kept)
    with ThreadPoolExecutor(workers) as pool:
        started = perf_counter()
        for _ in drained(pool, kept):
            pass
        ceiling = source_bytes / (perf_counter() - started)
    started, cpu = perf_counter(), process_time()
    job()
    passed, cpu = perf_counter() - started, process_time() - cpu
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Row(source_bytes / 1e6, ceiling / 1e6, source_bytes / 1e6 / passed, cpu, peak_mb)


def drained(pool: ThreadPoolExecutor, kept: list[Block]) -> Iterator[None]:
    def read(block: Block) -> None:
        block.tensor.rows(block.start, block.stop)

    return pool.map(read, kept)


def show(name: str, plan: Plan, rows: list[Row]) -> None:
    print(f"{name}: {rows[0].source_mb:.0f} MB of source, {plan.workers} threads")
    print(f"{'MB/s':>9} {'ceiling':>9} {'ratio':>7} {'CPU s':>7} {'MB/CPU s':>9} {'peak MB':>8}")
    for row in [*rows, None]:
        picked = row or Row(
            *(median(column) for column in zip(*map(astuple_of, rows), strict=True))
        )
        print(
            f"{picked.mb_s:9.0f} {picked.ceiling_mb_s:9.0f} "
            f"{100 * picked.mb_s / picked.ceiling_mb_s:6.1f}% {picked.cpu_s:7.2f} "
            f"{picked.source_mb / max(picked.cpu_s, 1e-9):9.0f} {picked.peak_rss_mb:8.0f}"
            + ("" if row else "  median")
        )


def astuple_of(row: Row) -> tuple[float, ...]:
    return tuple(asdict(row).values())


if __name__ == "__main__":
    main()
