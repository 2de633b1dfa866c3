"""How weights are stored: each scheme quantizes, lays out and restores a matrix, in plain NumPy.

The stored layout is the CPU kernels' own, so a mapped pack is used as it lies. A tile is 16 rows of
the matrix; rows are padded to whole pairs of tiles, columns to whole groups, both with zeros.

    f32, f16, bf16   values [N/16, K, 16]               the yardstick, not quantized
    int8             codes  [N/16, K/4, 16, 4] int8     scales [N] float32, one per row
    int6             codes  [N/16, K/16 * 3, 16, 4] u8  scales [N/16, K/64, 16] float16
    int4, nl4        codes  [N/16, K/8, 16, 4] uint8    scales [N/16, K/G, 16] float16
    nf4              codes  as int4                     scales [N/16, K/64, 16] float16

A byte of 4-bit codes holds column k in its low and column k + 4 in its high nibble, so that 64
bytes are 8 columns of 16 rows and one lane is one row. 16 columns of 6-bit codes are the low four
bits of each as two such blocks, then one of the high two bits: column 4 i + j in bits 2 i, 2 i + 1.

Invariant: dequantize(quantize(w)) depends on each row (int8) or group (the others) alone, so a
matrix can be quantized in blocks of rows; a group of zeros has scale 0 and never divides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import UsageError
from bloomq.grids import GRIDS, group_scales, reciprocal

Array = NDArray[np.generic]
F32 = NDArray[np.float32]
Parts = Mapping[str, Array]

TILE = 16  # rows of a tile: the 32-bit lanes of a 512-bit register
ROW_MULTIPLE = 2 * TILE  # products work on pairs of tiles
GROUP_SIZES = (32, 64, 128)

# NF4: the 16 quantiles of a normal distribution that bitsandbytes computes with.
# Source: QLoRA (arXiv 2305.14314), appendix E.
NF4_CODEBOOK: F32 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0],
    dtype=np.float32,
)  # fmt: skip
# The integer kernels' code book: 127 times the above, rounded: an error of at most 0.4 % of a
# block's largest weight, a tenth of NF4's own.
NF4_INT8_CODEBOOK = tuple(int(c) for c in np.rint(127 * NF4_CODEBOOK))


@dataclass(frozen=True, slots=True)
class Part:
    """One stored array of a weight: its dtype as safetensors spells it, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to store a matrix [N, K].

    `group_size` is the number of columns that share an activation scale in the integer kernels, and
    but for int8 and floats a weight scale; columns are padded to a multiple of it.
    """

    name: Literal["f32", "f16", "bf16", "int8", "int6", "int4", "nl4", "nf4"]
    group_size: int

    @property
    def is_float(self) -> bool:
        return self.name in ("f32", "f16", "bf16")

    @property
    def label(self) -> str:
        return f"{self.name}-g{self.group_size}" if self.name in DEFAULT_GROUP else self.name

    def padded(self, shape: tuple[int, int]) -> tuple[int, int]:
        """[N, K] as stored."""
        n, k = shape
        return round_up(n, ROW_MULTIPLE), round_up(k, self.group_size)

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """The stored arrays of a matrix [N, K]."""
        n, k = self.padded(shape)
        tiles = n // TILE
        if self.is_float:
            dtype = {"f32": "F32", "f16": "F16", "bf16": "BF16"}[self.name]
            return {"values": Part(dtype, (tiles, k, TILE))}
        if self.name == "int8":
            return {"codes": Part("I8", (tiles, k // 4, TILE, 4)), "scales": Part("F32", (n,))}
        blocks = k // 16 * 3 if self.name == "int6" else k // 8
        return {
            "codes": Part("U8", (tiles, blocks, TILE, 4)),
            "scales": Part("F16", (tiles, k // self.group_size, TILE)),
        }

    def quantize(self, w: F32) -> dict[str, Array]:
        """w [N, K] -> the stored arrays. Not finite where a value or a scale is too large."""
        return _QUANTIZE[self.name](_pad(w, self.padded(_shape2(w))), self)

    def dequantize(self, parts: Parts, shape: tuple[int, int]) -> F32:
        """The stored arrays -> [N, K] float32: the weights that the scheme computes with."""
        n, k = shape
        return _DEQUANTIZE[self.name](parts, self)[:n, :k]

    def dequantize_rows(self, parts: Parts, ids: NDArray[np.int64]) -> F32:
        """Rows `ids` [M] -> [M, stored K] float32, reading those rows alone."""
        tile, lane = ids // TILE, ids % TILE
        picked = {}
        for name, part in parts.items():
            if part.ndim == 1:  # a value per row
                rows = part[ids]
                picked[name] = np.concatenate([rows, np.zeros(-len(ids) % TILE, rows.dtype)])
                continue
            rows = part[tile, :, lane]  # [M, ...]
            padded = np.zeros((round_up(len(ids), TILE), *rows.shape[1:]), rows.dtype)
            padded[: len(ids)] = rows
            tiles = padded.reshape(-1, TILE, *rows.shape[1:])  # [M/16, 16, ...] -> lanes third
            picked[name] = np.ascontiguousarray(np.moveaxis(tiles, 1, 2))
        return _DEQUANTIZE[self.name](picked, self)[: len(ids)]


def get_scheme(name: str, group_size: int | None = None) -> Scheme:
    """The scheme of that name; `group_size` (32, 64 or 128) is for nl4 and int4 alone.

    Raises: UsageError.
    """
    if not isinstance(name, str) or name not in _QUANTIZE:
        raise UsageError(f"unknown scheme {name!r}, expected one of {', '.join(_QUANTIZE)}")
    if name not in DEFAULT_GROUP:
        if group_size is not None:
            raise UsageError(
                f"scheme {name} has no group size to choose: drop it, or use "
                + " or ".join(DEFAULT_GROUP)
            )
        return Scheme(name, _FIXED_GROUP[name])  # type: ignore[arg-type]
    whole = isinstance(group_size, int)  # 64.0 is in the tuple too
    if group_size is not None and not (whole and group_size in GROUP_SIZES):
        raise UsageError(f"group size {group_size!r}, expected one of {GROUP_SIZES}")
    return Scheme(name, group_size or DEFAULT_GROUP[name])  # type: ignore[arg-type]


# Where the size of groups can be chosen. By KL nl4 loses as much with 64 as int4 with 32, and int4
# with 64 a quarter more (docs/experiments.md).
DEFAULT_GROUP = {"nl4": 64, "int4": 32}
# float: columns are summed in blocks of 64, which keeps float32 sums short; int8: the columns of
# one activation scale; int6 as bitsandbytes' blocks, which are nf4's.
_FIXED_GROUP = {"f32": 64, "f16": 64, "bf16": 64, "int8": 128, "int6": 64, "nf4": 64}
SCHEME_NAMES = ("int8", "int6", "nl4", "int4", "nf4", "f32", "bf16", "f16")


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _shape2(w: F32) -> tuple[int, int]:
    n, k = w.shape
    return n, k


def _pad(w: F32, shape: tuple[int, int]) -> F32:
    if w.shape == shape:
        return w
    out = np.zeros(shape, np.float32)
    out[: w.shape[0], : w.shape[1]] = w
    return out


# -- bfloat16, which NumPy lacks -------------------------------------------------------------------


def bf16_to_f32(bits: NDArray[np.uint16]) -> F32:
    """bfloat16 bits -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(x: F32) -> NDArray[np.uint16]:
    """float32 -> bfloat16 bits, to nearest even; NaN stays a quiet NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


# -- layouts --------------------------------------------------------------------------------------


def tile_rows(x: Array) -> Array:
    """[N, K] -> [N/16, K, 16]."""
    n, k = x.shape
    return np.ascontiguousarray(x.reshape(n // TILE, TILE, k).transpose(0, 2, 1))


def untile_rows(x: Array) -> Array:
    """[N/16, K, 16] -> [N, K]."""
    tiles, k, _ = x.shape
    return x.transpose(0, 2, 1).reshape(tiles * TILE, k)


def tile_bytes(codes: Array) -> Array:
    """[N, K] -> [N/16, K/4, 16, 4]."""
    n, k = codes.shape
    return np.ascontiguousarray(codes.reshape(n // TILE, TILE, k // 4, 4).transpose(0, 2, 1, 3))


def untile_bytes(tiled: Array) -> Array:
    """[N/16, K/4, 16, 4] -> [N, K]."""
    tiles, k4, _, _ = tiled.shape
    return tiled.transpose(0, 2, 1, 3).reshape(tiles * TILE, 4 * k4)


def tile_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[N, K] of 0..15 -> [N/16, K/8, 16, 4]: column k low, column k + 4 high."""
    n, k = codes.shape
    split = codes.reshape(n // TILE, TILE, k // 8, 2, 4)
    packed = split[:, :, :, 0, :] | (split[:, :, :, 1, :] << 4)  # [N/16, 16, K/8, 4]
    return np.ascontiguousarray(packed.transpose(0, 2, 1, 3))


def untile_nibbles(tiled: Array) -> NDArray[np.uint8]:
    """[N/16, K/8, 16, 4] -> [N, K] of 0..15."""
    packed = np.asarray(tiled, np.uint8).transpose(0, 2, 1, 3)  # [N/16, 16, K/8, 4]
    split = np.stack([packed & 15, packed >> 4], axis=3)  # [N/16, 16, K/8, 2, 4]
    tiles, _, k8, _, _ = split.shape
    return split.reshape(tiles * TILE, 8 * k8)


def tile_sixes(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[N, K] of 0..63 -> [N/16, K/16 * 3, 16, 4]."""
    n, k = codes.shape
    low = tile_nibbles(np.asarray(codes & 15, np.uint8)).reshape(n // TILE, k // 16, 2, TILE, 4)
    high = (codes >> 4).reshape(n // TILE, TILE, k // 16, 4, 4)  # i in the fourth place
    shifted = high << np.array([0, 2, 4, 6], np.uint8)[:, None]
    packed = np.bitwise_or.reduce(shifted, axis=3).transpose(0, 2, 1, 3)  # [N/16, K/16, 16, 4]
    joined = np.concatenate([low, packed[:, :, None]], axis=2)
    return np.ascontiguousarray(joined.reshape(n // TILE, k // 16 * 3, TILE, 4))


def untile_sixes(tiled: Array) -> NDArray[np.uint8]:
    """[N/16, K/16 * 3, 16, 4] -> [N, K] of 0..63."""
    tiles, blocks, _, _ = tiled.shape
    split = np.asarray(tiled, np.uint8).reshape(tiles, blocks // 3, 3, TILE, 4)
    low = untile_nibbles(split[:, :, :2].reshape(tiles, blocks // 3 * 2, TILE, 4))
    packed = split[:, :, 2].transpose(0, 2, 1, 3)[:, :, :, None]  # [N/16, 16, K/16, 1, 4]
    high = (packed >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    return np.asarray(low | (high.reshape(low.shape) << 4), np.uint8)


# -- float ----------------------------------------------------------------------------------------


def _quantize_float(w: F32, scheme: Scheme) -> dict[str, Array]:
    if scheme.name == "bf16":
        return {"values": tile_rows(f32_to_bf16(w))}
    with np.errstate(
        over="ignore"
    ):  # beyond float16's 65,504 becomes infinite, which callers check
        return {"values": tile_rows(w.astype(np.float16 if scheme.name == "f16" else np.float32))}


def _dequantize_float(parts: Parts, scheme: Scheme) -> F32:
    values = untile_rows(parts["values"])
    if scheme.name == "bf16":
        return bf16_to_f32(values.view(np.uint16))
    return values.astype(np.float32)


# -- int8: symmetric, per output row ---------------------------------------------------------------


def _quantize_int8(w: F32, scheme: Scheme) -> dict[str, Array]:
    scales = int8_scales(np.abs(w).max(axis=1))
    codes = np.rint(w * reciprocal(scales)[:, None])  # |code| <= 127 by the choice of the scale
    return {"codes": tile_bytes(codes.astype(np.int8)), "scales": scales}


def int8_scales(largest: F32) -> F32:
    """The scale of a row from its largest magnitude."""
    return largest / np.float32(127)


def _dequantize_int8(parts: Parts, scheme: Scheme) -> F32:
    scales = np.asarray(parts["scales"], np.float32)
    return untile_bytes(parts["codes"]).astype(np.float32) * scales[:, None]


# -- int4, nl4 and int6: groups along K, whole numbers, error-minimising scale ---------------------


GROUPED = (*GRIDS, "nf4")  # schemes whose columns share a weight scale by groups


def _quantize_groups(w: F32, scheme: Scheme) -> dict[str, Array]:
    grid = GRIDS[scheme.name]
    scales = to_half(group_scales(w, scheme.group_size, grid))
    inverse = reciprocal(scales.astype(np.float32))
    q = grid.nearest((w.reshape(*scales.shape, -1) * inverse[..., None]).reshape(w.shape))
    codes = grid.codes(q)
    tiled = tile_sixes(codes) if scheme.name == "int6" else tile_nibbles(codes)
    return {"codes": tiled, "scales": tile_rows(scales)}


def _dequantize_groups(parts: Parts, scheme: Scheme) -> F32:
    untile = untile_sixes if scheme.name == "int6" else untile_nibbles
    return _scaled(GRIDS[scheme.name].numbers[untile(parts["codes"])], parts, scheme)


def _scaled(q: F32, parts: Parts, scheme: Scheme) -> F32:
    """q [N, K] times the scale of each one's group."""
    return q * np.repeat(untile_rows(parts["scales"]).astype(np.float32), scheme.group_size, axis=1)


def to_half(scales: F32) -> NDArray[np.float16]:
    """float32 -> float16; too large becomes infinite, which callers check."""
    with np.errstate(over="ignore"):
        return scales.astype(np.float16)


# -- nf4: blocks of 64, the largest magnitude as scale --------------------------------------------

# A value goes to the nearest entry: the index is how many of these midpoints lie below it.
NF4_MIDPOINTS: F32 = (NF4_CODEBOOK[1:] + NF4_CODEBOOK[:-1]) / np.float32(2)


def _quantize_nf4(w: F32, scheme: Scheme) -> dict[str, Array]:
    groups = w.reshape(w.shape[0], -1, scheme.group_size)
    scales = to_half(np.abs(groups).max(axis=2))
    x = groups * reciprocal(scales.astype(np.float32))[..., None]
    codes = np.searchsorted(NF4_MIDPOINTS, x.reshape(w.shape)).astype(np.uint8)
    return {"codes": tile_nibbles(codes), "scales": tile_rows(scales)}


def _dequantize_nf4(parts: Parts, scheme: Scheme) -> F32:
    return _scaled(NF4_CODEBOOK[untile_nibbles(parts["codes"])], parts, scheme)


_QUANTIZE: dict[str, Callable[[F32, Scheme], dict[str, Array]]] = {
    "int8": _quantize_int8,
    "int6": _quantize_groups,
    "nl4": _quantize_groups,
    "int4": _quantize_groups,
    "nf4": _quantize_nf4,
    "f32": _quantize_float,
    "bf16": _quantize_float,
    "f16": _quantize_float,
}
_DEQUANTIZE: dict[str, Callable[[Parts, Scheme], F32]] = {
    "int8": _dequantize_int8,
    "int6": _dequantize_groups,
    "nl4": _dequantize_groups,
    "int4": _dequantize_groups,
    "nf4": _dequantize_nf4,
    "f32": _dequantize_float,
    "bf16": _dequantize_float,
    "f16": _dequantize_float,
}
