"""Tokens a second of greedy text, four beams and contrastive search.

    python benchmarks/search.py [-m PACK] [-n 64] [--beams 4] [--top-k 4] [--repeat 5]
                                [--checkpoint FOLDER]

Each way writes its text in turn, `--repeat` times after a first that is not measured. Printed:
median tokens a second of the text that is returned, their range, and the time of a token relative
to greedy. --checkpoint: transformers writes the same texts from it, in float32, greedily and with
beams (contrastive search has left it); ratio: ours to it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import bloomq
from bloomq.language_model import LanguageModel
from bloomq.search import beam_search, contrastive_search

PROMPT = list(range(100, 132))  # token ids: packs of random weights have no tokenizer
Ways = dict[str, Callable[[], int]]  # name -> writes a text, and says how many tokens it has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, help="a pack (default: the embedded demo)")
    parser.add_argument("-n", "--tokens", type=int, default=64)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--checkpoint", type=Path, help="for transformers, beside us")
    args = parser.parse_args()
    model = bloomq.load(args.model, backend="numba")
    ours = our_ways(model, args.tokens, args.beams, args.top_k)
    theirs: Ways = {}
    if args.checkpoint is not None:
        theirs = their_ways(args.checkpoint, args.tokens, args.beams)
    rates = measured({**ours, **{f"transformers, {k}": v for k, v in theirs.items()}}, args.repeat)
    greedy = median(rates["greedy"])
    print(f"{'way':30}{'tok/s':>8}{'range':>16}{'time of greedy':>16}{'ratio':>7}")
    for name, samples in rates.items():
        rate, peer = median(samples), rates.get(f"transformers, {name}")
        spread = f"{min(samples):.1f}-{max(samples):.1f}"
        ratio = "" if peer is None else f"{rate / median(peer):.2f}"
        print(f"{name:30}{rate:8.1f}{spread:>16}{greedy / rate:16.2f}{ratio:>7}")


def our_ways(model: LanguageModel, tokens: int, beams: int, top_k: int) -> Ways:
    head, context = model.head, model.context

    def beam() -> int:
        found = beam_search(head, PROMPT, num_beams=beams, max_new_tokens=tokens, context=context)
        return len(found[0].ids)

    def contrastive() -> int:
        found = contrastive_search(
            head, PROMPT, penalty_alpha=0.6, top_k=top_k, max_new_tokens=tokens, context=context
        )
        return len(found.ids)

    return {
        "greedy": lambda: len(model.generate(PROMPT, max_new_tokens=tokens).ids),
        f"{beams} beams": beam,
        f"contrastive, top_k {top_k}": contrastive,
    }


def their_ways(checkpoint: Path, tokens: int, beams: int) -> Ways:
    import torch
    import transformers

    model = transformers.BloomForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])

    def written(num_beams: int) -> int:
        with torch.inference_mode():
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                min_new_tokens=tokens, num_beams=num_beams, do_sample=False,
            )  # fmt: skip
        return int(found.shape[1]) - len(PROMPT)

    return {"greedy": lambda: written(1), f"{beams} beams": lambda: written(beams)}


def measured(ways: Ways, repeat: int) -> dict[str, list[float]]:
    """Tokens a second of each way, in turn."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeat + 1):
        for name, write in ways.items():
            start = time.perf_counter()
            tokens = write()
            if turn:
                rates[name].append(tokens / (time.perf_counter() - start))
    return rates


if __name__ == "__main__":
    main()
