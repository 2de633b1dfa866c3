"""A model under conversion, run one block at a time: what each matrix is given as its input.

The block is `bloomq.model.Block` and its layers are those of a backend, so a text's activations are
those that the finished pack will have there, rounding included. Invariant: memory is a few windows'
activations and one block's weights; the activations between blocks lie in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.config import BloomConfig
from bloomq.errors import NumericError
from bloomq.layers import Activation, LayerNorm, Span
from bloomq.model import Block
from bloomq.schemes import Scheme, bf16_to_f32, get_scheme
from bloomq.weights import Matrix, Norm

from ..quantize import all_finite, quantize_block
from ..source import Checkpoint, SourceTensor
from .engine import Engine, X

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Sink = Callable[[X], None]  # is given the inputs of a matrix, [M, K], of the engine or NumPy's
StreamSink = Callable[[X, X], None]  # and the stream that its output is added to, [M, C]
_ROUNDED_ROWS = 1024
STEP_TOKENS = 2048  # tokens of one step, at least one window: 134 MB of 7b1's widest activations


@dataclass(frozen=True, slots=True, eq=False)
class UnderWay:
    """A checkpoint's weights, of which some are finished: `Weights`, as far as they are needed.

    matrices: as stored, by name; biases: by key, where they are not the checkpoint's.
    """

    checkpoint: Checkpoint
    matrices: dict[str, Matrix] = field(default_factory=dict)
    biases: dict[str, F32] = field(default_factory=dict)

    @property
    def config(self) -> BloomConfig:
        return self.checkpoint.config

    def matrix(self, name: str) -> Matrix:
        """An unfinished one has no parts: it is never multiplied with."""
        shape = self.checkpoint.tensors[f"{name}.weight"].shape
        return self.matrices.get(name) or Matrix(name, get_scheme("f32"), (shape[0], shape[1]), {})

    def vector(self, key: str, length: int) -> F32:
        found = self.biases.get(key)
        return vector_of(self.checkpoint.tensors[key]) if found is None else found[:length]

    def norm(self, name: str) -> Norm:
        gain, bias = (
            vector_of(self.checkpoint.tensors[f"{name}.{leaf}"]) for leaf in ("weight", "bias")
        )
        return Norm(name, gain, bias, self.config.layer_norm_epsilon)

    def add_rounded(self, names: list[str], scheme: Scheme, pool: ThreadPoolExecutor) -> None:
        """Take matrices of the checkpoint, rounded to nearest. Raises: NumericError where one is
        damaged."""
        for name in names:
            tensor = self.checkpoint.tensors[f"{name}.weight"]
            n, k = tensor.shape
            starts = range(0, n, _ROUNDED_ROWS)
            found = list(
                pool.map(lambda at, t=tensor, n=n: quantize_block(
                    rows_of(t, at, min(at + _ROUNDED_ROWS, n)), "F32", scheme), starts)
            )  # fmt: skip
            parts = {leaf: np.concatenate([part[leaf] for part in found]) for leaf in found[0]}
            self.matrices[name] = Matrix(name, scheme, (n, k), parts)

    def drop(self, names: list[str]) -> None:
        for name in names:
            self.matrices.pop(name, None)
            self.biases.pop(f"{name}.bias", None)


def linears_of(layer: int) -> list[str]:
    """The matrices of a block, in the order in which a step reads them."""
    return [f"h.{layer}.{name}" for name in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")]


def rows_of(tensor: SourceTensor, start: int, stop: int) -> F32:
    """[stop - start, ...] float32. Raises: NumericError where a value is not finite."""
    raw = tensor.rows(start, stop)
    if not all_finite(raw, tensor.dtype):
        raise NumericError(f"{tensor.name} holds NaN or infinity: the checkpoint is damaged")
    if tensor.dtype == "BF16":
        return bf16_to_f32(raw.view(np.uint16))
    return np.asarray(raw, np.float32)


def vector_of(tensor: SourceTensor) -> F32:
    return rows_of(tensor, 0, tensor.shape[0])


@dataclass(slots=True, eq=False)
class Kept:
    """What a block has made of the text so far, from which passes for its later matrices go on:
    rows [B * T, C] are what came out of its attention, then out of `attn.out`."""

    rows: F32
    stage: int = 0  # 0: nothing yet, _ATTENTION or _OUT


_ATTENTION, _OUT = 1, 2


class _Reached(BaseException):
    """A block came to the matrix whose inputs were asked for."""


@dataclass(frozen=True, slots=True, eq=False)
class _Tap:
    """In place of a linear: hands its input on and ends the step."""

    norm: LayerNorm
    sink: Callable[[X, Any], None]

    def __call__(self, x: X, add: X | None = None, delta: X | None = None) -> X:
        self.sink(self.norm(x), add)
        raise _Reached


@dataclass(frozen=True, slots=True, eq=False)
class _InPieces:
    """A linear of NumPy's arrays, of a few rows at a time."""

    inner: Any
    at_once: int

    def __call__(self, x: F32, add: F32 | None = None, delta: F32 | None = None) -> F32:
        pieces = [slice(at, at + self.at_once) for at in range(0, len(x), self.at_once)]
        return np.concatenate(
            [self.inner(x[at], add=None if add is None else add[at]) for at in pieces]
        )


class _Tapped:
    """A backend for one block, with a tap in place of the matrix `name`; cached as layer 0.

    tokens: those of the step under way.
    """

    def __init__(
        self, engine: Engine, name: str | None, sink: Callable[[X, Any], None], kept: Kept | None
    ) -> None:
        self._inner, self._at_once = engine.layers, engine.at_once
        self._name, self._sink, self._kept = name, sink, kept
        self._stage = 0 if kept is None else kept.stage
        self.tokens = slice(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def linear(
        self, weight: Matrix, bias: F32 | None = None, *, norm: Norm | None = None,
        act: Activation | None = None,
    ) -> Any:  # fmt: skip
        if weight.name == self._name:
            return _Tap(_unchanged if norm is None else self._inner.norm(norm), self._sink)
        if not weight.parts or (weight.name.endswith("attn.qkv") and self._stage):
            return _nothing
        made = self._inner.linear(weight, bias, norm=norm, act=act)
        if self._at_once is not None:
            made = _InPieces(made, self._at_once)
        return self._keeping(_OUT, made) if weight.name.endswith("attn.out") else made

    def attention(self, layer: int, n_head: int, head_dim: int) -> Any:
        return self._keeping(_ATTENTION, self._inner.attention(0, n_head, head_dim))

    def _keeping(self, stage: int, inner: Any) -> Any:
        """A layer whose results are kept; or in its place what was kept."""
        kept = self._kept
        if kept is None:
            return inner
        if self._stage > stage:
            return _nothing
        if self._stage == stage:
            return lambda *arguments, **options: np.asarray(kept.rows[self.tokens])

        def run(*arguments: Any, **options: Any) -> X:
            result = inner(*arguments, **options)
            kept.rows[self.tokens], kept.stage = self._inner.numpy(result), stage
            return result

        return run


def _unchanged(x: X) -> X:
    return x


def _nothing(*arguments: object, **options: object) -> None:
    """In place of a layer whose result nothing reads."""


class Runner:
    """Runs windows of tokens, ids [B, T], through one layer at a time. Rows that it is given and
    fills are NumPy's."""

    def __init__(self, ids: I64, config: BloomConfig, engine: Engine) -> None:
        self.ids = ids
        self._engine, self._backend = engine, engine.layers
        self._one_layer = replace(config, n_layer=1)
        self._rows = max(1, STEP_TOKENS // ids.shape[1])

    def steps(self) -> Iterator[tuple[slice, Span]]:
        """Whole windows at a time: which tokens they are, and the span of a cache."""
        count, length = self.ids.shape
        for start in range(0, count, self._rows):
            rows = min(self._rows, count - start)
            tokens = slice(start * length, (start + rows) * length)
            yield tokens, Span.of(range(rows), [length] * rows)

    def embed(self, weights: UnderWay, table: Mapping[int, int], rows: F32, out: F32) -> None:
        """out [B * T, C] is what the first block gets; table[id]: the row of `rows` it has."""
        norm = self._backend.norm(weights.norm("emb_ln"))
        index = np.array([table[token] for token in self.ids.reshape(-1).tolist()], np.int64)
        for tokens, _ in self.steps():
            out[tokens] = self.numpy(norm(rows[index[tokens]]))

    def inputs_of(
        self, name: str, layer: int, weights: UnderWay, x: F32, sink: Sink,
        kept: Kept | None = None,
    ) -> None:  # fmt: skip
        """Give `sink` the inputs of matrix `name` of a block whose own input is x [B * T, C].

        kept: what earlier calls left there of the block's results is not computed anew; the
        matrices before `name` must be the same in all calls.
        """
        self._run(weights, layer, x, None, name, lambda inputs, add: sink(inputs), kept)

    def stream_at(
        self, name: str, layer: int, weights: UnderWay, x: F32, sink: StreamSink,
        kept: Kept | None = None,
    ) -> None:  # fmt: skip
        """Give `sink` also the stream that the output of `name`, one that writes to it, is added
        to."""
        self._run(weights, layer, x, None, name, sink, kept)

    def through(
        self, layer: int, weights: UnderWay, x: F32, out: F32, kept: Kept | None = None
    ) -> None:
        """out [B * T, C]: what a block makes of x; may be x itself, or what is kept."""
        self._run(weights, layer, x, out, None, _ignore, kept)

    def numpy(self, x: X) -> F32:
        found: F32 = self._backend.numpy(x)
        return found

    def _run(
        self, weights: UnderWay, layer: int, x: F32, out: F32 | None, name: str | None,
        sink: Callable[[X, Any], None], kept: Kept | None,
    ) -> None:  # fmt: skip
        tapped = _Tapped(self._engine, name, sink, kept)
        backend: Any = tapped
        block = Block(weights, backend, layer)
        cache = self._backend.cache(self._one_layer, self._rows, self.ids.shape[1])
        for tokens, span in self.steps():
            for row in range(len(span.rows)):
                cache.truncate(row, 0)
            tapped.tokens = tokens
            try:
                result = block(self._engine.there(x[tokens]), cache, span)
            except _Reached:
                continue
            assert out is not None
            out[tokens] = self.numpy(result)

    def final(self, weights: UnderWay, x: F32, sink: Sink) -> None:
        """Give `sink` what the head gets of the last block's output x."""
        norm = self._backend.norm(weights.norm("ln_f"))
        for tokens, _ in self.steps():
            sink(norm(self._engine.there(x[tokens])))

    def head(self, weights: UnderWay, matrix: Matrix | None) -> Callable[[F32], F32]:
        """What a head makes of hidden states [M, C]; None: what the last norm does."""
        norm = weights.norm("ln_f")
        if matrix is None:
            layer: Callable[[X], X] = self._backend.norm(norm)
        else:
            layer = self._backend.linear(matrix, norm=norm)
        return lambda x: self.numpy(layer(self._engine.there(x)))


def places_of(wanted: I64) -> dict[int, int]:
    """Token -> where it is among the wanted."""
    return {token: place for place, token in enumerate(wanted.tolist())}


def _ignore(x: X, add: Any) -> None:
    return None
