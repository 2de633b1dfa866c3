"""Matrix products on weight tiles: y[m, n] = sum over k of x[m, k] * W[n, k].

Two micro-kernels, each a generator of LLVM IR for one scheme, group size, tier and number of
tokens:

- `gemv_tile`: one tile (16 rows) against 1, 4 or 8 tokens, straight from the packed codes. Decode.
  Reads each weight byte once: bytes touched = the tile's codes and scales.
- `gemm_panel`: 32 rows that `unpack_tile` spread out into bytes, against 8 tokens. Prefill: the
  panel (32 x K bytes, in the level-2 cache) is unpacked once and used for all tokens.

Integer schemes sum int8 products exactly in int32 within a group and fold groups in order with one
fused multiply-add, y = fma(float(sum), weight scale * activation scale, y). The float schemes do
the same with a float32 partial sum per group. So an element of y has the same bits whichever
kernel, batch or thread computed it.

Both end in the same epilogue, y = gelu(product + bias) + add, and write whole lanes: rows of y are
padded to pairs of tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bloomq.backends.numba_cpu.simd import F32, I32, I64, LANES, V16F, V16H, V64B, Vectors

_PANEL_K4_BYTES = 128  # a panel's bytes for 4 columns: 2 tiles x 16 rows x 4
_PANEL_K4 = 2  # columns / 4 of a loop step: more, and LLVM spills what it loads early
PANEL_TOKENS = 8  # tokens of a gemm_panel call: 8 x 2 int32 accumulators of 32 registers


@dataclass(frozen=True, slots=True)
class Spec:
    """What a micro-kernel is specialised for; spelled as text, Numba can treat it as a literal."""

    scheme: str
    group: int
    tier: str
    tokens: int = 1

    def __str__(self) -> str:
        return f"{self.scheme}/{self.group}/{self.tier}/{self.tokens}"

    @classmethod
    def parse(cls, text: str) -> Spec:
        scheme, group, tier, tokens = text.split("/")
        return cls(scheme, int(group), tier, int(tokens))

    @property
    def signed(self) -> bool:
        """Are the weight bytes signed (int8, and nf4's code book), or nibbles 0..15?"""
        return self.scheme != "int4"

    @property
    def is_float(self) -> bool:
        return self.scheme in ("f32", "f16", "bf16")

    @property
    def bytes_per_k4(self) -> int:
        """Code bytes of 16 rows x 4 columns."""
        return 64 if self.scheme == "int8" else 32


def weight_offset(scheme: str, tier: str) -> int:
    """What a weight byte is too large by, as the dot product sees it: the driver takes
    offset * sum(activations of the group) off again."""
    if scheme == "int4":
        return 8
    return 128 if tier in ("avx512-vnni", "avx-vnni") else 0


def _emitter(emit: Any, spec: Any, arguments: tuple[Any, ...], end: Any = None) -> Any:
    """An intrinsic's (signature, codegen) for `emit(vectors, spec, *int64 arguments[, end])`."""
    parsed = Spec.parse(spec.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit(Vectors(builder, parsed.tier), parsed, *args[1:])
        return context.get_dummy_value()

    tail = () if end is None else (types.UniTuple(types.int64, 5),)
    return types.void(spec, *(types.int64 for _ in arguments), *tail), codegen


@intrinsic(prefer_literal=True)
def gemv_tile(
    typingctx: Any, spec: Any, codes: Any, scales: Any, acts: Any, act_stride: Any,
    act_scales: Any, act_sums: Any, groups: Any, end: Any,
) -> Any:  # fmt: skip
    """y [tokens, 16] = the products of one tile with `tokens` rows of activations, finished.

    acts: int8 [tokens, act_stride] (float schemes: float32, stride in bytes); act_scales float32
    and act_sums int32 [tokens, groups]; end: (bias, gelu, add, y, stride of y in bytes), see
    `_emit_end`. All others after `spec` are addresses or sizes, int64.
    """
    rest = (codes, scales, acts, act_stride, act_scales, act_sums, groups)
    return _emitter(_emit_gemv, spec, rest, end)


def _emit_gemv(
    v: Vectors, spec: Spec, codes: ir.Value, scales: ir.Value, acts: ir.Value,
    act_stride: ir.Value, act_scales: ir.Value, act_sums: ir.Value, groups: ir.Value,
    end: ir.Value,
) -> None:  # fmt: skip
    b = v.b
    zero = v.constant(V16F, 0.0)
    totals = [cgutils.alloca_once_value(b, zero) for _ in range(spec.tokens)]
    for total in totals:  # the slots are the caller's frame's: used again by the next tile
        b.store(zero, total)
    rows = [v.at(acts, b.mul(I64(t), act_stride)) for t in range(spec.tokens)]
    meta = [b.mul(b.mul(I64(t), groups), I64(4)) for t in range(spec.tokens)]
    with cgutils.for_range(b, groups, intp=I64) as loop:
        g = loop.index
        if spec.is_float:
            sums = _group_float(v, spec, codes, rows, g)
            for total, part in zip(totals, sums, strict=True):
                b.store(b.fadd(b.load(total, typ=V16F), part), total)
        else:
            at = [v.at(offset, b.mul(g, I64(4))) for offset in meta]
            start = [v.broadcast(v.at(act_sums, o), I32) for o in at]
            sums = _group_int(v, spec, codes, rows, g, start)
            weight_scale = _load_scales(v, spec, scales, g)
            for total, part, o in zip(totals, sums, at, strict=True):
                scale = b.fmul(weight_scale, v.broadcast(v.at(act_scales, o), F32))
                b.store(v.fma(b.sitofp(part, V16F), scale, b.load(total, typ=V16F)), total)
    scratch = _scratch(v, spec.tokens)
    for t, total in enumerate(totals):
        v.store(b.load(total, typ=V16F), v.at(scratch, 4 * LANES * t))
    _emit_end(v, scratch, spec.tokens, 1, end)


def _scratch(v: Vectors, vectors: int) -> ir.Value:
    """The address of memory for so many vectors in the caller's frame. By address, so that LLVM
    leaves it there instead of taking registers from the accumulators."""
    memory = cgutils.alloca_once(v.b, ir.ArrayType(V16F, vectors))
    return v.b.ptrtoint(memory, I64)


def _emit_end(v: Vectors, totals: ir.Value, tokens: int, tiles: int, end: ir.Value) -> None:
    """y = gelu(totals + bias) + add, for totals [tokens][tiles][16] at an address.

    end: bias (address of the tile's, 0: none), gelu (0 or 1), add (address of the tile's first
    residual, 0: none), y (address of the tile's first output), stride of y and add in bytes.
    """
    b = v.b
    bias, gelu, add, y, stride = (b.extract_value(end, i) for i in range(5))
    with cgutils.for_range(b, I64(tokens), intp=I64) as loop:  # a loop, since gelu is long
        row = b.mul(loop.index, stride)
        source = v.at(totals, b.mul(loop.index, I64(4 * LANES * tiles)))
        for tile in range(tiles):
            at = 4 * LANES * tile
            slot = v.at(source, at)
            with b.if_then(b.icmp_signed("!=", bias, I64(0))):
                v.store(b.fadd(v.load(slot, V16F), v.load(v.at(bias, at), V16F)), slot)
            with b.if_then(b.icmp_signed("!=", gelu, I64(0))):
                v.store(v.gelu(v.load(slot, V16F)), slot)
            with b.if_then(b.icmp_signed("!=", add, I64(0))):
                residual = v.load(v.at(v.at(add, row), at), V16F)
                v.store(b.fadd(v.load(slot, V16F), residual), slot)
            v.store(v.load(slot, V16F), v.at(v.at(y, row), at))


def _load_scales(v: Vectors, spec: Spec, scales: ir.Value, g: ir.Value) -> ir.Value:
    """The 16 rows' scales of group g: one per row for int8, float16 per group for int4 and nf4."""
    if spec.scheme == "int8":
        return v.load(scales, V16F)
    half = v.load(v.at(scales, v.b.mul(g, I64(2 * LANES))), V16H)
    scale = v.b.fpext(half, V16F)
    # The integer code book is 127 times the real one.
    return v.b.fmul(scale, v.constant(V16F, 1 / 127)) if spec.scheme == "nf4" else scale


def _weight_bytes(v: Vectors, spec: Spec, codes: ir.Value) -> list[ir.Value]:
    """64 code bytes as prepared vectors of 16 rows x 4 columns: one (int8) or two (nibbles)."""
    loaded = v.load(codes, V64B)
    if spec.scheme == "int8":
        return [v.prepare(loaded, signed=True)]
    nibbles = v.nibbles(loaded)
    return [v.nf4_bytes(n) for n in nibbles] if spec.scheme == "nf4" else list(nibbles)


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
    v: Vectors, spec: Spec, codes: ir.Value, rows: list[ir.Value], g: ir.Value,
    start: list[ir.Value],
) -> list[ir.Value]:  # fmt: skip
    """int32 sums [tokens][16 rows] over one group, 32 columns to an iteration."""
    k_base = v.b.mul(g, I64(spec.group))
    step_bytes = 8 * spec.bytes_per_k4

    def body(step: ir.Value, sums: list[ir.Value]) -> None:
        k32 = v.at(k_base, v.b.mul(step, I64(32)))
        source = v.at(codes, v.b.mul(k32, I64(step_bytes // 32)))
        at = [v.at(row, k32) for row in rows]
        k = 0
        for chunk in range(0, step_bytes, 64):
            for weights in _weight_bytes(v, spec, v.at(source, chunk)):
                for t, row in enumerate(at):
                    acts = v.broadcast4(v.at(row, k))
                    sums[t] = v.dot4(sums[t], weights, acts, spec.signed)
                k += 4

    return _accumulate(v, start, spec.group // 32, body)


def _group_float(
    v: Vectors, spec: Spec, values: ir.Value, rows: list[ir.Value], g: ir.Value
) -> list[ir.Value]:
    """float32 sums [tokens][16 rows] over the columns of one group, 16 columns to an iteration."""
    column_bytes = LANES * (4 if spec.scheme == "f32" else 2)
    k_base = v.b.mul(g, I64(spec.group))

    def body(step: ir.Value, sums: list[ir.Value]) -> None:
        k16 = v.at(k_base, v.b.mul(step, I64(16)))
        source = v.at(values, v.b.mul(k16, I64(column_bytes)))
        at = [v.at(row, v.b.mul(k16, I64(4))) for row in rows]
        for k in range(16):
            weights = v.load_float(v.at(source, k * column_bytes), spec.scheme)
            for t, row in enumerate(at):
                sums[t] = v.fma(weights, v.broadcast(v.at(row, 4 * k), F32), sums[t])

    return _accumulate(v, [v.constant(V16F, 0.0) for _ in rows], spec.group // 16, body)


@intrinsic(prefer_literal=True)
def unpack_tile(
    typingctx: Any, spec: Any, codes: Any, scales: Any, groups: Any, panel: Any,
    panel_scales: Any,
) -> Any:  # fmt: skip
    """Spread one tile of a pair into its half of a panel.

    panel: prepared bytes [K/4, 2, 16, 4]; panel_scales: float32 [groups, 2, 16]; both addresses
    already point at this tile's half.
    """
    return _emitter(_emit_unpack, spec, (codes, scales, groups, panel, panel_scales))


def _emit_unpack(
    v: Vectors, spec: Spec, codes: ir.Value, scales: ir.Value, groups: ir.Value,
    panel: ir.Value, panel_scales: ir.Value,
) -> None:  # fmt: skip
    b = v.b
    group_bytes = spec.group // 4 * spec.bytes_per_k4
    with cgutils.for_range(b, groups, intp=I64) as loop:
        g = loop.index
        source = v.at(codes, b.mul(g, I64(group_bytes)))
        target = v.at(panel, b.mul(g, I64(spec.group // 4 * _PANEL_K4_BYTES)))
        for chunk in range(0, group_bytes, 64):
            for weights in _weight_bytes(v, spec, v.at(source, chunk)):
                v.store(weights, target)
                target = v.at(target, _PANEL_K4_BYTES)
        scale = _load_scales(v, spec, scales, g)
        v.store(scale, v.at(panel_scales, b.mul(g, I64(2 * 4 * LANES))))


@intrinsic(prefer_literal=True)
def gemm_panel(
    typingctx: Any, spec: Any, panel: Any, panel_scales: Any, acts: Any, act_scales: Any,
    act_sums: Any, groups: Any, end: Any,
) -> Any:  # fmt: skip
    """y [8, 32] = the products of a panel's 32 rows with a block of 8 tokens, finished.

    acts: int8 [K/4, 8, 4]: as rows they would lie a multiple of 4 KB apart, in one set of the
    cache; act_scales float32 and act_sums int32 [8, groups]; end: as in `gemv_tile`.
    """
    rest = (panel, panel_scales, acts, act_scales, act_sums, groups)
    return _emitter(_emit_gemm, spec, rest, end)


def _emit_gemm(
    v: Vectors, spec: Spec, panel: ir.Value, panel_scales: ir.Value, acts: ir.Value,
    act_scales: ir.Value, act_sums: ir.Value, groups: ir.Value, end: ir.Value,
) -> None:  # fmt: skip
    """16 int32 accumulators live in registers through a group; the float32 totals, in memory, are
    touched once a group."""
    b = v.b
    meta = [b.mul(b.mul(I64(t), groups), I64(4)) for t in range(PANEL_TOKENS)]
    scratch = _scratch(v, 2 * PANEL_TOKENS)
    slots = [v.at(scratch, 4 * LANES * i) for i in range(2 * PANEL_TOKENS)]
    for slot in slots:
        v.store(v.constant(V16F, 0.0), slot)
    with cgutils.for_range(b, groups, intp=I64) as loop:
        g = loop.index
        at = [v.at(offset, b.mul(g, I64(4))) for offset in meta]
        start = [v.broadcast(v.at(act_sums, o), I32) for o in at]
        sums = _group_panel(v, spec, panel, acts, g, start)
        scales_at = v.at(panel_scales, b.mul(g, I64(2 * 4 * LANES)))
        weight_scales = [v.load(v.at(scales_at, 4 * LANES * half), V16F) for half in range(2)]
        act_scale = [v.broadcast(v.at(act_scales, o), F32) for o in at]
        for i, slot in enumerate(slots):  # token i // 2, tile i % 2
            scale = b.fmul(weight_scales[i % 2], act_scale[i // 2])
            v.store(v.fma(b.sitofp(sums[i], V16F), scale, v.load(slot, V16F)), slot)
    _emit_end(v, scratch, PANEL_TOKENS, 2, end)


def _group_panel(
    v: Vectors, spec: Spec, panel: ir.Value, acts: ir.Value, g: ir.Value, start: list[ir.Value]
) -> list[ir.Value]:
    """int32 sums [8 tokens x 2 halves][16 rows] over one group, in steps of _PANEL_K4 x 4
    columns.
    """
    k_base = v.b.mul(g, I64(spec.group))

    def body(step: ir.Value, sums: list[ir.Value]) -> None:
        k = v.at(k_base, v.b.mul(step, I64(4 * _PANEL_K4)))
        source = v.at(panel, v.b.mul(k, I64(_PANEL_K4_BYTES // 4)))
        block = v.at(acts, v.b.mul(k, I64(PANEL_TOKENS)))
        for k4 in range(_PANEL_K4):
            here = v.at(source, _PANEL_K4_BYTES * k4)
            weights = [v.load(v.at(here, 64 * half), V64B) for half in range(2)]
            for t in range(PANEL_TOKENS):
                four = v.broadcast4(v.at(block, 4 * (PANEL_TOKENS * k4 + t)))
                for half in range(2):
                    i = 2 * t + half
                    sums[i] = v.dot4(sums[i], weights[half], four, spec.signed)

    steps = spec.group // (4 * _PANEL_K4)
    return _accumulate(v, [s for s in start for _ in range(2)], steps, body)
