"""Quantization of a block of rows, compiled: the same bits as `schemes`, at the speed of memory.

The inner loops run over the 16 rows of a tile, so they vectorise without reordering a sum; without
fast-math, LLVM contracts nothing. Callers run blocks on several threads: these hold no lock.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bloomq.grids import GRIDS, reciprocal
from bloomq.schemes import NF4_MIDPOINTS, TILE, Array, Scheme, int8_scales, to_half

from .group_scales import book_of, cached, group_scales, load_group

F32 = NDArray[np.float32]


_ROUND = np.float32(12582912)  # 1.5 x 2^23: adding and subtracting it rounds, half to even


def quantize_block(raw: Array, dtype: str, scheme: Scheme) -> dict[str, Array]:
    """Rows as stored in a checkpoint, [n, K] of F32, F16 or BF16 -> the scheme's arrays.

    n a multiple of 32, but for a matrix's last block. Not finite where a weight or a scale is not.
    """
    w = _widen(raw, dtype, scheme.padded((raw.shape[0], raw.shape[1])))
    if scheme.is_float:
        return scheme.quantize(w)
    tiles = w.shape[0] // TILE
    if scheme.name == "int8":
        scales = int8_scales(_row_peaks(w))
        codes = np.empty((tiles, w.shape[1] // 4, TILE, 4), np.int8)
        _int8_codes(w, reciprocal(scales), codes)
        return {"codes": codes, "scales": scales}
    groups = w.shape[1] // scheme.group_size
    wide = np.empty((tiles, groups, TILE), np.float32)
    if scheme.name == "nf4":
        _group_peaks(w, scheme.group_size, wide)
    else:
        grid = GRIDS[scheme.name]
        levels = tuple(np.float32(level) for level in grid.levels)
        group_scales(w, scheme.group_size, levels, tuple(book_of(grid)), wide)
    half = to_half(wide)
    packed = np.empty(scheme.parts((w.shape[0], w.shape[1]))["codes"].shape, np.uint8)
    inverse = reciprocal(half.astype(np.float32))
    if scheme.name == "int6":
        _int6_codes(w, scheme.group_size, inverse, packed)
    elif scheme.name == "int4":
        _int4_codes(w, scheme.group_size, inverse, packed)
    else:
        midpoints = NF4_MIDPOINTS if scheme.name == "nf4" else GRIDS[scheme.name].midpoints
        _listed_codes(w, scheme.group_size, inverse, midpoints, packed)
    return {"codes": packed, "scales": half}


def all_finite(raw: Array, dtype: str) -> bool:
    """Is every value of a block finite?"""
    if dtype == "F32":
        return bool(_peak_bits(raw.reshape(-1).view(np.int32), 0x7FFFFFFF) < 0x7F800000)
    exponent = 0x7F80 if dtype == "BF16" else 0x7C00
    return bool(_peak_bits(raw.reshape(-1).view(np.int16), 0x7FFF) < exponent)


def _widen(raw: Array, dtype: str, shape: tuple[int, int]) -> F32:
    """[n, K] float32, padded with zeros to `shape`."""
    n, k = raw.shape
    out = np.empty(shape, np.float32) if (n, k) == shape else np.zeros(shape, np.float32)
    if dtype == "BF16":
        _widen_bf16(raw, out.view(np.uint32))
    else:
        out[:n, :k] = raw
    return out


@cached
def _widen_bf16(bits, out):  # type: ignore[no-untyped-def]
    for i in range(bits.shape[0]):
        for j in range(bits.shape[1]):
            out[i, j] = np.uint32(bits[i, j]) << np.uint32(16)


@cached
def _peak_bits(bits, mask):  # type: ignore[no-untyped-def]
    """The largest magnitude as an integer: floats order like their bits."""
    peak = np.int32(0)
    for i in range(bits.shape[0]):
        peak = max(peak, np.int32(bits[i]) & np.int32(mask))
    return peak


@cached
def _row_peaks(w):  # type: ignore[no-untyped-def]
    peaks = np.empty(w.shape[0], np.float32)
    for i in range(w.shape[0]):
        bits = w[i].view(np.int32)
        peak = np.int32(0)
        for j in range(w.shape[1]):
            peak = max(peak, bits[j] & np.int32(0x7FFFFFFF))
        peaks[i] = np.int32(peak).view(np.float32)
    return peaks


@cached
def _int8_codes(w, inverse, codes):  # type: ignore[no-untyped-def]
    for tile in range(codes.shape[0]):
        for lane in range(16):
            row = tile * 16 + lane
            for k4 in range(codes.shape[1]):
                for j in range(4):
                    whole = w[row, 4 * k4 + j] * inverse[row] + _ROUND
                    codes[tile, k4, lane, j] = np.int8(whole - _ROUND)


@cached
def _peak_of_group(block, peak, magnitude):  # type: ignore[no-untyped-def]
    """The value of largest magnitude in each lane, signed; the first of equals."""
    for lane in range(16):
        peak[lane] = block[0, lane]
        magnitude[lane] = abs(block[0, lane])
    for k in range(1, block.shape[0]):
        for lane in range(16):
            value = block[k, lane]
            larger = abs(value) > magnitude[lane]
            peak[lane] = value if larger else peak[lane]
            magnitude[lane] = abs(value) if larger else magnitude[lane]


@cached
def _group_peaks(w, group, peaks):  # type: ignore[no-untyped-def]
    block = np.empty((group, 16), np.float32)
    peak = np.empty(16, np.float32)
    for tile in range(peaks.shape[0]):
        for g in range(peaks.shape[1]):
            load_group(w, tile, g * group, block)
            _peak_of_group(block, peak, peaks[tile, g])


@cached
def _int4_codes(w, group, inverse, codes):  # type: ignore[no-untyped-def]
    for tile in range(codes.shape[0]):
        for lane in range(16):
            row = tile * 16 + lane
            for k8 in range(codes.shape[1]):
                factor = inverse[tile, k8 * 8 // group, lane]
                for j in range(4):
                    low = (w[row, 8 * k8 + j] * factor + _ROUND) - _ROUND
                    high = (w[row, 8 * k8 + 4 + j] * factor + _ROUND) - _ROUND
                    low = min(max(low, np.float32(-8)), np.float32(7)) + np.float32(8)
                    high = min(max(high, np.float32(-8)), np.float32(7)) + np.float32(8)
                    codes[tile, k8, lane, j] = np.uint8(np.int32(low) | (np.int32(high) << 4))


@cached
def _int6_codes(w, group, inverse, codes):  # type: ignore[no-untyped-def]
    for tile in range(codes.shape[0]):
        for lane in range(16):
            row = tile * 16 + lane
            for k16 in range(codes.shape[1] // 3):
                factor = inverse[tile, k16 * 16 // group, lane]
                for j in range(4):
                    high = np.int32(0)
                    for i in range(4):
                        q = (w[row, 16 * k16 + 4 * i + j] * factor + _ROUND) - _ROUND
                        code = np.int32(min(max(q, np.float32(-32)), np.float32(31))) + 32
                        high |= (code >> 4) << (2 * i)
                        at = 3 * k16 + i // 2
                        if i % 2:
                            codes[tile, at, lane, j] |= np.uint8((code & 15) << 4)
                        else:
                            codes[tile, at, lane, j] = np.uint8(code & 15)
                    codes[tile, 3 * k16 + 2, lane, j] = np.uint8(high)


@cached
def _listed_codes(w, group, inverse, midpoints, codes):  # type: ignore[no-untyped-def]
    """A code is how many midpoints lie below a weight: counted for a group of 16 rows at a time."""
    block = np.empty((group, 16), np.float32)
    values = block.reshape(-1)
    code = np.empty((group, 16), np.int32)
    counts = code.reshape(-1)
    for tile in range(codes.shape[0]):
        for g in range(inverse.shape[1]):
            load_group(w, tile, g * group, block)
            for k in range(group):
                for lane in range(16):
                    block[k, lane] *= inverse[tile, g, lane]
            counts[:] = 0
            for midpoint in midpoints:
                for i in range(values.shape[0]):
                    counts[i] += np.int32(1) if values[i] > midpoint else np.int32(0)
            for k8 in range(group // 8):
                for lane in range(16):
                    for j in range(4):
                        low, high = code[8 * k8 + j, lane], code[8 * k8 + 4 + j, lane]
                        codes[tile, g * group // 8 + k8, lane, j] = np.uint8(low | high << 4)
