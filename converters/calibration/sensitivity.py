"""How much each matrix's rounding changes what the model predicts, measured on a text.

One sweep over the blocks carries a version of the activations for every matrix: the one in which
that matrix alone is rounded coarsely. So each block is read once, and memory is a block; versions
lie in a file. What the other schemes would cost follows from the errors they make in the matrix's
outputs, since the divergence is quadratic in these while they are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bloomq.config import weight_specs
from bloomq.divergence import divergence
from bloomq.schemes import Scheme, get_scheme
from bloomq.weights import Matrix

from ..quantize import quantize_block
from ..source import Checkpoint
from .budget import CANDIDATES
from .engine import CPU, Device, Engine, X, threads_of
from .forward import Runner, UnderWay, linears_of, places_of, rows_of
from .scratch import Scratch

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Progress = Callable[[int, int], None]
Head = Callable[[F32], F32]  # hidden states [M, C] -> [M, V]

PROBE = CANDIDATES[0]
_REST = get_scheme("int8")  # of all other matrices: a quarter of f32's time, next to no loss
TOKENS = 1024
_BLOCK_BYTES = 64 << 20  # of float32 rows at a time
_HEAD_TOKENS = 64  # of logits at a time: 64 MB of 250,880


def measure(
    checkpoint: Checkpoint, ids: I64, folder: Path, *, threads: int | None = None,
    device: Device = CPU, progress: Progress = lambda done, total: None,
) -> dict[str, dict[Scheme, float]]:  # fmt: skip
    """What each matrix costs in each of CANDIDATES: nats of KL divergence a token, from the model
    in int8 to that with this matrix rounded to nearest.

    ids: windows [B, T], of which the first TOKENS tokens are used; folder: of its own, for the
    versions: 4 bytes for each of these tokens, column and matrix; it is gone in the end.
    Raises: NumericError, OutputError, CheckpointError, CapacityError.
    """
    ids = ids[: max(1, TOKENS // ids.shape[1])]
    with ThreadPoolExecutor(threads_of(threads)) as pool:
        engine = device.engine(pool, threads)
        with engine.watched():
            return _Sweep(checkpoint, ids, folder, engine, progress).costs()


@dataclass(slots=True, eq=False)
class _Probe:
    """A matrix at both schemes, and the squared error of its outputs in each candidate."""

    rest: Matrix
    probe: Matrix
    errors: dict[Scheme, float]


class _Sweep:
    def __init__(
        self, checkpoint: Checkpoint, ids: I64, folder: Path, engine: Engine, progress: Progress
    ) -> None:
        self._checkpoint, self._config, self._engine = checkpoint, checkpoint.config, engine
        self._runner = Runner(ids, checkpoint.config, engine)
        self._report = progress
        names = [s.name for s in weight_specs(self._config) if s.kind in ("embedding", "linear")]
        self._names = [name for name in names if name != "wte"]
        self._scratch = Scratch(
            folder, "versions", (2 + len(self._names)) * ids.size, self._config.hidden_size
        )
        self._errors: dict[str, dict[Scheme, float]] = {}

    def costs(self) -> dict[str, dict[Scheme, float]]:
        flat = self._scratch.new()
        versions = flat.reshape(2 + len(self._names), -1, self._config.hidden_size)
        table = self._embed(versions)  # version 0: the base, 1: the embedding's
        for layer in range(self._config.n_layer):
            self._block(layer, versions, 2 + 4 * layer)
            self._report(layer + 1, self._config.n_layer + 1)
        found = dict(self._divergences(versions, table))
        self._report(self._config.n_layer + 1, self._config.n_layer + 1)
        self._scratch.remove()
        return {
            name: {
                s: kl * e / max(self._errors[name][PROBE], 1e-30)
                for s, e in self._errors[name].items()
            }
            for name, kl in found.items()
        }

    def _probe(self, name: str, weigh: F64) -> _Probe:
        """Both matrices; errors of column k weighed with weigh[k]."""
        tensor = self._checkpoint.tensors[f"{name}.weight"]
        n, k = tensor.shape
        rows = max(32, _BLOCK_BYTES // (4 * k) // 32 * 32)
        kept: dict[Scheme, list[dict[str, NDArray[np.generic]]]] = {_REST: [], PROBE: []}
        errors = dict.fromkeys(CANDIDATES, 0.0)
        for start in range(0, n, rows):
            w = rows_of(tensor, start, min(start + rows, n))
            for scheme in CANDIDATES:
                parts = quantize_block(w, "F32", scheme)
                with np.errstate(over="ignore", invalid="ignore"):  # refused when it is solved
                    e = w - scheme.dequantize(parts, (len(w), k))
                    squares = np.square(e).sum(axis=0, dtype=np.float64)
                    errors[scheme] += float(squares @ weigh)
                if scheme in kept:
                    kept[scheme].append(parts)
        rest, probe = (
            Matrix(
                name,
                scheme,
                (n, k),
                {leaf: np.concatenate([p[leaf] for p in blocks]) for leaf in blocks[0]},
            )
            for scheme, blocks in kept.items()
        )
        return _Probe(rest, probe, errors)

    def _embed(self, versions: F32) -> _Probe:
        wanted = np.unique(self._runner.ids)
        table = self._probe("wte", np.ones(self._config.hidden_size))
        for version, matrix in zip(versions, (table.rest, table.probe), strict=False):
            weights = UnderWay(self._checkpoint)
            self._runner.embed(weights, places_of(wanted), matrix.rows(wanted), version)
        self._errors["wte"] = table.errors
        return table

    def _block(self, layer: int, versions: F32, begun: int) -> None:
        """Take all versions that have begun through a block, and begin those of its matrices."""
        weights, found = UnderWay(self._checkpoint), {}
        for name in linears_of(layer):
            squares = _Squares(self._runner)
            self._runner.inputs_of(name, layer, weights, versions[0], squares.add)
            found[name] = self._probe(name, squares.mean())
            weights.matrices[name] = found[name].rest
            self._errors[name] = found[name].errors
        for number, (name, probe) in enumerate(found.items()):
            one = UnderWay(self._checkpoint, {**weights.matrices, name: probe.probe})
            self._runner.through(layer, one, versions[0], versions[begun + number])
        # As one text: a device is given the block's matrices once, not for each version.
        runner = Runner(np.tile(self._runner.ids, (begun, 1)), self._config, self._engine)
        both = versions[:begun].reshape(-1, self._config.hidden_size)  # a view
        runner.through(layer, weights, both, both)

    def _divergences(self, versions: F32, table: _Probe) -> Iterator[tuple[str, float]]:
        weights = UnderWay(self._checkpoint)
        head = table if self._config.head_is_embedding else None
        if head is None and self._config.architecture == "BloomForCausalLM":
            head = self._probe("lm_head", np.ones(self._config.hidden_size))
            self._errors["lm_head"] = head.errors
        # Bound once: a device gets the largest of all matrices once, not for every few tokens.
        rest = self._runner.head(weights, None if head is None else head.rest)
        apart = _half_square if head is None else divergence
        if head is not None and head is not table:
            probe = self._runner.head(weights, head.probe)
            yield "lm_head", _mean(apart, versions[0], versions[0], rest, probe)
        for name, version in zip(["wte", *self._names], versions[1:], strict=True):
            if name == "wte" and head is table:
                probe = self._runner.head(weights, table.probe)
                yield name, _mean(apart, versions[0], version, rest, probe)
            else:
                yield name, _mean(apart, versions[0], version, rest, rest)


def _mean(
    apart: Callable[[F32, F32], float], base: F32, other: F32, of_base: Head, of_other: Head
) -> float:
    """How far apart, on average, is what heads make of the tokens of two versions."""
    total = 0.0
    for start in range(0, len(base), _HEAD_TOKENS):
        at = slice(start, start + _HEAD_TOKENS)
        total += sum(map(apart, of_base(base[at]), of_other(other[at])))
    return max(total / len(base), 0.0)


def _half_square(p: F32, q: F32) -> float:
    """Half the squared distance of hidden states, where there is no language model's head."""
    return float(np.square(p - q, dtype=np.float64).sum()) / 2


class _Squares:
    """The mean square of each column of rows that come a few at a time."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._total: F64 | None = None
        self._count = 0

    def add(self, x: X) -> None:
        there = self._runner.numpy(x)
        total = np.einsum("mk,mk->k", there, there, dtype=np.float64)
        self._total = total if self._total is None else self._total + total
        self._count += len(x)

    def mean(self) -> F64:
        assert self._total is not None
        return self._total / self._count
