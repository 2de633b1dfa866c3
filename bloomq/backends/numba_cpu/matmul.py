"""Matrix products on weight tiles: y[m, n] = sum over k of x[m, k] * W[n, k].

One micro-kernel, a generator of LLVM IR for one scheme, group size, tier and number of tokens: one
or two tiles (16 rows each) against a block of tokens, straight from the packed codes. Prompts run
through it block by block: their codes are unpacked anew for each, which costs less than writing and
reading what was unpacked (docs/experiments.md).

Integer schemes sum int8 products exactly in int32 within a group, join those of an activation's
limbs there, and fold groups in order with one fused multiply-add, y = fma(float(sum), weight scale
* activation scale, y). The float schemes do the same with a float32 partial sum per group. So an
element of y has the same bits whichever kernel, batch or thread computed it.

All end in one epilogue, y = gelu(product + bias + delta) + add, which writes whole lanes: rows of y
are padded to pairs of tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import llvmlite.ir as ir
from numba.core import cgutils
from numba.extending import intrinsic

from bloomq.backends.numba_cpu.processor import cpu_features, cpu_name
from bloomq.backends.numba_cpu.simd import (
    F32,
    I32,
    I64,
    LANES,
    LIMB,
    V16F,
    V16H,
    V16I,
    V64B,
    Vectors,
    emitter,
)
from bloomq.grids import GRIDS
from bloomq.schemes import NF4_INT8_CODEBOOK

# Codes and scales are asked for so far ahead: some 100 ns at full bandwidth. Of two tiles that lie
# side by side the first would run into the second, so where a pair leaves the level-2 cache room,
# the same place of the next pair is asked for. Long streams are fetched unasked by `_STREAMING`
# processors: there asking costs more than it gains (docs/experiments.md).
_AHEAD_BYTES, _SCALES_AHEAD_BYTES = 4096, 1024
_PAIR_BYTES = 64 << 10
_STREAMING = ("znver3", "znver4")  # the former measured by AVX2 code on the latter
_STEP = 16  # columns of an iteration


@dataclass(frozen=True, slots=True)
class Spec:
    """What a micro-kernel is specialised for; spelled as text, Numba can treat it as a literal."""

    scheme: str
    group: int
    tier: str
    tokens: int = 1
    limbs: int = 1  # int8 numbers that make an activation: see `prologue`

    def __str__(self) -> str:
        return f"{self.scheme}/{self.group}/{self.tier}/{self.tokens}/{self.limbs}"

    @classmethod
    def parse(cls, text: str) -> Spec:
        scheme, group, tier, tokens, limbs = text.split("/")
        return cls(scheme, int(group), tier, int(tokens), int(limbs))

    @property
    def rows(self) -> int:
        """Rows of int8 that are multiplied: a token's limbs lie side by side."""
        return self.tokens * self.limbs

    @property
    def streams(self) -> bool:
        """Does reading the codes take the time, not the products?"""
        return self.rows <= 2

    @property
    def tiles(self) -> int:
        """Tiles of a call, which share each activation loaded. Where the products take the time
        two, if 32 registers of 16 lanes hold their sums. Where reading does two of 4-bit codes, far
        apart, each in a stream of its own; wider codes come as fast in one (docs/experiments.md).
        """
        if self.streams:
            return 2 if self.bytes_per_k4 == 32 and not self.is_float else 1
        return 2 if self.tier == "avx512-vnni" else 1

    @property
    def far(self) -> bool:
        """Is a call's second tile one of the matrix's other half, not the next?"""
        return self.streams and self.tiles == 2

    @property
    def signed(self) -> bool:
        """Are the weight bytes signed (int8, and nf4's code book), or a grid's numbers from 0?"""
        return self.scheme not in GRIDS

    @property
    def is_float(self) -> bool:
        return self.scheme in ("f32", "f16", "bf16")

    @property
    def bytes_per_k4(self) -> int:
        """Code bytes of 16 rows x 4 columns."""
        return {"int8": 64, "int6": 48}.get(self.scheme, 32)


def token_blocks(tier: str, limbs: int = 1) -> tuple[int, ...]:
    """The numbers of tokens that micro-kernels are made for, ascending: their sums fill half of the
    tier's registers."""
    rows = (1, 4, 8) if tier == "avx512-vnni" else (1, 4)
    return tuple(max(1, n // limbs) for n in rows)


def weight_offset(scheme: str, tier: str) -> int:
    """What a weight byte is too large by, as the dot product sees it: the driver takes
    offset * sum(activations of the group) off again."""
    if scheme in GRIDS:
        return -GRIDS[scheme].lowest
    return 128 if tier in ("avx512-vnni", "avx-vnni") else 0


@intrinsic(prefer_literal=True)
def multiply_tiles(
    typingctx: Any, spec: Any, codes: Any, tile_codes: Any, scales: Any, tile_scales: Any,
    acts: Any, act_scales: Any, act_sums: Any, groups: Any, totals: Any,
) -> Any:  # fmt: skip
    """totals [tokens, tiles, 16] float32 += the products of `spec.tiles` tiles with `spec.tokens`
    rows of activations, over `groups` groups of columns.

    A tile's codes and scales lie tile_codes and tile_scales bytes after the last one's. acts: int8
    [K/4, tokens, limbs, 4] (float schemes: float32 [K, tokens]): as rows they would lie a multiple
    of 4 KB apart, in one set of the cache. act_scales float32 and act_sums int32 [groups, tokens].
    All after `spec` are addresses or sizes, int64.
    """
    rest = (codes, tile_codes, scales, tile_scales, acts, act_scales, act_sums, groups, totals)
    return emitter(_emit_product, Spec.parse, spec, rest)


def _emit_product(
    v: Vectors, spec: Spec, codes: ir.Value, tile_codes: ir.Value, scales: ir.Value,
    tile_scales: ir.Value, acts: ir.Value, act_scales: ir.Value, act_sums: ir.Value,
    groups: ir.Value, totals: ir.Value,
) -> None:  # fmt: skip
    """The int32 sums live in registers through a group; the totals are touched once a group."""
    b, tokens = v.b, spec.tokens
    tiles = [v.at(codes, b.mul(I64(i), tile_codes)) for i in range(spec.tiles)]
    tile_scale = [v.at(scales, b.mul(I64(i), tile_scales)) for i in range(spec.tiles)]
    slots = [v.at(totals, 4 * LANES * i) for i in range(spec.tiles * tokens)]
    ahead, scales_ahead = _distances(v, spec, tile_codes, tile_scales)
    with cgutils.for_range(b, groups, intp=I64) as loop:
        g = loop.index
        if spec.is_float:
            parts = _group_float(v, spec, tiles, acts, g)
            for slot, part in zip(slots, parts, strict=True):
                v.store(b.fadd(v.load(slot, V16F), part), slot)
        else:
            meta = b.mul(g, I64(4 * tokens))
            start = [v.constant(V16I, 0)] * spec.rows
            for t in range(tokens):  # in the last limb, whose unit the joined sum has
                at = v.at(v.at(act_sums, meta), 4 * t)
                start[(t + 1) * spec.limbs - 1] = v.broadcast(at, I32)
            sums = _group_int(v, spec, tiles, acts, g, [s for s in start for _ in tiles], ahead)
            sums = _joined(v, spec, sums)
            weight_scales = [_load_scales(v, spec, at, g, scales_ahead) for at in tile_scale]
            _fold(v, sums, weight_scales, v.at(act_scales, meta), slots)


def _distances(
    v: Vectors, spec: Spec, tile_codes: ir.Value, tile_scales: ir.Value
) -> tuple[ir.Value | None, ir.Value | None]:
    """How far ahead codes and scales are asked for, in bytes; None: not at all."""
    b = v.b
    if spec.far or spec.tiles == 1:
        streaming = cpu_name() in _STREAMING
        return (None, None) if streaming else (I64(_AHEAD_BYTES), I64(_SCALES_AHEAD_BYTES))
    pair, scales_pair = b.mul(I64(2), tile_codes), b.mul(I64(2), tile_scales)
    near = b.icmp_signed("<=", pair, I64(_PAIR_BYTES))
    ahead = b.select(near, pair, I64(_AHEAD_BYTES))
    return ahead, b.select(near, scales_pair, I64(_SCALES_AHEAD_BYTES))


def _joined(v: Vectors, spec: Spec, sums: list[ir.Value]) -> list[ir.Value]:
    """[tokens][limbs][tiles] -> [tokens][tiles]: LIMB times each, and the next. In int8's groups of
    128 columns at most 254 x 127 x 127 x 128, a quarter of what int32 holds."""
    found, count = [], spec.tiles * spec.limbs
    for i in range(0, len(sums), count):
        for tile in range(i, i + spec.tiles):
            total = sums[tile]
            for limb in range(1, spec.limbs):
                total = v.b.mul(total, v.constant(V16I, LIMB))
                total = v.b.add(total, sums[tile + limb * spec.tiles])
            found.append(total)
    return found


def _fold(
    v: Vectors, sums: list[ir.Value], weight_scales: list[ir.Value], act_scales: ir.Value,
    totals: list[ir.Value],
) -> None:  # fmt: skip
    """totals = fma(float(sum), weight scale * activation scale, totals), [tokens][tiles][16]."""
    b = v.b
    for i, (slot, part) in enumerate(zip(totals, sums, strict=True)):
        t, tile = divmod(i, len(weight_scales))
        scale = b.fmul(weight_scales[tile], v.broadcast(v.at(act_scales, 4 * t), F32))
        v.store(v.fma(b.sitofp(part, V16F), scale, v.load(slot, V16F)), slot)


@intrinsic(prefer_literal=True)
def finish_tiles(
    typingctx: Any, spec: Any, totals: Any, bias: Any, delta: Any, gelu: Any, add: Any, y: Any,
    stride: Any, tile_rows: Any,
) -> Any:  # fmt: skip
    """y [tokens, 16 of each tile] = gelu(totals + bias + delta) + add.

    bias: address of the first tile's (0: none); gelu: 0 or 1; delta, add: address of the first
    token's (0: none); y: address of the first output; stride: of y, delta and add, in bytes;
    tile_rows: how far a tile's bias, delta, add and y lie after the last one's, in bytes.
    """
    rest = (totals, bias, delta, gelu, add, y, stride, tile_rows)
    return emitter(_emit_finish, Spec.parse, spec, rest)


def _emit_finish(
    v: Vectors, spec: Spec, totals: ir.Value, bias: ir.Value, delta: ir.Value, gelu: ir.Value,
    add: ir.Value, y: ir.Value, stride: ir.Value, tile_rows: ir.Value,
) -> None:  # fmt: skip
    b = v.b
    with cgutils.for_range(b, I64(spec.tokens), intp=I64) as loop:  # a loop, since gelu is long
        row = b.mul(loop.index, stride)
        source = v.at(totals, b.mul(loop.index, I64(4 * LANES * spec.tiles)))
        for tile in range(spec.tiles):
            at = b.mul(I64(tile), tile_rows)
            slot = v.at(source, 4 * LANES * tile)

            def plus(first: ir.Value, offset: ir.Value, slot: ir.Value = slot) -> None:
                with b.if_then(b.icmp_signed("!=", first, I64(0))):
                    other = v.load(v.at(first, offset), V16F)
                    v.store(b.fadd(v.load(slot, V16F), other), slot)

            plus(bias, at)
            plus(delta, b.add(row, at))
            with b.if_then(b.icmp_signed("!=", gelu, I64(0))):
                v.store(v.gelu(v.load(slot, V16F)), slot)
            plus(add, b.add(row, at))
            v.store(v.load(slot, V16F), v.at(v.at(y, row), at))


def _load_scales(
    v: Vectors, spec: Spec, scales: ir.Value, g: ir.Value, ahead: ir.Value | None
) -> ir.Value:
    """The 16 rows' scales of group g: one per row for int8, float16 per group for the others."""
    if spec.scheme == "int8":
        return v.load(scales, V16F)
    at = v.at(scales, v.b.mul(g, I64(2 * LANES)))
    if ahead is not None:
        v.prefetch(v.at(at, ahead))
    scale = v.b.fpext(v.load(at, V16H), V16F)
    # The integer code book is 127 times the real one.
    return v.b.fmul(scale, v.constant(V16F, 1 / 127)) if spec.scheme == "nf4" else scale


def _weight_bytes(
    v: Vectors, spec: Spec, codes: ir.Value, ahead: ir.Value | None
) -> list[ir.Value]:
    """The codes of 16 columns as four prepared vectors of 16 rows x 4 columns."""
    loaded = []
    for at in range(0, _STEP // 4 * spec.bytes_per_k4, 64):
        if ahead is not None:
            v.prefetch(v.at(v.at(codes, ahead), at))
        loaded.append(v.load(v.at(codes, at), V64B))
    if spec.scheme == "int8":
        return [v.prepare(part, signed=True) for part in loaded]
    book = _book(v, spec)
    if book and spec.streams and v.tier == "avx512-vnni" and "avx512vbmi" in cpu_features():
        return [half for part in loaded for half in v.listed_nibbles(part, book)]
    nibbles = [half for part in loaded[:2] for half in v.nibbles(part)]
    if spec.scheme == "int6":
        return [v.b.or_(low, v.high_pair(loaded[2], i)) for i, low in enumerate(nibbles)]
    return [v.listed(n, book) for n in nibbles] if book else nibbles


def _book(v: Vectors, spec: Spec) -> list[int] | None:
    """The prepared byte of each 4-bit code; None: the code itself."""
    if spec.scheme == "nf4":
        return [entry + v.offset(signed=True) for entry in NF4_INT8_CODEBOOK]
    grid = GRIDS.get(spec.scheme)
    return None if grid is None or grid.is_uniform else [n - grid.lowest for n in grid.book]


def _accumulate(
    v: Vectors, start: list[ir.Value], steps: int, body: Callable[[ir.Value, list[ir.Value]], None]
) -> list[ir.Value]:
    """Run `body(step, sums)` `steps` times over sums that live in registers; `body` replaces
    them.
    """
    b = v.b
    cells = [cgutils.alloca_once(b, value.type) for value in start]
    for cell, value in zip(cells, start, strict=True):
        b.store(value, cell)
    with cgutils.for_range(b, I64(steps), intp=I64) as loop:
        sums = [
            b.load(cell, typ=cell_value.type) for cell, cell_value in zip(cells, start, strict=True)
        ]
        body(loop.index, sums)
        for cell, value in zip(cells, sums, strict=True):
            b.store(value, cell)
    return [b.load(cell, typ=value.type) for cell, value in zip(cells, start, strict=True)]


def _group_int(
    v: Vectors, spec: Spec, tiles: list[ir.Value], acts: ir.Value, g: ir.Value,
    start: list[ir.Value], ahead: ir.Value | None,
) -> list[ir.Value]:  # fmt: skip
    """int32 sums [rows][tiles][16 rows] over one group, 16 columns to an iteration: with 32 of
    them LLVM loads ahead of the accumulators, and spills."""
    k_base = v.b.mul(g, I64(spec.group))
    # One sum would be one chain of dot products, each some 4 cycles behind the last: so two.
    chains = 2 if len(start) == 1 else 1

    def body(step: ir.Value, sums: list[ir.Value]) -> None:
        k = v.at(k_base, v.b.mul(step, I64(_STEP)))
        offset = v.b.udiv(v.b.mul(k, I64(spec.bytes_per_k4)), I64(4))
        block = v.at(acts, v.b.mul(k, I64(spec.rows)))
        unpacked = zip(
            *(_weight_bytes(v, spec, v.at(at, offset), ahead) for at in tiles), strict=True
        )
        for four_columns, weights in enumerate(unpacked):  # of each tile
            chain = four_columns % chains
            for t in range(spec.rows):
                four = v.broadcast4(v.at(block, 4 * t))
                for tile, bytes_ in enumerate(weights):
                    i = (chain * spec.rows + t) * spec.tiles + tile
                    sums[i] = v.dot4(sums[i], bytes_, four, spec.signed)
            block = v.at(block, 4 * spec.rows)

    zeros = [v.constant(V16I, 0)] * len(start) * (chains - 1)
    sums = _accumulate(v, start + zeros, spec.group // _STEP, body)
    count = len(start)
    return [reduce(v.b.add, sums[i::count]) for i in range(count)]


def _group_float(
    v: Vectors, spec: Spec, tiles: list[ir.Value], acts: ir.Value, g: ir.Value
) -> list[ir.Value]:
    """float32 sums [rows][tiles][16 rows] over the columns of one group, 8 to an iteration."""
    column_bytes = LANES * (4 if spec.scheme == "f32" else 2)
    k_base, columns = v.b.mul(g, I64(spec.group)), 8

    def body(step: ir.Value, sums: list[ir.Value]) -> None:
        k = v.at(k_base, v.b.mul(step, I64(columns)))
        source = [v.at(tile, v.b.mul(k, I64(column_bytes))) for tile in tiles]
        block = v.at(acts, v.b.mul(k, I64(4 * spec.rows)))
        for column in range(columns):
            weights = [v.load_float(v.at(at, column * column_bytes), spec.scheme) for at in source]
            for t in range(spec.rows):
                x = v.broadcast(v.at(block, 4 * (spec.rows * column + t)), F32)
                for tile, values in enumerate(weights):
                    i = spec.tiles * t + tile
                    sums[i] = v.fma(values, x, sums[i])

    zero = v.constant(V16F, 0.0)
    return _accumulate(v, [zero] * (spec.tiles * spec.rows), spec.group // columns, body)
