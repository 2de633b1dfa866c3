"""Pages: where the keys and values of 64 tokens lie, as the attention kernels read them.

A page is one piece of memory with all layers and heads, so a row is a list of pages, rows share
what they have in common by referring to the same ones, and forgetting tokens is leaving pages out.
Where a head lies within a page is the same in every page of a cache.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.attention_parts import PAGE
from bloomq.layers import CacheDtype, Stored
from bloomq.schemes import round_up

Array = NDArray[Any]
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
ELEMENTS: dict[str, type[np.generic]] = {"f32": np.float32, "f16": np.float16, "int8": np.int8}
_HUGE = 1 << 21  # the system's large pages on x86-64, and on ARM with small ones of 4 KB
_SPARE_BYTES = 64 << 20  # a prompt's step on bloom-560m
_BLOCK = 16  # keys that lie side by side


def padded_head(head_dim: int) -> int:
    """head_dim as the cache pads it."""
    return round_up(head_dim, 16)


@dataclass(frozen=True, slots=True)
class Layout:
    """What lies where in a page, in this order: keys and values [layer, H, 2, 64 * width] (keys as
    [64/16, width, 16], values as [64, width], width being D padded); int8 scales of both [layer, H,
    2, 64]; the largest |k| of each head [layer, H]. Scales and lengths are float32."""

    n_layer: int
    n_head: int
    head_dim: int
    dtype: CacheDtype

    @property
    def width(self) -> int:
        return padded_head(self.head_dim)

    @property
    def places(self) -> int:
        """Heads of all layers."""
        return self.n_layer * self.n_head

    @property
    def token_bytes(self) -> int:
        """Keys, values and scales of one token."""
        return 2 * self.places * (self.width * np.dtype(self.element).itemsize + self._scale_bytes)

    @property
    def page_bytes(self) -> int:
        return PAGE * self.token_bytes + 4 * self.places

    @property
    def element(self) -> type[np.generic]:
        return ELEMENTS[self.dtype]

    @property
    def _scale_bytes(self) -> int:
        return 4 if self.dtype == "int8" else 0

    def page(self, spare: Spare) -> Page:
        """A page of any content. Raises: MemoryError."""
        memory = spare.take()
        scales_at = 2 * PAGE * self.places * self.width * np.dtype(self.element).itemsize
        lengths_at, heads = PAGE * self.token_bytes, (self.n_layer, self.n_head)
        in_head = PAGE if self._scale_bytes else 0
        return Page(
            spare,
            memory,
            memory[:scales_at].view(self.element).reshape(*heads, 2, PAGE * self.width),
            memory[scales_at:lengths_at].view(np.float32).reshape(*heads, 2, in_head),
            memory[lengths_at:].view(np.float32).reshape(heads),
        )

    def copied(self, page: Page, tokens: int, spare: Spare) -> Page:
        """A page with the first `tokens` of another. Raises: MemoryError."""
        fresh = self.page(spare)
        used = round_up(tokens, _BLOCK) * self.width
        fresh.data[..., :used] = page.data[..., :used]
        fresh.scales[..., :tokens] = page.scales[..., :tokens]
        fresh.key_lengths[:] = page.key_lengths
        return fresh

    def keys(self, page: Page) -> Array:
        """A view of a page's keys, [layer, 64/16, 16, H, width]: block and place make the token."""
        shape = (self.n_layer, self.n_head, PAGE // _BLOCK, self.width, _BLOCK)
        return page.data[:, :, 0].reshape(shape).transpose(0, 2, 4, 1, 3)

    def values(self, page: Page) -> Array:
        """A view of a page's values, [layer, 64, H, width]."""
        shape = (self.n_layer, self.n_head, PAGE, self.width)
        return page.data[:, :, 1].reshape(shape).transpose(0, 2, 1, 3)

    def layer_keys(self, pages: Sequence[Page], layer: int, count: int) -> F32:
        """The first `count` keys of a layer in some pages, as attention reads them, [count, H,
        D]."""
        out = np.empty((count, self.n_head, self.head_dim), np.float32)
        for start, page in zip(range(0, count, PAGE), pages, strict=False):
            part = slice(start, min(count, start + PAGE))
            held = self.keys(page)[layer].reshape(PAGE, self.n_head, self.width)
            out[part] = held[: part.stop - start, :, : self.head_dim]
            if self._scale_bytes:
                out[part] *= _by_token(page.scales)[0, layer, : part.stop - start, :, None]
        return out

    def stored(self, pages: Sequence[Page], length: int) -> Stored:
        """The first `length` tokens of some pages."""
        d, scaled = self.head_dim, self.dtype == "int8"
        shape = (self.n_layer, length, self.n_head, d)
        keys, values = np.empty(shape, self.element), np.empty(shape, self.element)
        scales = np.empty((2, *shape[:3]) if scaled else 0, np.float32)
        for start, page in zip(range(0, length, PAGE), pages, strict=False):
            stop = min(length, start + PAGE)
            held = self.keys(page).reshape(self.n_layer, PAGE, self.n_head, self.width)
            keys[:, start:stop] = held[:, : stop - start, :, :d]
            values[:, start:stop] = self.values(page)[:, : stop - start, :, :d]
            if scaled:
                scales[:, :, start:stop] = _by_token(page.scales)[:, :, : stop - start]
        return Stored(keys, values, scales)

    def fill(self, page: Page, stored: Stored, start: int) -> None:
        """Write the tokens from `start` on into a page, as many as go in."""
        part = slice(start, start + PAGE)
        keys, values = stored.keys[:, part], stored.values[:, part]
        count, d = keys.shape[1], self.head_dim
        padded = np.zeros((self.n_layer, PAGE, self.n_head, self.width), self.element)
        padded[:, :count, :, :d] = keys
        self.keys(page)[:] = padded.reshape(self.keys(page).shape)
        padded[:, :count, :, :d] = values
        self.values(page)[:] = padded
        wide = keys.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity: of what was stored
            if self.dtype == "int8":
                _by_token(page.scales)[:, :, :count] = stored.scales[:, :, part]
                wide *= stored.scales[0, :, part, :, None]
            # Of the keys as attention reads them, so a bound of their scores whoever wrote them.
            page.key_lengths[:] = np.sqrt(np.square(wide).sum(axis=3)).max(axis=1)


def _by_token(scales: F32) -> F32:
    """Scales of a page [layer, H, 2, 64] as a view [2, layer, 64, H]."""
    return scales.transpose(2, 0, 3, 1)


def _mapped(size: int) -> NDArray[np.uint8]:
    """So many bytes of the system's, which they go back to; large ones in large pages: a token's
    step reads every page of its row, and in small ones took 1.2 times as long. No large page is
    begun that would not be filled. Raises: MemoryError."""
    private = {} if os.name == "nt" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    whole = size // _HUGE * _HUGE
    try:
        region = mmap.mmap(-1, size + _HUGE if whole else size, **private)
    except (OSError, ValueError, OverflowError):
        raise MemoryError from None
    memory = np.frombuffer(region, np.uint8)
    first = -memory.ctypes.data % _HUGE if whole else 0
    if whole and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without
            region.madvise(mmap.MADV_HUGEPAGE, first, whole)
    return memory[first : first + size]


class Spare:
    """Memory of pages that nothing refers to any more, no program that runs either: some of it is
    kept, since the system's is all zeros again, which takes as long as a copy."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes, self.most_bytes = page_bytes, _SPARE_BYTES
        self._free: list[NDArray[np.uint8]] = []

    @property
    def nbytes(self) -> int:
        return len(self._free) * self._page_bytes

    def take(self) -> NDArray[np.uint8]:
        """Memory for a page, of any content. Raises: MemoryError."""
        try:
            return self._free.pop()
        except IndexError:
            return _mapped(self._page_bytes)

    def give_back(self, memory: NDArray[np.uint8]) -> None:
        if self.nbytes < self.most_bytes:  # no global: pages may outlive the module
            self._free.append(memory)


class Page:
    """The memory of 64 tokens; see `Layout`. rows: how many rows of the cache refer to it."""

    __slots__ = ("_memory", "_spare", "address", "data", "key_lengths", "rows", "scales")

    def __init__(
        self, spare: Spare, memory: NDArray[np.uint8], data: Array, scales: F32, key_lengths: F32
    ) -> None:
        self._spare, self._memory, self.rows = spare, memory, 0
        self.address = int(memory.ctypes.data)
        self.data, self.scales, self.key_lengths = data, scales, key_lengths

    def __del__(self) -> None:
        if hasattr(self, "_memory"):  # Ctrl-C may cut off its making
            self._spare.give_back(self._memory)


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """The pages of a row, exchanged as a whole: what a program was told of them stays true while
    it runs. table: their addresses."""

    pages: tuple[Page, ...]
    table: I64
    address: int  # of the table

    @classmethod
    def of(cls, pages: Sequence[Page]) -> Pages:
        table = np.array([page.address for page in pages], np.int64)
        return cls(tuple(pages), table, int(table.ctypes.data))
