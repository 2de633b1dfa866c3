"""Linear layers as operations of a program: y = act(norm(x) @ W.T + bias + delta) + add.

x [M, K] -> y [M, N]: a prologue over rows (see `prologue`), then the product over tiles of W, which
ends in the epilogue. Each weight byte is read from memory once, by one thread, and each y is
reduced by one thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from bloomq.backends.numba_cpu.jit import kernel
from bloomq.backends.numba_cpu.matmul import (
    Spec,
    finish_tiles,
    multiply_tiles,
    token_blocks,
    weight_offset,
)
from bloomq.backends.numba_cpu.memory import address, fields, keep
from bloomq.backends.numba_cpu.program import Buffer
from bloomq.backends.numba_cpu.prologue import prepare, spread_rows
from bloomq.schemes import TILE, Scheme

# Weights that one thread takes at a time, at least and at most: a stream that ends costs some 1 us.
_CHUNK_BYTES = 64 << 10
_MOST_BYTES = 1 << 20
# A prompt's blocks of tokens meet so many columns at a time: 8 KB of two int4 tiles stay in the
# level-1 cache, beside 4 KB of a block's activations. A few blocks read whole rows, which streams
# from memory while it computes.
_COLUMNS = 512
_FEW_BLOCKS = 4


@lru_cache(maxsize=64)
def multiply(spec_text: str) -> Any:
    """The product of blocks of tokens with tiles of quantized weights. Units: pairs of tiles.

    Arguments: codes, scales, K, acts, act scales, act sums, bias, delta, gelu, add (0: none), y,
    stride of y, delta and add in bytes, blocks, pairs of the matrix.

    The pairs of a `far` spec are a tile of the matrix's first half and one of its second: what lies
    behind a tile is read after it, so that a thread has two streams as long as its units follow one
    another.
    """
    spec = Spec.parse(spec_text)
    text, group, k4_bytes, tokens = spec_text, spec.group, spec.bytes_per_k4, spec.tokens
    tiles, rows, row_scales, columns = spec.tiles, spec.rows, spec.scheme == "int8", _COLUMNS
    far = spec.far

    @kernel
    def multiply(arguments, first, last):  # type: ignore[no-untyped-def]
        (
            codes, scales, k, acts, act_scales, act_sums, bias, delta, gelu, add, y, stride, blocks,
            pairs,
        ) = fields(arguments, 14)  # fmt: skip
        groups, tile_codes = k // group, k // 4 * k4_bytes
        tile_scales, group_scales = (64, 0) if row_scales else (groups * 32, 32)
        part = groups if blocks <= _FEW_BLOCKS else columns // group
        size = 4 * TILE * tiles * tokens  # bytes of a block's totals
        totals = np.zeros((last - first) * blocks * 2 * TILE * tokens + TILE, np.float32)
        start = (address(totals) + 63) // 64 * 64
        begin, step, apart = (first, 1, pairs) if far else (2 * first, tiles, 1)
        end = begin + 2 * (last - first) // tiles * step
        for g in range(0, groups, part):
            count = min(part, groups - g)
            for block in range(blocks):
                meta = 4 * tokens * (block * groups + g)
                to = start + block * size
                for tile in range(begin, end, step):
                    multiply_tiles(
                        text, codes + tile * tile_codes + g * group // 4 * k4_bytes,
                        apart * tile_codes,
                        scales + tile * tile_scales + g * group_scales, apart * tile_scales,
                        acts + rows * (block * k + g * group), act_scales + meta,
                        act_sums + meta, count, to,
                    )  # fmt: skip
                    to += blocks * size
        for tile in range(begin, end, step):
            at = 64 * tile
            for block in range(blocks):
                row = at + tokens * block * stride
                finish_tiles(
                    text, start, bias + at if bias else 0, delta + row if delta else 0, gelu,
                    add + row if add else 0, y + row, stride, 64 * apart,
                )  # fmt: skip
                start += size
        keep(totals)

    return multiply


@lru_cache(maxsize=32)
def multiply_float(spec_text: str) -> Any:
    """The product of blocks of tokens with tiles of unquantized weights. Units: pairs of tiles.

    Arguments: values, K, acts (float32 [blocks, K, tokens]), bias, delta, gelu, add, y, stride
    of y, delta and add in bytes, blocks.
    """
    spec = Spec.parse(spec_text)
    group, tokens, tiles, text = spec.group, spec.tokens, spec.tiles, spec_text
    column_bytes = TILE * (4 if spec.scheme == "f32" else 2)

    @kernel
    def multiply_float(arguments, first, last):  # type: ignore[no-untyped-def]
        values, k, acts, bias, delta, gelu, add, y, stride, blocks = fields(arguments, 10)
        size = k * column_bytes
        totals = np.empty((tokens, tiles, TILE), np.float32)
        for tile in range(2 * first, 2 * last, tiles):
            at = 64 * tile
            for block in range(blocks):
                row = at + tokens * block * stride
                totals[:] = np.float32(0)
                multiply_tiles(
                    text, values + tile * size, size, 0, 0, acts + 4 * tokens * block * k, 0, 0,
                    k // group, address(totals),
                )  # fmt: skip
                finish_tiles(
                    text, address(totals), bias + at if bias else 0, delta + row if delta else 0,
                    gelu, add + row if add else 0, y + row, stride, 64,
                )  # fmt: skip
        keep(totals)

    return multiply_float


def block_of(m: int, tier: str, limbs: int = 1) -> int:
    """Tokens of a micro-kernel's block, for a step of m."""
    sizes = token_blocks(tier, limbs)
    return next((size for size in sizes if m <= size), sizes[-1])


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix as its kernels see it: kernels, sizes and addresses, chosen when it is loaded."""

    scheme: Scheme
    tier: str
    n: int
    k: int  # columns as stored
    codes: int
    scales: int
    nbytes: int
    bias: int
    gelu: int
    gain: int
    shift: int
    epsilon: float
    limbs: int  # of activations that are rounded

    def compile(self) -> None:
        """Compile every kernel that `record` may ask for, or take it from the cache."""
        spread_rows() if self.scheme.is_float else self._prepare()
        for tokens in token_blocks(self.tier, self.limbs):
            (multiply_float if self.scheme.is_float else multiply)(self._spec(tokens))

    def _spec(self, tokens: int) -> str:
        return str(Spec(self.scheme.name, self.scheme.group_size, self.tier, tokens, self.limbs))

    def _prepare(self) -> Any:
        return prepare(self.tier, self.scheme.group_size, self.limbs)

    def record(self, x: Buffer, add: Buffer | None, delta: Buffer | None) -> Buffer:
        """Append this layer to x's program; returns y."""
        y = x.program.buffer(x.rows, self.n, np.float32)
        if x.rows:
            tokens = block_of(x.rows, self.tier, self.limbs)
            added, moved = (0 if other is None else other.address for other in (add, delta))
            end = (self.bias, moved, self.gelu, added, y.address, y.stride_bytes)
            record = self._record_float if self.scheme.is_float else self._record_int
            record(x, tokens, -(-x.rows // tokens), end)
        return y

    def _record_int(self, x: Buffer, tokens: int, blocks: int, end: tuple[int, ...]) -> None:
        program, groups = x.program, self.k // self.scheme.group_size
        # Rows of a block share cache lines, so one thread does them all.
        acts = program.buffer(1, blocks * tokens * self.limbs * self.k, np.int8)
        act_scales = program.buffer(1, blocks * tokens * groups, np.float32)
        act_sums = program.buffer(1, blocks * tokens * groups, np.int32)
        to = (acts.address, act_scales.address, act_sums.address)
        program.add(
            self._prepare(), x.rows, tokens, x.address, x.stride_bytes, x.columns, self.gain,
            self.shift, self.epsilon, self.k, weight_offset(self.scheme.name, self.tier), *to,
            tokens,
        )  # fmt: skip
        program.add(
            multiply(self._spec(tokens)), self._pairs, self._pairs_of(_CHUNK_BYTES, blocks),
            self.codes, self.scales, self.k, *to, *end, blocks, self._pairs,
            most=self._pairs_of(_MOST_BYTES, blocks), touched=self.nbytes,
        )  # fmt: skip

    def _record_float(self, x: Buffer, tokens: int, blocks: int, end: tuple[int, ...]) -> None:
        program = x.program
        acts = program.buffer(1, blocks * tokens * self.k, np.float32)
        program.add(
            spread_rows(), x.rows, tokens, x.address, x.stride_bytes, x.columns, self.gain,
            self.shift, self.epsilon, self.k, acts.address, tokens,
        )  # fmt: skip
        program.add(
            multiply_float(self._spec(tokens)), self._pairs, self._pairs_of(_CHUNK_BYTES, blocks),
            self.codes, self.k, acts.address, *end, blocks,
            most=self._pairs_of(_MOST_BYTES, blocks), touched=self.nbytes,
        )  # fmt: skip

    @property
    def _pairs(self) -> int:
        return -(-self.n // (2 * TILE))

    def _pairs_of(self, nbytes: int, blocks: int) -> int:
        """Pairs of tiles of so many bytes; of several blocks of tokens one is work enough."""
        return nbytes * self._pairs // self.nbytes if blocks == 1 else 1
