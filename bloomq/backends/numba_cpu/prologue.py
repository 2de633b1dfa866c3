"""What happens to a row of activations before a matrix product: layer norm, then int8.

A row belongs to one thread, and every sum runs in one fixed order, so the bits do not depend on the
number of threads or on the other rows.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit

from bloomq.backends.numba_cpu.jit import kernel
from bloomq.backends.numba_cpu.memory import (
    address,
    as_float,
    codes,
    fields,
    floats,
    keep,
    words,
)

# Sums may be vectorised; NaN and infinity keep their meaning (fastmath=True would drop them).
_VECTOR_SUMS = {"reassoc", "contract", "nsz"}
_NOT_FINITE = 0x7F800000  # as bits: exponent all ones, which NaN and infinity share
BLOCK = 8  # rows that a block of interleaved activations holds


@njit(fastmath=_VECTOR_SUMS, error_model="numpy")
def norm_row(x, gain, bias, epsilon, out):  # type: ignore[no-untyped-def]
    """out = (x - mean) / sqrt(variance + epsilon) * gain + bias, over one row [C]."""
    n = x.shape[0]
    total = np.float32(0)
    for i in range(n):
        total += x[i]
    mean = total / np.float32(n)
    squares = np.float32(0)
    for i in range(n):
        centred = x[i] - mean
        squares += centred * centred
    inverse = np.float32(1) / np.float32(math.sqrt(squares / np.float32(n) + epsilon))
    for i in range(n):
        out[i] = (x[i] - mean) * inverse * gain[i] + bias[i]


@njit(error_model="numpy")
def quantize_row(x, group, offset, out, scales, sums):  # type: ignore[no-untyped-def]
    """int8 codes of one row, with one scale for each `group` of it.

    out = round(x * 127 / largest), half to even; scales = largest / 127; sums = -offset times the
    sum of a group's codes. A group of zeros has scale 0. A group with NaN or infinity has scale
    NaN, so that the result says so.
    """
    bits = x.view(np.int32)
    rounder = np.float32(12582912)  # 1.5 x 2^23: adding it rounds to a whole number
    for g in range(scales.shape[0]):
        low = g * group
        high = min(low + group, x.shape[0])
        peak_bits = np.int32(0)
        for i in range(low, high):  # the magnitudes of floats order like their bits
            peak_bits = max(peak_bits, bits[i] & np.int32(0x7FFFFFFF))
        peak = np.int32(peak_bits).view(np.float32)
        if peak_bits >= _NOT_FINITE:
            scales[g] = np.float32(np.nan)
            inverse = np.float32(0)
        elif peak < np.float32(1e-30):  # 127 / peak must not overflow
            scales[g] = np.float32(0)
            inverse = np.float32(0)
        else:
            scales[g] = peak / np.float32(127)
            inverse = np.float32(127) / peak
        total = np.int32(0)
        for i in range(low, high):
            whole = x[i] * inverse + rounder
            code = np.int32(whole - rounder)
            out[i] = np.int8(code)
            total += code
        sums[g] = np.int32(-offset) * total


@njit(error_model="numpy")
def _normed(x, gain, shift, epsilon, out):  # type: ignore[no-untyped-def]
    """x after the norm whose gain and shift are at these addresses (gain 0: x itself), in `out`."""
    if gain == 0:
        return x
    n = x.shape[0]
    norm_row(x, floats(gain, n), floats(shift, n), epsilon, out)
    return out


@lru_cache(maxsize=1)
def prepare() -> Any:
    """The prologue of the integer products. Units: rows, or blocks of 8 where `interleaved`.

    Arguments: x, stride of x in bytes, C, gain (0: no norm), shift, epsilon, K (C padded to whole
    groups), group, offset, codes, scales, sums, M, interleaved. codes int8 [M, K], or
    [M/8, K/4, 8, 4] as `gemm_panel` reads them; scales float32 and sums int32 [M, K/group].
    """

    @kernel
    def prepare(arguments, first, last):  # type: ignore[no-untyped-def]
        (
            x, stride, c, gain, shift, epsilon, k, group, offset, to_codes, to_scales, to_sums, m,
            interleaved,
        ) = fields(arguments, 14)  # fmt: skip
        groups = k // group
        normed = np.empty(c, np.float32)
        lone = np.zeros(k, np.int8)
        for unit in range(first, last):
            begin, end = (BLOCK * unit, min(BLOCK * unit + BLOCK, m)) if interleaved else (
                unit, unit + 1
            )  # fmt: skip
            for row in range(begin, end):
                values = _normed(
                    floats(x + row * stride, c), gain, shift, as_float(epsilon), normed
                )
                scales = floats(to_scales + 4 * row * groups, groups)
                sums = words(to_sums + 4 * row * groups, groups)
                if interleaved:
                    quantize_row(values, group, offset, lone, scales, sums)
                    fours = words(address(lone), k // 4)
                    block = words(to_codes + begin * k, 2 * k)
                    for k4 in range(k // 4):
                        block[BLOCK * k4 + row - begin] = fours[k4]
                else:
                    out = codes(to_codes + row * k, k)
                    out[c:] = np.int8(0)
                    quantize_row(values, group, offset, out, scales, sums)
        keep(lone)

    return prepare


@lru_cache(maxsize=1)
def norm_rows() -> Any:
    """The prologue of the float products, and the embedding's norm. Units: rows.

    Arguments: x, stride of x in bytes, C, gain (0: no norm), shift, epsilon, K, out, stride of out
    in bytes. out: float32 rows of K >= C, the rest zeros.
    """

    @kernel
    def norm_rows(arguments, first, last):  # type: ignore[no-untyped-def]
        x, stride, c, gain, shift, epsilon, k, out, out_stride = fields(arguments, 9)
        for row in range(first, last):
            source = floats(x + row * stride, c)
            target = floats(out + row * out_stride, k)
            target[c:] = np.float32(0)
            if gain == 0:
                target[:c] = source
            else:
                norm_row(source, floats(gain, c), floats(shift, c), as_float(epsilon), target[:c])

    return norm_rows
