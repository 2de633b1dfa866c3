"""Generates at random for minutes, and watches memory and a fixed prompt's tokens.

    python benchmarks/soak.py [PACK] [--minutes 10] [--threads N] [--cache-dtype int8] [--seed 0]

Prompts, batches, lengths and sampling are random; some streams are dropped half-way, as callers do.
The first minute begins with the largest call, so that later ones ask for no more memory than it.
What is kept of texts and recorded steps comes and goes with the calls, by 80 MB on bloom-560m, so
a minute counts by the median behind each of its calls. Exit code 1 when that of the second half of
the minutes is more than 20 MB above that of the first, or when the fixed prompt's tokens change.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np

import bloomq

MOST_GROWTH_MB = 20.0  # one more recorded step of a small model, or what malloc keeps
MOST_PROMPT, MOST_NEW, MOST_BATCH = 700, 48, 6  # a prompt may take two steps of 512 tokens
FIXED_PROMPT, FIXED_NEW = 40, 32


@dataclass(slots=True)
class Tally:
    """What was done so far."""

    calls: int = 0
    tokens: int = 0
    checks: int = 0
    changed: bool = False


def rss_mb() -> float:
    """Memory of this process that the system holds, in MB (1e6), mapped weights included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack", nargs="?", type=Path, help="default: the embedded demo")
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cache-dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.minutes < 2:
        parser.error(
            "--minutes must be at least 2: the first half is what the second is compared with"
        )
    print(f"start      {rss_mb():7.1f} MB RSS, before loading", flush=True)
    model = bloomq.load(args.pack, threads=args.threads, cache_dtype=args.cache_dtype)
    print(f"loaded     {rss_mb():7.1f} MB RSS, {model.backend_reason}", flush=True)
    rng, tally = np.random.default_rng(args.seed), Tally()
    fixed = rng.integers(0, model.config.vocab_size, FIXED_PROMPT).tolist()
    expected = model.generate(fixed, max_new_tokens=FIXED_NEW).ids
    largest = [random_prompt(model, rng, most_prompt(model)) for _ in range(MOST_BATCH)]
    model.generate(largest, max_new_tokens=MOST_NEW)
    started, minutes = time.perf_counter(), []
    for minute in range(1, args.minutes + 1):
        held = []
        while time.perf_counter() - started < 60 * minute:
            one_call(model, rng, tally)
            held.append(rss_mb())
            if tally.calls % 10 == 0:
                tally.changed |= model.generate(fixed, max_new_tokens=FIXED_NEW).ids != expected
                tally.checks += 1
        minutes.append(median(held or [rss_mb()]))
        print(
            f"minute {minute:3d} {minutes[-1]:7.1f} MB RSS, at most {max(held, default=0.0):.1f}, "
            f"{tally.calls} calls, {tally.tokens} tokens, {tally.checks} checks",
            flush=True,
        )
    half = len(minutes) // 2
    growth = median(minutes[half:]) - median(minutes[:half])
    print(f"end        {rss_mb():7.1f} MB RSS, second half {growth:+.1f} MB to the first")
    if tally.changed:
        print("FAILED: the fixed prompt's tokens changed")
    if growth > MOST_GROWTH_MB:
        print(f"FAILED: memory grew by more than {MOST_GROWTH_MB:.0f} MB")
    return int(tally.changed or growth > MOST_GROWTH_MB)


def most_prompt(model: bloomq.LanguageModel) -> int:
    """The longest prompt that leaves room for MOST_NEW tokens."""
    return min(MOST_PROMPT, model.context - MOST_NEW)


def random_prompt(model: bloomq.LanguageModel, rng: np.random.Generator, length: int) -> list[int]:
    ids: list[int] = rng.integers(0, model.config.vocab_size, length).tolist()
    return ids


def one_call(model: bloomq.LanguageModel, rng: np.random.Generator, tally: Tally) -> None:
    """A batch, or a stream that may be dropped before its end; most prompts are short."""
    most, new = most_prompt(model), int(rng.integers(1, MOST_NEW + 1))
    batch = int(rng.integers(1, MOST_BATCH + 1))
    lengths = np.exp(rng.uniform(0, np.log(most), batch)).astype(int)
    prompts = [random_prompt(model, rng, length) for length in lengths]
    sampling = {
        "temperature": float(rng.choice([0.0, 0.8])),
        "top_k": int(rng.choice([0, 40])),
        "top_p": float(rng.choice([1.0, 0.9])),
        "repetition_penalty": float(rng.choice([1.0, 1.2])),
        "seed": int(rng.integers(1 << 31)),
    }
    tally.calls += 1
    if batch > 1:
        results = model.generate(prompts, max_new_tokens=new, **sampling)
        tally.tokens += sum(len(result.ids) for result in results)
        return
    stream = model.stream(prompts[0], max_new_tokens=new, **sampling)
    for _ in islice(stream, int(rng.integers(1, new + 1))):
        tally.tokens += 1


if __name__ == "__main__":
    sys.exit(main())
