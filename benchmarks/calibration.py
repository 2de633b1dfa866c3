"""What calibration gains: bits, perplexity, KL divergence and top-1 agreement of each ingredient.

    python benchmarks/calibration.py [--checkpoint DIR] [--text DIR] [--calibrate DIR]
        [--tokens 8000] [--calibration-tokens 81920] [--window 256] [--only WORD]
    python benchmarks/calibration.py --time CHECKPOINT      seconds a block, on random tokens

Held-out text and windows as of benchmarks/quality.py, and never calibrated on; the interval is two
standard errors of the difference in loss. Runs through the Numba backend, rounding of activations
included. Each row says how long its conversion took, on a machine that may be busy.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from bloomq.converters.calibration.conversion import plan_calibrated
from bloomq.converters.calibration.producer import Settings, calibrated
from bloomq.converters.calibration.text import TOKENS
from bloomq.converters.convert import convert, run
from bloomq.converters.plan import make_plan
from bloomq.converters.reading import read_checkpoint
from quality import Row, line, log_softmax, mean_loss, read_windows

import bloomq

ROOT = Path(__file__).resolve().parent.parent
G32, G64, G128 = ({"scheme": "int4", "group_size": g} for g in (32, 64, 128))
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
    ("int4-g32 nearest", {**G32, "head_scheme": "int4"}, None),
    ("int4-g32 calibrated", {**G32, "head_scheme": "int4"}, Settings()),
    ("int4-g128 nearest", {**G128, "head_scheme": "int4"}, None),
    ("int4-g128 calibrated", {**G128, "head_scheme": "int4"}, Settings()),
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
    parser.add_argument("--calibration-tokens", type=int, default=81920)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--only", default="", help="variants whose name has this in it")
    parser.add_argument("--time", type=Path, metavar="CHECKPOINT", help="time its blocks, no more")
    args = parser.parse_args()
    if args.time is not None:
        time_blocks(args.time)
        return
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


def time_blocks(path: Path) -> None:
    """Prints how long the pieces before the blocks take, and each block, of as many random tokens
    as a calibration takes by itself: what a checkpoint of a few layers (make_checkpoint.py
    --layers) says of one with all."""
    vocab_size = read_checkpoint(path).config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocab_size, (TOKENS // 2048, 2048))
    times = [(perf_counter(), process_time())]

    def block_done(done: int, total: int) -> None:
        times.append((perf_counter(), process_time()))
        seconds, cpu = (after - before for before, after in zip(times[-2], times[-1], strict=True))
        print(f"block {done} of {total}: {seconds:.0f} s, {cpu:.0f} s of the CPU", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(path, Path(folder) / "pack")
        produce = calibrated(ids, Path(folder) / "activations", progress=block_done)
        for piece in produce(plan.checkpoint, plan.schemes, set()):
            if piece.weight == "emb_ln" and len(times) == 1:
                times.append((perf_counter(), process_time()))
                print(f"embedding: {times[-1][0] - times[0][0]:.0f} s", flush=True)


def make(
    args: argparse.Namespace, target: Path, options: dict[str, Any], settings: Settings | None
) -> None:
    if settings is None:
        convert(args.checkpoint, target, **options)
        return
    plan, producer, method = plan_calibrated(
        args.checkpoint, target, args.calibrate, tokens=args.calibration_tokens, window=args.window,
        settings=settings, **options,
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
