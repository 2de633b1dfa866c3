"""What calibration gains: bits, perplexity, KL divergence and top-1 agreement of each ingredient.

    python benchmarks/calibration.py [--checkpoint DIR] [--text DIR] [--calibrate DIR]
        [--tokens 8000] [--calibration-tokens 81920] [--window 256] [--only WORD] [--device cpu]
    python benchmarks/calibration.py --time CHECKPOINT [--layers 30] [--device cuda]
        seconds of its pieces

Held-out text and windows as of benchmarks/quality.py, and never calibrated on; the interval is two
standard errors of the difference in loss. Runs through the Numba backend, rounding of activations
included. Each row says how long its conversion took, on a machine that may be busy. With --device a
GPU calibrates; --time then waits for it at each piece's end, and says what memory it took.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from bloomq.converters.calibration import producer
from bloomq.converters.calibration.conversion import plan_calibrated
from bloomq.converters.calibration.engine import CPU, Device, Engine, device_of
from bloomq.converters.calibration.forward import Runner, rows_of
from bloomq.converters.calibration.producer import Settings, _Calibration
from bloomq.converters.calibration.solver import Solver
from bloomq.converters.calibration.text import TOKENS
from bloomq.converters.convert import convert, run
from bloomq.converters.plan import make_plan
from quality import Row, line, log_softmax, mean_loss, read_windows

import bloomq
from bloomq.backends.numba_cpu.threads import physical_cores

ROOT = Path(__file__).resolve().parent.parent
G32, G128 = ({"scheme": "int4", "group_size": g} for g in (32, 128))
NL4 = {"scheme": "nl4", "group_size": 64}
GPTQ_ALONE = Settings(sweeps=0, correct_bias=False)
DESCENT = Settings(correct_bias=False)
BIASES = Settings(make_up=False)
# name, options of the plan, settings (None: round to nearest)
VARIANTS: tuple[tuple[str, dict[str, Any], Settings | None], ...] = (
    ("int4-g32 int6 nearest", G32, None),
    ("int4-g32 int6 gptq", G32, GPTQ_ALONE),
    ("int4-g32 int6 +descent", G32, DESCENT),
    ("int4-g32 int6 +bias", G32, BIASES),
    ("int4-g32 int6 +stream", G32, Settings()),
    ("nl4-g64 int6 nearest", NL4, None),
    ("nl4-g64 int6 +stream", NL4, Settings()),
    ("int4-g32 nearest", {**G32, "head_scheme": "int4"}, None),
    ("int4-g32 calibrated", {**G32, "head_scheme": "int4"}, Settings()),
    ("int4-g128 nearest", {**G128, "head_scheme": "int4"}, None),
    ("int4-g128 calibrated", {**G128, "head_scheme": "int4"}, Settings()),
    ("nl4-g64 nearest", {**NL4, "head_scheme": "nl4"}, None),
    ("nl4-g64 calibrated", {**NL4, "head_scheme": "nl4"}, Settings()),
    ("int6 calibrated", {"scheme": "int6"}, Settings()),
    ("int8 nearest", {"scheme": "int8"}, None),
    ("int8 calibrated", {"scheme": "int8"}, Settings()),
    *((f"{bits} bits calibrated", {"bits": bits}, Settings()) for bits in (4.3, 4.85, 5.4, 5.76)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    corpora = ROOT.parent / "shared/corpora"
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "tests/data/bloom-demo")
    parser.add_argument("--text", type=Path, default=corpora / "heldout")
    parser.add_argument("--calibrate", type=Path, default=corpora / "calibration")
    parser.add_argument("--tokens", type=int, default=8000, help="of each held-out file, at most")
    parser.add_argument("--calibration-tokens", type=int, help="81,920; --time: 24,576")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--only", default="", help="variants whose name has this in it")
    parser.add_argument("--time", type=Path, metavar="CHECKPOINT", help="time its pieces, no more")
    parser.add_argument("--layers", type=int, help="--time: of the whole model")
    parser.add_argument("--device", default="cpu", help="that calibrates: cpu, cuda or cuda:N")
    args = parser.parse_args()
    if args.time is not None:
        tokens = args.calibration_tokens or TOKENS
        time_pieces(args.time, tokens, args.layers, device_of(args.device))
        return
    args.calibration_tokens = args.calibration_tokens or 81920
    for text in (args.text, args.calibrate):
        if not text.exists():
            parser.error(f"{text}: no such text: name a file or folder")
    chosen = [variant for variant in VARIANTS if args.only in variant[0]]
    with tempfile.TemporaryDirectory() as folder:
        convert(args.checkpoint, Path(folder) / "base", scheme="f32")
        base = bloomq.load(Path(folder) / "base")
        windows = read_windows(base, args.text, args.tokens, args.window)
        print(f"{len(windows)} windows of {args.window} tokens")
        print(f"{'scheme':22} {'bits':>5} {'perplexity':>10} {'change':>18} {'KL':>9} {'top-1':>7}")
        for number, (name, options, settings) in enumerate(chosen):
            target, started = Path(folder) / str(number), perf_counter()
            make(args, target, options, settings)
            seconds = perf_counter() - started
            row = measure(name, bloomq.load(target), base, windows)
            print(line(row), f"{seconds:7.1f} s", flush=True)


class Stages:
    """Seconds, and seconds of the CPU, in each stage, less those in stages within it. settle: waits
    for what a stage has begun."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle = settle
        self.spent: dict[str, list[float]] = {}
        self._within: list[list[float]] = [[0.0, 0.0]]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._settle()
        begun = perf_counter(), process_time()
        self._within.append([0.0, 0.0])
        yield
        self._settle()
        both = perf_counter() - begun[0], process_time() - begun[1]
        for i, (seconds, inner) in enumerate(zip(both, self._within.pop(), strict=True)):
            self.spent.setdefault(name, [0.0, 0.0])[i] += seconds - inner
            self._within[-1][i] += seconds

    def watch(self, owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def call(*arguments: Any, **options: Any) -> Any:
            with self.stage(name):
                return inner(*arguments, **options)

        setattr(owner, method, call)

    def take(self, *, times: float = 1.0) -> list[float]:
        """Print what was spent, so many times over, and forget it; the sums."""
        total = [times * sum(spent) for spent in zip(*self.spent.values(), strict=True)]
        parts = (f"{name} {times * s:.1f} ({times * c:.1f})" for name, (s, c) in self.spent.items())
        print(f"    {total[0]:.1f} s ({total[1]:.1f} of the CPU): {', '.join(parts)}", flush=True)
        self.spent.clear()
        return total


def time_pieces(path: Path, tokens: int, layers: int | None, device: Device = CPU) -> None:
    """Prints how long the pieces of a calibration take, of random tokens and weights as they are:
    the head's hidden states, the table (of as many rows as are solved at once), each block; and the
    whole for `layers` blocks, from a checkpoint of a few (make_checkpoint.py --layers)."""
    with ThreadPoolExecutor(physical_cores()) as pool:
        engine = device.engine(pool, None)
        if device.torch in (None, "cpu"):
            _time_pieces(path, tokens, layers, engine, lambda: None)
            return
        import torch

        _time_pieces(path, tokens, layers, engine, lambda: torch.cuda.synchronize(device.torch))
        peak = torch.cuda.max_memory_allocated(device.torch) / 1e9
        print(f"on {device.label}: {peak:.2f} GB of its memory at the peak")


def _time_pieces(
    path: Path, tokens: int, layers: int | None, engine: Engine, settle: Callable[[], None]
) -> None:
    moments = engine.moments()
    wanted = engine.wanted(np.empty((0, 0), np.float32), moments)
    stages = Stages(settle)
    for owner, method, name in (
        (Runner, "through", "layers"), (Runner, "inputs_of", "layers"),
        (Runner, "stream_at", "layers"), (type(wanted), "add", "making up"),
        (type(wanted), "weights", "making up"), (type(moments), "add", "moments"),
        (type(moments), "result", "moments"), (producer, "_picked", "looked up"),
        (Solver, "__init__", "factor"), (Solver, "rows", "rows"),
    ):  # fmt: skip
        stages.watch(owner, method, name)
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(path, Path(folder) / "pack")
        config = plan.checkpoint.config
        layers = layers or config.n_layer
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (tokens // 2048, 2048))
        run = _Calibration(
            ids, Path(folder) / "activations", "timed", Settings(), engine,
            lambda done, total: None, plan.checkpoint, plan.schemes, (),
        )  # fmt: skip
        print("hidden states of the head, all blocks:")
        with stages.stage("weights"):
            moment = run._head_moment()
        once = stages.spent.pop("looked up")[0]  # whatever the number of blocks
        total = once + stages.take(times=layers / config.n_layer)[0]
        print("the table:")
        name, table = "wte", plan.checkpoint.tensors["wte.weight"]
        rows = min(table.shape[0], engine.solved_rows(config.hidden_size))
        solver = Solver(moment, plan.schemes[name], engine, damping=Settings().damping)
        stages.spent.clear()
        with stages.stage("weights"):
            solver.rows(rows_of(table, 0, rows))
        total += stages.take(times=table.shape[0] / rows)[0]
        x = run.scratch.new()
        x[:] = np.random.default_rng(1).standard_normal(x.shape, np.float32)
        run.scratch.keep(x, 0)
        for layer in range(config.n_layer):
            print(f"block {layer + 1}, on {ids.size} tokens:")
            with stages.stage("weights"):
                for _ in run._block(layer):
                    pass
            seconds = stages.take()[0]
        print(f"in all, of {layers} blocks: {(total + layers * seconds) / 60:.1f} minutes")


def make(
    args: argparse.Namespace, target: Path, options: dict[str, Any], settings: Settings | None
) -> None:
    if settings is None:
        convert(args.checkpoint, target, **options)
        return
    plan, producer, method = plan_calibrated(
        args.checkpoint, target, args.calibrate, tokens=args.calibration_tokens, window=args.window,
        settings=settings, device=device_of(args.device), **options,
    )  # fmt: skip
    run(plan, producer=producer, method=method)


def measure(
    name: str, model: bloomq.LanguageModel, base: bloomq.LanguageModel, windows: list[np.ndarray]
) -> Row:
    """As `quality.compare`, one window of the base's scores at a time."""
    losses, differences, divergences, agreements = [], [], [], []
    for ids in windows:
        p, q = log_softmax(base, ids), log_softmax(model, ids)
        losses.append(mean_loss(q, ids))
        differences.append(losses[-1] - mean_loss(p, ids))
        divergences.append((np.exp(p) * (p - q)).sum(axis=1, dtype=np.float64).mean())
        agreements.append((p.argmax(axis=1) == q.argmax(axis=1)).mean())
    difference = np.array(differences)
    return Row(
        name, model.pack.bits_per_weight, float(np.exp(np.mean(losses))),
        100 * float(np.expm1(difference.mean())),
        200 * float(difference.std(ddof=1) / np.sqrt(len(windows))),
        float(np.mean(divergences)), 100 * float(np.mean(agreements)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
