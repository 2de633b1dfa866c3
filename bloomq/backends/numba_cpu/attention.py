"""Attention with ALiBi over a cache that the kernels read as it lies.

    out[i] = sum over keys j <= position of i:  softmax_j(q_i . k_j / sqrt(D) + slope * (j - i)) v_j

The bias is slope * j in the paper; softmax does not see the shift by slope * i, and near the query
it keeps float32's full resolution. Source: ALiBi (arXiv 2108.12409).

Keys lie in blocks of 16, [S/16, D, 16]: a lane is a key, so scores need no horizontal sums. Values
lie in rows [S, D]: a lane is a component. D is padded to a multiple of 16 with zeros. An int8 cache
has a float32 scale for every key and value of every head.

Keys are walked in chunks of 256 at fixed positions, the newest first, with a running maximum
(online softmax). A weight below e^-40 of the largest seen so far counts as 0: 10^6 of them together
are 10^-12 of the result, far below float32's 6 x 10^-8. So a chunk whose keys provably all stay
below that, by |q||k| and the distance, is not read at all (the ALiBi horizon), and no bit changes.

Bytes touched per decoded token: at most 2 x S x D x size of a cache element for each head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from bloomq.backends.numba_cpu.jit import kernel
from bloomq.backends.numba_cpu.memory import address, fields, floats, keep, longs
from bloomq.backends.numba_cpu.simd import F32, I32, I64, LANES, V16B, V16F, V16H, Vectors, emitter

CHUNK = 256  # keys between two rescalings of the running sum
QUERIES = 8  # queries that share each loaded key and value in prefill
_FAINT = 40.0  # weights below e^-40 of the largest are 0


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What the attention kernels are specialised for, as text for Numba's literals."""

    dtype: str  # of the cache: f32, f16 or int8
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
        return {"f32": 4, "f16": 2, "int8": 1}[self.dtype]

    @property
    def key_blocks(self) -> int:
        """Blocks of 16 keys scored at once: with `queries`, enough sums to hide the latency of a
        fused multiply-add, few enough for 32 registers."""
        return 4 if self.queries == 1 else 2


# -- storing ---------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def store_vector(typingctx: Any, spec: Any, source: Any, target: Any, step: Any, scale: Any) -> Any:
    """One key or value, float32 [width] at `source`, into the cache, rounded half to even.

    target: of its first component, the others `step` bytes apart (a literal); scale: the address
    of its float32 scale, written for int8 alone.
    """
    parsed, apart = AttentionSpec.parse(spec.literal_value), step.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit_store(Vectors(builder, parsed.tier), parsed, args[1], args[2], apart, args[4])
        return context.get_dummy_value()

    return types.void(spec, types.int64, types.int64, step, types.int64), codegen


def _emit_store(
    v: Vectors, spec: AttentionSpec, source: ir.Value, target: ir.Value, step: int, scale: ir.Value
) -> None:
    b = v.b
    parts = [v.load(v.at(source, 4 * d), V16F) for d in range(0, spec.width, LANES)]
    if spec.dtype == "f16":
        parts = [b.fptrunc(part, V16H) for part in parts]
    elif spec.dtype == "int8":
        codes, step_size = v.to_int8(parts)
        parts = [b.trunc(code, V16B) for code in codes]
        v.store(step_size, scale)
    for i, part in enumerate(parts):
        at = v.at(target, i * LANES * step)
        if step == spec.size:  # components side by side
            v.store(part, at)
            continue
        for lane in range(LANES):
            v.store(b.extract_element(part, I32(lane)), v.at(at, lane * step))


# -- scores, softmax, mixing -----------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def score_keys(typingctx: Any, spec: Any, q: Any, keys: Any, blocks: Any, scores: Any) -> Any:
    """scores [queries, CHUNK] = q [queries, width] . keys, for `blocks` blocks of 16 keys, rounded
    up to whole steps of `spec.key_blocks`; int8 keys without their scales."""
    return emitter(_emit_score_keys, AttentionSpec.parse, spec, (q, keys, blocks, scores))


def _emit_score_keys(
    v: Vectors, spec: AttentionSpec, q: ir.Value, keys: ir.Value, blocks: ir.Value, scores: ir.Value
) -> None:
    b, count = v.b, spec.key_blocks
    block_bytes = spec.width * LANES * spec.size
    steps = b.udiv(b.add(blocks, I64(count - 1)), I64(count))
    cells = [[cgutils.alloca_once(b, V16F) for _ in range(count)] for _ in range(spec.queries)]
    with cgutils.for_range(b, steps, intp=I64) as loop:
        block = v.at(keys, b.mul(loop.index, I64(count * block_bytes)))
        for cell in (cell for row in cells for cell in row):
            b.store(v.constant(V16F, 0.0), cell)
        unroll = 4
        with cgutils.for_range(b, I64(spec.width // unroll), intp=I64) as inner:
            line = v.at(block, b.mul(inner.index, I64(unroll * LANES * spec.size)))
            part = v.at(q, b.mul(inner.index, I64(unroll * 4)))
            for d in range(unroll):
                loaded = [
                    v.load_float(v.at(line, n * block_bytes + d * LANES * spec.size), spec.dtype)
                    for n in range(count)
                ]
                for i, row in enumerate(cells):
                    x = v.broadcast(v.at(part, 4 * (i * spec.width + d)), F32)
                    for key, cell in zip(loaded, row, strict=True):
                        b.store(v.fma(key, x, b.load(cell, typ=V16F)), cell)
        at = v.at(scores, b.mul(loop.index, I64(4 * LANES * count)))
        for i, row in enumerate(cells):
            for n, cell in enumerate(row):
                v.store(b.load(cell, typ=V16F), v.at(at, 4 * (CHUNK * i + LANES * n)))


@intrinsic(prefer_literal=True)
def soften(
    typingctx: Any, spec: Any, scores: Any, visible: Any, shape: Any, key_scales: Any,
    value_scales: Any,
) -> Any:  # fmt: skip
    """One query's scores of a chunk, in place, to softmax weights relative to the running peak.

    Sees the first `visible` >= 1 keys. shape: address of float32 (slope, position of the chunk's
    first key less the query's, peak, sum, decay): peak and sum are brought up to date, decay is
    what earlier sums shrink by. int8 caches: addresses of the chunk's key and value scales, which
    are multiplied in.
    """
    return emitter(
        _emit_soften, AttentionSpec.parse, spec, (scores, visible, shape, key_scales, value_scales)
    )


def _emit_soften(
    v: Vectors, spec: AttentionSpec, scores: ir.Value, visible: ir.Value, shape: ir.Value,
    key_scales: ir.Value, value_scales: ir.Value,
) -> None:  # fmt: skip
    b = v.b
    slope, nearest = v.broadcast(shape, F32), v.load(v.at(shape, 4), F32)
    lanes = ir.Constant(V16F, [float(lane) for lane in range(LANES)])
    blocks = b.udiv(b.add(visible, I64(LANES - 1)), I64(LANES))
    seen_keys = v.splat(b.sitofp(visible, F32))  # whole numbers below 2^24 are exact
    before = v.load(v.at(shape, 8), F32)
    peak_cell = cgutils.alloca_once(b, V16F)
    b.store(v.splat(before), peak_cell)
    with cgutils.for_range(b, blocks, intp=I64) as loop:
        offset = b.mul(loop.index, I64(4 * LANES))
        score = v.load(v.at(scores, offset), V16F)
        if spec.dtype == "int8":
            score = b.fmul(score, v.load(v.at(key_scales, offset), V16F))
        key = b.fadd(lanes, v.splat(b.sitofp(b.mul(loop.index, I64(LANES)), F32)))
        score = v.fma(slope, b.fadd(key, v.splat(nearest)), score)
        hidden = b.fcmp_ordered(">=", key, seen_keys)
        score = b.select(hidden, v.constant(V16F, float("-inf")), score)
        v.store(score, v.at(scores, offset))
        peak = b.load(peak_cell, typ=V16F)  # NaN is not above, and comes out of exp below
        b.store(b.select(b.fcmp_ordered(">", score, peak), score, peak), peak_cell)
    peak = v.call("llvm.vector.reduce.fmax.v16f32", F32, [b.load(peak_cell, typ=V16F)])
    peak16 = v.splat(peak)
    decay = b.extract_element(v.exp(b.fsub(v.splat(before), peak16)), I32(0))
    total_cell = cgutils.alloca_once(b, V16F)
    b.store(v.constant(V16F, 0.0), total_cell)
    with cgutils.for_range(b, blocks, intp=I64) as loop:
        offset = b.mul(loop.index, I64(4 * LANES))
        at = v.at(scores, offset)
        weight = v.exp_from(-_FAINT, b.fsub(v.load(at, V16F), peak16))
        b.store(b.fadd(b.load(total_cell, typ=V16F), weight), total_cell)
        if spec.dtype == "int8":
            scaled = b.fmul(weight, v.load(v.at(value_scales, offset), V16F))
            none = b.fcmp_ordered("==", weight, v.constant(V16F, 0.0))
            weight = b.select(none, v.constant(V16F, 0.0), scaled)  # hidden scales may be NaN
        v.store(weight, at)
    total = b.load(total_cell, typ=V16F)
    added = v.call(
        "llvm.vector.reduce.fadd.v16f32", F32, [ir.Constant(F32, 0.0), total]
    )  # in order: no "reassoc"
    total = b.fadd(b.fmul(v.load(v.at(shape, 12), F32), decay), added)
    v.store(peak, v.at(shape, 8))
    v.store(total, v.at(shape, 12))
    v.store(decay, v.at(shape, 16))


@intrinsic(prefer_literal=True)
def mix_values(
    typingctx: Any, spec: Any, weights: Any, values: Any, count: Any, decays: Any, out: Any
) -> Any:
    """out [queries, width] = out * decays + weights [queries, CHUNK] @ values [count, width].

    decays: address of the first query's, the others a `_SHAPE` of `soften` apart."""
    return emitter(
        _emit_mix_values, AttentionSpec.parse, spec, (weights, values, count, decays, out)
    )


_SHAPE = 8  # float32 of a query's `shape` in `soften`, padded


def _emit_mix_values(
    v: Vectors, spec: AttentionSpec, weights: ir.Value, values: ir.Value, count: ir.Value,
    decays: ir.Value, out: ir.Value,
) -> None:  # fmt: skip
    b = v.b
    step = 16 // spec.queries * LANES  # components in registers: 16 sums
    for first in range(0, spec.width, step):
        columns = range(first, min(first + step, spec.width), LANES)
        slots = [
            (i, d, v.at(out, 4 * (i * spec.width + d)))
            for i in range(spec.queries)
            for d in columns
        ]
        cells = [cgutils.alloca_once(b, V16F) for _ in slots]
        for cell, (i, _, at) in zip(cells, slots, strict=True):
            decay = v.broadcast(v.at(decays, 4 * _SHAPE * i), F32)
            b.store(b.fmul(v.load(at, V16F), decay), cell)
        with cgutils.for_range(b, count, intp=I64) as loop:
            row = v.at(values, b.mul(loop.index, I64(spec.width * spec.size)))
            loaded = {d: v.load_float(v.at(row, d * spec.size), spec.dtype) for d in columns}
            at_weight = v.at(weights, b.mul(loop.index, I64(4)))
            shares = [v.broadcast(v.at(at_weight, 4 * CHUNK * i), F32) for i in range(spec.queries)]
            for cell, (i, d, _) in zip(cells, slots, strict=True):
                b.store(v.fma(loaded[d], shares[i], b.load(cell, typ=V16F)), cell)
        for cell, (_, _, at) in zip(cells, slots, strict=True):
            v.store(b.load(cell, typ=V16F), at)


# -- kernels ---------------------------------------------------------------------------------------

# Both kernels read `inputs`, which `NumbaCache.bind` writes: addresses of the cache's data, int8
# scales and key lengths; heads of a layer, capacity, heads of all layers; rows of the step, and the
# addresses of their numbers, starts and past lengths.


@njit
def _step_inputs(inputs):  # type: ignore[no-untyped-def]
    """Rows of the step, and the addresses of their numbers, starts and past lengths."""
    return fields(inputs, 10)[6:]


@njit
def _head_of_cache(inputs, layer, head, vector_bytes):  # type: ignore[no-untyped-def]
    """Where one head of one row lies (`head` counts through the rows of a layer): addresses of its
    keys, values and their scales, and its key lengths as a view."""
    data, scales, lengths, layer_heads, capacity, total, _, _, _, _ = fields(inputs, 10)
    place, chunks = layer * layer_heads + head, (capacity + CHUNK - 1) // CHUNK
    keys = data + place * capacity * vector_bytes
    key_scales = scales + 4 * place * capacity
    return (
        keys, keys + total * capacity * vector_bytes, key_scales,
        key_scales + 4 * total * capacity, floats(lengths + 4 * place * chunks, chunks),
    )  # fmt: skip


@njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
def _length(x):  # type: ignore[no-untyped-def]
    """|x|, float32."""
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    return np.float32(math.sqrt(total))


@lru_cache(maxsize=8)
def store(dtype: str, width: int, tier: str) -> Any:
    """Keys and values of a step's tokens into the cache. Units: cache rows times heads.

    Arguments: inputs, layer, qkv, stride of qkv in bytes, H, D.
    """
    spec = str(AttentionSpec(dtype, width, tier))
    size = AttentionSpec.parse(spec).size
    key_step = LANES * size

    @kernel
    def store(arguments, first, last):  # type: ignore[no-untyped-def]
        inputs, layer, qkv, stride, n_head, head_dim = fields(arguments, 6)
        n_rows, rows, starts, past = _step_inputs(inputs)
        lone = np.zeros(width, np.float32)
        for unit in range(first, last):
            r, head = unit // n_head, unit % n_head
            row = longs(rows, n_rows)[r]
            begin, end = longs(starts, n_rows + 1)[r], longs(starts, n_rows + 1)[r + 1]
            keys, values, key_scales, value_scales, longest = _head_of_cache(
                inputs, layer, row * n_head + head, width * size
            )
            for token in range(begin, end):
                position = longs(past, n_rows)[r] + token - begin
                source = qkv + token * stride + 4 * (3 * head + 1) * head_dim
                lone[:head_dim] = floats(source, head_dim)
                length = _length(lone)
                so_far = longest[position // CHUNK]  # NaN stays: a chunk with it is always read
                if position % CHUNK == 0 or not (np.isnan(so_far) or so_far > length):
                    longest[position // CHUNK] = length
                block = keys + (position // 16 * (16 * width) + position % 16) * size
                store_vector(spec, address(lone), block, key_step, key_scales + 4 * position)
                lone[:head_dim] = floats(source + 4 * head_dim, head_dim)
                at = values + position * width * size
                store_vector(spec, address(lone), at, size, value_scales + 4 * position)
        keep(lone)

    return store


@lru_cache(maxsize=16)
def attend(dtype: str, width: int, tier: str, queries: int) -> Any:
    """Attention of a step's queries over the cache, `queries` (1 or QUERIES) at a time. Units:
    blocks of queries times heads, the heads that see farthest first.

    Arguments: inputs, layer, qkv, stride of qkv in bytes, H, D, slopes, out, stride of out in
    bytes. A step has at most tokens / queries + rows blocks; the last may not exist.
    """
    spec = str(AttentionSpec(dtype, width, tier, queries))
    single = str(replace(AttentionSpec.parse(spec), queries=1))
    size = AttentionSpec.parse(spec).size

    @kernel
    def attend(arguments, first, last):  # type: ignore[no-untyped-def]
        inputs, layer, qkv, stride, n_head, head_dim, slopes, out, out_stride = fields(arguments, 9)
        n_rows, rows, starts, past = _step_inputs(inputs)
        norm = np.float32(1.0 / math.sqrt(head_dim))
        # Lengths are of unrounded keys: int8 moves each component by at most 1/254 of the largest,
        # float16 by 1/2048 of itself; 1.005 covers that and the roundings of the sums.
        slack = np.float32(1.005 + math.sqrt(width) / 254)
        q = np.zeros((queries, width), np.float32)
        scores = np.zeros((queries, CHUNK), np.float32)
        mixed = np.zeros((queries, width), np.float32)
        shape = np.zeros((queries, _SHAPE), np.float32)
        far = np.zeros(queries, np.float32)  # the largest |q||k| per unit of |k|
        for unit in range(first, last):
            block, head = unit // n_head, n_head - 1 - unit % n_head
            r = 0
            begin = longs(starts, n_rows + 1)
            while r < n_rows:  # which row's block is it?
                here = (begin[r + 1] - begin[r] + queries - 1) // queries
                if block < here:
                    break
                block -= here
                r += 1
            if r == n_rows:
                continue
            row, before = longs(rows, n_rows)[r], longs(past, n_rows)[r]
            keys, values, key_scales, value_scales, longest = _head_of_cache(
                inputs, layer, row * n_head + head, width * size
            )
            slope = floats(slopes, n_head)[head]
            token = begin[r] + block * queries
            count = min(queries, begin[r + 1] - token)
            position = before + block * queries  # of the first of these queries
            for i in range(count):
                source = floats(qkv + (token + i) * stride + 12 * head * head_dim, head_dim)
                for d in range(head_dim):
                    q[i, d] = source[d] * norm
                far[i] = _length(q[i]) * slack
            mixed[:] = np.float32(0)
            shape[:] = np.float32(0)
            shape[:, 2] = np.float32(-np.inf)
            end = position + count  # keys that the last of these queries sees
            for chunk in range((end - 1) // CHUNK, -1, -1):
                at = chunk * CHUNK
                length = min(CHUNK, end - at)
                if at + CHUNK <= position:  # all of it lies before every query
                    needed = False
                    for i in range(count):
                        gap = np.float32(position + i - at - CHUNK + 1)
                        reach = far[i] * longest[chunk] - slope * gap
                        if not reach < shape[i, 2] - np.float32(_FAINT + 1):
                            needed = True
                    if not needed:
                        continue
                score_keys(
                    spec, address(q), keys + at * width * size, (length + 15) // 16,
                    address(scores),
                )  # fmt: skip
                for i in range(queries):
                    visible = min(length, position + i + 1 - at)
                    shape[i, 0] = slope
                    shape[i, 1] = np.float32(at - position - i)
                    if i < count and visible > 0:
                        soften(
                            single, address(scores[i]), visible, address(shape[i]),
                            key_scales + 4 * at, value_scales + 4 * at,
                        )  # fmt: skip
                        scores[i, (visible + 15) // 16 * 16 : length] = np.float32(0)
                    else:
                        scores[i, :length] = np.float32(0)
                        shape[i, 4] = np.float32(1)
                mix_values(
                    spec, address(scores), values + at * width * size, length,
                    address(shape[:, 4:]), address(mixed),
                )  # fmt: skip
            for i in range(count):
                target = floats(out + (token + i) * out_stride + 4 * head * head_dim, head_dim)
                for d in range(head_dim):
                    target[d] = mixed[i, d] / shape[i, 3]
        keep(q)
        keep(scores)
        keep(mixed)
        keep(shape)

    return attend
