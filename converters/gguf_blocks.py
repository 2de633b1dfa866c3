"""The ways that ggml stores values: blocks of a row, each of so many bytes.

F32, F16 and BF16 are read as they lie. The other types become float32 by the `gguf` package's own
dequantization; the two that a pack can be written in without it, Q8_0 and Q4_0, are written here.

    Q8_0    a block of 32: scale, float16; 32 codes, int8                     code * scale
    Q4_0    a block of 32: scale, float16; 16 bytes, column j low, j + 16 high    (code - 8) * scale

Q4_0's grid is int4's in groups of 32: from one to the other, no bit is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import CheckpointError
from bloomq.schemes import F32, ROW_MULTIPLE, Array, round_up, tile_nibbles, tile_rows

U8 = NDArray[np.uint8]
BLOCK = 32  # columns of a block of Q8_0 and Q4_0
_ZERO = 8  # int4's code of a weight of zero


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of ggml: its number in a file, the values of a block, and their bytes."""

    name: str
    number: int
    block: int
    block_bytes: int

    def nbytes_of(self, count: int) -> int:
        """Bytes of so many values, whole blocks."""
        return count // self.block * self.block_bytes


# Source: ggml.h, enum ggml_type; ggml-common.h, the blocks. Those that are missing were withdrawn,
# are for intermediates (Q8_1, Q8_K), or hold integers.
TYPES = {
    number: BlockType(name, number, block, nbytes)
    for name, number, block, nbytes in (
        ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34), ("Q2_K", 10, 256, 84),
        ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210), ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74),
        ("IQ3_XXS", 18, 256, 98), ("IQ1_S", 19, 256, 50), ("IQ4_NL", 20, 32, 18),
        ("IQ3_S", 21, 256, 110), ("IQ2_S", 22, 256, 82), ("IQ4_XS", 23, 256, 136),
        ("IQ1_M", 29, 256, 56), ("BF16", 30, 1, 2), ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66),
        ("MXFP4", 39, 32, 17),
    )
}  # fmt: skip
BY_NAME = {kind.name: kind for kind in TYPES.values()}
AS_IT_LIES = ("F32", "F16", "BF16")


def dequantize(raw: U8, kind: BlockType, label: str) -> F32:
    """Rows of blocks, [n, bytes] -> [n, K] float32.

    Raises: CheckpointError without the `gguf` package.
    """
    quants, types = _package(kind, label)
    with np.errstate(all="ignore"):  # scales of a damaged file may be infinite
        return np.asarray(quants.dequantize(raw, types(kind.number)), np.float32)


def check_readable(kind: BlockType, label: str) -> None:
    """Raises: CheckpointError for a type that needs the `gguf` package, where there is none."""
    if kind.name not in AS_IT_LIES:
        _package(kind, label)


def _package(kind: BlockType, label: str):  # type: ignore[no-untyped-def]
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise CheckpointError(
            f"{label} is {kind.name}, for which the gguf package is needed: "
            "pip install 'bloomq[gguf]'"
        ) from None
    return quants, GGMLQuantizationType


def q8_0_blocks(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> U8:
    """codes [n, K] and the scale of each 32 of them [n, K/32] -> rows of blocks, [n, K/32 * 34]."""
    n, groups = scales.shape
    blocks = np.empty((n, groups, 2 + BLOCK), np.uint8)
    blocks[:, :, :2] = _bytes_of(scales)
    blocks[:, :, 2:] = codes.view(np.uint8).reshape(n, groups, BLOCK)
    return blocks.reshape(n, -1)


def q8_0_scales(w: F32) -> F32:
    """weights [n, K] -> the scale [n, K/32] with which their codes reach from -127 to 127."""
    scales: F32 = np.abs(w.reshape(len(w), -1, BLOCK)).max(axis=2) / np.float32(127)
    return scales


def q4_0_blocks(codes: U8, scales: NDArray[np.float16]) -> U8:
    """codes [n, K] of 0..15, the scale of each 32 [n, K/32] -> rows of blocks, [n, K/32 * 18]."""
    n, groups = scales.shape
    halves = codes.reshape(n, groups, 2, BLOCK // 2)
    blocks = np.empty((n, groups, 2 + BLOCK // 2), np.uint8)
    blocks[:, :, :2] = _bytes_of(scales)
    blocks[:, :, 2:] = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return blocks.reshape(n, -1)


def q4_0_parts(raw: U8) -> dict[str, Array]:
    """Rows of Q4_0 blocks, [n, K/32 * 18] -> the arrays of int4 in groups of 32, the same values.

    Rows are padded to a multiple of 32 as `Scheme.quantize` pads them. Scales may be infinite.
    """
    n, blocks = len(raw), raw.reshape(len(raw), -1, 2 + BLOCK // 2)
    groups, rows = blocks.shape[1], round_up(n, ROW_MULTIPLE)
    codes = np.full((rows, groups, 2, BLOCK // 2), _ZERO, np.uint8)
    codes[:n, :, 0], codes[:n, :, 1] = blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4
    scales = np.zeros((rows, groups), np.float16)
    scales[:n] = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0]
    return {
        "codes": tile_nibbles(codes.reshape(rows, groups * BLOCK)),
        "scales": tile_rows(scales),
    }


def _bytes_of(scales: NDArray[np.float16]) -> U8:
    """[n, G] -> [n, G, 2], little endian."""
    return np.ascontiguousarray(scales, "<f2").view(np.uint8).reshape(*scales.shape, 2)
