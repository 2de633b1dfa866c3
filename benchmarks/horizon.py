"""What the ALiBi horizon saves: attention of one new token behind 2k, 8k and 32k tokens of context.

    python benchmarks/horizon.py [--pack PACK] [--text FILE] [--depths 2048 8192 32768] [--json]

A trained model's own queries and keys (the embedded demo's by default) from running the text,
repeated to the depth, through its layers. Each layer's attention is timed beside the same kernel
with slopes of 0, for which no key is ever out of sight: what it would cost to read them all. The
two are timed in turn; medians.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import bloomq
from bloomq.layers import STEP_TOKENS, Span

TEXT = Path(__file__).parent.parent / "README.md"
REPEAT = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pack", type=Path, help="default: the embedded demo")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--depths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = bloomq.load(args.pack, backend="numba")
    text = model.prompt_ids(args.text.read_text())
    for depth in args.depths:
        ids = np.resize(np.array(text, np.int64), depth)
        row = measure(model.head, ids)
        if args.json:
            print(json.dumps(row))
        else:
            print(
                f"{depth:6} tokens: {row['horizon_ms']:.3f} ms of attention a step, "
                f"{row['all_keys_ms']:.3f} with every key read: {row['ratio']:.1f} x"
            )


def measure(head: Any, ids: np.ndarray) -> dict[str, float]:
    """Milliseconds of all layers' attention for the last of these tokens, both ways."""
    cache = head.cache(1, len(ids))
    for start in range(0, len(ids) - 1, STEP_TOKENS):
        part = ids[start : min(start + STEP_TOKENS, len(ids) - 1)]
        head.step(part, cache, Span.of([0], [len(part)]), np.zeros(0, np.int64))
    span, x = Span.of([0], [1]), head.model.emb_ln(head.model.wte(ids[-1:]))
    times: dict[str, float] = {"horizon_ms": 0.0, "all_keys_ms": 0.0}
    for block in head.model.blocks:
        qkv, slopes = block.qkv(block.ln_1(x), cache, span), block.attention._slopes
        samples: dict[str, list[float]] = {name: [] for name in times}
        for _ in range(REPEAT):
            for name, used in (("horizon_ms", slopes), ("all_keys_ms", np.zeros_like(slopes))):
                block.attention._slopes = used
                started = perf_counter()
                block.attention(qkv, cache, span)
                samples[name].append(1e3 * (perf_counter() - started))
        block.attention._slopes = slopes
        for name, taken in samples.items():
            times[name] += median(taken)
        x = block(x, cache, span)
    return {"depth": len(ids), **times, "ratio": times["all_keys_ms"] / times["horizon_ms"]}


if __name__ == "__main__":
    main()
