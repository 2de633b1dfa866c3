"""How Triton's products are best cut: candidates for lines of `triton_products.CUTS`, measured.

Two matrices of bloom-7b1's blocks, [16384, 4096] and [4096, 4096], several of each, so that no
cache holds them, in a CUDA graph. Compiling takes most of the time, about a second a candidate.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from gpu_engines import DrawnLoader
from gpu_run import Run
from gpu_ways import AGAIN, again, recorded
from gpu_weights import RandomWeights

from bloomq.backends.cuda.device import why_no_triton
from bloomq.backends.cuda.stored import Stored
from bloomq.weights import Matrix

NAMES = ("mlp.up", "attn.out")
COPIES = 4  # of both: 340 MB in int8, 180 MB in 4 bits
# Scheme, tokens, int8 activations: decode at batch 1, at 8 and at 32, of what is decoded with most.
CASES = (
    ("int8", 1, True), ("nl4", 1, False), ("int4", 1, False), ("int8", 32, True),
    ("nl4", 32, False), ("nl4", 4, False), ("bf16", 1, False), ("int8", 64, True),
)  # fmt: skip


def cuts(run: Run) -> None:
    """A row for each candidate, and of each case the fastest as a line of the table."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and (run.device.type == "cpu" or why_no_triton() is not None):
        return  # there is nothing to run them
    for scheme, m, rounds in CASES[:2] if run.tiny else CASES:
        try:
            _case(run, scheme, m, rounds)
        except Exception as error:  # the other cases are still measured
            run.failed(f"cuts of {scheme}, {m} tokens", error)
        run.free()


def candidates(scheme: str, m: int, dtype: torch.dtype) -> list[Any]:
    """The table's own line, and others beside it."""
    from bloomq.backends.cuda.triton_products import BY_HAND, CUTS, case_of

    case = case_of(scheme, m, dtype)
    now = CUTS[case]
    if m <= BY_HAND and dtype != torch.int8:
        stages = (1,) if case[0] == "book" else (2, 3, 4)  # its entries would go the codes' way
        tried = [replace(now, rows=rows, stages=n) for rows in (4, 8, 16) for n in stages]
        tried += [replace(now, warps=8), replace(now, rows=16, warps=8)]
    else:
        tried = [replace(now, rows=rows, stages=n) for rows in (32, 64) for n in (3, 4, 6)]
        tried += [replace(now, rows=16), replace(now, warps=2), replace(now, warps=8)]
    return [now, *(cut for cut in tried if cut != now)]


def _case(run: Run, scheme: str, m: int, rounds: bool) -> None:
    from bloomq.backends.cuda import triton_products as products

    loader, weights = DrawnLoader(run.device), RandomWeights(run.model("bloom-7b1"), scheme)
    matrices = [weights.matrix(f"h.0.{name}") for name in NAMES[run.tiny :]]
    stored = [
        loader.load(Matrix(f"{copy}.{at.name}", at.scheme, at.shape, at.parts))
        for copy in range(1 if run.tiny else COPIES)
        for at in matrices
    ]
    k, total = matrices[0].shape[1], sum(one.nbytes for one in stored)
    dtype = torch.float32 if m == 1 else torch.bfloat16
    x, x_scales = torch.randn(m, k, device=run.device).to(dtype), None
    if rounds:
        x = torch.randint(-127, 128, (m, k), device=run.device, dtype=torch.int8)
        x_scales = torch.ones(m, k // products.X_GROUP, device=run.device)
    name, found = products.case_of(scheme, m, x.dtype), list[tuple[float, Any]]()
    for cut in candidates(scheme, m, x.dtype)[: 2 if run.tiny else None]:
        if run.left() < 0:
            break
        try:
            seconds = _seconds(run, partial(_products, x, x_scales, stored, cut))
        except Exception as error:  # too much shared memory, perhaps: not a candidate
            run.failed(f"{name}: {cut}", error)
            continue
        found.append((seconds, cut))
        run.emit(f"{name}: {cut}", tokens=m, us=round(1e6 * seconds, 1),
                 gb_s=round(total / seconds / 1e9, 1))  # fmt: skip
    if found:
        seconds, cut = min(found, key=lambda pair: pair[0])
        best = f"Blocks({cut.rows}, {cut.pieces}, {cut.warps}, {cut.stages})"
        run.emit(
            f"cut of {name}", tokens=m, line=f"{name}: {best},".replace("'", '"'),
            cut_us=round(1e6 * seconds, 1), now_us=round(1e6 * found[0][0], 1),
            cut_gb_s=round(total / seconds / 1e9, 1),
        )  # fmt: skip


def _products(
    x: torch.Tensor, x_scales: torch.Tensor | None, stored: Sequence[Stored], cut: Any
) -> list[torch.Tensor]:
    """Of x with every matrix, cut as `blocks_for` would with that line."""
    from bloomq.backends.cuda import triton_products as products

    made = []
    for one in stored:
        scheme, (n, k) = one.scheme, one.shape
        blocks = products.fitted(cut, scheme.name, len(x), n, k, x.dtype)
        made.append(
            products.product(
                x, one.codes, one.scales, scheme=scheme.name, group_size=scheme.group_size,
                x_scales=x_scales, blocks=blocks,
            )
        )  # fmt: skip
    return made


def _seconds(run: Run, work: Callable[[], object]) -> float:
    """Of one run of the work."""
    replay = recorded(run, work)
    return median(run.seconds(partial(again, replay)) for _ in range(run.sizes.repeat)) / AGAIN
