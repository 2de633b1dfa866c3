"""Linear layers as operations of a program: y = act(norm(x) @ W.T + bias) + add.

x [M, K] -> y [M, N]: a prologue over rows (see `prologue`), then the product over tiles of W, which
ends in the epilogue. Each weight byte is read by one thread, up to 8 tokens once, and each y is
reduced by one thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from bloomq.backends.numba_cpu.jit import kernel
from bloomq.backends.numba_cpu.matmul import (
    PANEL_TOKENS,
    Spec,
    gemm_panel,
    gemv_tile,
    unpack_tile,
    weight_offset,
)
from bloomq.backends.numba_cpu.memory import address, fields, keep
from bloomq.backends.numba_cpu.program import Buffer
from bloomq.backends.numba_cpu.prologue import norm_rows, prepare
from bloomq.schemes import TILE, Scheme

_PANEL = 2 * TILE
_FEW = (1, 4, PANEL_TOKENS)  # tokens that `gemv_tile` is made for
# Weights that one thread takes at a time in decode: long enough for the memory's streams to get
# going, short enough to share a matrix of 1 MB evenly.
_CHUNK_BYTES = 64 << 10


@lru_cache(maxsize=64)
def gemv(spec_text: str) -> Any:
    """The product of 1, 4 or 8 tokens with tiles straight from their codes. Units: tiles.

    Arguments: codes, scales, K, acts, act scales, act sums, bias (0: none), gelu, add (0: none), y,
    stride of y and add in bytes.
    """
    spec = Spec.parse(spec_text)
    text, group, k4_bytes, row_scales = (
        spec_text, spec.group, spec.bytes_per_k4, spec.scheme == "int8",
    )  # fmt: skip

    @kernel
    def gemv(arguments, first, last):  # type: ignore[no-untyped-def]
        codes, scales, k, acts, act_scales, act_sums, bias, gelu, add, y, stride = fields(
            arguments, 11
        )
        groups = k // group
        tile_codes = k // 4 * k4_bytes
        tile_scales = 64 if row_scales else groups * 32
        for tile in range(first, last):
            at = 64 * tile
            end = (bias + at if bias else 0, gelu, add + at if add else 0, y + at, stride)
            gemv_tile(
                text, codes + tile * tile_codes, scales + tile * tile_scales, acts, k, act_scales,
                act_sums, groups, end,
            )  # fmt: skip

    return gemv


@lru_cache(maxsize=16)
def gemm(spec_text: str) -> Any:
    """The product of many tokens: a pair of tiles is spread out into a panel, then meets all
    tokens, 8 at a time. Units: pairs of tiles.

    Arguments: as `gemv`, then blocks of 8 tokens.
    """
    spec = Spec.parse(spec_text)
    group, k4_bytes, row_scales = spec.group, spec.bytes_per_k4, spec.scheme == "int8"
    text = spec_text

    @kernel
    def gemm(arguments, first, last):  # type: ignore[no-untyped-def]
        codes, scales, k, acts, act_scales, act_sums, bias, gelu, add, y, stride, blocks = fields(
            arguments, 12
        )
        groups = k // group
        tile_codes = k // 4 * k4_bytes
        tile_scales = 64 if row_scales else groups * 32
        panel = np.empty(k * _PANEL + 64, np.uint8)
        panel_scales = np.empty(groups * _PANEL + 16, np.float32)
        # A 64-byte load that straddles two cache lines costs twice.
        p, ps = (address(panel) + 63) // 64 * 64, (address(panel_scales) + 63) // 64 * 64
        for pair in range(first, last):
            for half in range(2):
                tile = 2 * pair + half
                unpack_tile(
                    text, codes + tile * tile_codes, scales + tile * tile_scales, groups,
                    p + 64 * half, ps + 64 * half,
                )  # fmt: skip
            at = 128 * pair
            for block in range(blocks):
                row = at + PANEL_TOKENS * block * stride
                meta = PANEL_TOKENS * block * groups * 4
                end = (bias + at if bias else 0, gelu, add + row if add else 0, y + row, stride)
                gemm_panel(
                    text, p, ps, acts + PANEL_TOKENS * block * k, act_scales + meta,
                    act_sums + meta, groups, end,
                )  # fmt: skip
        keep(panel)
        keep(panel_scales)

    return gemm


@lru_cache(maxsize=32)
def float_gemm(spec_text: str) -> Any:
    """The product with unquantized tiles, `tokens` at a time. Units: tiles.

    Arguments: values, K, acts (float32), stride of acts in bytes, bias, gelu, add, y, stride of y
    and add in bytes, blocks of tokens.
    """
    spec = Spec.parse(spec_text)
    group, tokens, text = spec.group, spec.tokens, spec_text
    column_bytes = TILE * (4 if spec.scheme == "f32" else 2)

    @kernel
    def float_gemm(arguments, first, last):  # type: ignore[no-untyped-def]
        values, k, acts, act_stride, bias, gelu, add, y, stride, blocks = fields(arguments, 10)
        for tile in range(first, last):
            at = 64 * tile
            for block in range(blocks):
                row = at + tokens * block * stride
                end = (bias + at if bias else 0, gelu, add + row if add else 0, y + row, stride)
                gemv_tile(
                    text, values + tile * k * column_bytes, 0, acts + tokens * block * act_stride,
                    act_stride, 0, 0, k // group, end,
                )  # fmt: skip

    return float_gemm


def padded_rows(m: int) -> int:
    """Rows that the micro-kernels read and write for m tokens: 1, 4 or a multiple of 8."""
    return next((few for few in _FEW if m <= few), -(-m // PANEL_TOKENS) * PANEL_TOKENS)


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
        norm_rows() if self.scheme.is_float else prepare()
        for tokens in _FEW:
            (float_gemm if self.scheme.is_float else gemv)(self._spec(tokens))
        if not self.scheme.is_float:
            gemm(self._spec(PANEL_TOKENS))

    def _spec(self, tokens: int) -> str:
        return str(Spec(self.scheme.name, self.scheme.group_size, self.tier, tokens))

    def record(self, x: Buffer, add: Buffer | None) -> Buffer:
        """Append this layer to x's program; returns y."""
        rows = padded_rows(x.rows)
        y = x.program.buffer(x.rows, self.n, np.float32, rows)
        if x.rows:
            residual = 0 if add is None else add.address
            end = (self.bias, self.gelu, residual, y.address, y.stride_bytes)
            record = self._record_float if self.scheme.is_float else self._record_int
            record(x, rows, end)
        return y

    def _record_int(self, x: Buffer, rows: int, end: tuple[int, ...]) -> None:
        program, groups = x.program, self.k // self.scheme.group_size
        many = x.rows > PANEL_TOKENS
        acts = program.buffer(1, rows * self.k, np.int8, 1)
        act_scales = program.buffer(1, rows * groups, np.float32, 1)
        act_sums = program.buffer(1, rows * groups, np.int32, 1)
        to = (acts.address, act_scales.address, act_sums.address)
        program.add(
            prepare(), rows // PANEL_TOKENS if many else x.rows, 1, x.address, x.stride_bytes,
            x.columns, self.gain, self.shift, self.epsilon, self.k, self.scheme.group_size,
            weight_offset(self.scheme.name, self.tier), *to, x.rows, many,
        )  # fmt: skip
        arguments = (self.codes, self.scales, self.k, *to, *end)
        tiles = -(-self.n // TILE)
        if many:
            program.add(
                gemm(self._spec(PANEL_TOKENS)), -(-tiles // 2), 1, *arguments,
                rows // PANEL_TOKENS, touched=self.nbytes,
            )  # fmt: skip
        else:
            chunk = _CHUNK_BYTES * tiles // self.nbytes
            program.add(gemv(self._spec(rows)), tiles, chunk, *arguments, touched=self.nbytes)

    def _record_float(self, x: Buffer, rows: int, end: tuple[int, ...]) -> None:
        program = x.program
        acts = program.buffer(x.rows, self.k, np.float32, rows)
        program.add(
            norm_rows(), x.rows, 1, x.address, x.stride_bytes, x.columns, self.gain, self.shift,
            self.epsilon, self.k, acts.address, acts.stride_bytes,
        )  # fmt: skip
        tokens, tiles = min(rows, PANEL_TOKENS), -(-self.n // TILE)
        program.add(
            float_gemm(self._spec(tokens)), tiles, _CHUNK_BYTES * tiles // self.nbytes, self.codes,
            self.k, acts.address, acts.stride_bytes, *end, rows // tokens, touched=self.nbytes,
        )  # fmt: skip
