"""What the loop gives: many texts at a time, beginnings that are not read again, its own cost.

    python benchmarks/generation.py [-m PACK] [--prompt 512] [-n 32] [--texts 64] [--repeat 5]

Printed, after the machine's measured read bandwidth: tokens/s of decode steps alone and through
`stream` (the difference is the loop's); tokens/s of texts at 1 to 32 at a time, texts entering as
others leave, over 1 at a time; and the time to the first token of a prompt read anew, continued
from memory, and continued from a file of `--prompt-cache`. Medians of `--repeat`, taken in turn.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

import bloomq
from bloomq import prompt_cache
from bloomq.backends.numba_cpu.layers import NumbaBackend
from bloomq.language_model import LanguageModel
from bloomq.layers import Span

PARALLEL = (1, 2, 4, 8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--pack", type=Path, help="default: the embedded demo")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("-n", "--tokens", type=int, default=32, help="of each text")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    model = bloomq.load(args.pack, backend="numba")
    rng = np.random.default_rng(0)
    assert isinstance(model.backend, NumbaBackend)
    read = model.backend.ceilings().read_gb_s()
    print(f"{model.pack.path.name}: {model.pack.bytes_per_token / 1e6:.0f} MB of weights a token; "
          f"{model.backend.description}; {read:.1f} GB/s read")  # fmt: skip
    prompt = rng.integers(100, model.config.vocab_size, args.prompt).tolist()
    cost_of_the_loop(model, prompt[:16], 2 * args.tokens, args.repeat)
    many_at_a_time(model, rng, args.tokens, args.texts, args.repeat)
    first_token(model, prompt, args.repeat)


def cost_of_the_loop(model: LanguageModel, prompt: list[int], tokens: int, repeat: int) -> None:
    bare, looped = [], []
    for _ in range(repeat + 1):  # the first is not measured
        bare.append(steps_ms(model, prompt, tokens))
        stats = model.generate(prompt, max_new_tokens=tokens + 1).stats
        looped.append(1e3 * stats.generate_s / (stats.generated_tokens - 1))
    step, loop = median(bare[1:]), median(looped[1:])
    print(f"a greedy step {step:.3f} ms, in the loop {loop:.3f} ms ({1e3 * (loop - step):+.0f} us)")


def steps_ms(model: LanguageModel, prompt: list[int], tokens: int) -> float:
    """Of a step and the choice of the likeliest token, without anything else."""
    cache = model.head.cache(1, len(prompt) + tokens)
    ids, wanted = np.array(prompt), np.array([0])
    model.head.step(ids, cache, Span.of([0], [len(ids)]), np.arange(0))
    span, ids = Span.of([0], [1]), np.array([5])
    started = perf_counter()
    for _ in range(tokens):
        ids = model.backend.top(model.head.step(ids, cache, span, wanted), 1).ids[:, 0]
    return 1e3 * (perf_counter() - started) / tokens


def many_at_a_time(
    model: LanguageModel, rng: np.random.Generator, tokens: int, texts: int, repeat: int
) -> None:
    """Prompts of 8 to 24 tokens, outputs of one length: the end-of-text token is rare."""
    prompts = [
        rng.integers(100, model.config.vocab_size, rng.integers(8, 25)).tolist()
        for _ in range(texts)
    ]
    rates: dict[int, list[float]] = {parallel: [] for parallel in PARALLEL}
    for _ in range(repeat):
        for parallel, samples in rates.items():
            model.forget()
            some = prompts[: max(parallel, texts * parallel // max(PARALLEL))]
            started = perf_counter()
            results = model.generate_each(some, parallel=parallel, max_new_tokens=tokens)
            count = sum(len(result.ids) for result in results)
            samples.append(count / (perf_counter() - started))
    alone = median(rates[1])
    for parallel, samples in rates.items():
        rate = median(samples)
        print(f"{parallel:3} texts at a time: {rate:8.1f} tokens/s, {rate / alone:5.2f} x")


def first_token(model: LanguageModel, prompt: list[int], repeat: int) -> None:
    longer = [*prompt, *prompt[:8]]
    times: dict[str, list[float]] = {"read anew": [], "from memory": [], "from a file": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompt")
        prompt_cache.save(model, prompt, path)
        size = path.stat().st_size
        for _ in range(repeat):
            for name, samples in times.items():
                model.forget()
                if name == "from memory":
                    model.generate(prompt, max_new_tokens=1)
                started = perf_counter()
                if name == "from a file":
                    prompt_cache.load(model, path)
                model.generate(longer, max_new_tokens=1)
                samples.append(1e3 * (perf_counter() - started))
    anew = median(times["read anew"])
    for name, samples in times.items():
        took = median(samples)
        print(
            f"first token of {len(longer)}, {name:12} {took:8.1f} ms, {anew / took:5.1f} x sooner"
        )
    print(f"(the file has {size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
