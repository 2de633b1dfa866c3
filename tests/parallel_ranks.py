"""What tests/test_parallel.py has torchrun start: every rank writes what it found as JSON.

Arguments: a folder for the answers, packs A and B of the demo and one of a model with few heads.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import bloomq
from bloomq.layers import Span
from bloomq.parallel.group import GATHERED_BYTES
from bloomq.parallel.workers import Workers, started


def digest(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def error_of(call: Any, *args: Any, **options: Any) -> str:
    try:
        call(*args, **options)
    except bloomq.BloomqError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def sums(workers: Workers) -> list[bool]:
    """Small and large sums: from the left, and so the same whichever way they went."""
    found = []
    for size in (64, GATHERED_BYTES // 4 // workers.world + 5):
        each = np.random.default_rng(7).standard_normal((workers.world, 1, size))
        wanted = np.float32(0) + each[0].astype(np.float32)
        for one in each[1:]:
            wanted = wanted + one.astype(np.float32)
        mine = each[workers.rank].astype(np.float32)
        found.append(bool(np.array_equal(workers.group.sum(mine), wanted)))
    return found


def main(out: Path, first: str, second: str, few_heads: str) -> None:
    workers = started(timeout_s=120)
    assert workers is not None
    answers: dict[str, Any] = {"sums": sums(workers), "seed": workers.seed()}
    answers["shared"] = workers.group.share(b"of rank %d" % workers.rank).decode()
    load: dict[str, Any] = {"threads": 1, "backend": "numba", "workers": workers}
    other = second if workers.rank == 1 else first
    answers["other pack"] = error_of(bloomq.load, other, **load)
    answers["few heads"] = error_of(bloomq.load, few_heads, **load)

    model = bloomq.load(first, **load)
    answers["text"] = model.generate("The river", max_new_tokens=64).text
    drawn = model.generate("The river", max_new_tokens=16, temperature=1.0, top_p=0.9, seed=3)
    answers["drawn"] = drawn.text
    ids = model.prompt_ids("Once upon a time there was a small village")
    cache = model.head.cache(1, 64)
    hidden = model.head.model.compile(lambda x: x)
    everything = np.arange(len(ids))
    residual = hidden(np.array(ids), cache, Span.of([0], [len(ids)]), everything)
    logits = model.backend.numpy(model.head.read(residual))
    answers |= {"residual": digest(residual), "logits": digest(logits)}
    if workers.rank == 0:
        np.save(out / "logits.npy", logits)

    prompt = "A" if workers.rank == workers.world - 1 else "The"
    answers["drawn apart"] = error_of(model.generate, prompt, max_new_tokens=4)
    (out / f"rank-{workers.rank}.json").write_text(json.dumps(answers))
    workers.group.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
