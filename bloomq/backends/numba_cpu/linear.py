"""The compiled linear layer: prologue, product and epilogue in one call.

    y = act(norm(x) @ W.T + bias) + add          x [M, K] -> y [M, N]

Threads share the work by output rows: share t of n takes the tiles [t/n, (t+1)/n) of W, so each
weight byte is read once by one thread (up to 8 tokens) and each y is reduced by one thread.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numba import float32, int64, njit, prange, void
from numba.extending import overload

from bloomq.backends.numba_cpu.jit import compiled
from bloomq.backends.numba_cpu.matmul import (
    PANEL_TOKENS,
    Spec,
    address,
    finish_tile,
    gemm_panel,
    gemv_tile,
    keep,
    unpack_tile,
    weight_offset,
)
from bloomq.backends.numba_cpu.prologue import norm_row, quantize_row
from bloomq.schemes import TILE

# x, gain, norm bias, epsilon, N, stored K, address of codes, of scales, of bias (0: none), gelu (0
# or 1), add ([0, 0]: none), y, threads. No gain: no norm. `add` may be y itself.
_SIGNATURE = void(
    float32[:, ::1], float32[::1], float32[::1], float32, int64, int64, int64, int64, int64, int64,
    float32[:, ::1], float32[:, ::1], int64,
)  # fmt: skip
_PANEL = 2 * TILE
# Below this many weight bytes times rows one thread is faster: starting a parallel region costs
# about 8 us when the other threads sleep, in which one thread reads 200 KB.
_SERIAL_BYTES = 1 << 18


@njit
def _prepare(  # type: ignore[no-untyped-def]
    x, gain, norm_bias, epsilon, group, offset, codes, scales, sums
):
    """One row's prologue: norm where there is a gain, then int8."""
    if gain.shape[0]:
        normed = np.empty(x.shape[0], np.float32)
        norm_row(x, gain, norm_bias, epsilon, normed)
        quantize_row(normed, group, offset, codes, scales, sums)
    else:
        quantize_row(x, group, offset, codes, scales, sums)


@njit
def _interleave(acts):  # type: ignore[no-untyped-def]
    """Rearrange a block of 8 tokens in place, [8, K] -> [K/4, 8, 4], as `gemm_panel` reads it."""
    rows = acts.copy().view(np.int32)  # [8, K/4]
    target = acts.reshape(-1).view(np.int32)
    for k4 in range(rows.shape[1]):
        for t in range(PANEL_TOKENS):
            target[PANEL_TOKENS * k4 + t] = rows[t, k4]


@njit
def _emit_rows(buffer, valid, first, token, count, add, y):  # type: ignore[no-untyped-def]
    """Copy rows of finished values to y[token:, first:], adding the residual where there is one."""
    for t in range(count):
        if add.shape[0]:
            for lane in range(valid):
                y[token + t, first + lane] = buffer[t, lane] + add[token + t, first + lane]
        else:
            for lane in range(valid):
                y[token + t, first + lane] = buffer[t, lane]


# The shares of a product are functions of their own, specialised through the literal `spec`: as
# closures of the kernels they would enter the key of Numba's cache, and never be found again.


def _few_tokens(  # type: ignore[no-untyped-def]
    spec, share, shares, m, k, n, codes, scales, acts, act_scales, act_sums, bias, gelu, add, y
):
    """Up to 8 tokens: each tile straight from its codes."""


@overload(_few_tokens, prefer_literal=True)
def _build_few_tokens(  # type: ignore[no-untyped-def]
    spec, share, shares, m, k, n, codes, scales, acts, act_scales, act_sums, bias, gelu, add, y
):
    base = Spec.parse(spec.literal_value)
    one, four, eight = (str(replace(base, tokens=t)) for t in (1, 4, PANEL_TOKENS))
    group, k4_bytes, row_scales = base.group, base.bytes_per_k4, base.scheme == "int8"

    def few_tokens(  # type: ignore[no-untyped-def]
        spec, share, shares, m, k, n, codes, scales, acts, act_scales, act_sums, bias, gelu, add, y
    ):
        groups = k // group
        tile_codes = k // 4 * k4_bytes
        tile_scales = 64 if row_scales else groups * 32
        tiles = (n + TILE - 1) // TILE
        buffer = np.empty((PANEL_TOKENS, TILE), np.float32)
        out = address(buffer)
        a, a_scales, a_sums = address(acts), address(act_scales), address(act_sums)
        for tile in range(tiles * share // shares, tiles * (share + 1) // shares):
            c, s = codes + tile * tile_codes, scales + tile * tile_scales
            if m == 1:
                gemv_tile(one, c, s, a, k, a_scales, a_sums, groups, out)
            elif m <= 4:
                gemv_tile(four, c, s, a, k, a_scales, a_sums, groups, out)
            else:
                gemv_tile(eight, c, s, a, k, a_scales, a_sums, groups, out)
            first = tile * TILE
            for t in range(m):
                finish_tile(one, out + 64 * t, bias + 4 * first if bias else 0, gelu)
            _emit_rows(buffer, min(TILE, n - first), first, 0, m, add, y)

    return few_tokens


def _many_tokens(  # type: ignore[no-untyped-def]
    spec, share, shares, m, k, n, codes, scales, acts, act_scales, act_sums, bias, gelu, add, y
):
    """A pair of tiles is spread out once into a panel, then meets all tokens, 8 at a time."""


@overload(_many_tokens, prefer_literal=True)
def _build_many_tokens(  # type: ignore[no-untyped-def]
    spec, share, shares, m, k, n, codes, scales, acts, act_scales, act_sums, bias, gelu, add, y
):
    base = Spec.parse(spec.literal_value)
    one, eight = (str(replace(base, tokens=t)) for t in (1, PANEL_TOKENS))
    group, k4_bytes, row_scales = base.group, base.bytes_per_k4, base.scheme == "int8"

    def many_tokens(  # type: ignore[no-untyped-def]
        spec, share, shares, m, k, n, codes, scales, acts, act_scales, act_sums, bias, gelu, add, y
    ):
        groups = k // group
        tile_codes = k // 4 * k4_bytes
        tile_scales = 64 if row_scales else groups * 32
        pairs = (n + _PANEL - 1) // _PANEL
        panel = np.empty(k * _PANEL + 64, np.uint8)
        panel_scales = np.empty(groups * _PANEL + 16, np.float32)
        buffer = np.empty((PANEL_TOKENS, _PANEL), np.float32)
        # A 64-byte load that straddles two cache lines costs twice.
        p, ps = (address(panel) + 63) // 64 * 64, (address(panel_scales) + 63) // 64 * 64
        out = address(buffer)
        a, a_scales, a_sums = address(acts), address(act_scales), address(act_sums)
        for pair in range(pairs * share // shares, pairs * (share + 1) // shares):
            for half in range(2):
                c = codes + (2 * pair + half) * tile_codes
                s = scales + (2 * pair + half) * tile_scales
                unpack_tile(one, c, s, groups, p + 64 * half, ps + 64 * half)
            first = pair * _PANEL
            for token in range(0, m, PANEL_TOKENS):
                at = token * groups * 4
                gemm_panel(eight, p, ps, a + token * k, a_scales + at, a_sums + at, groups, out)
                count = min(PANEL_TOKENS, m - token)
                for t in range(2 * count):
                    b = bias + 4 * (first + TILE * (t % 2)) if bias else 0
                    finish_tile(one, out + 64 * t, b, gelu)
                _emit_rows(buffer, min(_PANEL, n - first), first, token, count, add, y)
        keep(panel)
        keep(panel_scales)

    return many_tokens


def _float_tokens(spec, share, shares, m, k, n, values, acts, bias, gelu, add, y):  # type: ignore[no-untyped-def]
    """Any number of tokens against unquantized tiles, 8 at a time."""


@overload(_float_tokens, prefer_literal=True)
def _build_float_tokens(spec, share, shares, m, k, n, values, acts, bias, gelu, add, y):  # type: ignore[no-untyped-def]
    base = Spec.parse(spec.literal_value)
    one, four, eight = (str(replace(base, tokens=t)) for t in (1, 4, PANEL_TOKENS))
    group, column_bytes = base.group, TILE * (4 if base.scheme == "f32" else 2)

    def float_tokens(spec, share, shares, m, k, n, values, acts, bias, gelu, add, y):  # type: ignore[no-untyped-def]
        groups = k // group
        tiles = (n + TILE - 1) // TILE
        buffer = np.empty((PANEL_TOKENS, TILE), np.float32)
        out, a = address(buffer), address(acts)
        for tile in range(tiles * share // shares, tiles * (share + 1) // shares):
            w, first = values + tile * k * column_bytes, tile * TILE
            for token in range(0, m, PANEL_TOKENS):
                at = a + token * k * 4
                if m == 1:
                    gemv_tile(one, w, 0, at, 4 * k, 0, 0, groups, out)
                elif m <= 4:
                    gemv_tile(four, w, 0, at, 4 * k, 0, 0, groups, out)
                else:
                    gemv_tile(eight, w, 0, at, 4 * k, 0, 0, groups, out)
                count = min(PANEL_TOKENS, m - token)
                for t in range(count):
                    finish_tile(one, out + 64 * t, bias + 4 * first if bias else 0, gelu)
                _emit_rows(buffer, min(TILE, n - first), first, token, count, add, y)

    return float_tokens


@njit
def _padded_rows(m):  # type: ignore[no-untyped-def]
    """Rows of activations that the micro-kernels read for m tokens: 1, 4 or a multiple of 8."""
    if m <= 1:
        return m
    return 4 if m <= 4 else (m + PANEL_TOKENS - 1) // PANEL_TOKENS * PANEL_TOKENS


@lru_cache(maxsize=16)
def int_linear(scheme: str, group: int, tier: str) -> Any:
    """The linear layer of one integer scheme on one tier."""
    spec = str(Spec(scheme, group, tier))
    offset = weight_offset(scheme, tier)
    k4_bytes = Spec(scheme, group, tier).bytes_per_k4

    @compiled(_SIGNATURE, parallel=True)
    def int_linear(  # type: ignore[no-untyped-def]
        x, gain, norm_bias, epsilon, n, k, codes, scales, bias, gelu, add, y, threads
    ):
        m = x.shape[0]
        rows = _padded_rows(m)
        acts = np.zeros((rows, k), np.int8)
        act_scales = np.zeros((rows, k // group), np.float32)
        act_sums = np.zeros((rows, k // group), np.int32)
        shares = threads if n // TILE * (k // 4) * k4_bytes * m > _SERIAL_BYTES else 1
        if m <= PANEL_TOKENS or shares == 1:  # a few rows are ready before other threads wake
            for i in range(m):
                _prepare(
                    x[i], gain, norm_bias, epsilon, group, offset,
                    acts[i], act_scales[i], act_sums[i],
                )  # fmt: skip
        else:
            for i in prange(m):
                _prepare(
                    x[i], gain, norm_bias, epsilon, group, offset,
                    acts[i], act_scales[i], act_sums[i],
                )  # fmt: skip
        if m > PANEL_TOKENS:
            if shares == 1:
                for block in range(rows // PANEL_TOKENS):
                    _interleave(acts[PANEL_TOKENS * block : PANEL_TOKENS * (block + 1)])
            else:
                for block in prange(rows // PANEL_TOKENS):
                    _interleave(acts[PANEL_TOKENS * block : PANEL_TOKENS * (block + 1)])
        if m <= PANEL_TOKENS:
            if shares == 1:
                _few_tokens(
                    spec, 0, 1, m, k, n, codes, scales, acts, act_scales, act_sums, bias, gelu,
                    add, y,
                )  # fmt: skip
            else:
                for share in prange(shares):
                    _few_tokens(
                        spec, share, shares, m, k, n, codes, scales, acts, act_scales, act_sums,
                        bias, gelu, add, y,
                    )  # fmt: skip
        elif shares == 1:
            _many_tokens(
                spec, 0, 1, m, k, n, codes, scales, acts, act_scales, act_sums, bias, gelu, add, y
            )
        else:
            for share in prange(shares):
                _many_tokens(
                    spec, share, shares, m, k, n, codes, scales, acts, act_scales, act_sums, bias,
                    gelu, add, y,
                )  # fmt: skip

    return int_linear


@lru_cache(maxsize=8)
def float_linear(dtype: str, group: int, tier: str) -> Any:
    """The linear layer of unquantized weights (f32, f16, bf16), in float32 throughout."""
    spec = str(Spec(dtype, group, tier))
    column_bytes = TILE * (4 if dtype == "f32" else 2)

    @compiled(_SIGNATURE, parallel=True)
    def float_linear(  # type: ignore[no-untyped-def]
        x, gain, norm_bias, epsilon, n, k, values, scales, bias, gelu, add, y, threads
    ):
        m = x.shape[0]
        acts = np.zeros((_padded_rows(m), k), np.float32)
        for i in range(m):
            if gain.shape[0]:
                norm_row(x[i], gain, norm_bias, epsilon, acts[i, : x.shape[1]])
            else:
                acts[i, : x.shape[1]] = x[i]
        shares = threads if n // TILE * k * column_bytes * m > _SERIAL_BYTES else 1
        if shares == 1:
            _float_tokens(spec, 0, 1, m, k, n, values, acts, bias, gelu, add, y)
        else:
            for share in prange(shares):
                _float_tokens(spec, share, shares, m, k, n, values, acts, bias, gelu, add, y)

    return float_linear
