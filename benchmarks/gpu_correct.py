"""Correctness on the embedded demo: the reference backend, transformers, and the CPU's text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_run import Run

import bloomq
from bloomq.backends import why_not
from bloomq.backends.cuda.layers import CudaBackend
from bloomq.backends.reference import ReferenceBackend
from bloomq.heads import Head
from bloomq.layers import Backend, Span
from bloomq.pack import Pack

DEMO = Path(__file__).resolve().parent.parent / "tests/data/bloom-demo"
PROMPT = "Once upon a time"
TEXT = (
    "Once upon a time, in a small village by the sea, there lived an old woman who mended nets. "
    "Every morning she walked to the harbour and counted the boats, and every evening she "
)
SCHEMES = ("f32", "bf16", "int8", "nl4", "int4", "nf4")
# Of the squared logits: what the project allows of int8 activations. 16-bit ones lose far less:
# a step of 2**-8 of the value, NMSE 2**-18 / 3 = 1.3e-6 for each of some ten products in a row.
NMSE = 5e-4
# float32 on both sides: sums of 64 to 256 terms in another order, some 30 products in a row; the
# conformance suite allows 1e-5 of the largest logit for one backend against itself.
CLOSE = 1e-4


def parity(run: Run) -> None:
    """Logits of a text's tokens, each scheme beside the reference; f32 beside transformers, too."""
    ids = np.array(bloomq.load(backend="reference").prompt_ids(TEXT), np.int64)
    for scheme in SCHEMES[:3] if run.tiny else SCHEMES:
        try:
            _scheme_parity(run, scheme, ids)
        except Exception as error:  # a scheme that fails must not hide the others
            run.failed(f"parity {scheme}", error)


def _scheme_parity(run: Run, scheme: str, ids: np.ndarray[Any, Any]) -> None:
    pack = _pack(run, scheme)
    cuda = CudaBackend(str(run.device), "f32")
    found = logits(pack, cuda, ids)
    expected = logits(pack, ReferenceBackend(), ids)
    error = _nmse(found, expected)
    same = float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())
    run.emit(
        f"parity {scheme} with the reference", nmse=error, top1=same, bound=NMSE,
        correct=bool(error <= NMSE),
    )  # fmt: skip
    if scheme == "f32":
        theirs = _transformers_logits(run, ids)
        off = float(np.abs(found - theirs).max() / np.abs(theirs).max())
        run.emit(
            "parity f32 with transformers", largest=off, bound=CLOSE, correct=bool(off <= CLOSE)
        )


def logits(pack: Pack, backend: Backend, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[T, V], of a prompt and then of 8 tokens, one by one: what prefill and decode compute."""
    head = Head(pack, backend, "BloomForCausalLM")
    cache, half = head.cache(1, len(ids)), len(ids) - 8
    first = Span.of([0], [half])
    found = [backend.numpy(head.step(ids[:half], cache, first, np.arange(half))).copy()]
    for i in range(half, len(ids)):
        step = head.step(ids[i : i + 1], cache, Span.of([0], [1]), np.arange(1))
        found.append(backend.numpy(step).copy())
    return np.concatenate(found)


def greedy(run: Run) -> None:
    """The text of the int8 pack, greedily, and the CPU backend's."""
    pack = _pack(run, "int8")
    missing = why_not("numba")
    cpu: Backend = ReferenceBackend("int8")  # the CPU kernels' twin
    if missing is None:
        cpu = bloomq.load(pack.path, backend="numba").backend
    start = np.array(bloomq.load(pack.path, backend="reference").prompt_ids(PROMPT), np.int64)
    ours, theirs = (
        greedy_ids(pack, backend, start, run.sizes.greedy)
        for backend in (CudaBackend(str(run.device), "f16"), cpu)
    )
    different = np.flatnonzero(ours != theirs)
    run.emit(
        "greedy int8 text equals the CPU backend's", tokens=len(ours),
        first_difference=int(different[0]) if len(different) else None,
        cpu=cpu.description, no_numba=missing, correct=not len(different),
    )  # fmt: skip


def greedy_ids(
    pack: Pack, backend: Backend, start: np.ndarray[Any, Any], count: int
) -> np.ndarray[Any, Any]:
    """`count` ids after `start`, through ends of text."""
    head = Head(pack, backend, "BloomForCausalLM")
    cache, ids, found = head.cache(1, len(start) + count), start, []
    for _ in range(count):
        span = Span.of([0], [len(ids)])
        ids = backend.top(head.step(ids, cache, span, span.last), 1).ids[:, 0]
        found.append(int(ids[0]))
    return np.array(found)


def _pack(run: Run, scheme: str) -> Pack:
    """The demo checkpoint in that scheme, converted once."""
    target = run.scratch / f"demo-{scheme}"
    if not target.exists():
        bloomq.convert(DEMO, target, scheme=scheme)
    return Pack.open(target)


def _transformers_logits(run: Run, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    from transformers import BloomForCausalLM

    model: Any = BloomForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    model.to(run.device).eval()
    with torch.inference_mode():
        found = model(torch.tensor(ids[None], device=run.device)).logits[0]
    result: np.ndarray[Any, Any] = found.float().cpu().numpy()
    return result


def _nmse(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    error = np.square(found.astype(np.float64) - expected).sum()
    return float(error / np.square(expected.astype(np.float64)).sum())
