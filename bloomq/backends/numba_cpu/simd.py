"""Vectors in LLVM IR: what a micro-kernel is written with, for each instruction-set tier.

Everything is expressed over 16 lanes (512 bits of float32), one lane per output row of a weight
tile; LLVM splits them in two for 256-bit machines. Only three operations differ between the tiers:
the four-byte dot product, the 16-entry byte table, and how far a byte of weight may reach.

Invariant: the integer results are the same on every tier; float results differ between tiers by
rounding at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.ir as ir
from numba import types

LANES = 16
LIMB = 254  # what is left of half a code, in codes of the next limb: 127, as far as int8 reaches

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F32, F16 = ir.FloatType(), ir.HalfType()
V16F = ir.VectorType(F32, LANES)
V16H = ir.VectorType(F16, LANES)
V16I = ir.VectorType(I32, LANES)
V16S = ir.VectorType(I16, LANES)
V16B = ir.VectorType(I8, LANES)
V64B = ir.VectorType(I8, 64)

# A tier is a set of instructions, best first, with the LLVM features that it needs.
TIERS: dict[str, tuple[str, ...]] = {
    "avx512-vnni": ("avx512f", "avx512bw", "avx512vl", "avx512vnni"),
    "avx-vnni": ("avx2", "fma", "f16c", "avxvnni"),
    "avx2": ("avx2", "fma", "f16c"),
    "neon": ("neon", "dotprod"),
    "portable": (),
}


class Vectors:
    """An IR builder with the vector operations of one tier.

    `b` is the llvmlite builder; every method appends instructions and returns the value. Addresses
    are 64-bit integers.
    """

    def __init__(self, b: ir.IRBuilder, tier: str) -> None:
        self.b = b
        self.tier = tier

    # -- memory and constants ------------------------------------------------------------------

    def at(self, address: ir.Value, offset: ir.Value | int = 0) -> ir.Value:
        """The address `offset` bytes further on."""
        if isinstance(offset, int):
            offset = I64(offset)
        return self.b.add(address, offset)

    def load(self, address: ir.Value, type_: ir.Type, align: int = 1) -> ir.Value:
        return self.b.load(self.b.inttoptr(address, ir.PointerType()), align=align, typ=type_)

    def store(self, value: ir.Value, address: ir.Value, align: int = 1) -> None:
        self.b.store(value, self.b.inttoptr(address, ir.PointerType()), align=align)

    def prefetch(self, address: ir.Value) -> None:
        """Ask for the cache line at an address, which need not be there."""
        pointer = self.b.inttoptr(address, ir.PointerType())
        signature = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = self.b.module.globals.get("llvm.prefetch.p0")
        if function is None:
            function = ir.Function(self.b.module, signature, "llvm.prefetch.p0")
        self.b.call(function, [pointer, I32(0), I32(3), I32(1)])  # to read, into all levels, data

    def splat(self, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
        """A vector with the scalar in every lane."""
        vector = ir.VectorType(scalar.type, lanes)
        one = self.b.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
        zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        return self.b.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)

    def constant(self, vector: ir.VectorType, value: float) -> ir.Value:
        return ir.Constant(vector, [value] * vector.count)

    def broadcast(self, address: ir.Value, type_: ir.Type) -> ir.Value:
        """A scalar in memory, in all 16 lanes."""
        return self.splat(self.load(address, type_))

    def call(self, name: str, result: ir.Type, args: list[ir.Value]) -> ir.Value:
        signature = ir.FunctionType(result, [a.type for a in args])
        function = self.b.module.globals.get(name)
        if function is None:
            function = ir.Function(self.b.module, signature, name)
        return self.b.call(function, args)

    # -- float32 -------------------------------------------------------------------------------

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """x * y + z, rounded once (twice on the portable tier: its processor may have no such
        unit).
        """
        name = "llvm.fmuladd.v16f32" if self.tier == "portable" else "llvm.fma.v16f32"
        return self.call(name, V16F, [x, y, z])

    def load_float(self, address: ir.Value, dtype: str) -> ir.Value:
        """16 values of f32, f16, bf16 or int8 in memory, as float32."""
        if dtype == "f32":
            return self.load(address, V16F)
        if dtype == "f16":
            return self.b.fpext(self.load(address, V16H), V16F)
        if dtype == "int8":
            wide = self.b.sext(self.load(address, V16B), V16I)
            return self.b.sitofp(wide, V16F)
        wide = self.b.zext(self.load(address, V16S), V16I)  # bf16 is the high half of a float32
        return self.b.bitcast(self.b.shl(wide, self.constant(V16I, 16)), V16F)

    def exp(self, x: ir.Value) -> ir.Value:
        """e**x in 16 lanes: relative error below 2e-7; 0 under -87.3 (where float32 underflows),
        capped at e**88; exact 1 at 0; NaN stays NaN."""
        b = self.b
        above = b.fcmp_ordered(">", x, self.constant(V16F, 88.0))
        y = self._exp_in_range(b.select(above, self.constant(V16F, 88.0), x))
        below = b.fcmp_ordered("<", x, self.constant(V16F, -87.3))
        return b.select(below, _zero(V16F), y)

    def exp_from(self, least: float, x: ir.Value) -> ir.Value:
        """e**x for x <= 0, as `exp`; 0 where x is below `least` (at least -87)."""
        faint = self.b.fcmp_ordered("<", x, self.constant(V16F, least))
        return self.b.select(faint, _zero(V16F), self._exp_in_range(x))

    def _exp_in_range(self, x: ir.Value) -> ir.Value:
        """e**x for x from -87.3 to 88, NaN for NaN.

        Range reduction x = n ln 2 + r with ln 2 in two parts, then a degree-6 polynomial; n is
        rounded by adding 1.5 x 2^23, which leaves it in the sum's low bits. Source: Cephes expf.
        """
        b, rounder = self.b, self.constant(V16F, 12582912.0)
        shifted = self.fma(x, self.constant(V16F, _LOG2_E), rounder)
        n = b.fsub(shifted, rounder)
        r = self.fma(n, self.constant(V16F, -0.693359375), x)
        r = self.fma(n, self.constant(V16F, 2.12194440e-4), r)
        p = self.constant(V16F, _EXP_POLYNOMIAL[0])
        for coefficient in _EXP_POLYNOMIAL[1:]:
            p = self.fma(p, r, self.constant(V16F, coefficient))
        p = self.fma(p, b.fmul(r, r), b.fadd(r, self.constant(V16F, 1.0)))
        exponent = b.shl(b.bitcast(shifted, V16I), self.constant(V16I, 23))
        power = b.bitcast(b.add(exponent, self.constant(V16I, 127 << 23)), V16F)
        return b.fmul(p, power)

    def gelu(self, x: ir.Value) -> ir.Value:
        """BLOOM's gelu: x/2 (1 + tanh u), u = 0.79788456 x (1 + 0.044715 x^2), as x / (1 +
        e^-2u).
        """
        b = self.b
        inner = self.fma(b.fmul(self.constant(V16F, 0.044715), x), x, self.constant(V16F, 1.0))
        u2 = b.fmul(b.fmul(self.constant(V16F, -2 * 0.79788456), x), inner)
        return b.fdiv(x, b.fadd(self.constant(V16F, 1.0), self.exp(u2)))

    # -- int8 ----------------------------------------------------------------------------------

    def to_int8(
        self, parts: list[ir.Value], limbs: int = 1
    ) -> tuple[list[list[ir.Value]], ir.Value]:
        """16 floats each -> (int32 codes of each limb, the last one's scale): codes = round(x * 127
        / largest), half to even; scale = largest / 127. What is left is at most half a code: the
        next limb's codes are LIMB times that, rounded, and its scale is so much less.

        All zeros (below 1e-30, where 127 / largest would overflow): scale 0. NaN or infinity among
        them: codes 0 and scale NaN, so that whatever is computed with them says so.
        """
        b = self.b
        # The magnitudes of floats order like their bits; NaN and infinity come last.
        magnitudes = [
            b.and_(b.bitcast(part, V16I), self.constant(V16I, 0x7FFFFFFF)) for part in parts
        ]
        peak = magnitudes[0]
        for other in magnitudes[1:]:
            peak = self.call("llvm.smax.v16i32", V16I, [peak, other])
        bits = self.call("llvm.vector.reduce.smax.v16i32", I32, [peak])
        largest = b.bitcast(bits, F32)
        finite = b.icmp_signed("<", bits, I32(_INFINITY_BITS))
        zero = b.fcmp_ordered("<", largest, F32(1e-30))
        scale = b.select(zero, F32(0.0), b.fdiv(largest, F32(127.0)))
        inverse = b.fdiv(F32(127.0), largest)
        inverse = b.select(b.and_(finite, b.not_(zero)), inverse, F32(0.0))
        # Infinity * 0 is NaN.
        clean = [b.select(finite, part, self.constant(V16F, 0.0)) for part in parts]
        left = [b.fmul(part, self.splat(inverse)) for part in clean]
        found, whole = [], left
        for limb in range(limbs):
            if limb:
                pairs = zip(left, whole, strict=True)
                left = [b.fmul(b.fsub(x, q), self.constant(V16F, LIMB)) for x, q in pairs]
                scale = b.fdiv(scale, F32(LIMB))
            whole = [self.call("llvm.rint.v16f32", V16F, [part]) for part in left]
            found.append([b.fptosi(part, V16I) for part in whole])
        return found, b.select(finite, scale, F32(float("nan")))

    # -- bytes ---------------------------------------------------------------------------------

    def broadcast4(self, address: ir.Value) -> ir.Value:
        """Four int8 of activations, repeated for each of the 16 rows."""
        return self.b.bitcast(self.broadcast(address, I32), V64B)

    def nibbles(self, codes: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The low and the high nibble of 64 bytes."""
        low = self.b.and_(codes, self.constant(V64B, 15))
        halves = ir.VectorType(
            I16, 32
        )  # x86 has no byte shift: shift words, mask what crossed over
        words = self.b.lshr(self.b.bitcast(codes, halves), self.constant(halves, 4))
        return low, self.b.and_(self.b.bitcast(words, V64B), self.constant(V64B, 15))

    def high_pair(self, packed: ir.Value, i: int) -> ir.Value:
        """Bits 2 i and 2 i + 1 of 64 bytes, as bits 4 and 5."""
        halves = ir.VectorType(I16, 32)  # shifted as words: the mask drops what crossed over
        words = self.b.bitcast(packed, halves)
        if i < 2:
            words = self.b.shl(words, self.constant(halves, 4 - 2 * i))
        elif i > 2:
            words = self.b.lshr(words, self.constant(halves, 2 * i - 4))
        return self.b.and_(self.b.bitcast(words, V64B), self.constant(V64B, 0x30))

    def listed(self, index: ir.Value, book: Sequence[int]) -> ir.Value:
        """The byte of a book of 16 that each of 64 indices 0..15 stands for."""
        entries = [_int8(entry) for entry in book]
        if self.tier == "portable":
            return self._table_by_selects(index, entries)
        if self.tier == "neon":
            vector = ir.VectorType(I8, 16)
            table, name = ir.Constant(vector, entries), "llvm.aarch64.neon.tbl1.v16i8"
            return self._join(
                [self.call(name, vector, [table, part]) for part in self._split(index, 4)]
            )
        width = 64 if self.tier == "avx512-vnni" else 32
        name = {64: "llvm.x86.avx512.pshuf.b.512", 32: "llvm.x86.avx2.pshuf.b"}[width]
        vector = ir.VectorType(I8, width)
        table = ir.Constant(vector, entries * (width // 16))
        parts = [self.call(name, vector, [table, part]) for part in self._split(index, 64 // width)]
        return self._join(parts)

    def listed_nibbles(self, codes: ir.Value, book: Sequence[int]) -> tuple[ir.Value, ir.Value]:
        """`listed` of the low and of the high nibble of 64 bytes, for processors with AVX-512 VBMI:
        of an index `vpermb` takes 6 bits, so the book four times over, and nothing is masked."""
        table = ir.Constant(V64B, [_int8(entry) for entry in book] * 4)
        halves = ir.VectorType(I16, 32)
        words = self.b.lshr(self.b.bitcast(codes, halves), self.constant(halves, 4))
        name, high = "llvm.x86.avx512.permvar.qi.512", self.b.bitcast(words, V64B)
        return self.call(name, V64B, [table, codes]), self.call(name, V64B, [table, high])

    def _table_by_selects(self, index: ir.Value, entries: list[int]) -> ir.Value:
        """A 16-entry table as four levels of selects on the index's bits."""
        b, layer = self.b, [self.constant(V64B, entry) for entry in entries]
        for bit in range(4):
            mask = b.icmp_signed("!=", b.and_(index, self.constant(V64B, 1 << bit)), _zero(V64B))
            layer = [b.select(mask, layer[i + 1], layer[i]) for i in range(0, len(layer), 2)]
        return layer[0]

    def offset(self, signed: bool) -> int:
        """What `prepare` adds to every weight byte: acc = sum((w + offset) * a)."""
        return 128 if signed and self.tier in ("avx512-vnni", "avx-vnni") else 0

    def prepare(self, weights: ir.Value, signed: bool) -> ir.Value:
        """Weight bytes in the form that `dot4` takes (vpdpbusd wants them unsigned)."""
        if self.offset(signed):
            return self.b.xor(weights, self.constant(V64B, -128))
        return weights

    def dot4(self, acc: ir.Value, weights: ir.Value, acts: ir.Value, signed: bool) -> ir.Value:
        """acc[row] + sum of 4 products, exact in int32.

        weights: 64 prepared bytes (16 rows x 4 k); acts: int8, |a| <= 127.
        """
        if self.tier == "avx512-vnni":
            args = [acc, self.b.bitcast(weights, V16I), self.b.bitcast(acts, V16I)]
            return self.call("llvm.x86.avx512.vpdpbusd.512", V16I, args)
        if self.tier == "avx-vnni":
            return self._halves("llvm.x86.avx512.vpdpbusd.256", acc, weights, acts)
        if self.tier == "avx2":
            return self._dot4_avx2(acc, weights, acts, signed)
        if self.tier == "neon":
            parts = zip(*(self._split(x, 4) for x in (acc, weights, acts)), strict=True)
            name, v4i = "llvm.aarch64.neon.sdot.v4i32.v16i8", ir.VectorType(I32, 4)
            return self._join([self.call(name, v4i, list(part)) for part in parts])
        return self._dot4_portable(acc, weights, acts, signed)

    def _halves(self, name: str, acc: ir.Value, weights: ir.Value, acts: ir.Value) -> ir.Value:
        """A 256-bit three-operand instruction over both halves."""
        v8i = ir.VectorType(I32, 8)
        w, a = self.b.bitcast(weights, V16I), self.b.bitcast(acts, V16I)
        pairs = zip(self._split(acc, 2), self._split(w, 2), self._split(a, 2), strict=True)
        return self._join([self.call(name, v8i, list(args)) for args in pairs])

    def _dot4_avx2(
        self, acc: ir.Value, weights: ir.Value, acts: ir.Value, signed: bool
    ) -> ir.Value:
        """maddubs + madd. Signed weights go in as |w| with their sign moved onto the activation:
        2 x 127 x 127 = 32,258 and, of nl4's bytes from 0, 2 x 124 x 127 = 31,496 both stay below
        int16's 32,767."""
        b = self.b
        if signed:
            negative = b.icmp_signed("<", weights, _zero(V64B))
            acts = b.select(negative, b.neg(acts), acts)
            weights = b.select(negative, b.neg(weights), weights)
        v16s, v8i = ir.VectorType(I16, 16), ir.VectorType(I32, 8)
        ones = self.constant(v16s, 1)
        sums = []
        for w, a in zip(self._split(weights, 2), self._split(acts, 2), strict=True):
            pairs = self.call("llvm.x86.avx2.pmadd.ub.sw", v16s, [w, a])
            sums.append(self.call("llvm.x86.avx2.pmadd.wd", v8i, [pairs, ones]))
        return b.add(acc, self._join(sums))

    def _dot4_portable(
        self, acc: ir.Value, weights: ir.Value, acts: ir.Value, signed: bool
    ) -> ir.Value:
        """Widen, multiply, and add the four products of each row by shuffles."""
        b, wide = self.b, ir.VectorType(I32, 64)
        w = b.sext(weights, wide) if signed else b.zext(weights, wide)
        products = b.mul(w, b.sext(acts, wide))
        undefined = ir.Constant(wide, ir.Undefined)
        for k in range(4):
            index = ir.Constant(V16I, [4 * lane + k for lane in range(LANES)])
            acc = b.add(acc, b.shuffle_vector(products, undefined, index))
        return acc

    def _split(self, vector: ir.Value, parts: int) -> list[ir.Value]:
        if parts == 1:
            return [vector]
        n = vector.type.count // parts
        undefined = ir.Constant(vector.type, ir.Undefined)
        indices = [
            ir.Constant(ir.VectorType(I32, n), list(range(p * n, p * n + n))) for p in range(parts)
        ]
        return [self.b.shuffle_vector(vector, undefined, index) for index in indices]

    def _join(self, parts: list[ir.Value]) -> ir.Value:
        """The concatenation of 1, 2 or 4 vectors."""
        if len(parts) == 1:
            return parts[0]
        half = len(parts) // 2
        low, high = self._join(parts[:half]), self._join(parts[half:])
        n = 2 * low.type.count
        index = ir.Constant(ir.VectorType(I32, n), list(range(n)))
        return self.b.shuffle_vector(low, high, index)


_INFINITY_BITS = 0x7F800000
_LOG2_E = 1.44269504088896341
_EXP_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


def _int8(value: int) -> int:
    """The int8 that has the bits of this byte."""
    return (value + 128) % 256 - 128


def _zero(vector: ir.VectorType) -> ir.Value:
    return ir.Constant(vector, [0] * vector.count)


def emitter(
    emit: Callable[..., None], parse: Callable[[str], Any], spec: Any, arguments: tuple[Any, ...]
) -> Any:
    """An intrinsic's (signature, codegen) for `emit(vectors, spec, *int64 arguments)`; `spec` is a
    literal text, `parse` makes of it what `emit` takes, with a `tier`."""
    parsed = parse(spec.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit(Vectors(builder, parsed.tier), parsed, *args[1:])
        return context.get_dummy_value()

    return types.void(spec, *(types.int64 for _ in arguments)), codegen
