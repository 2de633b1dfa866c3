"""Attention with ALiBi over a cache that the kernels read as it lies.

    out[i] = sum over keys j <= position of i:  softmax_j(q_i . k_j / sqrt(D) + slope * (j - i)) v_j

The bias is slope * j in the paper; softmax does not see the shift by slope * i, and near the query
it keeps float32's full resolution. Source: ALiBi (arXiv 2108.12409).

Keys lie in blocks of 16, [S/16, D, 16]: a lane is a key, so scores need no horizontal sums. Values
lie in rows [S, D]: a lane is a component. D is padded to a multiple of 16 with zeros.

One thread does one head of one row from end to end: it stores the new keys and values, then walks
the keys in chunks of 256 at fixed positions with a running maximum (online softmax). So neither the
number of threads, nor the other rows, nor how a prompt was cut into steps changes a bit.
Bytes touched per decoded token: 2 x S x D x size of a cache element for each head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import float32, int64, njit, prange, types, void
from numba.core import cgutils
from numba.extending import intrinsic, overload

from bloomq.backends.numba_cpu.jit import compiled
from bloomq.backends.numba_cpu.matmul import address, keep
from bloomq.backends.numba_cpu.simd import F32, I64, LANES, V16F, V16H, Vectors

CHUNK = 256  # keys between two rescalings of the running sum
# Below this many products (about 8 us of one thread, what waking the others costs) one thread
# works.
_SERIAL_WORK = 1 << 17
QUERIES = 4  # queries that share each loaded key and value in prefill


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What the attention kernels are specialised for, as text for Numba's literals."""

    dtype: str  # of the cache: f32 or f16
    width: int  # head_dim rounded up to a multiple of 16
    tier: str
    queries: int = 1

    def __str__(self) -> str:
        return f"{self.dtype}/{self.width}/{self.tier}/{self.queries}"

    @classmethod
    def parse(cls, text: str) -> AttentionSpec:
        dtype, width, tier, queries = text.split("/")
        return cls(dtype, int(width), tier, int(queries))

    @property
    def size(self) -> int:
        """Bytes of a cache element."""
        return 4 if self.dtype == "f32" else 2


def _emitter(emit: Any, spec: Any, arguments: tuple[Any, ...]) -> Any:
    parsed = AttentionSpec.parse(spec.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit(Vectors(builder, parsed.tier), parsed, *args[1:])
        return context.get_dummy_value()

    return types.void(spec, *(types.int64 for _ in arguments)), codegen


@intrinsic(prefer_literal=True)
def store_key(typingctx: Any, spec: Any, source: Any, lane: Any) -> Any:
    """One key, float32 [width] at `source`, into a block of 16 keys; `lane` is the address of its
    first component there."""
    return _emitter(_emit_store_key, spec, (source, lane))


def _emit_store_key(v: Vectors, spec: AttentionSpec, source: ir.Value, lane: ir.Value) -> None:
    for d in range(0, spec.width, LANES):
        values = v.load(v.at(source, 4 * d), V16F)
        if spec.dtype == "f16":
            values = v.b.fptrunc(values, V16H)
        for i in range(LANES):
            element = v.b.extract_element(values, ir.Constant(ir.IntType(32), i))
            v.store(element, v.at(lane, (d + i) * LANES * spec.size))


@intrinsic(prefer_literal=True)
def store_value(typingctx: Any, spec: Any, source: Any, target: Any) -> Any:
    """One value vector, float32 [width] at `source`, into its row of the cache."""
    return _emitter(_emit_store_value, spec, (source, target))


def _emit_store_value(v: Vectors, spec: AttentionSpec, source: ir.Value, target: ir.Value) -> None:
    for d in range(0, spec.width, LANES):
        values = v.load(v.at(source, 4 * d), V16F)
        if spec.dtype == "f16":
            values = v.b.fptrunc(values, V16H)
        v.store(values, v.at(target, d * spec.size))


@intrinsic(prefer_literal=True)
def score_keys(typingctx: Any, spec: Any, q: Any, keys: Any, blocks: Any, scores: Any) -> Any:
    """scores [queries, CHUNK] = q [queries, width] . keys, for `blocks` blocks of 16 keys."""
    return _emitter(_emit_score_keys, spec, (q, keys, blocks, scores))


def _emit_score_keys(
    v: Vectors, spec: AttentionSpec, q: ir.Value, keys: ir.Value, blocks: ir.Value, scores: ir.Value
) -> None:
    b = v.b
    with cgutils.for_range(b, blocks, intp=I64) as loop:
        block = v.at(keys, b.mul(loop.index, I64(spec.width * LANES * spec.size)))
        sums = [v.constant(V16F, 0.0) for _ in range(spec.queries)]
        for d in range(spec.width):
            key = v.load_float(v.at(block, d * LANES * spec.size), spec.dtype)
            for i in range(spec.queries):
                x = v.broadcast(v.at(q, 4 * (i * spec.width + d)), F32)
                sums[i] = v.fma(key, x, sums[i])
        at = v.at(scores, b.mul(loop.index, I64(4 * LANES)))
        for i, total in enumerate(sums):
            v.store(total, v.at(at, 4 * CHUNK * i))


@intrinsic(prefer_literal=True)
def exp_less(typingctx: Any, spec: Any, x: Any, blocks: Any, peak: Any) -> Any:
    """x = exp(x - peak) in place over `blocks` blocks of 16; `peak` is an address."""
    return _emitter(_emit_exp_less, spec, (x, blocks, peak))


def _emit_exp_less(
    v: Vectors, spec: AttentionSpec, x: ir.Value, blocks: ir.Value, peak: ir.Value
) -> None:
    shift = v.broadcast(peak, F32)
    with cgutils.for_range(v.b, blocks, intp=I64) as loop:
        at = v.at(x, v.b.mul(loop.index, I64(4 * LANES)))
        v.store(v.exp(v.b.fsub(v.load(at, V16F), shift)), at)


@intrinsic(prefer_literal=True)
def mix_values(typingctx: Any, spec: Any, weights: Any, values: Any, count: Any, out: Any) -> Any:
    """out [queries, width] += weights [queries, CHUNK] @ values [count, width]."""
    return _emitter(_emit_mix_values, spec, (weights, values, count, out))


def _emit_mix_values(
    v: Vectors, spec: AttentionSpec, weights: ir.Value, values: ir.Value, count: ir.Value,
    out: ir.Value,
) -> None:  # fmt: skip
    b = v.b
    step = 16 // spec.queries // 2 * LANES  # components in registers: at most 16 accumulators
    for first in range(0, spec.width, step):
        columns = range(first, min(first + step, spec.width), LANES)
        slots = [
            (i, d, v.at(out, 4 * (i * spec.width + d)))
            for i in range(spec.queries)
            for d in columns
        ]
        cells = [cgutils.alloca_once_value(b, v.load(at, V16F)) for _, _, at in slots]
        for cell, (_, _, at) in zip(cells, slots, strict=True):
            b.store(v.load(at, V16F), cell)
        with cgutils.for_range(b, count, intp=I64) as loop:
            row = v.at(values, b.mul(loop.index, I64(spec.width * spec.size)))
            loaded = {d: v.load_float(v.at(row, d * spec.size), spec.dtype) for d in columns}
            at_weight = v.at(weights, b.mul(loop.index, I64(4)))
            shares = [v.broadcast(v.at(at_weight, 4 * CHUNK * i), F32) for i in range(spec.queries)]
            for cell, (i, d, _) in zip(cells, slots, strict=True):
                b.store(v.fma(loaded[d], shares[i], b.load(cell, typ=V16F)), cell)
        for cell, (_, _, at) in zip(cells, slots, strict=True):
            v.store(b.load(cell, typ=V16F), at)


@njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
def _sum(x):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i]
    return total


@njit(error_model="numpy")
def _bias_and_peak(scores, visible, first, position, slope):  # type: ignore[no-untyped-def]
    """Add the ALiBi bias to the visible scores of one query; hide the rest of its last block of 16.
    Returns their maximum."""
    peak = np.float32(-np.inf)
    for j in range(visible):
        scores[j] += slope * np.float32(first + j - position)
        peak = max(peak, scores[j])
    for j in range(visible, (visible + 15) // 16 * 16):
        scores[j] = np.float32(-np.inf)
    return peak


def _attend_share(  # type: ignore[no-untyped-def]
    spec, share, shares, qkv, keys, values, row_stride, rows, starts, past, slopes, head_dim,
    capacity, out,
):  # fmt: skip
    """The heads of one thread, for all rows."""


@overload(_attend_share, prefer_literal=True)
def _build_attend_share(  # type: ignore[no-untyped-def]
    spec, share, shares, qkv, keys, values, row_stride, rows, starts, past, slopes, head_dim,
    capacity, out,
):  # fmt: skip
    base = AttentionSpec.parse(spec.literal_value)
    single, several = str(base), str(replace(base, queries=QUERIES))
    size, width = base.size, base.width

    def attend_share(  # type: ignore[no-untyped-def]
        spec, share, shares, qkv, keys, values, row_stride, rows, starts, past, slopes, head_dim,
        capacity, out,
    ):  # fmt: skip
        tasks = slopes.shape[0] * rows.shape[0]  # heads outermost: rows of any lengths balance
        norm = np.float32(1.0 / math.sqrt(head_dim))
        q = np.zeros((QUERIES, width), np.float32)
        scores = np.zeros((QUERIES, CHUNK), np.float32)
        mixed = np.zeros((QUERIES, width), np.float32)
        peaks = np.zeros(QUERIES, np.float32)
        sums = np.zeros(QUERIES, np.float32)
        one = np.zeros(width, np.float32)
        for task in range(tasks * share // shares, tasks * (share + 1) // shares):
            head, r = task // rows.shape[0], task % rows.shape[0]
            base = (rows[r] * row_stride + head * capacity * width) * size
            k_base, v_base = keys + base, values + base
            column = head * 3 * head_dim
            slope = slopes[head]
            first_token, tokens = starts[r], starts[r + 1] - starts[r]

            for t in range(tokens):
                source, position = qkv[first_token + t], past[r] + t
                one[:head_dim] = source[column + head_dim : column + 2 * head_dim]
                block = position // 16 * (16 * width) + position % 16
                store_key(single, address(one), k_base + block * size)
                one[:head_dim] = source[column + 2 * head_dim : column + 3 * head_dim]
                store_value(single, address(one), v_base + position * width * size)

            for token in range(0, tokens, QUERIES):
                count = min(QUERIES, tokens - token)
                for i in range(count):
                    for d in range(head_dim):
                        q[i, d] = qkv[first_token + token + i, column + d] * norm
                mixed[:] = np.float32(0)
                peaks[:] = np.float32(-np.inf)
                sums[:] = np.float32(0)
                end = past[r] + token + count  # keys that the last of these queries sees
                for first in range(0, end, CHUNK):
                    length = min(CHUNK, end - first)
                    blocks = (length + 15) // 16
                    chunk_keys = k_base + first * width * size
                    if count == 1:
                        score_keys(single, address(q), chunk_keys, blocks, address(scores))
                    else:
                        score_keys(several, address(q), chunk_keys, blocks, address(scores))
                    for i in range(count):
                        position = past[r] + token + i
                        visible = min(length, position + 1 - first)
                        if visible <= 0:
                            scores[i, : 16 * blocks] = np.float32(0)
                            continue
                        peak = _bias_and_peak(scores[i], visible, first, position, slope)
                        peak = max(peak, peaks[i])
                        decay = np.float32(math.exp(peaks[i] - peak))
                        peaks[i] = peak
                        seen = (visible + 15) // 16
                        exp_less(single, address(scores[i]), seen, address(peaks[i:]))
                        scores[i, 16 * seen : 16 * blocks] = np.float32(0)
                        sums[i] = sums[i] * decay + _sum(scores[i, : 16 * seen])
                        for d in range(width):
                            mixed[i, d] *= decay
                    chunk_values = v_base + first * width * size
                    if count == 1:
                        mix_values(single, address(scores), chunk_values, length, address(mixed))
                    else:
                        mix_values(several, address(scores), chunk_values, length, address(mixed))
                for i in range(count):
                    for d in range(head_dim):
                        out[first_token + token + i, head * head_dim + d] = mixed[i, d] / sums[i]
        keep(q)
        keep(scores)
        keep(mixed)
        keep(peaks)
        keep(one)

    return attend_share


@lru_cache(maxsize=8)
def attend(dtype: str, width: int, tier: str) -> Any:
    """The compiled attention of one cache dtype and head width: see the module.

    attend(qkv [M, H * 3 * D], keys, values, row_stride, rows [R], starts [R + 1], past [R],
    slopes [H], D, capacity, out [M, H * D], threads): `keys` and `values` are addresses of a
    layer's cache; a cache row takes row_stride elements; capacity is a multiple of 16.
    """
    spec = str(AttentionSpec(dtype, width, tier))

    @compiled(
        void(
            float32[:, ::1], int64, int64, int64, int64[::1], int64[::1], int64[::1], float32[::1],
            int64, int64, float32[:, ::1], int64,
        ),
        parallel=True,
    )  # fmt: skip
    def attend(  # type: ignore[no-untyped-def]
        qkv, keys, values, row_stride, rows, starts, past, slopes, head_dim, capacity, out, threads
    ):
        work = 0  # keys times queries times components, over all heads
        for r in range(rows.shape[0]):
            tokens = starts[r + 1] - starts[r]
            work += tokens * (past[r] + tokens) * width * slopes.shape[0]
        if work < _SERIAL_WORK or threads == 1:
            _attend_share(
                spec, 0, 1, qkv, keys, values, row_stride, rows, starts, past, slopes, head_dim,
                capacity, out,
            )  # fmt: skip
        else:
            for share in prange(threads):
                _attend_share(
                    spec, share, threads, qkv, keys, values, row_stride, rows, starts, past,
                    slopes, head_dim, capacity, out,
                )  # fmt: skip

    return attend
