"""What happens to a row of activations before a matrix product: layer norm, then int8.

A row belongs to one thread, and every sum runs in one fixed order, so the bits do not depend on the
number of threads or on the other rows. These are compiled as part of the kernels that call them.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

# Sums may be vectorised; NaN and infinity keep their meaning (fastmath=True would drop them).
_VECTOR_SUMS = {"reassoc", "contract", "nsz"}
_NOT_FINITE = 0x7F800000  # as bits: exponent all ones, which NaN and infinity share


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
def quantize_row(x, group, offset, codes, scales, sums):  # type: ignore[no-untyped-def]
    """int8 codes of one row, with one scale for each `group` of it.

    codes = round(x * 127 / largest), half to even; scales = largest / 127; sums = -offset times the
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
            codes[i] = np.int8(code)
            total += code
        sums[g] = np.int32(-offset) * total
