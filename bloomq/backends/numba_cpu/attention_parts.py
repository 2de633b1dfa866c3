"""The micro-kernels of attention: storing a vector, scores, softmax weights, mixing of values.

Invariant: an element of a result is summed in one order, over the keys of a chunk from the first to
the last, whatever the number of queries at once and wherever the pages lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bloomq.backends.numba_cpu.program import LINE
from bloomq.backends.numba_cpu.simd import F32, I32, I64, LANES, V16B, V16F, V16H, Vectors, emitter

PAGE = 64  # tokens of a page: `layers.PAGE_TOKENS`, said here too, where a change compiles anew
CHUNK = 256  # keys between two rescalings of the running sum: whole pages
SHAPE = 8  # float32 of a query's `shape` in `soften`, padded
FAINT = 40.0  # weights below e^-40 of the largest are 0


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
        """Blocks of 16 keys scored at once, a page or a part of it: with `queries`, enough sums to
        hide the latency of a fused multiply-add, few enough for 32 registers."""
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
        (codes,), step_size = v.to_int8(parts)
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


def _in_pages(
    v: Vectors, pages: ir.Value, offset: ir.Value, index: ir.Value, per_page: int, size: int
) -> ir.Value:
    """The address of part `index` of what lies `offset` bytes into each page, in `per_page` (a
    power of two) parts of `size` bytes. pages: the address of the pages' addresses."""
    b = v.b
    number = b.lshr(index, I64(per_page.bit_length() - 1))
    page = v.load(v.at(pages, b.mul(number, I64(8))), I64)
    part = b.mul(b.and_(index, I64(per_page - 1)), I64(size))
    return v.at(v.at(page, offset), part)


@intrinsic(prefer_literal=True)
def score_keys(
    typingctx: Any, spec: Any, q: Any, pages: Any, keys: Any, blocks: Any, scores: Any
) -> Any:
    """scores [queries, CHUNK] = q [queries, width] . keys, for `blocks` blocks of 16 keys, rounded
    up to whole steps of `spec.key_blocks`; int8 keys without their scales.

    pages: the address of the addresses of a chunk's pages; keys: where in a page they lie.
    """
    return emitter(_emit_score_keys, AttentionSpec.parse, spec, (q, pages, keys, blocks, scores))


def _emit_score_keys(
    v: Vectors, spec: AttentionSpec, q: ir.Value, pages: ir.Value, keys: ir.Value,
    blocks: ir.Value, scores: ir.Value,
) -> None:  # fmt: skip
    b, count = v.b, spec.key_blocks
    block_bytes = spec.width * LANES * spec.size
    in_page, piece = PAGE // LANES // count, count * block_bytes
    steps = b.udiv(b.add(blocks, I64(count - 1)), I64(count))
    cells = [[cgutils.alloca_once(b, V16F) for _ in range(count)] for _ in range(spec.queries)]
    with cgutils.for_range(b, steps, intp=I64) as loop:
        block = _in_pages(v, pages, keys, loop.index, in_page, piece)
        # Ask for the same place in the next page; with the last keys, for the first page's values.
        coming = b.add(loop.index, I64(in_page))
        last = b.icmp_unsigned(">=", coming, steps)
        coming = b.select(last, b.and_(loop.index, I64(in_page - 1)), coming)
        ahead = _in_pages(v, pages, keys, coming, in_page, piece)
        ahead = b.select(last, v.at(ahead, PAGE * spec.width * spec.size), ahead)
        for cell in (cell for row in cells for cell in row):
            b.store(v.constant(V16F, 0.0), cell)
        unroll = 4
        with cgutils.for_range(b, I64(spec.width // unroll), intp=I64) as inner:
            offset = b.mul(inner.index, I64(unroll * LANES * spec.size))
            line = v.at(block, offset)
            for n in range(count):
                for d in range(0, unroll * LANES * spec.size, LINE):
                    v.prefetch(v.at(v.at(ahead, offset), n * block_bytes + d))
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
    typingctx: Any, spec: Any, scores: Any, visible: Any, shape: Any, pages: Any, key_scales: Any,
    value_scales: Any,
) -> Any:  # fmt: skip
    """One query's scores of a chunk, in place, to softmax weights relative to the running peak.

    Sees the first `visible` >= 1 keys. shape: address of float32 (slope, position of the chunk's
    first key less the query's, peak, sum, decay): peak and sum are brought up to date, decay is
    what earlier sums shrink by. int8 caches: where in the chunk's pages (as in `score_keys`) the
    key and value scales lie, which are multiplied in.
    """
    return emitter(
        _emit_soften, AttentionSpec.parse, spec,
        (scores, visible, shape, pages, key_scales, value_scales),
    )  # fmt: skip


def _emit_soften(
    v: Vectors, spec: AttentionSpec, scores: ir.Value, visible: ir.Value, shape: ir.Value,
    pages: ir.Value, key_scales: ir.Value, value_scales: ir.Value,
) -> None:  # fmt: skip
    b, in_page, step = v.b, PAGE // LANES, 4 * LANES
    slope, nearest = v.broadcast(shape, F32), v.load(v.at(shape, 4), F32)
    lanes = ir.Constant(V16F, [float(lane) for lane in range(LANES)])
    blocks = b.udiv(b.add(visible, I64(LANES - 1)), I64(LANES))
    seen_keys = v.splat(b.sitofp(visible, F32))  # whole numbers below 2^24 are exact
    before = v.load(v.at(shape, 8), F32)
    peak_cell = cgutils.alloca_once(b, V16F)
    b.store(v.splat(before), peak_cell)
    with cgutils.for_range(b, blocks, intp=I64) as loop:
        offset = b.mul(loop.index, I64(step))
        score = v.load(v.at(scores, offset), V16F)
        if spec.dtype == "int8":
            scale = _in_pages(v, pages, key_scales, loop.index, in_page, step)
            score = b.fmul(score, v.load(scale, V16F))
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
        offset = b.mul(loop.index, I64(step))
        at = v.at(scores, offset)
        weight = v.exp_from(-FAINT, b.fsub(v.load(at, V16F), peak16))
        b.store(b.fadd(b.load(total_cell, typ=V16F), weight), total_cell)
        if spec.dtype == "int8":
            scale = _in_pages(v, pages, value_scales, loop.index, in_page, step)
            scaled = b.fmul(weight, v.load(scale, V16F))
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
    typingctx: Any, spec: Any, weights: Any, pages: Any, values: Any, count: Any, decays: Any,
    out: Any,
) -> Any:  # fmt: skip
    """out [queries, width] = out * decays + weights [queries, CHUNK] @ values [count, width].

    pages, values: as `score_keys` finds keys; decays: address of the first query's, the others a
    `SHAPE` of `soften` apart."""
    return emitter(
        _emit_mix_values, AttentionSpec.parse, spec, (weights, pages, values, count, decays, out)
    )


def _emit_mix_values(
    v: Vectors, spec: AttentionSpec, weights: ir.Value, pages: ir.Value, values: ir.Value,
    count: ir.Value, decays: ir.Value, out: ir.Value,
) -> None:  # fmt: skip
    b = v.b
    used = b.udiv(b.add(count, I64(PAGE - 1)), I64(PAGE))  # pages
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
            decay = v.broadcast(v.at(decays, 4 * SHAPE * i), F32)
            b.store(b.fmul(v.load(at, V16F), decay), cell)
        with cgutils.for_range(b, used, intp=I64) as page:
            start = _in_pages(v, pages, values, page.index, 1, 0)
            page_weights = v.at(weights, b.mul(page.index, I64(4 * PAGE)))
            left = b.sub(count, b.mul(page.index, I64(PAGE)))
            length = b.select(b.icmp_unsigned("<", left, I64(PAGE)), left, I64(PAGE))
            coming = b.add(page.index, I64(1))
            coming = b.select(b.icmp_unsigned("<", coming, used), coming, page.index)
            ahead = _in_pages(v, pages, values, coming, 1, 0)
            with cgutils.for_range(b, length, intp=I64) as loop:
                offset = b.mul(loop.index, I64(spec.width * spec.size))
                row = v.at(start, offset)
                if first == 0:
                    for d in range(0, spec.width * spec.size, LINE):
                        v.prefetch(v.at(v.at(ahead, offset), d))
                loaded = {d: v.load_float(v.at(row, d * spec.size), spec.dtype) for d in columns}
                weight = v.at(page_weights, b.mul(loop.index, I64(4)))
                shares = [
                    v.broadcast(v.at(weight, 4 * CHUNK * i), F32) for i in range(spec.queries)
                ]
                for cell, (i, d, _) in zip(cells, slots, strict=True):
                    b.store(v.fma(loaded[d], shares[i], b.load(cell, typ=V16F)), cell)
        for cell, (_, _, at) in zip(cells, slots, strict=True):
            v.store(b.load(cell, typ=V16F), at)
