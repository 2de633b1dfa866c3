"""The Numba backend: BLOOM's layers on the CPU, bound to mapped weights.

A layer called with the buffers of a program appends itself to it; called with NumPy arrays it runs
at once, as a program of its own. Kernels are compiled (or taken from the cache) when a layer is
built, never on a call. Weights are passed to them as addresses; each layer holds its arrays so that
the addresses stay good.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.attention import QUERIES, attend, store
from bloomq.backends.numba_cpu.cache import BOUND, NumbaCache
from bloomq.backends.numba_cpu.ceilings import Ceilings
from bloomq.backends.numba_cpu.embedding import look_up, take_rows
from bloomq.backends.numba_cpu.linear import Product
from bloomq.backends.numba_cpu.pages import padded_head
from bloomq.backends.numba_cpu.processor import best_tier, cpu_features
from bloomq.backends.numba_cpu.program import Buffer, Input, Program
from bloomq.backends.numba_cpu.prologue import gate_rows, norm_rows
from bloomq.backends.numba_cpu.recorded import Recorded, Recording
from bloomq.backends.numba_cpu.row_questions import RowQuestions
from bloomq.backends.numba_cpu.surveyed import LogitRows, Survey
from bloomq.backends.numba_cpu.threads import Pool, physical_cores
from bloomq.config import BloomConfig
from bloomq.errors import UsageError
from bloomq.layers import (
    STEP_TOKENS,
    SURVEYED_ROWS,
    Activation,
    CacheDtype,
    Span,
    Step,
    Top,
    slopes,
)
from bloomq.levels import Levels, Sums
from bloomq.weights import Matrix, Norm

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

# A program's inputs: what `NumbaCache.bind` writes, then the addresses of ids and of the index of
# wanted rows.
_IDS, _WANTED, _INPUTS = BOUND, BOUND + 1, BOUND + 2
_ATTENTION_CHUNKS = 64  # of a step: enough to share evenly, each worth its scratch memory
_Shape = tuple[tuple[int, ...], int, int]  # of ids or hidden states; rows and results
Given = Input | Buffer


class NumbaBackend:
    """`Backend` for CPUs. `threads` None: one for each physical core this process may use.

    Raises: UsageError for an impossible number of threads.
    """

    name = "numba"
    step_tokens = STEP_TOKENS

    def __init__(self, threads: int | None = None, cache_dtype: CacheDtype = "f16") -> None:
        most = os.cpu_count() or 1
        self.threads = physical_cores() if threads is None else threads
        whole = isinstance(self.threads, int) and not isinstance(self.threads, bool)
        if not whole or not 1 <= self.threads <= most:
            raise UsageError(f"threads is {threads!r}, expected 1 to {most} (this machine's cores)")
        self.tier = best_tier(cpu_features())
        self.cache_dtype: CacheDtype = cache_dtype
        self.pool = Pool(self.threads)
        self._rows = RowQuestions(self.pool, self.tier)
        take_rows()
        norm_rows()
        gate_rows()

    @property
    def description(self) -> str:
        count = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.tier}, {count}, {self.cache_dtype} cache"

    @property
    def arithmetic(self) -> str:
        return f"numba: {self.tier}, {self.cache_dtype} cache"

    def embedding(self, table: Matrix) -> NumbaEmbedding:
        return NumbaEmbedding(self.pool, table)

    def norm(self, norm: Norm) -> NumbaNorm:
        return NumbaNorm(self.pool, norm)

    def linear(
        self,
        weight: Matrix,
        bias: F32 | None = None,
        *,
        norm: Norm | None = None,
        act: Activation | None = None,
        limbs: int = 1,
    ) -> NumbaLinear:
        return NumbaLinear(self.pool, self.tier, weight, bias, norm, act, limbs)

    def attention(
        self, layer: int, n_head: int, head_dim: int, *, slope: F32 | None = None
    ) -> NumbaAttention:
        return NumbaAttention(
            self.pool, self.tier, self.cache_dtype, layer, n_head, head_dim, slope
        )

    def cache(self, config: BloomConfig, batch: int, capacity: int, ranks: int = 0) -> NumbaCache:
        return NumbaCache(config, batch, capacity, self.cache_dtype, ranks)

    def gate(self, x: Any, cache: NumbaCache, span: Span) -> Any:
        if isinstance(x, Buffer):
            out = x.program.buffer(x.rows, x.columns, np.float32)
            x.program.add(
                gate_rows(), len(span.rows), 1, x.program.inputs.ctypes.data, x.address,
                x.stride_bytes, x.columns, out.address, out.stride_bytes,
            )  # fmt: skip
            return out
        program = Program(_INPUTS)
        cache.bind(program, span)
        return _run_alone(self.pool, self.gate(_held(program, x), cache, span))

    def ceilings(self) -> Ceilings:
        """What the machine can do at best with these threads and instructions."""
        return Ceilings(self.tier, self.pool)

    def compile(self, step: Step) -> Step:
        return _Replay(self.pool, step)

    def take(self, x: Any, index: Any) -> Any:
        if isinstance(x, LogitRows):
            return x.take(index)
        if not isinstance(x, Buffer):
            return x[index]
        out = x.program.buffer(index.rows, x.columns, np.float32)
        x.program.add(
            take_rows(), index.rows, 8, x.program.inputs.ctypes.data, index.at, x.address,
            x.stride_bytes, x.columns, out.address, out.stride_bytes,
        )  # fmt: skip
        return out

    def survey(self, logits: Any) -> Any:
        if len(logits) > SURVEYED_ROWS:
            return logits
        if isinstance(logits, Buffer):
            return Survey(self.tier, logits)
        return self._rows.survey(self.tier, logits)

    def top(self, logits: F32 | LogitRows, k: int) -> Top:
        return self._rows.top(self.tier, logits, k)

    def best(self, logits: F32 | LogitRows, k: int) -> tuple[I64, F32]:
        return self._rows.best(self.tier, logits, k)

    def masked(self, logits: F32 | LogitRows, allowed: NDArray[np.bool_]) -> F32:
        return self._rows.masked(self.numpy(logits), allowed)

    def sums(self, logits: F32 | LogitRows, temperature: float = 1.0) -> Sums:
        return self._rows.sums(self.tier, logits, temperature)

    def levels(self, logits: F32 | LogitRows, temperature: float = 1.0) -> Levels:
        return self._rows.levels(self.tier, logits, temperature)

    def numpy(self, x: F32 | LogitRows) -> F32:
        return x.values if isinstance(x, LogitRows) else x


class _Replay:
    """A step recorded once for every number of tokens, rows and wanted results, then replayed."""

    def __init__(self, pool: Pool, step: Step) -> None:
        self._pool, self._step = pool, step
        self._recorded = Recorded()

    def __call__(
        self, ids: NDArray[Any], cache: NumbaCache, span: Span, wanted: I64
    ) -> F32 | LogitRows:
        shape = (ids.shape, len(span.rows), len(wanted))
        recording = self._recorded.take(shape, lambda: self._record(shape, cache, span))
        program, given = recording.program, recording.given
        values = given.values if isinstance(given, Input) else given.values()
        values[:] = ids
        recording.wanted.values[:] = wanted
        cache.bind(program, span)
        self._pool.run(program)
        program.held = None
        result = recording.result
        mine = result.values().copy() if isinstance(result, Buffer) else result.rows()
        self._recorded.put_back(shape, recording)
        return mine

    def _record(self, shape: _Shape, cache: NumbaCache, span: Span) -> Recording:
        program = Program(_INPUTS)
        (tokens, *columns), _, results = shape
        given: Given = Input(program, tokens, _IDS)
        if columns:
            given = program.buffer(tokens, columns[0], np.float32)
        wanted = Input(program, results, _WANTED)
        return Recording(program, given, wanted, self._step(given, cache, span, wanted))


def _held(program: Program, array: F32) -> Buffer:
    """A buffer of the program that holds an array."""
    rows, columns = array.shape
    buffer = program.buffer(rows, columns, np.float32)
    buffer.values()[:] = array
    return buffer


def _run_alone(pool: Pool, out: Buffer) -> F32:
    """The values of a buffer, by running its program now."""
    pool.run(out.program)
    return np.array(out.values())


class NumbaLinear:
    """y = act(norm(x) @ W.T + bias + delta) + add over one mapped matrix."""

    def __init__(
        self,
        pool: Pool,
        tier: str,
        weight: Matrix,
        bias: F32 | None,
        norm: Norm | None,
        act: Activation | None,
        limbs: int = 1,
    ) -> None:
        scheme = weight.scheme
        stored_n, stored_k = scheme.padded(weight.shape)
        parts = list(weight.parts.values())  # codes and scales, or values alone
        vectors = [None if bias is None else _padded(bias, stored_n)]
        vectors += [None, None] if norm is None else [_padded(v) for v in (norm.gain, norm.bias)]
        self._pool, self._alive = pool, (parts, vectors)  # what the addresses below point into
        bias_at, gain_at, shift_at = (0 if v is None else v.ctypes.data for v in vectors)
        self._product = Product(
            scheme=scheme, tier=tier, n=weight.shape[0], k=stored_k,
            codes=parts[0].ctypes.data, scales=parts[-1].ctypes.data, nbytes=weight.nbytes,
            bias=bias_at, gelu=int(act == "gelu"), gain=gain_at, shift=shift_at,
            epsilon=0.0 if norm is None else norm.epsilon, limbs=1 if scheme.is_float else limbs,
        )  # fmt: skip
        self._product.compile()

    def __call__(self, x: Any, add: Any = None, delta: Any = None) -> Any:
        if isinstance(x, Buffer):
            x.program.keep(self._alive)
            return self._product.record(x, add, delta)
        program = Program()
        given = [None if array is None else _held(program, array) for array in (x, add, delta)]
        return _run_alone(self._pool, self(*given))


class NumbaEmbedding:
    """Rows of a table."""

    def __init__(self, pool: Pool, table: Matrix) -> None:
        self._pool, self._columns = pool, table.shape[1]
        self._stored_k = table.scheme.padded(table.shape)[1]
        self._parts = list(table.parts.values())
        self._look_up = look_up(table.scheme.name, table.scheme.group_size)

    def __call__(self, ids: Any) -> Any:
        if isinstance(ids, Input):
            program = ids.program
            out = program.buffer(ids.rows, self._columns, np.float32)
            program.keep(self._parts)
            program.add(
                self._look_up, ids.rows, 1, program.inputs.ctypes.data, ids.at,
                self._parts[0].ctypes.data, self._parts[-1].ctypes.data, self._stored_k,
                self._columns, out.address, out.stride_bytes,
            )  # fmt: skip
            return out
        given = Input(Program(1), len(ids), 0)
        given.values[:] = ids
        return _run_alone(self._pool, self(given))


class NumbaNorm:
    """A layer norm on its own."""

    def __init__(self, pool: Pool, norm: Norm) -> None:
        self._pool, self._epsilon = pool, norm.epsilon
        self._gain, self._shift = _padded(norm.gain), _padded(norm.bias)

    def __call__(self, x: Any) -> Any:
        if not isinstance(x, Buffer):
            return _run_alone(self._pool, self(_held(Program(), x)))
        out = x.program.buffer(x.rows, x.columns, np.float32)
        x.program.keep(self._gain, self._shift)
        x.program.add(
            norm_rows(), x.rows, 1, x.address, x.stride_bytes, x.columns, self._gain.ctypes.data,
            self._shift.ctypes.data, self._epsilon, out.address, out.stride_bytes,
        )  # fmt: skip
        return out


class NumbaAttention:
    """ALiBi attention of one layer."""

    def __init__(
        self,
        pool: Pool,
        tier: str,
        dtype: CacheDtype,
        layer: int,
        n_head: int,
        head_dim: int,
        slope: F32 | None = None,
    ) -> None:
        self._pool, self._layer, self._head_dim = pool, layer, head_dim
        self._slopes = slopes(n_head) if slope is None else np.ascontiguousarray(slope)
        width = padded_head(head_dim)
        self._store = store(dtype, width, tier)
        self._one = attend(dtype, width, tier, 1)
        self._several = attend(dtype, width, tier, QUERIES)

    def __call__(self, qkv: Any, cache: NumbaCache, span: Span) -> Any:
        """Of the cache and the span, only the number of rows is recorded: programs bind the rest
        when they run."""
        if not isinstance(qkv, Buffer):
            program = Program(_INPUTS)
            cache.bind(program, span)
            return _run_alone(self._pool, self(_held(program, qkv), cache, span))
        program, n_head, tokens = qkv.program, len(self._slopes), qkv.rows
        c = n_head * self._head_dim
        out = program.buffer(tokens, c, np.float32)
        program.keep(self._slopes)
        shared = (
            program.inputs.ctypes.data, self._layer, qkv.address, qkv.stride_bytes, n_head,
            self._head_dim,
        )  # fmt: skip
        rows = len(span.rows)
        program.add(self._store, rows * n_head, 1, *shared)
        single = tokens == rows
        blocks = rows if single else tokens // QUERIES + rows
        program.add(
            self._one if single else self._several, blocks * n_head,
            blocks * n_head // _ATTENTION_CHUNKS, *shared,
            self._slopes.ctypes.data, out.address, out.stride_bytes,
        )  # fmt: skip
        return out


def _padded(vector: F32, length: int = 0) -> F32:
    """A private float32 copy of a vector, with zeros up to `length`."""
    out = np.zeros(max(length, len(vector)), np.float32)
    out[: len(vector)] = vector
    return out
