"""Linear layers as operations of a program: y = act(norm(x) @ W.T + bias) + add.

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
from bloomq.backends.numba_cpu.matmul import Spec, multiply_tiles, token_blocks, weight_offset
from bloomq.backends.numba_cpu.memory import fields
from bloomq.backends.numba_cpu.program import Buffer
from bloomq.backends.numba_cpu.prologue import prepare, spread_rows
from bloomq.schemes import TILE, Scheme

# Weights that one thread takes at a time: long enough for the memory's streams to get going, short
# enough to share a matrix of 1 MB evenly.
_CHUNK_BYTES = 64 << 10


@lru_cache(maxsize=64)
def multiply(spec_text: str) -> Any:
    """The product of blocks of tokens with tiles of quantized weights. Units: pairs of tiles.

    Arguments: codes, scales, K, acts, act scales, act sums, bias (0: none), gelu, add (0: none), y,
    stride of y and add in bytes, blocks.
    """
    spec = Spec.parse(spec_text)
    text, group, k4_bytes, tokens = spec_text, spec.group, spec.bytes_per_k4, spec.tokens
    tiles, row_scales = spec.tiles, spec.scheme == "int8"

    @kernel
    def multiply(arguments, first, last):  # type: ignore[no-untyped-def]
        codes, scales, k, acts, act_scales, act_sums, bias, gelu, add, y, stride, blocks = fields(
            arguments, 12
        )
        groups = k // group
        tile_codes = k // 4 * k4_bytes
        tile_scales = 64 if row_scales else groups * 32
        for tile in range(2 * first, 2 * last, tiles):
            at = 64 * tile
            for block in range(blocks):
                row, meta = at + tokens * block * stride, 4 * tokens * block * groups
                end = (bias + at if bias else 0, gelu, add + row if add else 0, y + row, stride)
                multiply_tiles(
                    text, codes + tile * tile_codes, tile_codes, scales + tile * tile_scales,
                    tile_scales, acts + tokens * block * k, act_scales + meta, act_sums + meta,
                    groups, end,
                )  # fmt: skip

    return multiply


@lru_cache(maxsize=32)
def multiply_float(spec_text: str) -> Any:
    """The product of blocks of tokens with tiles of unquantized weights. Units: pairs of tiles.

    Arguments: values, K, acts (float32 [blocks, K, tokens]), bias, gelu, add, y, stride of y and
    add in bytes, blocks.
    """
    spec = Spec.parse(spec_text)
    group, tokens, tiles, text = spec.group, spec.tokens, spec.tiles, spec_text
    column_bytes = TILE * (4 if spec.scheme == "f32" else 2)

    @kernel
    def multiply_float(arguments, first, last):  # type: ignore[no-untyped-def]
        values, k, acts, bias, gelu, add, y, stride, blocks = fields(arguments, 9)
        size = k * column_bytes
        for tile in range(2 * first, 2 * last, tiles):
            at = 64 * tile
            for block in range(blocks):
                row = at + tokens * block * stride
                end = (bias + at if bias else 0, gelu, add + row if add else 0, y + row, stride)
                multiply_tiles(
                    text, values + tile * size, size, 0, 0, acts + 4 * tokens * block * k, 0, 0,
                    k // group, end,
                )  # fmt: skip

    return multiply_float


def block_of(m: int, tier: str) -> int:
    """Tokens of a micro-kernel's block, for a step of m."""
    sizes = token_blocks(tier)
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

    def compile(self) -> None:
        """Compile every kernel that `record` may ask for, or take it from the cache."""
        spread_rows() if self.scheme.is_float else prepare(self.tier, self.scheme.group_size)
        for tokens in token_blocks(self.tier):
            (multiply_float if self.scheme.is_float else multiply)(self._spec(tokens))

    def _spec(self, tokens: int) -> str:
        return str(Spec(self.scheme.name, self.scheme.group_size, self.tier, tokens))

    def record(self, x: Buffer, add: Buffer | None) -> Buffer:
        """Append this layer to x's program; returns y."""
        y = x.program.buffer(x.rows, self.n, np.float32)
        if x.rows:
            tokens = block_of(x.rows, self.tier)
            residual = 0 if add is None else add.address
            end = (self.bias, self.gelu, residual, y.address, y.stride_bytes)
            record = self._record_float if self.scheme.is_float else self._record_int
            record(x, tokens, -(-x.rows // tokens), end)
        return y

    def _record_int(self, x: Buffer, tokens: int, blocks: int, end: tuple[int, ...]) -> None:
        program, groups = x.program, self.k // self.scheme.group_size
        acts = program.buffer(1, blocks * tokens * self.k, np.int8)
        act_scales = program.buffer(1, blocks * tokens * groups, np.float32)
        act_sums = program.buffer(1, blocks * tokens * groups, np.int32)
        to = (acts.address, act_scales.address, act_sums.address)
        program.add(
            prepare(self.tier, self.scheme.group_size), x.rows, 4, x.address, x.stride_bytes,
            x.columns, self.gain, self.shift, self.epsilon, self.k,
            weight_offset(self.scheme.name, self.tier), *to, tokens,
        )  # fmt: skip
        program.add(
            multiply(self._spec(tokens)), self._pairs, self._chunk, self.codes, self.scales, self.k,
            *to, *end, blocks, touched=self.nbytes,
        )  # fmt: skip

    def _record_float(self, x: Buffer, tokens: int, blocks: int, end: tuple[int, ...]) -> None:
        program = x.program
        acts = program.buffer(1, blocks * tokens * self.k, np.float32)
        program.add(
            spread_rows(), x.rows, 1, x.address, x.stride_bytes, x.columns, self.gain, self.shift,
            self.epsilon, self.k, acts.address, tokens,
        )  # fmt: skip
        program.add(
            multiply_float(self._spec(tokens)), self._pairs, self._chunk, self.codes, self.k,
            acts.address, *end, blocks, touched=self.nbytes,
        )  # fmt: skip

    @property
    def _pairs(self) -> int:
        return -(-self.n // (2 * TILE))

    @property
    def _chunk(self) -> int:
        return _CHUNK_BYTES * self._pairs // self.nbytes
