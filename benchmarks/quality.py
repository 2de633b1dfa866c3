"""What each scheme costs in quality: perplexity, KL divergence and top-1 agreement against f32.

    python benchmarks/quality.py [--checkpoint DIR] [--text FILE_OR_DIR] [--tokens 20000] [--json
    FILE]

Windows of `--window` tokens without overlap from the start of each file; every token but a window's
first is predicted. KL is of the scheme's distribution from the f32 pack's, in nats a token, over
all positions; the interval is two standard errors of the difference in loss, windows as samples.
Runs through the Numba backend, so the rounding of activations is included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import bloomq
from bloomq.divergence import divergence

ROOT = Path(__file__).resolve().parent.parent
VARIANTS: tuple[tuple[str, dict[str, object]], ...] = (
    ("bf16", {"scheme": "bf16"}),
    ("int8", {"scheme": "int8"}),
    ("int6", {"scheme": "int6"}),
    ("nl4-g32", {"scheme": "nl4", "group_size": 32}),
    ("nl4-g64", {"scheme": "nl4"}),
    ("nl4-g128", {"scheme": "nl4", "group_size": 128}),
    ("nl4-g64, head int8", {"scheme": "nl4", "head_scheme": "int8"}),
    ("nl4-g64, head nl4", {"scheme": "nl4", "head_scheme": "nl4"}),
    ("int4-g32", {"scheme": "int4", "group_size": 32}),
    ("int4-g64", {"scheme": "int4", "group_size": 64}),
    ("int4-g128", {"scheme": "int4", "group_size": 128}),
    ("nf4", {"scheme": "nf4"}),
    ("nf4, head nf4", {"scheme": "nf4", "head_scheme": "nf4"}),
)


@dataclass(frozen=True, slots=True)
class Row:
    scheme: str
    bits_per_weight: float
    perplexity: float
    delta_percent: float
    interval_percent: float
    kl_nats: float
    same_top1_percent: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "tests/data/bloom-demo")
    parser.add_argument("--text", type=Path, default=ROOT.parent / "shared/corpora/heldout")
    parser.add_argument("--tokens", type=int, default=20_000, help="of each file, at most")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--json", type=Path, help="append the rows here, as JSON lines")
    args = parser.parse_args()
    if not args.text.exists():
        parser.error(f"{args.text}: no such text: name a file or folder with --text")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args.checkpoint, args.text, args.tokens, args.window, Path(folder))
    if args.json:
        with args.json.open("a") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def measure(checkpoint: Path, text: Path, tokens: int, window: int, folder: Path) -> list[Row]:
    bloomq.convert(checkpoint, folder / "f32", scheme="f32")
    base = bloomq.load(folder / "f32")
    windows = read_windows(base, text, tokens, window)
    scores = [log_softmax(base, w) for w in windows]  # float32: 8 MB a window at 8,192 tokens
    loss = np.array([mean_loss(p, w) for p, w in zip(scores, windows, strict=True)])
    print(f"{len(windows)} windows of {window} tokens, f32 perplexity {np.exp(loss.mean()):.3f}\n")
    print(f"{'scheme':22} {'bits':>5} {'perplexity':>10} {'change':>18} {'KL':>9} {'top-1':>7}")
    rows = []
    for number, (name, options) in enumerate(VARIANTS):
        target = folder / str(number)
        bloomq.convert(checkpoint, target, **options)  # type: ignore[arg-type]
        rows.append(compare(name, bloomq.load(target), windows, scores, loss))
        print(line(rows[-1]), flush=True)
    return rows


def read_windows(
    model: bloomq.LanguageModel, text: Path, tokens: int, window: int
) -> list[np.ndarray]:
    files = sorted(text.glob("*.txt")) if text.is_dir() else [text]
    windows = []
    for file in files:
        ids = np.array(model.tokenizer.encode(file.read_text(encoding="utf-8"))[:tokens])
        windows += [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]
    return windows


def log_softmax(model: bloomq.LanguageModel, ids: np.ndarray) -> np.ndarray:
    """[T, V] float32; the sums over the vocabulary in float64."""
    logits = model(ids).logits[0]
    logits -= logits.max(axis=1, keepdims=True)
    total = np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)
    return logits - np.log(total).astype(np.float32)


def mean_loss(scores: np.ndarray, ids: np.ndarray) -> float:
    return float(-scores[np.arange(len(ids) - 1), ids[1:]].mean(dtype=np.float64))


def compare(
    name: str,
    model: bloomq.LanguageModel,
    windows: list[np.ndarray],
    base_scores: list[np.ndarray],
    base_loss: np.ndarray,
) -> Row:
    losses, divergences, agreements = [], [], []
    for ids, p in zip(windows, base_scores, strict=True):
        q = log_softmax(model, ids)
        losses.append(mean_loss(q, ids))
        divergences.append(np.mean([divergence(*rows) for rows in zip(p, q, strict=True)]))
        agreements.append((p.argmax(axis=1) == q.argmax(axis=1)).mean())
    difference = np.array(losses) - base_loss
    error = 2 * difference.std(ddof=1) / np.sqrt(len(windows))
    return Row(
        name, model.pack.bits_per_weight, float(np.exp(np.mean(losses))),
        100 * float(np.expm1(difference.mean())), 100 * float(error),
        float(np.mean(divergences)), 100 * float(np.mean(agreements)),
    )  # fmt: skip


def line(row: Row) -> str:
    return (
        f"{row.scheme:22} {row.bits_per_weight:5.2f} {row.perplexity:10.3f} "
        f"{row.delta_percent:+9.3f} ± {row.interval_percent:.3f} % {row.kl_nats:9.6f} "
        f"{row.same_top1_percent:6.2f}%"
    )


if __name__ == "__main__":
    main()
