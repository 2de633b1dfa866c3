"""The producer of calibrated weights: block by block, each matrix solved for what reaches it
through the blocks and matrices before it as they are stored.

Those that write to the residual stream are solved for what brings it back to the checkpoint's own,
which goes along (`making_up`). Rounding errors that the others make on average over the text go
into their biases. The embedding comes first in a pack; where it is the head too it is solved for
the hidden states that the checkpoint's own weights end in, which takes a pass over the text before
all else.

Invariant: the pieces depend on the checkpoint, the schemes, the token ids, the settings and the
device alone, not on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bloomq.config import BloomConfig, WeightSpec, weight_specs
from bloomq.schemes import Array, Scheme, get_scheme, round_up
from bloomq.weights import Matrix

from ..pieces import Piece, Producer, blocks, rounded_block
from ..source import Checkpoint, SourceTensor
from .engine import CPU, Device, Engine, X, threads_of
from .forward import Kept, Runner, UnderWay, linears_of, places_of, rows_of
from .look_up import look_up_moment
from .making_up import SCHEMES, TOKENS_A_COLUMN, stream_behind, writes_to_stream
from .scratch import Scratch
from .solver import DAMPING, SWEEPS, Solver
from .text import spread

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Rows = Callable[[int, int], F32]  # first and last of a matrix -> [n, K]
Progress = Callable[[int, int], None]  # (work done, work in all), in an arbitrary unit

VERSION = 3  # raised whenever the same text and settings give other bytes
# An embedding that is also the head serves two ends: as the head its error is weighed by the hidden
# states, as a look-up by what the first block reads, which weighs so much beside it, of mean
# diagonals (docs/experiments.md).
LOOK_UP = 0.35
HEAD_TOKENS = 8192  # of the text, for the hidden states that the head gets: C^2 moments, not 16 C^2
_NEARLY_EXACT = get_scheme("int8")  # for these states: a quarter of float32's time
_PICKED_BYTES = 64 << 20  # of float32 rows of the table at a time


@dataclass(frozen=True, slots=True)
class Settings:
    """How matrices are solved. damping: of their moments; look_up: what errors of looked-up rows
    weigh beside the head's, in an embedding that is both; sweeps: of descent; correct_bias: whether
    mean errors go into the biases; make_up: whether, then, errors made before are made up for."""

    damping: float = DAMPING
    look_up: float = LOOK_UP
    sweeps: int = SWEEPS
    correct_bias: bool = True
    make_up: bool = True


def calibrated(
    ids: I64, folder: Path, *, settings: Settings | None = None, threads: int | None = None,
    device: Device = CPU, progress: Progress = lambda done, total: None,
) -> Producer:  # fmt: skip
    """The producer that calibrates on windows of token ids [B, T].

    folder: of its own, for activations: see `scratch`; it is gone when all weights are made.
    threads: None for one a core; no byte depends on them. device: that computes.
    Raises (when it produces): NumericError, OutputError, UsageError, CheckpointError,
    CapacityError where the device's memory is too small.
    """
    return partial(_produce, ids, folder, settings or Settings(), threads, device, progress)


def _produce(
    ids: I64, folder: Path, settings: Settings, threads: int | None, device: Device,
    progress: Progress, checkpoint: Checkpoint, schemes: Mapping[str, Scheme],
    done: Collection[str],
) -> Iterator[Piece]:  # fmt: skip
    key = _key(ids, settings, checkpoint, schemes, device)
    with ThreadPoolExecutor(threads_of(threads)) as pool:
        engine = device.engine(pool, threads)
        run = _Calibration(ids, folder, key, settings, engine, progress, checkpoint, schemes, done)
        with engine.watched():
            yield from run.pieces()
    run.scratch.remove()


def _key(
    ids: I64, settings: Settings, checkpoint: Checkpoint, schemes: Mapping[str, Scheme],
    device: Device,
) -> str:  # fmt: skip
    """A digest of all that the activations depend on."""
    labels = {name: scheme.label for name, scheme in schemes.items()}
    known = checkpoint.provenance.get("fingerprint") or checkpoint.fingerprint
    text = hashlib.sha256(ids.tobytes()).hexdigest()
    facts = [VERSION, known, labels, text, list(ids.shape), repr(settings), device.label]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class _Calibration:
    """One run of the producer."""

    def __init__(
        self, ids: I64, folder: Path, key: str, settings: Settings, engine: Engine,
        progress: Progress, checkpoint: Checkpoint, schemes: Mapping[str, Scheme],
        done: Collection[str],
    ) -> None:  # fmt: skip
        self._checkpoint, self._schemes, self._done = checkpoint, schemes, frozenset(done)
        self._config, self._settings, self._engine = checkpoint.config, settings, engine
        self._specs = {spec.name: spec for spec in weight_specs(self._config)}
        self._runner = Runner(ids, self._config, engine)
        self._tokens = ids.size
        self._making_up = making_up(self._config, schemes, settings, ids.size)
        rows = streams(self._making_up) * ids.size
        self.scratch = Scratch(folder, key, rows, self._config.hidden_size)
        self._report, self._work = progress, 0

    def pieces(self) -> Iterator[Piece]:
        layers = self._config.n_layer
        begin = self.scratch.latest(self._first_undone_block())
        if begin is None:
            begin = 0
            yield from self._embedding()
        else:
            yield from self._as_stored("emb_ln")
        for layer in range(begin, layers):
            yield from self._block(layer)
            self._work += 1
            self._report(self._work, layers - begin)
        yield from self._after_blocks()

    def _first_undone_block(self) -> int:
        for layer in range(self._config.n_layer):
            if any(
                name not in self._done for name in self._specs if name.startswith(f"h.{layer}.")
            ):
                return layer
        return self._config.n_layer

    # -- before, between and after the blocks

    def _embedding(self) -> Iterator[Piece]:
        """The table, and the first block's input."""
        wanted = np.unique(self._runner.ids)
        moment, damping = look_up_moment(self._checkpoint), self._settings.damping
        if self._config.head_is_embedding and not self._schemes["wte"].is_float:
            moment *= self._settings.look_up
            head = self._head_moment()
            moment *= np.diag(head).mean(dtype=np.float64)
            moment += head
        stored = np.empty((len(wanted), self._config.hidden_size), np.float32)
        rows = partial(rows_of, self._checkpoint.tensors["wte.weight"])
        for piece, start, values in self._solved("wte", rows, moment, damping):
            here = (wanted >= start) & (wanted < start + len(values))
            stored[here] = values[wanted[here] - start]
            if "wte" not in self._done:
                yield piece
        yield from self._as_stored("emb_ln")
        x, weights = self.scratch.new(), UnderWay(self._checkpoint)
        out, followed = self._streams(x)
        self._runner.embed(weights, places_of(wanted), stored, out)
        if self._making_up:
            own = _picked(self._checkpoint.tensors["wte.weight"], wanted)
            self._runner.embed(weights, places_of(wanted), own, followed)
        self.scratch.keep(x, 0)

    def _head_moment(self) -> F32:
        """Of the hidden states that the checkpoint's weights, rounded to int8, end in, over some
        of the text."""
        ids = spread(self._runner.ids)
        ids = ids[: max(1, HEAD_TOKENS // ids.shape[1])]
        runner = Runner(ids, self._config, self._engine)
        weights, wanted = UnderWay(self._checkpoint), np.unique(ids)
        tensor = self._checkpoint.tensors["wte.weight"]
        x = np.empty((ids.size, self._config.hidden_size), np.float32)
        runner.embed(weights, places_of(wanted), _picked(tensor, wanted), x)
        for layer in range(self._config.n_layer):
            weights.add_rounded(linears_of(layer), _NEARLY_EXACT, self._engine.pool)
            runner.through(layer, weights, x, x)
            weights.drop(linears_of(layer))
        moments = self._engine.moments()
        runner.final(weights, x, moments.add)
        return runner.numpy(moments.result(central=False)[1])

    def _after_blocks(self) -> Iterator[Piece]:
        yield from self._as_stored("ln_f")
        for spec in weight_specs(self._config)[-1:]:
            if spec.kind == "head" and not self._schemes[spec.name].is_float:
                moments = self._engine.moments()
                x, _ = self._streams(self.scratch.open(self._config.n_layer))
                self._runner.final(UnderWay(self._checkpoint), x, moments.add)
                moment = moments.result(central=False)[1]
                rows = partial(rows_of, self._checkpoint.tensors[f"{spec.name}.weight"])
                for piece, _, _ in self._solved(spec.name, rows, moment, self._settings.damping):
                    if spec.name not in self._done:
                        yield piece
            elif spec.name != "ln_f":
                yield from self._as_stored(spec.name)

    def _as_stored(self, name: str) -> Iterator[Piece]:
        """A weight that is not calibrated."""
        if name not in self._done:
            others = self._specs.keys() - {name}
            for block in blocks(self._checkpoint, self._schemes, others):
                yield rounded_block(block)

    # -- a block

    def _block(self, layer: int) -> Iterator[Piece]:
        """Its weights; then the next block's input."""
        x, own = self._streams(self.scratch.open(layer))
        new, weights = self.scratch.new(), UnderWay(self._checkpoint)
        out, wanted = self._streams(new)
        kept, followed, exact = Kept(out), Kept(wanted), UnderWay(self._checkpoint)
        if self._making_up:
            exact.add_rounded(linears_of(layer), _NEARLY_EXACT, self._engine.pool)
        for spec in self._specs.values():
            if not spec.name.startswith(f"h.{layer}."):
                continue
            if not spec.is_matrix:
                yield from self._as_stored(spec.name)
                continue
            if self._making_up and writes_to_stream(spec.name):
                stream_behind(spec.name, layer, exact, own, self._runner, followed)
            for piece in self._linear(spec, layer, weights, x, kept, wanted):
                if spec.name not in self._done:
                    yield piece
        self._runner.through(layer, weights, x, out, kept)
        self.scratch.keep(new, layer + 1)

    def _streams(self, both: F32) -> tuple[F32, F32]:
        """Of the weights as they are stored, and of the checkpoint's own, if it is followed."""
        return both[: self._tokens], both[self._tokens :]

    def _linear(
        self, spec: WeightSpec, layer: int, weights: UnderWay, x: F32, kept: Kept, wanted: F32
    ) -> Iterator[Piece]:
        """The pieces of a matrix and its bias, which `weights` then has. x: the block's input;
        kept: what it has made of that; wanted: the checkpoint's own stream behind the matrix."""
        name, key, parts = spec.name, f"{spec.name}.bias", dict[str, list[Array]]()
        moments, n = self._engine.moments(), spec.shape[0]
        rows = partial(rows_of, self._checkpoint.tensors[f"{name}.weight"])
        bias = np.zeros(round_up(n, 32), np.float32)
        if name in self._making_up:
            target = self._engine.wanted(wanted, moments)
            self._runner.stream_at(name, layer, weights, x, target.add, kept)
            mean, moment = moments.result(central=True)
            w, bias[:n] = target.weights(rows(0, n), mean, moment)
            rows = partial(_rows, w)
        else:
            self._runner.inputs_of(name, layer, weights, x, moments.add, kept)
            mean, moment = moments.result(central=self._settings.correct_bias)
            bias[:n] = weights.vector(key, n)
        for piece, start, values in self._solved(name, rows, moment, self._settings.damping):
            for leaf, array in piece.arrays.items():
                parts.setdefault(leaf.removeprefix(f"{name}."), []).append(array)
            if self._settings.correct_bias:
                stop = start + len(values)
                bias[start:stop] += np.einsum("nk,k->n", rows(start, stop) - values, mean)
            yield piece
        whole = {leaf: np.concatenate(arrays) for leaf, arrays in parts.items()}
        weights.matrices[name] = Matrix(
            name, self._schemes[name], (spec.shape[0], spec.shape[1]), whole
        )
        weights.biases[key] = bias
        yield Piece(name, {key: bias}, self._checkpoint.tensors[key].nbytes)

    def _solved(
        self, name: str, rows: Rows, moment: X, damping: float
    ) -> Iterator[tuple[Piece, int, F32]]:
        """(piece, first row, values [n, K]) of some rows of a matrix at a time."""
        tensor = self._checkpoint.tensors[f"{name}.weight"]
        total, k = tensor.shape
        step = self._engine.solved_rows(k)
        solver = Solver(
            moment, self._schemes[name], self._engine, name=tensor.name, damping=damping,
            sweeps=self._settings.sweeps,
        )  # fmt: skip
        for start in range(0, total, step):
            stop = min(start + step, total)
            solved = solver.rows(rows(start, stop))
            arrays = {f"{name}.{leaf}": part for leaf, part in solved.parts.items()}
            nbytes = tensor.nbytes * (stop - start) // total
            yield Piece(name, arrays, nbytes), start, solved.values


def making_up(
    config: BloomConfig, schemes: Mapping[str, Scheme], settings: Settings, tokens: int
) -> frozenset[str]:
    """The matrices that make up for errors before them. Not where the tokens are few: see
    `TOKENS_A_COLUMN`."""
    if not (settings.correct_bias and settings.make_up):
        return frozenset()
    return frozenset(
        spec.name for spec in weight_specs(config)
        if writes_to_stream(spec.name) and schemes[spec.name].name in SCHEMES
        and tokens >= TOKENS_A_COLUMN * spec.shape[1]
    )  # fmt: skip


def streams(making_up: Collection[str]) -> int:
    """That go along: of the weights as they are stored, and of the checkpoint's own."""
    return 2 if making_up else 1


def _rows(w: F32, start: int, stop: int) -> F32:
    return w[start:stop]


def _picked(tensor: SourceTensor, wanted: I64) -> F32:
    """Rows `wanted`, ascending, of a table that is read a block at a time."""
    total, k = tensor.shape
    picked, step = np.empty((len(wanted), k), np.float32), max(1, _PICKED_BYTES // (4 * k))
    for start in range(0, total, step):
        here = (wanted >= start) & (wanted < start + step)
        if here.any():
            picked[here] = rows_of(tensor, start, min(start + step, total))[wanted[here] - start]
    return picked
