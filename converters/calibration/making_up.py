"""What a matrix that writes to the residual stream should add to it: what brings the stored model's
stream back to the checkpoint's own.

The wanted contribution r [N] is the checkpoint's own stream behind the matrix less the stored one
before it; the inputs a [K] are the stored ones. The weights that come closest over the text, and
stay near what they were, minimise E|r - W* a|^2 + damping |W* - W|^2, about the means of both:
W* = (E[r a.T] + damping W) (E[a a.T] + damping)^-1, and the means go into the bias.

Source: GPTAQ (arXiv 2504.02692) for targets of the unquantized model; here they are those of the
stream, so errors made before are made up for too (docs/experiments.md).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.products import add_product
from bloomq.errors import NumericError

from .engine import Sums
from .forward import Kept, Runner, UnderWay

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

# Of the mean diagonal of the inputs' moment, and as much again for each column that there is to a
# token: what a regression fits of noise grows so (docs/experiments.md).
_DAMPING, _BY_COLUMNS = 0.4, 10.0
# With 2 it gains half as much as with 8, and of 7b1's mlp.down, of which 24,576 tokens are 1.5 a
# column, it would take as long as all else.
TOKENS_A_COLUMN = 4
SCHEMES = ("nl4", "int4", "int6")  # what errors int8 makes are less than what is fitted of noise
_STRIP = 512  # rows of a sum over the text that a thread adds to at a time


def writes_to_stream(name: str) -> bool:
    """Is a matrix's output added to the residual stream?"""
    return name.endswith(("attn.out", "mlp.down"))


def stream_behind(
    name: str, layer: int, weights: UnderWay, x: F32, runner: Runner, kept: Kept
) -> None:
    """kept.rows [tokens, C] become the stream behind matrix `name`, one that writes to it, of a
    block whose own input is x; to be called for `attn.out` first."""
    if name.endswith("mlp.down"):
        runner.through(layer, weights, x, kept.rows, kept)
    else:
        runner.inputs_of(f"h.{layer}.mlp.up", layer, weights, x, _ignore, kept)


def _ignore(x: F32) -> None:
    return None


class Wanted:
    """Sums over a text of what a matrix should add, and of that times its inputs.

    stream: [tokens, N], the checkpoint's own behind the matrix, in the order in which `add` is
    called; moments: of the inputs, added up beside. Sums are taken about the first rows' means, so
    that float32 holds them.
    """

    def __init__(self, stream: F32, moments: Sums, pool: ThreadPoolExecutor) -> None:
        self._stream, self._moments, self._pool, self._count = stream, moments, pool, 0
        self._centres: tuple[F32, F32] | None = None
        self._totals: tuple[F64, F64] | None = None
        self._cross: F32 | None = None

    def add(self, a: F32, before: F32) -> None:
        """a [M, K]: the matrix's inputs; before [M, N]: the stored stream that it adds to."""
        self._moments.add(a)
        r = self._stream[self._count : self._count + len(a)] - before
        if self._centres is None or self._totals is None or self._cross is None:
            self._centres = r.mean(axis=0), a.mean(axis=0)
            self._totals = np.zeros(r.shape[1]), np.zeros(a.shape[1])
            self._cross = np.zeros((r.shape[1], a.shape[1]), np.float32)
        r, a = r - self._centres[0], a - self._centres[1]
        self._totals[0][:] += r.sum(axis=0, dtype=np.float64)
        self._totals[1][:] += a.sum(axis=0, dtype=np.float64)
        self._count += len(a)
        cross = self._cross

        def run(start: int) -> None:
            rows = slice(start, start + _STRIP)
            add_product(cross[rows], r[:, rows], a)

        list(self._pool.map(run, range(0, len(cross), _STRIP)))

    def weights(self, w: F32, mean: F32, moment: F32) -> tuple[F32, F32]:
        """(W* [N, K], its bias [N]); at most once. w: as the checkpoint has it; mean [K], moment
        [K, K]: of the inputs, about their mean. Raises: NumericError."""
        assert self._centres is not None and self._totals is not None and self._cross is not None
        cross, self._cross = self._cross, None
        shift_r, shift_a = (total / self._count for total in self._totals)
        cross /= np.float32(self._count)
        cross -= np.outer(shift_r, shift_a).astype(np.float32)
        check_finite(float(cross.sum(dtype=np.float64)))
        damping = damping_of(np.diag(moment), self._count)
        cross += damping * w
        damped = moment.copy()
        damped[np.diag_indices(len(damped))] += damping
        found = np.ascontiguousarray(np.linalg.solve(damped, cross.T).T, np.float32)
        wanted = (self._centres[0] + shift_r).astype(np.float32)
        return found, wanted - np.einsum("nk,k->n", found, mean)


def check_finite(total: float) -> None:
    """Of what a matrix should add, summed up. Raises: NumericError."""
    if not np.isfinite(total):
        raise NumericError(
            "the checkpoint's own activations are not finite: it is damaged or overflows"
        )


def damping_of(diagonal: F32, tokens: int) -> np.float32:
    """diagonal: of the inputs' moment [K]."""
    part = _DAMPING + _BY_COLUMNS * len(diagonal) / tokens
    return np.float32(part * diagonal.mean(dtype=np.float64) or 1.0)
