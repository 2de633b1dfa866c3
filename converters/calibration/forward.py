"""A model under conversion, run one block at a time: what each matrix is given as its input.

The block is `bloomq.model.Block` and its layers are the CPU backend's, so a text's activations are
those that the finished pack will have, rounding included. Invariant: memory is a few windows'
activations and one block's weights; the activations between blocks lie in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.layers import NumbaBackend
from bloomq.config import BloomConfig
from bloomq.errors import NumericError
from bloomq.layers import Activation, Backend, LayerNorm, Span
from bloomq.model import Block
from bloomq.schemes import bf16_to_f32, get_scheme
from bloomq.weights import Matrix, Norm

from ..quantize import all_finite
from ..source import Checkpoint, SourceTensor

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Sink = Callable[[F32], None]  # is given the inputs of a matrix, [M, K]
StreamSink = Callable[[F32, F32], None]  # and the stream that its output is added to, [M, C]
_SUMMED_ROWS = 8192  # 0.5 GB of 16,384 columns
_TRIANGLE = 1024  # columns of a second moment that are summed in one product
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

    def add_exact(self, names: list[str]) -> None:
        """Take matrices as the checkpoint has them. Raises: NumericError where one is damaged."""
        for name in names:
            tensor = self.checkpoint.tensors[f"{name}.weight"]
            scheme = get_scheme("f32")
            w = rows_of(tensor, 0, tensor.shape[0])
            shape = (w.shape[0], w.shape[1])
            self.matrices[name] = Matrix(name, scheme, shape, scheme.quantize(w))

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


class Moments:
    """Mean and second moment of rows that come a few at a time.

    Sums are taken about the first rows' mean, so that float32 holds them where a channel is large
    and nearly constant; and of many rows at once: for 16,384 columns, adding up is 1 GB each time.
    """

    def __init__(self) -> None:
        self._waiting: list[F32] = []
        self._centre: F32 | None = None
        self._total: F64 | None = None
        self._squares: F32 | None = None
        self._count = 0

    def add(self, x: F32) -> None:
        """x [M, K]."""
        self._waiting.append(x)
        if sum(map(len, self._waiting)) >= _SUMMED_ROWS:
            self._sum()

    def _sum(self) -> None:
        x = np.concatenate(self._waiting)
        self._waiting = []
        if self._centre is None:
            self._centre = x.mean(axis=0, dtype=np.float64).astype(np.float32)
        x -= self._centre
        self._count += len(x)
        if self._total is None or self._squares is None:
            self._total = np.zeros(x.shape[1])
            self._squares = np.zeros((x.shape[1], x.shape[1]), np.float32)
        self._total += x.sum(axis=0, dtype=np.float64)
        # The upper triangle alone: 11 s for 4,096 tokens of 16,384 columns, NumPy's x.T @ x 14.
        for start in range(0, x.shape[1], _TRIANGLE):
            stop = start + _TRIANGLE
            self._squares[start:stop, start:] += x[:, start:stop].T @ x[:, start:]

    def result(self, *, central: bool) -> tuple[F32, F32]:
        """(mean [K], moment [K, K]), about the mean or about 0; at most once."""
        if self._waiting:
            self._sum()
        moment, self._squares = self._squares, None
        assert self._centre is not None and self._total is not None and moment is not None
        shift = self._total / self._count
        moment /= np.float32(self._count)
        mean = (self._centre + shift).astype(np.float32)
        narrow, added = shift.astype(np.float32), mean if not central else np.zeros_like(mean)
        for start in range(0, len(moment), _TRIANGLE):
            stop = start + _TRIANGLE
            part = moment[start:stop, start:]
            part -= np.outer(narrow[start:stop], narrow[start:])
            part += np.outer(added[start:stop], added[start:])
            moment[stop:, start:stop] = moment[start:stop, stop:].T
            square = moment[start:stop, start:stop]
            square[:] = np.triu(square) + np.triu(square, 1).T
        return mean, moment


class _Reached(BaseException):
    """A block came to the matrix whose inputs were asked for."""


@dataclass(frozen=True, slots=True, eq=False)
class _Tap:
    """In place of a linear: hands its input on and ends the step."""

    norm: LayerNorm
    sink: Callable[[F32, Any], None]

    def __call__(self, x: F32, add: F32 | None = None, delta: F32 | None = None) -> F32:
        self.sink(self.norm(x), add)
        raise _Reached


class _Tapped:
    """A backend for one block, with a tap in place of the matrix `name`; cached as layer 0."""

    def __init__(
        self, inner: NumbaBackend, name: str | None, sink: Callable[[F32, Any], None]
    ) -> None:
        self._inner, self._name, self._sink = inner, name, sink

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def linear(
        self, weight: Matrix, bias: F32 | None = None, *, norm: Norm | None = None,
        act: Activation | None = None,
    ) -> Any:  # fmt: skip
        if weight.name == self._name:
            return _Tap(_unchanged if norm is None else self._inner.norm(norm), self._sink)
        return self._inner.linear(weight, bias, norm=norm, act=act) if weight.parts else None

    def attention(self, layer: int, n_head: int, head_dim: int) -> Any:
        return self._inner.attention(0, n_head, head_dim)


def _unchanged(x: F32) -> F32:
    return x


class Runner:
    """Runs windows of tokens, ids [B, T], through one layer at a time."""

    def __init__(self, ids: I64, config: BloomConfig, threads: int | None) -> None:
        self.ids = ids
        self._backend = NumbaBackend(threads, "f32")
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
            out[tokens] = norm(rows[index[tokens]])

    def inputs_of(self, name: str, layer: int, weights: UnderWay, x: F32, sink: Sink) -> None:
        """Give `sink` the inputs of matrix `name` of a block whose own input is x [B * T, C]."""
        self._run(weights, layer, x, None, name, lambda inputs, add: sink(inputs))

    def stream_at(self, name: str, layer: int, weights: UnderWay, x: F32, sink: StreamSink) -> None:
        """Give `sink` also the stream that the output of `name`, one that writes to it, is added
        to."""
        self._run(weights, layer, x, None, name, sink)

    def through(self, layer: int, weights: UnderWay, x: F32, out: F32) -> None:
        """out [B * T, C]: what a block makes of x; may be x itself."""
        self._run(weights, layer, x, out, None, _ignore)

    def _run(
        self, weights: UnderWay, layer: int, x: F32, out: F32 | None, name: str | None,
        sink: Callable[[F32, Any], None],
    ) -> None:  # fmt: skip
        tapped: Any = _Tapped(self._backend, name, sink)
        backend: Backend = tapped
        block = Block(weights, backend, layer)
        cache = self._backend.cache(self._one_layer, self._rows, self.ids.shape[1])
        for tokens, span in self.steps():
            for row in range(len(span.rows)):
                cache.truncate(row, 0)
            try:
                result = block(np.ascontiguousarray(x[tokens]), cache, span)
            except _Reached:
                continue
            assert out is not None
            out[tokens] = result

    def final(self, weights: UnderWay, x: F32, sink: Sink) -> None:
        """Give `sink` what the head gets of the last block's output x."""
        norm = self._backend.norm(weights.norm("ln_f"))
        for tokens, _ in self.steps():
            sink(norm(np.ascontiguousarray(x[tokens])))

    def logits(self, weights: UnderWay, head: Matrix | None, x: F32) -> F32:
        """What a head makes of hidden states x [M, C]; None: what the last norm does."""
        norm, x = weights.norm("ln_f"), np.ascontiguousarray(x)
        if head is None:
            return np.asarray(self._backend.norm(norm)(x))
        return np.asarray(self._backend.linear(head, norm=norm)(x))


def places_of(wanted: I64) -> dict[int, int]:
    """Token -> where it is among the wanted."""
    return {token: place for place, token in enumerate(wanted.tolist())}


def _ignore(x: F32, add: Any) -> None:
    return None
