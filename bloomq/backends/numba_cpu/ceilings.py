"""What this machine can do at best: how fast threads read memory, and multiply bytes.

Measured with the same vectors and threads as the layers, so that a layer's figure over these is the
share of the machine that it uses.
"""

from __future__ import annotations

from functools import lru_cache
from time import perf_counter
from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bloomq.backends.numba_cpu.jit import kernel
from bloomq.backends.numba_cpu.memory import fields
from bloomq.backends.numba_cpu.program import Program
from bloomq.backends.numba_cpu.simd import I64, LANES, V16I, V64B, Vectors
from bloomq.backends.numba_cpu.threads import Pool

_STREAMS = 4  # more reads are under way at once than a single one asks for
_UNIT_BYTES = 1 << 20
_READ_BYTES = 1 << 28  # far more than the caches hold
_DOT_ROUNDS = 20_000


def _sums(tier: str) -> int:
    """Independent sums that fill half of the tier's registers, as in the products."""
    return 16 if tier == "avx512-vnni" else 4


@intrinsic(prefer_literal=True)
def _read(typingctx: Any, tier: Any, source: Any, out: Any) -> Any:
    """Read `_UNIT_BYTES` at an address; the sum [16] goes to `out`, lest LLVM leave it out."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v, b = Vectors(builder, tier.literal_value), builder
        cells = [cgutils.alloca_once_value(b, v.constant(V16I, 0)) for _ in range(_STREAMS)]
        steps = _UNIT_BYTES // _STREAMS // 64
        with cgutils.for_range(b, I64(steps), intp=I64) as loop:
            for i, cell in enumerate(cells):
                at = v.at(v.at(args[1], i * steps * 64), b.mul(loop.index, I64(64)))
                b.store(b.add(b.load(cell, typ=V16I), v.load(at, V16I)), cell)
        for i, cell in enumerate(cells):
            v.store(b.load(cell, typ=V16I), v.at(args[2], 64 * i))
        return context.get_dummy_value()

    return types.void(tier, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def _dot(typingctx: Any, tier: Any, rounds: Any, seed: Any) -> Any:
    """`rounds` rounds of one four-byte dot product for each sum; begins and ends in memory."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v, b = Vectors(builder, tier.literal_value), builder
        count = _sums(v.tier)
        acts = v.load(args[2], V64B)
        cells = [cgutils.alloca_once(b, V16I) for _ in range(count)]
        for i, cell in enumerate(cells):
            b.store(v.load(v.at(args[2], 64 * i), V16I), cell)
        with cgutils.for_range(b, args[1], intp=I64):
            for cell in cells:  # weights that change, or LLVM takes the product out of the loop
                total = b.load(cell, typ=V16I)
                b.store(v.dot4(total, b.bitcast(total, V64B), acts, signed=False), cell)
        for i, cell in enumerate(cells):
            v.store(b.load(cell, typ=V16I), v.at(args[2], 64 * i))
        return context.get_dummy_value()

    return types.void(tier, types.int64, types.int64), codegen


@lru_cache(maxsize=4)
def _read_units(tier: str) -> Any:
    """Units: stretches of `_UNIT_BYTES`. Arguments: memory, sums."""
    size = _UNIT_BYTES

    @kernel
    def read_units(arguments, first, last):  # type: ignore[no-untyped-def]
        memory, sums = fields(arguments, 2)
        for unit in range(first, last):
            _read(tier, memory + unit * size, sums + 1024 * unit)

    return read_units


@lru_cache(maxsize=4)
def _dot_units(tier: str) -> Any:
    """Units: `_DOT_ROUNDS` rounds. Arguments: memory."""
    rounds = _DOT_ROUNDS

    @kernel
    def dot_units(arguments, first, last):  # type: ignore[no-untyped-def]
        memory = fields(arguments, 1)[0]
        for unit in range(first, last):
            _dot(tier, rounds, memory + 1024 * unit)

    return dot_units


class Ceilings:
    """The limits of a pool of threads; each call measures anew, since machines drift."""

    def __init__(self, tier: str, pool: Pool) -> None:
        self._pool, self._tier = pool, tier
        self._memory = np.ones(_READ_BYTES // 4, np.int32)
        units, self._dots = _READ_BYTES // _UNIT_BYTES, 64 * pool.threads
        self._scratch = np.zeros(max(units, self._dots) * 1024, np.uint8)  # 1024 for each unit
        self._reading, self._multiplying = Program(), Program()
        self._reading.add(
            _read_units(tier), units, 1, self._memory.ctypes.data, self._scratch.ctypes.data,
            touched=_READ_BYTES,
        )  # fmt: skip
        self._multiplying.add(
            _dot_units(tier), self._dots, 1, self._scratch.ctypes.data, touched=_READ_BYTES
        )
        self._time(self._multiplying)

    @property
    def nbytes(self) -> int:
        """Memory held for measuring."""
        return int(self._memory.nbytes + self._scratch.nbytes)

    def read_gb_s(self) -> float:
        """Memory read, GB/s."""
        return _READ_BYTES / self._time(self._reading) / 1e9

    def dot_gmac_s(self) -> float:
        """Products of int8 and uint8 added up in int32, 10^9 a second."""
        products = self._dots * _DOT_ROUNDS * _sums(self._tier) * LANES * 4
        return products / self._time(self._multiplying) / 1e9

    def _time(self, program: Program) -> float:
        started = perf_counter()
        self._pool.run(program)
        return perf_counter() - started
