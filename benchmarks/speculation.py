"""What guessing ahead gains on code, prose and text that repeats itself.

    python benchmarks/speculation.py [--pack PACK] [--draft PACK] [--prose FILE] [-n 256]
                                     [--repeat 5]

Greedy continuations of three prompts, with and without guesses (`draft="lookup"`, or a smaller
model's pack), in turn; the text is the same by construction, and checked. Printed: tokens a second
without and with, their ratio (medians), tokens of a step, and how many guesses came true. The
prompts: a part of Python's argparse, the prose file (default: this project's README), and a table
whose rows differ in a number.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from statistics import median
from typing import Any

import bloomq

README = Path(__file__).parent.parent / "README.md"
PROMPT_TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pack", type=Path, help="default: the embedded demo")
    parser.add_argument("--draft", type=Path, help="a smaller model's pack (default: lookup)")
    parser.add_argument("--prose", type=Path, default=README)
    parser.add_argument("-n", "--tokens", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    model = bloomq.load(args.pack, backend="numba")
    draft: Any = "lookup" if args.draft is None else bloomq.load(args.draft, backend="numba")
    texts = {
        "code": inspect.getsource(argparse),
        "prose": args.prose.read_text(),
        "repetition": "\n".join(f"row {i}: the value of cell {i} is {i}" for i in range(200)),
    }
    print(f"{'text':12}{'plain':>8}{'guessing':>10}{'ratio':>7}{'tokens a step':>15}{'right':>7}")
    for name, text in texts.items():
        prompt = model.prompt_ids(text)[:PROMPT_TOKENS]
        print(f"{name:12}" + compare(model, draft, prompt, args.tokens, args.repeat))


def compare(model: Any, draft: Any, prompt: list[int], tokens: int, repeat: int) -> str:
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeat + 1):  # the first is not measured
        results = {}
        for guessing, samples in rates.items():
            result = model.generate(
                prompt, max_new_tokens=tokens, draft=draft if guessing else None
            )
            samples.append(result.stats.generated_tokens_per_s)
            results[guessing] = result
        assert results[True].ids == results[False].ids
    plain, guessed = (median(samples[1:]) for samples in rates.values())
    stats = results[True].stats
    steps = stats.generated_tokens - stats.right_guesses
    share = stats.right_guesses / max(stats.guessed_tokens, 1)
    return (
        f"{plain:8.0f}{guessed:10.0f}{guessed / plain:7.2f}"
        f"{stats.generated_tokens / steps:15.2f}{share:7.0%}"
    )


if __name__ == "__main__":
    main()
