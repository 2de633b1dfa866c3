"""Matrices that GPTQ and AWQ packed: from their int32 words to codes, zeros and scales, a block of
our rows at a time.

Both store the transpose: our row is their column. So a block of rows is a band of columns, and
bands are read wide and kept for the blocks that follow: every byte is read about once.

    weight[n, k] = (code[n, k] - zero[n, group of k]) * scale[n, group of k]

Source: AutoGPTQ, nn_modules/qlinear/qlinear_cuda.py; AutoAWQ, awq/utils/packing_utils.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import CheckpointError
from bloomq.grids import GRIDS
from bloomq.schemes import (
    ROW_MULTIPLE,
    Array,
    Scheme,
    bf16_to_f32,
    round_up,
    tile_bytes,
    tile_nibbles,
    tile_rows,
    tile_sixes,
)

from .source import SourceTensor

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
I16 = NDArray[np.int16]
WORD_BITS = 32
# A band is any of 7b1's matrices whole (33 MB), and a 13th of 176B's largest (411 MB).
_BAND_BYTES, _MOST_BANDS = 32 << 20, 6
# Nibble i of a word of AWQ holds column _AWQ_COLUMNS[i] of its eight.
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_words(words: Array, bits: int) -> U8:
    """[P, n] int32 -> [32 P / bits, n]: code j of a column lies in bits [bits j, bits (j + 1)) of
    its words, read as one string of bits from the lowest. P a multiple of `bits`."""
    cycles = words.view(np.uint32).reshape(-1, bits, words.shape[1])
    codes = np.empty((len(cycles), WORD_BITS, words.shape[1]), np.uint8)
    for j in range(WORD_BITS):
        word, shift = divmod(bits * j, WORD_BITS)
        value = cycles[:, word] >> np.uint32(shift)
        if shift + bits > WORD_BITS:  # 3 bits: two codes of 32 lie in two words
            value = value | (cycles[:, word + 1] << np.uint32(WORD_BITS - shift))
        codes[:, j] = value & np.uint32((1 << bits) - 1)
    return codes.reshape(-1, words.shape[1])


def unpack_awq(words: Array) -> U8:
    """[K, n / 8] int32 -> [K, n] of 0..15."""
    codes = np.empty((*words.shape, 8), np.uint8)
    for i, column in enumerate(_AWQ_COLUMNS):
        codes[..., column] = (words.view(np.uint32) >> np.uint32(4 * i)) & np.uint32(15)
    return codes.reshape(len(words), -1)


class Bands:
    """What was read last of a checkpoint's packed matrices: a few pieces, whatever its size."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[tuple[str, int], Any] = OrderedDict()

    def __reduce__(self) -> tuple[type[Bands], tuple[()]]:
        return Bands, ()  # another process reads for itself

    def get(self, name: str, at: int, read: Callable[[], Any]) -> Any:
        """The piece of `name` at `at`; one thread reads, the others wait for it."""
        with self._lock:
            if (name, at) not in self._kept:
                self._kept[name, at] = read()
                while len(self._kept) > _MOST_BANDS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end((name, at))
            return self._kept[name, at]


@dataclass(frozen=True, slots=True)
class Grid:
    """One packed matrix [N, K]; what it is made of has been checked to be of these sizes.

    group: columns that share a scale; K: all. zero_shift: what is added to a stored zero. index:
    the group of every column, in any order; None: in order. divisors: [K], each column's weights
    are divided by its own.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group: int
    is_awq: bool
    zero_shift: int
    qweight: SourceTensor
    qzeros: SourceTensor
    scales: SourceTensor
    index: SourceTensor | None
    divisors: SourceTensor | None
    bands: Bands

    @property
    def tensors(self) -> tuple[SourceTensor | None, ...]:
        """What the matrix is read from."""
        return self.qweight, self.qzeros, self.scales, self.index, self.divisors

    def rows(self, start: int, stop: int) -> F32:
        """Rows [start, stop) dequantized; exact but for `divisors`.

        Raises: CheckpointError.
        """
        steps, scales, groups = self._block(start, stop)
        weights = steps.astype(np.float32)
        weights *= scales.astype(np.float32)[:, groups]
        if self.divisors is not None:
            weights /= _divisors(self.divisors)
        return weights

    def parts(self, scheme: Scheme, start: int, stop: int) -> dict[str, Array]:
        """Rows [start, stop) as the arrays of a scheme whose grid this is.

        Raises: CheckpointError where it is not, against what the checkpoint's settings say.
        """
        steps, scales, groups = self._block(start, stop)  # [n, K], [n, K / group]
        self._check_order(groups)
        if scheme.name == "int8":
            return self._int8_parts(scheme, steps, scales)
        low = GRIDS[scheme.name].lowest
        if steps.min() < low or steps.max() >= -low:
            raise CheckpointError(
                f"{self.name}: weights of {steps.min()} to {steps.max()} steps, expected {low} to "
                f"{-low - 1} of a symmetric grid: choose a --scheme to quantize them anew"
            )
        n, k = scheme.padded((len(steps), self.shape[1]))
        codes = np.full((n, k), -low, np.uint8)  # the code of 0
        codes[: len(steps), : self.shape[1]] = steps - low
        half = np.zeros((n, k // scheme.group_size), np.float16)
        half[: len(steps)] = scales[:, groups[:: scheme.group_size]]
        tiled = tile_nibbles(codes) if scheme.name == "int4" else tile_sixes(codes)
        return {"codes": tiled, "scales": tile_rows(half)}

    def _int8_parts(self, scheme: Scheme, steps: I16, scales: Array) -> dict[str, Array]:
        """int8 goes to -127: a row with -128 in it is quantized anew."""
        n, k = scheme.padded((len(steps), self.shape[1]))
        codes, wide = np.zeros((n, k), np.int8), np.zeros(n, np.float32)
        fits = np.abs(steps).max(axis=1) <= 127
        row_scales = scales[:, 0].astype(np.float32)
        codes[: len(steps), : self.shape[1]][fits] = steps[fits]
        wide[: len(steps)][fits] = row_scales[fits]
        parts: dict[str, Array] = {"codes": tile_bytes(codes), "scales": wide}
        if fits.all():
            return parts
        values = np.zeros((n, self.shape[1]), np.float32)
        values[: len(steps)] = steps * row_scales[:, None]
        anew = scheme.quantize(values)
        rows = np.flatnonzero(~fits)
        parts["codes"][rows // 16, :, rows % 16] = anew["codes"][rows // 16, :, rows % 16]
        parts["scales"][rows] = anew["scales"][rows]
        return parts

    def _block(self, start: int, stop: int) -> tuple[I16, Array, NDArray[np.int64]]:
        """Code - zero [n, K], scales [n, groups] as stored or float32, and the group of every
        column."""
        first = start // ROW_MULTIPLE * ROW_MULTIPLE
        last = min(round_up(stop, ROW_MULTIPLE), self.shape[0])
        pieces = []
        while first < last:
            width = self._band_rows()
            band = first // width * width
            end = min(last, band + width)
            pieces.append(self._unpack(band, first - band, end - band))
            first = end
        inside = slice(start % ROW_MULTIPLE, start % ROW_MULTIPLE + stop - start)
        codes, zeros, scales = (np.concatenate(part)[inside] for part in zip(*pieces, strict=True))
        groups = self._groups(scales.shape[1])
        return codes.astype(np.int16) - zeros[:, groups], scales, groups

    def _band_rows(self) -> int:
        """Our rows in a band: as many as fill it, in whole words of qzeros."""
        rows = _BAND_BYTES * self.shape[0] // max(self.qweight.nbytes, 1)
        return max(ROW_MULTIPLE, rows // ROW_MULTIPLE * ROW_MULTIPLE)

    def _unpack(self, band: int, first: int, last: int) -> tuple[U8, I16, Array]:
        """Rows [first, last) of the band that begins at row `band`: codes [n, K], zeros and scales
        [n, groups]."""
        stop = min(band + self._band_rows(), self.shape[0])
        words, zeros, scales = self.bands.get(self.name, band, partial(self._read, band, stop))
        bits, per_word = self.bits, WORD_BITS // self.bits
        if self.is_awq:
            codes = unpack_awq(words[:, first // per_word : last // per_word])
            zero = unpack_awq(zeros[:, first // per_word : last // per_word]).T
        else:
            codes = unpack_words(np.ascontiguousarray(words[:, first:last]), bits)
            part = zeros[:, first * bits // WORD_BITS : last * bits // WORD_BITS]
            zero = unpack_words(np.ascontiguousarray(part.T), bits)
        shifted = zero.astype(np.int16) + np.int16(self.zero_shift)
        return np.ascontiguousarray(codes.T), shifted, scales[:, first:last].T

    def _read(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        """Words of the codes, words of the zeros, scales of rows [start, stop)."""
        packed = (start * self.bits // WORD_BITS, stop * self.bits // WORD_BITS)
        words = columns_of(self.qweight, *(packed if self.is_awq else (start, stop)))
        scales = columns_of(self.scales, start, stop)
        if self.scales.dtype == "BF16":
            scales = bf16_to_f32(scales.view(np.uint16))
        if not np.isfinite(scales.astype(np.float32)).all():
            raise CheckpointError(f"{self.scales.name} holds NaN or infinity: damaged")
        return words, columns_of(self.qzeros, *packed), scales

    def _groups(self, count: int) -> NDArray[np.int64]:
        """The group of every column, [K]."""
        k = self.shape[1]
        if self.index is None:
            return np.arange(k) // self.group
        index = self.bands.get(self.index.name, 0, partial(self.index.rows, 0, k))
        if index.min() < 0 or index.max() >= count:
            raise CheckpointError(
                f"{self.index.name} holds groups {index.min()} to {index.max()}, expected 0 to "
                f"{count - 1}: damaged"
            )
        return np.asarray(index, np.int64)

    def _check_order(self, groups: NDArray[np.int64]) -> None:
        if not np.array_equal(groups, np.arange(self.shape[1]) // self.group):
            raise CheckpointError(
                f"{self.name}: its groups are scattered (g_idx), though desc_act is false: choose "
                "a --scheme to quantize it anew"
            )


def _divisors(tensor: SourceTensor) -> F32:
    raw = tensor.rows(0, tensor.shape[0])
    bf16 = tensor.dtype == "BF16"
    values = bf16_to_f32(raw.view(np.uint16)) if bf16 else raw.astype(np.float32)
    if not (np.isfinite(values) & (values != 0)).all():
        raise CheckpointError(f"{tensor.name} holds 0, NaN or infinity: damaged")
    return values


def columns_of(tensor: SourceTensor, start: int, stop: int) -> Array:
    """Columns [start, stop) of a matrix; all of it is read where its reader knows no better."""
    if tensor.columns is not None:
        return tensor.columns(start, stop)
    step = max(1, _BAND_BYTES * tensor.shape[0] // max(tensor.nbytes, 1))
    pieces = []
    for first in range(0, tensor.shape[0], step):
        rows = tensor.rows(first, min(first + step, tensor.shape[0]))
        pieces.append(np.ascontiguousarray(rows[:, start:stop]))
    return np.concatenate(pieces)
