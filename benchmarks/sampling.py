"""What choosing a token costs, by setting, beside transformers' processors on the same logits.

    python benchmarks/sampling.py [-m PACK [--synthetic]] [--vocab 250880] [--spread 3.0]
                                  [--text FILE] [--threads N] [--repeat 9] [--no-peer]
                                  [--json FILE]

With a pack, each token is drawn right behind a real decode step, in which the model's weights went
through the caches: what generation pays. The settings take turns, a step before each. Logits are
the model's own behind places of a text (default: this project's README; random tokens where the
pack has no tokenizer). Without a pack, tokens are drawn one after another, all code and data warm,
which takes half as long; a step is taken for 12.4 ms, bloom-560m's on the README's machine, and
what it finds out about its logits is printed apart. Logits are then those of the demo model behind
places of the text, widened to a larger vocabulary, or normal numbers of this spread, at 3 flatter
than nearly all places of a text. --synthetic draws from such logits between the steps of a pack,
for one whose weights were never trained.
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
from bloomq.backends.numba_cpu.surveyed import LogitRows
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
    model = None
    if args.model is not None:
        model = bloomq.load(args.model, backend="numba", threads=args.threads)
    backend = NumbaBackend(args.threads) if model is None else model.backend
    if model is None or args.synthetic:
        rows = synthetic(args.vocab if model is None else model.config.vocab_size, args.spread)
    else:
        rows = of_model(model, args.text)
    threads = getattr(backend, "threads", 1)
    known = [backend.survey(row[None]) for row in rows]
    draws = [ours(backend, options, name, rows.shape[1]) for name, options in SETTINGS.items()]
    peers = [
        None if args.no_peer or "constraint" in name else theirs(options, rows.shape[1], threads)
        for name, options in SETTINGS.items()
    ]
    calls = [call for pair in zip(draws, peers, strict=True) for call in pair]
    if model is None:
        step_ms, samples = STEP_MS, measure_alone(calls, known, args.repeat)
        within = [timed(backend.survey, row[None]) for _ in range(args.repeat) for row in rows]
        print(f"found out within the step: {median(within):.0f} µs")
    else:
        step_ms, samples = measure_between_steps(model, calls, known, args.repeat)
    where = "one after another" if model is None else "between steps"
    print(f"{backend.description}; V {rows.shape[1]:,}; a step: {step_ms:.1f} ms; drawn {where}")
    print(f"{'setting':32}{'µs':>7}{'half of them':>15}{'of a step':>11}{'transformers':>14}")
    for (name, options), mine, others in zip(
        SETTINGS.items(), samples[::2], samples[1::2], strict=True
    ):
        middle, (low, _, high) = median(mine), quantiles(mine, n=4)
        beside = f"{median(others):14.0f}" if others else f"{'-':>14}"
        spread = f"{low:.0f} to {high:.0f}"
        print(f"{name:32}{middle:7.0f}{spread:>15}{middle / step_ms / 10:10.1f}%{beside}")
        if args.json:
            line = {
                "setting": name, "options": options, "vocab_size": rows.shape[1],
                "step_ms": step_ms, "model": str(args.model or "synthetic"), "drawn": where,
                "us": mine, "transformers_us": others, "description": backend.description,
                "version": bloomq.__version__,
            }  # fmt: skip
            with args.json.open("a") as file:
                file.write(json.dumps(line) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, help="a pack (default: synthetic logits)")
    parser.add_argument("--synthetic", action="store_true", help="logits, with a pack too")
    parser.add_argument("--vocab", type=int, default=250_880, help="of synthetic logits")
    parser.add_argument("--spread", type=float, help="synthetic logits are normal numbers")
    parser.add_argument("--text", type=Path, default=README)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", type=Path, help="append every sample here, as JSON lines")
    return parser.parse_args()


def synthetic(vocab_size: int, spread: float | None) -> np.ndarray:
    rng = np.random.default_rng(0)
    if spread is not None:
        return (spread * rng.standard_normal((ROWS, vocab_size))).astype(np.float32)
    return np.stack([widened(row, vocab_size, rng) for row in of_model(bloomq.load(), README)])


def widened(row: np.ndarray, vocab_size: int, rng: np.random.Generator) -> np.ndarray:
    """A row's logits in random places of a larger vocabulary. The other tokens are like the less
    likely half of the row, and as likely together as that half is, so that the entropy stays."""
    tail = np.sort(row)[: len(row) // 2]
    others = rng.choice(tail, vocab_size - len(row)) + rng.normal(0, 0.1, vocab_size - len(row))
    wide = np.concatenate([row, others - np.log(len(others) / len(tail))])
    return rng.permutation(wide).astype(np.float32)


def of_model(model: Any, text: Path) -> np.ndarray:
    """Logits behind ROWS places of a text."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 512)
    if model.tokenizer is not None:
        ids = np.array(model.prompt_ids(text.read_text())[:512], np.int64)
    places = np.linspace(16, len(ids) - 1, ROWS).astype(np.int64)
    span = Span.of([0], [len(ids)])
    rows = model.head.step(ids, model.head.cache(1, len(ids)), span, places)
    return np.array(model.backend.numpy(rows))


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


Draw = Callable[[Any], Any]  # from logits [1, V], which know what a step found out about them


def ours(backend: Any, options: dict[str, Any], name: str, vocab_size: int) -> Draw:
    """Draws the next token, the history half prompt and half output."""
    text = history(vocab_size)
    sampler = Sampler(
        Sampling(**options, seed=0), text[: HISTORY // 2], 0, vocab_size,
        constraint=Mask(vocab_size) if "constraint" in name else None,
    )  # fmt: skip
    produced = text[HISTORY // 2 :]

    def draw(logits: Any) -> float:
        """As the loop does: the best of all rows, then the token and its log probability."""
        row = Logits(backend, logits, 0, backend.top(logits, sampler.wants))
        return row.logit(sampler(row, produced)) - row.logsumexp()

    return draw


def theirs(options: dict[str, Any], vocab_size: int, threads: int) -> Draw | None:
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
    ids = torch.tensor([history(vocab_size)])

    def draw(logits: LogitRows) -> Any:
        found = torch.from_numpy(logits.values)
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


def put(logits: LogitRows, row: LogitRows) -> None:
    """One row, and what is known of it, in the place of another."""
    for to, array in (
        (logits.values, row.values), (logits.maxima, row.maxima), (logits.top.ids, row.top.ids),
        (logits.top.logits, row.top.logits), (logits.top.logsumexp, row.top.logsumexp),
    ):  # fmt: skip
        to[:] = array


def timed(call: Draw, logits: Any) -> float:
    """Microseconds."""
    started = perf_counter()
    call(logits)
    return 1e6 * (perf_counter() - started)


def measure_alone(
    calls: list[Draw | None], rows: list[LogitRows], repeat: int
) -> list[list[float]]:
    """Of each call: every row `repeat` times, one after another, ours and the peer's in turn."""
    found: list[list[float]] = [[] for _ in calls]
    for first in range(0, len(calls), 2):
        for turn in range(repeat + 1):  # the first is not measured
            for samples, call in zip(found[first : first + 2], calls[first:], strict=False):
                for row in rows if call is not None else ():
                    sample = timed(call, row)
                    samples.extend([sample] if turn else [])
    return found


def measure_between_steps(
    model: Any, calls: list[Draw | None], rows: list[LogitRows], repeat: int
) -> tuple[float, list[list[float]]]:
    """Milliseconds of a decode step, and of each call: every row `repeat` times, with the row in
    the place of the step's logits."""
    found: list[list[float]] = [[] for _ in calls]
    head, steps = model.head, []
    cache = head.cache(1, 256)
    for turn in range(repeat + 1):  # the first is not measured
        for row in rows:
            cache.truncate(0, 0)
            for samples, call in zip(found, calls, strict=True):
                if call is None:
                    continue
                started = perf_counter()
                logits = head.step(np.array([5]), cache, Span.of([0], [1]), np.array([0]))
                steps.append(1e3 * (perf_counter() - started))
                put(logits, row)
                sample = timed(call, logits)
                samples.extend([sample] if turn else [])
    return median(steps), found


if __name__ == "__main__":
    main()
