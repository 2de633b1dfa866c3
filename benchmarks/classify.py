"""Texts a second of batched classification, beside transformers, on random weights of bloom-560m.

    python benchmarks/classify.py --work DIR [--texts 64] [--repeat 3] [--json FILE]

Makes a classifier's checkpoint and its packs in DIR, which keeps them (2.1 GB). Everyone gets the
same texts and tokenizer, on the same threads, in turn, so a ratio is of neighbours in time;
transformers sorts texts by length too, and is measured at the best of a few batch sizes, chosen in
a first round. Each runs in a process of its own, whose peak memory is the system's figure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from speed import cpu_name

import bloomq

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent / "tests" / "data" / "bloom-demo"
PROSE = HERE.parent / "README.md", HERE.parent / "docs" / "experiments.md"
BATCH_SIZES = (4, 16, 32)
# float16 is what transformers computes in unless told otherwise, as the published files have it;
# bfloat16 is the fastest where the processor has instructions for it.
RUNNERS = (
    "bloomq nl4", "bloomq int8",
    "transformers float16", "transformers float32", "transformers bfloat16",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--words", type=int, nargs=2, default=(4, 40), help="of a text")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="append the results here, as a JSON line")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(args)
        return
    prepare(args.work)
    print(f"{cpu_name()}, {args.threads} threads, load {os.getloadavg()[0]:.1f}, bloomq "
          f"{bloomq.__version__}")  # fmt: skip
    workers = {name: Worker(name) for name in RUNNERS}
    facts = {name: worker.ask("ready") for name, worker in workers.items()}
    batch = {name: best_batch(worker) for name, worker in workers.items() if "bloomq" not in name}
    samples: dict[str, list[float]] = {name: [] for name in RUNNERS}
    for _ in range(args.repeat):
        for name, worker in workers.items():
            samples[name].append(worker.ask(batch.get(name, 0))["texts_s"])
    peaks = {name: worker.ask("peak")["rss_mb"] for name, worker in workers.items()}
    report(facts[RUNNERS[0]], samples, batch, peaks)
    if args.json:
        row = {"cpu": cpu_name(), "samples": samples, "batch": batch, "rss_mb": peaks}
        with args.json.open("a") as file:
            file.write(json.dumps(row) + "\n")


def prepare(work: Path) -> None:
    """The checkpoint of a classifier of 8 labels with the demo's tokenizer, and its packs."""
    checkpoint = work / "classifier-560m"
    if not (checkpoint / "tokenizer.json").exists():
        command = [HERE / "make_checkpoint.py", "bloom-560m", checkpoint, "--labels", "8"]
        subprocess.run([sys.executable, *command], check=True)
        for name in ("tokenizer_config.json", "tokenizer.json"):
            shutil.copy(TOKENIZER / name, checkpoint)
    for scheme in ("nl4", "int8"):
        if not (work / f"classifier-560m-{scheme}").exists():
            bloomq.convert(checkpoint, work / f"classifier-560m-{scheme}", scheme=scheme)


class Worker:
    """A runner in a process of its own, which sleeps while the others run."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, str(HERE / "classify.py"), *sys.argv[1:], "--worker", name]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, question: str | int) -> dict[str, float]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(question)}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"error: {' '.join(map(str, self._process.args))} ended")  # type: ignore[arg-type]
        answer: dict[str, float] = json.loads(line)
        return answer


def best_batch(worker: Worker) -> int:
    """The batch size at which transformers is fastest here, once each."""
    return max(BATCH_SIZES, key=lambda size: worker.ask(size)["texts_s"])


def report(
    facts: dict[str, float],
    samples: dict[str, list[float]],
    batch: dict[str, int],
    peaks: dict[str, float],
) -> None:
    length = facts["tokens"] / facts["texts"]
    print(f"{facts['texts']:.0f} texts, {length:.0f} tokens each on average, medians of "
          f"{len(samples[RUNNERS[0]])}\n")  # fmt: skip
    theirs = [name for name in RUNNERS if name in batch]
    print(f"{'':24}{'texts/s':>9} {'':13}" + "".join(f"{'of ' + n:>26}" for n in theirs)
          + f"{'peak MB':>9}")  # fmt: skip
    for name in RUNNERS:
        rates = samples[name]
        title = f"{name}, batch {batch[name]}" if name in batch else name
        spread = f"{min(rates):.1f}-{max(rates):.1f}"
        ratios = [
            median(a / b for a, b in zip(rates, samples[other], strict=True)) for other in theirs
        ]
        print(f"{title:32}{median(rates):9.1f} {spread:>13}"
              + "".join(f"{ratio:18.1f}" for ratio in ratios) + f"{peaks[name]:9.0f}")  # fmt: skip


# -- a worker --------------------------------------------------------------------------------------


def serve(args: argparse.Namespace) -> None:
    """Answer questions on standard input: a batch size with texts a second."""
    texts = some_texts(args.texts, *args.words)
    kind, what = args.worker.split()
    make = bloomq_runner if kind == "bloomq" else transformers_runner
    classify = make(args.work, what, args.threads)
    classify(texts[:2], 2)  # compiles, and touches the weights
    for line in sys.stdin:
        question, answer = json.loads(line), {}
        if question == "ready":
            answer = {"texts": len(texts), "tokens": count_tokens(texts)}
        elif question == "peak":
            answer = {"rss_mb": peak_rss_mb()}
        else:
            started = perf_counter()
            classify(texts, question)
            answer = {"texts_s": len(texts) / (perf_counter() - started)}
        print(json.dumps(answer), flush=True)


def some_texts(count: int, least: int, most: int) -> list[str]:
    """Pieces of this project's own prose."""
    words = " ".join(path.read_text(encoding="utf-8") for path in PROSE).split()
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(count):
        length = int(rng.integers(least, most + 1))
        start = int(rng.integers(len(words) - length))
        texts.append(" ".join(words[start : start + length]))
    return texts


def count_tokens(texts: list[str]) -> int:
    tokenizer = bloomq.BloomTokenizer.from_pretrained(TOKENIZER)
    return sum(map(len, tokenizer.encode_batch(texts)))


def bloomq_runner(work: Path, scheme: str, threads: int) -> Any:
    classifier = bloomq.Classifier.load(
        work / f"classifier-560m-{scheme}", backend="numba", threads=threads
    )
    return lambda texts, _: classifier.classify(texts)


def transformers_runner(work: Path, dtype: str, threads: int) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(threads)
    folder = work / "classifier-560m"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def classify(texts: list[str], size: int) -> list[int]:
        """Sorted by length, so that a batch has little padding."""
        order = np.argsort([len(ids) for ids in tokenizer(texts)["input_ids"]], kind="stable")
        found = [0] * len(texts)
        with torch.inference_mode():
            for first in range(0, len(order), size):
                rows = order[first : first + size]
                batch = tokenizer([texts[i] for i in rows], padding=True, return_tensors="pt")
                best = model(**batch, use_cache=False).logits.argmax(-1).tolist()
                for i, label in zip(rows, best, strict=True):
                    found[i] = label
        return found

    return classify


def peak_rss_mb() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    main()
