"""What following a constraint costs a token, at BLOOM's vocabulary of 250,680 tokens.

    python benchmarks/constraints.py [--tokenizer FILE] [--repeat 20]

Printed first: seconds and memory to compile the vocabulary, once for a model. Then for each
constraint, walking a text that it allows: ms to compile it, µs for `allowed` (median, 90 %, the
most), for masking 250,880 logits with it, for `accept`, and the share of tokens that were forced,
which speculation can offer as guesses. --tokenizer: a tokenizer.json; default: the demo's, with
pairs of its tokens as further ones.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import numpy as np

import bloomq
from bloomq.constraints import Grammar, JsonSchema, Regex
from bloomq.constraints.matching import Compiler
from bloomq.tokenizer import BloomTokenizer

TOKENS, ROWS, END = 250_680, 250_880, 2  # of the six BLOOMs
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"}, "age": {"type": "integer"},
        "languages": {"type": "array", "items": {"type": "string", "maxLength": 20}},
        "role": {"enum": ["author", "editor", "translator"]},
    },
    "required": ["name", "age", "languages", "role"], "additionalProperties": False,
}  # fmt: skip
TEXT = "La liberté consiste à pouvoir faire tout ce qui ne nuit pas à autrui. "
SPEECH = json.dumps(TEXT * 3, ensure_ascii=False)
NESTED = json.dumps({"a": [1, {"b": TEXT}]}, ensure_ascii=False)
DOCUMENT = {"name": "Olympe de Gouges", "age": 45, "languages": ["français", "occitan"]}
CASES: dict[str, tuple[Any, str]] = {
    "schema": (JsonSchema(PERSON), json.dumps({**DOCUMENT, "role": "author"}, ensure_ascii=False)),
    "any object": (JsonSchema.any_object(), NESTED),
    "long string": (JsonSchema({"type": "string", "maxLength": 400}), SPEECH),
    "regex": (Regex(r"\d{4}-\d{2}-\d{2} (\w+ ?){1,9}\."), "2026-11-23 nous avons bien mangé."),
    "any letters": (Regex(r"([\p{L}'.]+ ){5,60}"), TEXT * 3),
    "grammar": (
        Grammar('start: t (("+"|"-") t)*\nt: f (("*"|"/") f)*\nf: /[0-9]+/ | "(" start ")"'),
        "12*(3+4)-56/(7-8*(9+10))+111",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, help="default: made from the demo's")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the tokenizer that is made")
    args = parser.parse_args()
    if args.tokenizer is None:
        tokenizer = BloomTokenizer.from_bytes(enlarged(args.tokens))
    else:
        tokenizer = BloomTokenizer.from_file(args.tokenizer)
    gc.collect()
    before, started = resident_mb(), perf_counter()
    compiler = Compiler(tokenizer, max(ROWS, tokenizer.vocab_size))
    compiler.matcher(Regex("a"), (END,))
    seconds, grown = perf_counter() - started, resident_mb() - before
    print(f"{tokenizer.vocab_size} tokens: compiled in {seconds:.2f} s, {grown:.0f} MB\n")
    print(f"{'constraint':12}{'compile ms':>11}{'allowed us: p50':>17}{'p90':>6}{'most':>7}"
          f"{'mask':>6}{'accept':>8}{'forced':>8}")  # fmt: skip
    for name, (constraint, text) in CASES.items():
        print(f"{name:12}" + walk(compiler, constraint, tokenizer.encode(text), args.repeat))


def walk(compiler: Compiler, constraint: Any, ids: list[int], repeat: int) -> str:
    started = perf_counter()
    compiler.matcher(constraint, (END,))
    compile_ms = (perf_counter() - started) * 1e3
    logits = np.random.default_rng(0).standard_normal(ROWS, np.float32)
    asked, masked, accepted, forced = [], [], [], 0
    for _ in range(repeat):
        matcher = compiler.matcher(constraint, (END,))
        for token in ids:
            forced += bool(matcher.forced())
            at = [perf_counter()]
            allowed = matcher.allowed()
            at.append(perf_counter())
            np.where(allowed, logits, -np.inf)
            at.append(perf_counter())
            if not allowed[token]:  # text that is forced comes in its usual tokens
                token = matcher.forced()[0]  # noqa: PLW2901
            matcher.accept(token)
            at.append(perf_counter())
            for samples, i in ((asked, 0), (masked, 1), (accepted, 2)):
                samples.append((at[i + 1] - at[i]) * 1e6)
    p90 = quantiles(asked, n=10)[-1]
    return (
        f"{compile_ms:11.1f}{median(asked):17.0f}{p90:6.0f}{max(asked):7.0f}{median(masked):6.0f}"
        f"{median(accepted):8.0f}{forced / len(asked):8.0%}"
    )


def enlarged(tokens: int) -> bytes:
    """The demo's tokenizer.json with pairs of its tokens, word beginnings first, as more tokens."""
    content = json.loads((bloomq.demo_pack() / "tokenizer.json").read_text())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    known = [token for token in vocab if not token.startswith("<")]
    first = [token for token in known if token[0] == "Ġ"] + [t for t in known if t[0] != "Ġ"]
    rest = [token for token in known if token.isalpha() and token[0] != "Ġ"]
    for i in range(len(first) * len(rest)):
        if len(vocab) >= tokens:
            break
        left, right = first[i % len(first)], rest[i // len(first) * 7 % len(rest)]
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append([left, right])
    return json.dumps(content).encode()


def resident_mb() -> float:
    """Of this process, on Linux; else 0."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
    except OSError:
        return 0.0


if __name__ == "__main__":
    main()
