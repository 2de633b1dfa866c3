"""Each way to a product, by scheme and number of tokens: what the backend's choices are to rest on.

One block's four matrices of bloom-7b1, several of each, so that no cache holds them: a step's worth
of weights in a row. On a GPU recorded as a CUDA graph, as decode steps are, so that the host's time
is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from gpu_engines import DrawnLoader
from gpu_run import Run
from gpu_weights import RandomWeights

from bloomq.backends.cuda.device import why_no_triton
from bloomq.backends.cuda.layers import CudaBackend
from bloomq.weights import Matrix

Way = Literal["torch", "bitsandbytes", "triton", "auto"]
WAYS: tuple[Way, ...] = ("torch", "bitsandbytes", "triton", "auto")
SCHEMES = ("int8", "nl4", "nf4", "bf16")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 512)
NAMES = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
AGAIN = 10  # in one sample, as the device is waited for at its end
BLOCKS = 3  # of 100 to 400 MB: more than any L2 holds


def ways(run: Run) -> None:
    """A row for each scheme, way and number of tokens: GB/s of weights, and the time of a block."""
    tokens = (1, 20) if run.tiny else TOKENS
    for scheme in SCHEMES:
        for way in WAYS:
            # On the CPU only by its interpreter, which the tests of the kernels use; that it does
            # not compile on a GPU is said of the machine.
            if way == "triton" and (run.device.type == "cpu" or why_no_triton() is not None):
                continue
            try:
                _rows(run, scheme, way, tokens)
            except Exception as error:  # a way that is not here, or does not run: to the next
                run.failed(f"{scheme} by {way}", error)
            run.free()


def _rows(run: Run, scheme: str, way: Way, tokens: tuple[int, ...]) -> None:
    weights = RandomWeights(run.model("bloom-7b1"), scheme)
    backend = CudaBackend(str(run.device), kernels=way)
    backend._loader = DrawnLoader(run.device)  # type: ignore[assignment]
    copies = 1 if run.tiny else BLOCKS
    # Names of their own, so that each is drawn for itself.
    of_block = [weights.matrix(f"h.0.{name}") for name in NAMES]
    matrices = [
        Matrix(f"{copy}.{matrix.name}", matrix.scheme, matrix.shape, matrix.parts)
        for copy in range(copies)
        for matrix in of_block
    ]
    layers = [(backend.linear(matrix), matrix.shape[1]) for matrix in matrices]
    block_gb = sum(matrix.nbytes for matrix in of_block) / 1e9

    def step(inputs: dict[int, torch.Tensor]) -> list[Any]:
        return [layer(inputs[k]) for layer, k in layers]

    for count in tokens:
        inputs = {k: torch.randn(count, k, device=run.device) for _, k in layers}
        work = recorded(run, partial(step, inputs))
        times = [run.seconds(partial(again, work)) for _ in range(run.sizes.repeat)]
        seconds = median(times) / AGAIN / copies
        run.emit(
            f"{scheme} by {way}, {count} tokens", way=f"{scheme} by {way}", tokens=count,
            block_us=round(1e6 * seconds, 1), gb_s=round(block_gb / seconds, 1),
        )  # fmt: skip


def again(work: Callable[[], object]) -> None:
    for _ in range(AGAIN):
        work()


def recorded(run: Run, work: Callable[[], Any]) -> Callable[[], object]:
    """The same work as one CUDA graph, where it can be; after it has run thrice."""
    for _ in range(3):
        work()
    run.wait()
    if run.device.type == "cpu":
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = work()

    def replay() -> object:
        graph.replay()
        return held

    replay()
    return replay
