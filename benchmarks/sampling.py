"""What choosing a token costs, by setting, beside transformers' processors on the same logits.

    python benchmarks/sampling.py [-m PACK] [--vocab 250880] [--spread 3] [--text FILE]
                                  [--threads N] [--repeat 9] [--no-peer] [--json FILE]

With a pack, logits are the model's own behind places of a text (default: this project's README;
random tokens where the pack has no tokenizer), and a step is one of its decode steps, measured
first. Without, logits are normal numbers of this spread, at 3 flatter than most places of a text,
and a step is taken for 12.4 ms, bloom-560m's on the machine of the README.
Printed for each setting: the median microseconds of a token and the middle half of the samples, its
share of a step, and what transformers takes (processors, softmax, one draw; PyTorch with as many
threads), in turn with ours. Penalties, DRY and n-grams look at 2,048 tokens; of the penalties
transformers has the one for repetition alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import numpy as np

import bloomq
from bloomq.backends.numba_cpu.layers import NumbaBackend
from bloomq.layers import Span
from bloomq.sampling import Logits, Sampler, Sampling

README = Path(__file__).parent.parent / "README.md"
STEP_MS, ROWS, HISTORY = 12.4, 8, 2048
USUAL: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "usual: k 40, p 0.95, min 0.05": USUAL,
    "usual, penalties": {**USUAL, **PENALTIES},
    "greedy, penalties": PENALTIES,
    "usual, DRY": {**USUAL, "dry_multiplier": 0.8},
    "usual, no-repeat 3-gram": {**USUAL, "no_repeat_ngram_size": 3},
    "usual, bias and bad words": {**USUAL, "logit_bias": {5: 1.0}, "bad_words": [[7], [8, 9]]},
    "usual, XTC": {**USUAL, "xtc_probability": 0.5},
    "usual, constraint": USUAL,
    "greedy, constraint": {},
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "min-p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "typical 0.9": {"temperature": 0.8, "typical_p": 0.9},
    "typical 0.9 of top-k 40": {"temperature": 0.8, "top_k": 40, "typical_p": 0.9},
    "top-n-sigma 1": {"temperature": 0.8, "top_n_sigma": 1.0},
    "XTC": {"temperature": 0.8, "xtc_probability": 0.5},
    "dynamic temperature": {"temperature": 0.8, "dynamic_temperature": 0.5},
    "mirostat 5": {"temperature": 0.8, "mirostat_tau": 5.0},
}
# What transformers 5 has; of the penalties it has repetition_penalty alone.
PEER = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty",
        "no_repeat_ngram_size", "bad_words", "logit_bias")  # fmt: skip


def main() -> None:
    args = arguments()
    model = None if args.model is None else bloomq.load(args.model, backend="numba")
    backend = NumbaBackend(args.threads) if model is None else model.backend
    rows, step_ms = (
        synthetic(args.vocab, args.spread) if model is None else of_model(model, args.text)
    )
    vocabulary = rows.shape[1]
    print(f"{backend.description}; V {vocabulary:,}; a step: {step_ms:.1f} ms")
    print(f"{'setting':32}{'µs':>7}{'half of them':>15}{'of a step':>11}{'transformers':>14}")
    for name, options in SETTINGS.items():
        constrained = "constraint" in name
        draw = ours(backend, rows, options, constrained)
        alone = args.no_peer or constrained
        peer = None if alone else theirs(rows, options, getattr(backend, "threads", 1))
        samples, others = measure(draw, peer, args.repeat)
        middle, (low, _, high) = median(samples), quantiles(samples, n=4)
        beside = f"{median(others):14.0f}" if others else f"{'-':>14}"
        spread = f"{low:.0f} to {high:.0f}"
        print(f"{name:32}{middle:7.0f}{spread:>15}{middle / step_ms / 10:10.1f}%{beside}")
        if args.json:
            line = {
                "setting": name, "options": options, "vocab_size": vocabulary, "step_ms": step_ms,
                "model": str(args.model or "synthetic"), "us": samples, "transformers_us": others,
                "description": backend.description, "version": bloomq.__version__,
            }  # fmt: skip
            with args.json.open("a") as file:
                file.write(json.dumps(line) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, help="a pack (default: synthetic logits)")
    parser.add_argument("--vocab", type=int, default=250_880, help="of synthetic logits")
    parser.add_argument("--spread", type=float, default=3.0, help="of synthetic logits")
    parser.add_argument("--text", type=Path, default=README)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", type=Path, help="append every sample here, as JSON lines")
    return parser.parse_args()


def synthetic(vocab_size: int, spread: float) -> tuple[np.ndarray, float]:
    rows = spread * np.random.default_rng(0).standard_normal((ROWS, vocab_size))
    return rows.astype(np.float32), STEP_MS


def of_model(model: Any, text: Path) -> tuple[np.ndarray, float]:
    """Logits behind ROWS places of a text, and the milliseconds of a decode step."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 512)
    if model.tokenizer is not None:
        ids = np.array(model.prompt_ids(text.read_text())[:512], np.int64)
    head, cache = model.head, model.head.cache(1, len(ids) + 32)
    places = np.linspace(16, len(ids) - 1, ROWS).astype(np.int64)
    rows = model.backend.numpy(head.step(ids, cache, Span.of([0], [len(ids)]), places))
    times = []
    for token in ids[:32]:
        started = perf_counter()
        head.step(np.array([token]), cache, Span.of([0], [1]), np.array([0]))
        times.append(1e3 * (perf_counter() - started))
    return np.array(rows), median(times[8:])


class Mask:
    """A constraint that allows half of the vocabulary in stretches."""

    def __init__(self, vocab_size: int) -> None:
        self._mask = np.arange(vocab_size) // 1000 % 2 == 0

    def allowed(self) -> np.ndarray:
        return self._mask

    def accept(self, token: int) -> None:
        pass


def history(vocab_size: int) -> list[int]:
    """HISTORY tokens, of which some repeat."""
    rng = np.random.default_rng(1)
    return (vocab_size * rng.random(HISTORY) ** 3).astype(int).tolist()


def ours(
    backend: Any, rows: np.ndarray, options: dict[str, Any], constrained: bool
) -> Callable[[int], Any]:
    """Draws the next token from a row, the history half prompt and half output."""
    text, vocabulary = history(rows.shape[1]), rows.shape[1]
    sampler = Sampler(
        Sampling(**options, seed=0), text[: HISTORY // 2], 0, vocabulary,
        constraint=Mask(vocabulary) if constrained else None,
    )  # fmt: skip
    produced = text[HISTORY // 2 :]
    return lambda row: sampler(Logits(backend, rows, row), produced)


def theirs(rows: np.ndarray, options: dict[str, Any], threads: int) -> Callable[[int], Any] | None:
    """The same with transformers' processors; None where it lacks one, or is not installed."""
    known = set(PEER) | {"presence_penalty", "frequency_penalty"}
    if not set(options) <= known:
        return None
    try:
        import torch
        import transformers as hf
    except ImportError:
        return None
    torch.set_num_threads(threads)
    made = list(processors(hf, options))
    ids, scores = torch.tensor([history(rows.shape[1])]), torch.tensor(rows)

    def draw(row: int) -> Any:
        found = scores[row : row + 1]
        for processor in made:
            found = processor(ids, found)
        if "temperature" not in options:
            return int(found.argmax(-1))
        return int(torch.multinomial(torch.softmax(found, -1), 1))

    return draw


def processors(hf: Any, options: dict[str, Any]) -> Iterator[Any]:
    """In the order in which transformers' `generate` has them."""
    makers = {
        "logit_bias": lambda b: hf.SequenceBiasLogitsProcessor({(t,): v for t, v in b.items()}),
        "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": hf.NoRepeatNGramLogitsProcessor,
        "bad_words": hf.NoBadWordsLogitsProcessor,
        "temperature": hf.TemperatureLogitsWarper, "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper, "min_p": hf.MinPLogitsWarper,
        "typical_p": hf.TypicalLogitsWarper,
    }  # fmt: skip
    for name, maker in makers.items():
        if name in options:
            yield maker(options[name])


def measure(
    draw: Callable[[int], Any], peer: Callable[[int], Any] | None, repeat: int
) -> tuple[list[float], list[float]]:
    """Microseconds of a token: every row `repeat` times, the peer in turn."""
    found: list[list[float]] = [[], []]
    for turn in range(repeat + 1):  # the first is not measured
        for samples, call in zip(found, (draw, peer), strict=True):
            for row in range(ROWS if call is not None else 0):
                started = perf_counter()
                call(row)  # type: ignore[misc]
                if turn:
                    samples.append(1e6 * (perf_counter() - started))
    return found[0], found[1]


if __name__ == "__main__":
    main()
