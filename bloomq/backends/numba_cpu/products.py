"""Float32 products of two arrays that lie with the summed index first: c += a.T @ b.

Both are copied, a chunk of rows at a time, into strips of 16 columns, which the micro-kernel then
reads one after another: 8 columns of a against 32 of b. Bytes touched: c once for every _DEPTH rows
of a and b; these once for every _TALL and _WIDE columns of the other. Threads share the work by
calling it for parts of c.

Invariant: an element of c is summed in one order, in chunks of _DEPTH at fixed places, one fused
multiply-add after another: its bits depend on its own column of a and of b alone, and on every tier
but the portable one they are the same. BLAS promises neither, and the one that comes with NumPy
takes AVX2 kernels on processors newer than itself, at half the speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import int64, types, void
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.jit import called, compiled
from bloomq.backends.numba_cpu.memory import address, floats, keep
from bloomq.backends.numba_cpu.processor import best_tier, cpu_features
from bloomq.backends.numba_cpu.simd import F32, I64, LANES, V16F, Vectors, emitter

F32Array = NDArray[np.float32]
_DEPTH = 192  # rows of a chunk: of 32 columns of b 24 KB, which stay in the level-1 cache
_TALL, _WIDE = 256, 512  # columns of a and of b, 0.6 MB, which stay in the level-2 cache
_ROWS, _COLUMNS = 8, 2  # of a tile of c: columns of a, strips of b


@dataclass(frozen=True, slots=True)
class _Spec:
    """A part of a tile whose sums fit the tier's registers."""

    tier: str

    @classmethod
    def parse(cls, text: str) -> _Spec:
        return cls(text)

    @property
    def rows(self) -> int:
        return _ROWS if self.tier == "avx512-vnni" else _ROWS // 2

    @property
    def columns(self) -> int:
        return _COLUMNS if self.tier == "avx512-vnni" else 1


@intrinsic
def _copy_strips(typingctx: Any, to: Any, source: Any, stride: Any, count: Any, strips: Any) -> Any:
    """to [strips, count, 16] = rows of 16 * strips values every `stride` bytes; all are int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v, (to, source, stride, count, strips) = Vectors(builder, "portable"), args
        with cgutils.for_range(builder, count, intp=I64) as rows:
            row = v.at(source, builder.mul(rows.index, stride))
            into = v.at(to, builder.mul(rows.index, I64(4 * LANES)))
            with cgutils.for_range(builder, strips, intp=I64) as columns:
                at = builder.mul(columns.index, I64(4 * LANES))
                value = v.load(v.at(row, at), V16F)
                v.store(value, v.at(into, builder.mul(at, count)))
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 5), codegen


@called()
def _strips(to, source, stride, count, columns, unit):  # type: ignore[no-untyped-def]
    """Columns as strips [count, 16], with zeros up to a multiple of `unit` columns."""
    whole = columns // LANES
    _copy_strips(to, source, stride, count, whole)
    for first in range(whole * LANES, (columns + unit - 1) // unit * unit, LANES):
        for r in range(count):
            into = floats(to + 4 * (first * count + LANES * r), LANES)
            into[:] = np.float32(0)
            if first < columns:
                row = floats(source + 4 * first + r * stride, columns - first)
                for lane in range(columns - first):
                    into[lane] = row[lane]


@intrinsic(prefer_literal=True)
def _tile(
    typingctx: Any, tier: Any, c: Any, c_stride: Any, a: Any, b: Any, strip: Any, depth: Any,
    negative: Any,
) -> Any:  # fmt: skip
    """c [8, 32] += (negative: -=) a.T @ b. a: address within a strip; b: two strips, `strip` bytes
    apart."""
    rest = (c, c_stride, a, b, strip, depth, negative)
    return emitter(_emit_tile, _Spec.parse, tier, rest)


def _emit_tile(
    v: Vectors, spec: _Spec, c: ir.Value, c_stride: ir.Value, a: ir.Value, b: ir.Value,
    strip: ir.Value, depth: ir.Value, negative: ir.Value,
) -> None:  # fmt: skip
    for row in range(0, _ROWS, spec.rows):
        for column in range(0, _COLUMNS, spec.columns):
            strips = [v.at(b, v.b.mul(I64(column + j), strip)) for j in range(spec.columns)]
            sums = _sums(v, spec, v.at(a, 4 * row), strips, depth)
            for i, total in enumerate(sums):
                r, j = divmod(i, spec.columns)
                at = v.at(c, v.b.mul(I64(row + r), c_stride))
                _add(v, total, v.at(at, 4 * LANES * (column + j)), negative)


def _sums(
    v: Vectors, spec: _Spec, a: ir.Value, strips: list[ir.Value], depth: ir.Value
) -> list[ir.Value]:
    """[rows][columns] sums over the chunk, in registers."""
    b = v.b
    cells = [cgutils.alloca_once(b, V16F) for _ in range(spec.rows * spec.columns)]
    for cell in cells:
        b.store(v.constant(V16F, 0.0), cell)
    with cgutils.for_range(b, depth, intp=I64) as loop:
        at = b.mul(loop.index, I64(4 * LANES))
        here = v.at(a, at)
        columns = [v.load(v.at(strip, at), V16F) for strip in strips]
        for r in range(spec.rows):
            x = v.broadcast(v.at(here, 4 * r), F32)
            for j, values in enumerate(columns):
                cell = cells[r * spec.columns + j]
                b.store(v.fma(x, values, b.load(cell, typ=V16F)), cell)
    return [b.load(cell, typ=V16F) for cell in cells]


def _add(v: Vectors, total: ir.Value, at: ir.Value, negative: ir.Value) -> None:
    b = v.b
    sign = b.icmp_signed("!=", negative, I64(0))
    total = b.select(sign, b.fneg(total), total)
    v.store(b.fadd(v.load(at, V16F), total), at)


@lru_cache(maxsize=4)
def _kernel(tier: str) -> Any:
    depth, tall, wide = _DEPTH, _TALL, _WIDE

    @compiled(void(*(int64,) * 10))
    def add_product(c, c_stride, a, a_stride, b, b_stride, m, n, k, negative):  # type: ignore[no-untyped-def]
        """c [m, n], a [k, m], b [k, n]: addresses and strides in bytes."""
        left, right = (
            np.empty(tall * depth + 16, np.float32),
            np.empty(wide * depth + 16, np.float32),
        )
        edge = np.empty((8, 32), np.float32)
        pa, pb = (address(left) + 63) // 64 * 64, (address(right) + 63) // 64 * 64
        for j0 in range(0, n, wide):
            nj = min(wide, n - j0)
            for k0 in range(0, k, depth):
                nk = min(depth, k - k0)
                _strips(pb, b + k0 * b_stride + 4 * j0, b_stride, nk, nj, 32)
                for i0 in range(0, m, tall):
                    ni = min(tall, m - i0)
                    _strips(pa, a + k0 * a_stride + 4 * i0, a_stride, nk, ni, 16)
                    for j in range(0, nj, 32):
                        for i in range(0, ni, 8):
                            at = c + (i0 + i) * c_stride + 4 * (j0 + j)
                            pi = pa + i // 16 * 64 * nk + i % 16 * 4
                            pj = pb + j // 16 * 64 * nk
                            if i + 8 <= ni and j + 32 <= nj:
                                _tile(tier, at, c_stride, pi, pj, 64 * nk, nk, negative)
                                continue
                            edge[:] = np.float32(0)
                            _tile(tier, address(edge), 128, pi, pj, 64 * nk, nk, negative)
                            for r in range(min(8, ni - i)):
                                row = floats(at + r * c_stride, nj - j)
                                for lane in range(min(32, nj - j)):
                                    row[lane] += edge[r, lane]
        keep(left)
        keep(right)
        keep(edge)

    return add_product


def add_product(
    c: F32Array, a: F32Array, b: F32Array, *, negative: bool = False, tier: str | None = None
) -> None:
    """c [M, N] += a.T @ b, or -= where `negative`; a [K, M], b [K, N]. Values of a row lie side by
    side. It holds no lock."""
    k, m, n = a.shape[0], *c.shape
    assert a.shape == (k, m) and b.shape == (k, n)
    if 0 in (k, m, n):
        return
    assert all(x.strides[1] == 4 and x.dtype == np.float32 for x in (a, b, c) if x.shape[1] > 1)
    kernel = _kernel(best_tier(cpu_features()) if tier is None else tier)
    kernel(
        c.ctypes.data, c.strides[0], a.ctypes.data, a.strides[0], b.ctypes.data, b.strides[0],
        m, n, k, negative,
    )  # fmt: skip
