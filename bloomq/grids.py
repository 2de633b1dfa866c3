"""Grids: the whole numbers that a group's codes stand for, and the scale that it is given."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Grid:
    """What a group's codes 0, 1, 2, ... stand for, in units of its scale: whole numbers, ascending.

    levels: numbers that the group's largest weight is tried at, which let the scale shrink or grow
    a little, whatever lowers the squared error.
    """

    book: tuple[int, ...]
    levels: tuple[float, ...]

    @property
    def lowest(self) -> int:
        return self.book[0]

    @property
    def highest(self) -> int:
        return self.book[-1]

    @property
    def is_uniform(self) -> bool:
        """Does every whole number between the ends have a code?"""
        return self.highest - self.lowest == len(self.book) - 1

    @cached_property
    def numbers(self) -> F32:
        """[codes], by code."""
        return np.array(self.book, np.float32)

    @cached_property
    def midpoints(self) -> F32:
        """[codes - 1]: the code of a value is how many of these lie below it."""
        return (self.numbers[1:] + self.numbers[:-1]) / np.float32(2)

    def nearest(self, x: F32) -> F32:
        """The number that is nearest to each x, none of them NaN; of two, the even one where every
        whole number has a code, otherwise the lower one."""
        if self.is_uniform:
            return np.clip(np.rint(x), np.float32(self.lowest), np.float32(self.highest))
        return self.numbers[np.searchsorted(self.midpoints, x)]

    def codes(self, numbers: F32 | NDArray[np.int8]) -> NDArray[np.uint8]:
        """Numbers of the grid -> their codes."""
        return self._code_of[numbers.astype(np.int8).view(np.uint8)]

    @cached_property
    def _code_of(self) -> NDArray[np.uint8]:
        """[256]: the code of each number, by its byte as int8."""
        table = np.zeros(256, np.uint8)
        table[np.array(self.book, np.int8).view(np.uint8)] = np.arange(len(self.book))
        return table


GRIDS = {
    # Six levels lower the squared error of normal weights by 10 to 11 % against -8 alone, within
    # 1.3 % of what 32 levels reach (docs/experiments.md).
    "int4": Grid(tuple(range(-8, 8)), (-8.0, -8.5, -7.5, -7.0, -6.5, -9.0)),
    "int6": Grid(tuple(range(-32, 32)), (-32.0, -33.0, -31.0)),
    # Denser where weights are: a fifth less squared error than int4's. Found by descent on the
    # error of groups of 64, with 0 among them, which costs 0.4 %; the levels are within 2.1 % of
    # what 20 of them reach (docs/experiments.md).
    # Spans less than 128: as bytes from 0, two products fit the 16 bits of AVX2's dot product.
    "nl4": Grid(
        (-68, -52, -41, -32, -25, -18, -12, -6, 0, 6, 12, 19, 26, 34, 43, 56),
        (-66.0, -70.0, -74.0, 57.0),
    ),
}


def group_scales(w: F32, group_size: int, grid: Grid) -> F32:
    """w [N, K] -> the float32 scale [N, K/G] of each group that minimises its squared error among
    the grid's levels, by least squares on the codes of each."""
    groups = w.reshape(w.shape[0], -1, group_size)  # [N, K/G, G]
    at = np.abs(groups).argmax(axis=2)  # the first of equals
    peak = np.take_along_axis(groups, at[..., None], axis=2)[..., 0]  # [N, K/G], signed
    best = np.zeros(peak.shape, np.float32)
    best_gain = np.full(peak.shape, -1, np.float32)
    inverse_peak = reciprocal(peak)
    for level in grid.levels:
        factor = np.float32(level) * inverse_peak
        wq = np.zeros(peak.shape, np.float32)
        qq = np.zeros(peak.shape, np.float32)
        for k in range(group_size):  # in this order in the compiled twin too: same bits
            value = groups[..., k]
            q = grid.nearest(value * factor)
            wq = wq + value * q
            qq = qq + q * q
        scale = wq / np.where(qq > 0, qq, np.float32(1))
        gain = wq * scale  # squared error = sum(w^2) - gain
        better = gain > best_gain
        best = np.where(better, scale, best)
        best_gain = np.where(better, gain, best_gain)
    return best


def reciprocal(scales: F32) -> F32:
    """1 / scale in float32, and 0 for 0 (and where 1 / scale would overflow)."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    return np.where(np.isinf(inverse), np.float32(0), inverse)
