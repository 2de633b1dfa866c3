"""The compiled linear layer: prologue, product and epilogue in one call.

    y = act(norm(x) @ W.T + bias) + add          x [M, K] -> y [M, N]

Threads share the work by output rows: thread t of n takes the tiles [t/n, (t+1)/n) of W, so each
weight byte is read once by one thread (up to 8 tokens) and each y is reduced by one thread.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import float32, int64, njit, prange, void

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
def _emit_rows(buffer, width, valid, first, token, count, add, y):  # type: ignore[no-untyped-def]
    """Copy rows of finished values to y[token:, first:], adding the residual where there is one."""
    for t in range(count):
        for lane in range(valid):
            value = buffer[t, lane]
            if add.shape[0]:
                value += add[token + t, first + lane]
            y[token + t, first + lane] = value


@lru_cache(maxsize=16)
def int_linear(scheme: str, group: int, tier: str) -> Any:
    """The linear layer of one integer scheme on one tier."""
    one, four, eight = (str(Spec(scheme, group, tier, tokens)) for tokens in (1, 4, 8))
    offset = weight_offset(scheme, tier)
    tile_code_bytes = Spec(scheme, group, tier).bytes_per_k4  # per 4 columns
    row_scales = scheme == "int8"

    @compiled(_SIGNATURE, parallel=True)
    def int_linear(  # type: ignore[no-untyped-def]
        x, gain, norm_bias, epsilon, n, k, codes, scales, bias, gelu, add, y, threads
    ):
        m = x.shape[0]
        groups = k // group
        rows = m if m == 1 else (4 if m <= 4 else (m + 7) // 8 * 8)  # the rest stays zero
        acts = np.zeros((rows, k), np.int8)
        act_scales = np.zeros((rows, groups), np.float32)
        act_sums = np.zeros((rows, groups), np.int32)
        if m <= PANEL_TOKENS:  # a parallel region costs more than a few rows
            for i in range(m):
                _prepare(
                    x[i],
                    gain,
                    norm_bias,
                    epsilon,
                    group,
                    offset,
                    acts[i],
                    act_scales[i],
                    act_sums[i],
                )
        else:
            for i in prange(m):
                _prepare(
                    x[i],
                    gain,
                    norm_bias,
                    epsilon,
                    group,
                    offset,
                    acts[i],
                    act_scales[i],
                    act_sums[i],
                )

        a, a_scales, a_sums = address(acts), address(act_scales), address(act_sums)
        tile_codes = k // 4 * tile_code_bytes
        tile_scales = 64 if row_scales else groups * 32
        if m <= PANEL_TOKENS:
            tiles = (n + TILE - 1) // TILE
            for thread in prange(threads):
                buffer = np.empty((PANEL_TOKENS, TILE), np.float32)
                out = address(buffer)
                for tile in range(tiles * thread // threads, tiles * (thread + 1) // threads):
                    c = codes + tile * tile_codes
                    s = scales + tile * tile_scales
                    if rows == 1:
                        gemv_tile(one, c, s, a, k, a_scales, a_sums, groups, out)
                    elif rows == 4:
                        gemv_tile(four, c, s, a, k, a_scales, a_sums, groups, out)
                    else:
                        gemv_tile(eight, c, s, a, k, a_scales, a_sums, groups, out)
                    first = tile * TILE
                    for t in range(m):
                        b = bias + 4 * first if bias else 0
                        finish_tile(one, out + 64 * t, b, gelu)
                    _emit_rows(buffer, TILE, min(TILE, n - first), first, 0, m, add, y)
        else:
            pairs = (n + _PANEL - 1) // _PANEL
            for thread in prange(threads):
                panel = np.empty(k * _PANEL, np.uint8)
                panel_scales = np.empty(groups * _PANEL, np.float32)
                buffer = np.empty((PANEL_TOKENS, _PANEL), np.float32)
                out, p, ps = address(buffer), address(panel), address(panel_scales)
                for pair in range(pairs * thread // threads, pairs * (thread + 1) // threads):
                    for half in range(2):
                        c = codes + (2 * pair + half) * tile_codes
                        s = scales + (2 * pair + half) * tile_scales
                        unpack_tile(one, c, s, groups, p + 64 * half, ps + 64 * half)
                    first = pair * _PANEL
                    for token in range(0, m, PANEL_TOKENS):
                        at = token * groups * 4
                        gemm_panel(
                            eight, p, ps, a + token * k, k, a_scales + at, a_sums + at, groups, out
                        )
                        count = min(PANEL_TOKENS, m - token)
                        for t in range(2 * count):
                            b = bias + 4 * (first + TILE * (t % 2)) if bias else 0
                            finish_tile(one, out + 64 * t, b, gelu)
                        _emit_rows(
                            buffer, _PANEL, min(_PANEL, n - first), first, token, count, add, y
                        )
                keep(panel)
                keep(panel_scales)
        keep(acts)
        keep(act_scales)
        keep(act_sums)

    return int_linear


@lru_cache(maxsize=8)
def float_linear(dtype: str, group: int, tier: str) -> Any:
    """The linear layer of unquantized weights (f32, f16, bf16), in float32 throughout."""
    one, four, eight = (str(Spec(dtype, group, tier, tokens)) for tokens in (1, 4, 8))
    tile_bytes = TILE * (4 if dtype == "f32" else 2)  # per column

    @compiled(_SIGNATURE, parallel=True)
    def float_linear(  # type: ignore[no-untyped-def]
        x, gain, norm_bias, epsilon, n, k, values, scales, bias, gelu, add, y, threads
    ):
        m = x.shape[0]
        groups = k // group
        rows = m if m == 1 else (4 if m <= 4 else (m + 7) // 8 * 8)
        acts = np.zeros((rows, k), np.float32)
        for i in range(m):
            if gain.shape[0]:
                norm_row(x[i], gain, norm_bias, epsilon, acts[i, : x.shape[1]])
            else:
                acts[i, : x.shape[1]] = x[i]
        a = address(acts)
        tiles = (n + TILE - 1) // TILE
        for thread in prange(threads):
            buffer = np.empty((PANEL_TOKENS, TILE), np.float32)
            out = address(buffer)
            for tile in range(tiles * thread // threads, tiles * (thread + 1) // threads):
                w = values + tile * k * tile_bytes
                first = tile * TILE
                for token in range(0, m, PANEL_TOKENS):
                    at = a + token * k * 4
                    if rows == 1:
                        gemv_tile(one, w, 0, at, 4 * k, 0, 0, groups, out)
                    elif rows == 4:
                        gemv_tile(four, w, 0, at, 4 * k, 0, 0, groups, out)
                    else:
                        gemv_tile(eight, w, 0, at, 4 * k, 0, 0, groups, out)
                    count = min(PANEL_TOKENS, m - token)
                    for t in range(count):
                        b = bias + 4 * first if bias else 0
                        finish_tile(one, out + 64 * t, b, gelu)
                    _emit_rows(buffer, TILE, min(TILE, n - first), first, token, count, add, y)
        keep(acts)

    return float_linear
