"""The error-minimising scale of every group on a grid, compiled: `schemes.group_scales`, bit for
bit, at a quarter of the time that Numba's own vectorising takes.

The search over levels is written in LLVM's vectors, a lane for each of a tile's 16 rows, because
all its sums must stay in registers: two for each level, fed by one load of the weights. Every
operation is a single IEEE one, unfused, in the order of the NumPy twin; so the bits are the same on
every machine, whatever width LLVM splits the vectors into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from bloomq.grids import Grid

LANES = 16
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_V = ir.VectorType(ir.FloatType(), LANES)
_VI = ir.VectorType(_I32, LANES)
_ROUND = 12582912.0  # 1.5 x 2^23: adding and subtracting it rounds, half to even
_Step = Callable[[ir.Value, Sequence[ir.Value]], list[ir.Value]]


def cached(function: Callable[..., Any]) -> Any:
    """Compile at the first call; keep the result where Numba finds a place to write."""
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return njit(nogil=True, error_model="numpy")(function)


def book_of(grid: Grid) -> NDArray[np.float32]:
    """The grid's numbers, as compiled loops take them; of every whole number from one to another,
    the two."""
    return np.array((grid.lowest, grid.highest) if grid.is_uniform else grid.book, np.float32)


@cached
def load_group(w, tile, first, block):  # type: ignore[no-untyped-def]
    """16 rows x one group of columns, transposed into block [group, 16]."""
    for lane in range(16):
        for k in range(block.shape[0]):
            block[k, lane] = w[tile * 16 + lane, first + k]


@cached
def group_scales(w, group, levels, book, scales):  # type: ignore[no-untyped-def]
    """scales [N/16, K/G, 16] = the best scale of each group of w [N, K]. levels: the
    grid's, book: `book_of` it, both tuples of float32."""
    block = np.empty((group, 16), np.float32)
    for tile in range(scales.shape[0]):
        for g in range(scales.shape[1]):
            load_group(w, tile, g * group, block)
            _best_scale(block, levels, book, scales[tile, g])


@intrinsic  # type: ignore[untyped-decorator]
def _best_scale(typingctx: Any, block: Any, levels: Any, book: Any, best: Any) -> Any:
    """best [16] = of each lane of block [G, 16], the scale among those of `levels` that leaves the
    least squared error."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, b, args[0])
        group = cgutils.unpack_tuple(b, array.shape)[0]
        out = context.make_array(signature.args[3])(context, b, args[3]).data
        levels, book = (
            [_splat(b, number) for number in cgutils.unpack_tuple(b, numbers)]
            for numbers in args[1:3]
        )
        scale = _Search(b, b.ptrtoint(array.data, _I64), group).best(levels, book)
        b.store(scale, b.inttoptr(b.ptrtoint(out, _I64), ir.PointerType()), align=4)
        return context.get_dummy_value()

    return types.void(block, levels, book, best), codegen


class _Search:
    """Emits the search for the scales of one group, whose rows of 16 lie from `start`."""

    def __init__(self, b: Any, start: ir.Value, group: ir.Value) -> None:
        self.b, self.start, self.group = b, start, group

    def best(self, levels: Sequence[ir.Value], book: Sequence[ir.Value]) -> ir.Value:
        b = self.b
        (peak,) = self._over_group([_all(0)], self._larger)
        inverse = b.fdiv(_all(1), peak)
        overflow = b.fcmp_ordered("==", self._magnitude(inverse), _all(float("inf")))
        inverse = b.select(overflow, _all(0), inverse)  # as schemes.reciprocal: 0 for 0
        factors = [b.fmul(level, inverse) for level in levels]
        nearest = self._nearest_of(book)

        def add(value: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
            found = []
            for i, factor in enumerate(factors):
                q = nearest(b.fmul(value, factor))
                found.append(b.fadd(sums[2 * i], b.fmul(value, q)))
                found.append(b.fadd(sums[2 * i + 1], b.fmul(q, q)))
            return found

        sums = self._over_group([_all(0)] * (2 * len(levels)), add)
        gain, best = _all(-1), _all(0)
        for wq, qq in zip(sums[::2], sums[1::2], strict=True):
            scale = b.fdiv(wq, b.select(b.fcmp_ordered(">", qq, _all(0)), qq, _all(1)))
            this = b.fmul(wq, scale)  # squared error = sum(w^2) - this
            better = b.fcmp_ordered(">", this, gain)
            best, gain = b.select(better, scale, best), b.select(better, this, gain)
        return best

    def _nearest_of(self, book: Sequence[ir.Value]) -> Callable[[ir.Value], ir.Value]:
        """`Grid.nearest`."""
        b = self.b

        def whole(x: ir.Value) -> ir.Value:
            q = b.fsub(b.fadd(x, _all(_ROUND)), _all(_ROUND))
            q = b.select(b.fcmp_ordered(">", book[0], q), book[0], q)
            return b.select(b.fcmp_ordered("<", book[-1], q), book[-1], q)

        pairs = list(pairwise(book))
        midpoints = [b.fmul(b.fadd(low, high), _all(0.5)) for low, high in pairs]
        steps = [b.fsub(high, low) for low, high in pairs]

        def listed(x: ir.Value) -> ir.Value:  # whole numbers, so that the sum is exact
            q = book[0]
            for midpoint, step in zip(midpoints, steps, strict=True):
                above = b.fcmp_ordered(">", x, midpoint)
                q = b.fadd(q, b.select(above, step, _all(0)))
            return q

        return whole if len(book) == 2 else listed

    def _larger(self, value: ir.Value, state: Sequence[ir.Value]) -> list[ir.Value]:
        """The value of larger magnitude, signed; the first of equals."""
        larger = self.b.fcmp_ordered(">", self._magnitude(value), self._magnitude(state[0]))
        return [self.b.select(larger, value, state[0])]

    def _magnitude(self, value: ir.Value) -> ir.Value:
        bits = self.b.and_(self.b.bitcast(value, _VI), ir.Constant(_VI, [0x7FFFFFFF] * LANES))
        return self.b.bitcast(bits, _V)

    def _over_group(self, initial: Sequence[ir.Value], step: _Step) -> list[ir.Value]:
        """The state after a loop over the group's rows."""
        b = self.b
        before = b.block
        body, after = b.append_basic_block("rows"), b.append_basic_block("rows.done")
        b.branch(body)
        b.position_at_end(body)
        k = b.phi(_I64)
        state = [b.phi(_V) for _ in initial]
        at = b.inttoptr(b.add(self.start, b.mul(k, _I64(4 * LANES))), ir.PointerType())
        found = step(b.load(at, typ=_V, align=4), state)
        following = b.add(k, _I64(1))
        for phi, first, later in zip(
            [k, *state], [_I64(0), *initial], [following, *found], strict=True
        ):
            phi.add_incoming(first, before)
            phi.add_incoming(later, body)
        b.cbranch(b.icmp_signed("<", following, self.group), body, after)
        b.position_at_end(after)
        return found


def _all(value: float) -> ir.Value:
    return ir.Constant(_V, [float(value)] * LANES)


def _splat(b: Any, scalar: ir.Value) -> ir.Value:
    """A vector with the scalar in every lane."""
    undefined = ir.Constant(_V, ir.Undefined)
    one = b.insert_element(undefined, scalar, _I32(0))
    return b.shuffle_vector(one, undefined, ir.Constant(_VI, [0] * LANES))
