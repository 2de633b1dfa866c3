"""A matrix on the device: brought there block by block, and laid out there as GPU kernels read it.

    f32, f16, bf16   codes [N, K] of that dtype                           scales: none (size 0)
    int8             codes [N, K] int8                                    scales [N] float32
    int6             codes [N, K] int8, -32..31                           scales [N, K/64] float16
    nl4              codes [N, K/2] uint8, 0..15, 8 is 0                  scales [N, K/G] float16
    int4             codes [N, K/2] uint8, 0..15, 8 is 0                  scales [N, K/G] float16
    nf4              codes [N, K/2] uint8, as bitsandbytes has them       scales [N, K/64] float32

A byte of 4-bit codes holds column 2 i in its high and column 2 i + 1 in its low nibble. N is the
matrix's own; K is padded as `Scheme.padded` says, with codes of 0, so that no group is cut.

Invariant: restored to float32, the values are those of `Scheme.dequantize`, bit for bit.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bloomq.errors import CapacityError
from bloomq.grids import GRIDS
from bloomq.schemes import NF4_CODEBOOK, Array, Scheme
from bloomq.weights import Matrix

# Large enough for the bus (32 MB in 1.3 ms at 25 GB/s, against some 10 us for a copy's start),
# small enough that two of them are nothing.
BLOCK_BYTES = 32 << 20
# What the codes of a scheme stand for, where that is no arithmetic: [16] float32.
BOOKS = {"nl4": GRIDS["nl4"].numbers, "nf4": NF4_CODEBOOK}
_DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "uint16": torch.bfloat16,
    "int8": torch.int8, "uint8": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Stored:
    """A matrix [N, K] = shape on the device, in the layout above."""

    scheme: Scheme
    shape: tuple[int, int]
    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def columns(self) -> int:
        """K, padded."""
        return self.scheme.padded(self.shape)[1]

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.scales.nbytes)

    def rows(self, first: int, stop: int) -> Stored:
        """Rows first .. stop of it: views."""
        scales = self.scales[first:stop] if len(self.scales) else self.scales
        return Stored(self.scheme, (stop - first, self.shape[1]), self.codes[first:stop], scales)

    def picked(self, ids: torch.Tensor) -> Stored:
        """Rows `ids` [M] of it."""
        scales = self.scales[ids] if len(self.scales) else self.scales
        return Stored(self.scheme, (len(ids), self.shape[1]), self.codes[ids], scales)


def restored(stored: Stored, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix, [N, padded K], computed in `dtype`."""
    name, codes, scales = stored.scheme.name, stored.codes, stored.scales
    if stored.scheme.is_float:
        return codes.to(dtype)
    if name == "int8":
        return codes.to(dtype) * scales[:, None].to(dtype)
    return _scaled(codes_of(stored, dtype), scales.to(dtype))


def codes_of(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """What the scales of a quantized matrix are multiplied with, [N, padded K]: exact in float16
    and bfloat16 too but for nf4's."""
    codes, name = stored.codes, stored.scheme.name
    if name in ("int8", "int6"):
        return codes.to(dtype)
    if name == "int4":
        pairs = torch.stack([codes >> 4, codes & 15], dim=2).view(len(codes), -1)
        return pairs.to(dtype) - 8
    return F.embedding(codes.int(), _pairs(name, codes.device, dtype)).view(len(codes), -1)


@cache
def _pairs(name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """What each byte of a scheme's codes stands for, [256, 2]: made when it is first asked for, so
    before a step that asks for it is recorded, in which nothing may come from the host."""
    book = BOOKS[name]
    both = np.stack([book.repeat(16), np.tile(book, 16)], axis=1)
    return torch.tensor(both, device=device).to(dtype)


def _scaled(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """values [N, K] times the scale of each one's group, [N, K/G]."""
    grouped = values.view(*scales.shape, -1)  # [N, K/G, G]
    return (grouped * scales[..., None]).view(values.shape)


class Loader:
    """Brings matrices to a device. A matrix that is there already, such as a tied head, is given
    again: told by the memory its codes lie in."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staging = _Staging(device)
        self._there: dict[object, tuple[weakref.ref[Any], weakref.ref[Stored]]] = {}

    def load(self, matrix: Matrix) -> Stored:
        """Raises: CapacityError where the device's memory is full."""
        first = next(iter(matrix.parts.values()))
        owner = _owner(first)
        key = (matrix.scheme, matrix.shape, first.__array_interface__["data"][0])
        if key in self._there:
            of, there = (reference() for reference in self._there[key])
            if of is owner and there is not None:
                return there
        try:
            stored = self._loaded(matrix)
        except torch.cuda.OutOfMemoryError:
            stored = None  # its traceback holds tensors: raised outside
        if stored is None:
            torch.cuda.empty_cache()
            free_gb = torch.cuda.mem_get_info(self._device)[0] / 1e9
            raise CapacityError(
                f"{matrix.name}: no room for its {matrix.nbytes / 1e9:.2f} GB on {self._device}, "
                f"where {free_gb:.2f} GB are free: use a smaller scheme, or more devices"
            )
        self._there[key] = weakref.ref(owner), weakref.ref(stored)
        return stored

    def _loaded(self, matrix: Matrix) -> Stored:
        scheme, (n, k) = matrix.scheme, matrix.shape
        codes, scales = (
            torch.empty(shape, dtype=dtype, device=self._device)
            for shape, dtype in _layout(scheme, n, scheme.padded((n, k))[1])
        )
        for name, part in matrix.parts.items():
            if part.ndim == 1:
                scales.copy_(torch.tensor(part[:n]))
                continue
            target, row = scales if name == "scales" else codes, 0
            for block in self._staging.blocks(part):
                lines = _lines(block)[: n - row]
                target[row : row + len(lines)] = lines if name != "codes" else _laid(lines, scheme)
                row += len(lines)
        return Stored(scheme, (n, k), codes, scales)


def _layout(
    scheme: Scheme, n: int, k: int
) -> tuple[tuple[tuple[int, ...], torch.dtype], tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of codes and of scales; k: padded."""
    groups = k // scheme.group_size
    if scheme.is_float:
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[scheme.name]
        return ((n, k), dtype), ((0,), torch.float32)
    return {
        "int8": (((n, k), torch.int8), ((n,), torch.float32)),
        "int6": (((n, k), torch.int8), ((n, groups), torch.float16)),
        "nl4": (((n, k // 2), torch.uint8), ((n, groups), torch.float16)),
        "int4": (((n, k // 2), torch.uint8), ((n, groups), torch.float16)),
        "nf4": (((n, k // 2), torch.uint8), ((n, groups), torch.float32)),
    }[scheme.name]


class _Staging:
    """Two buffers in host memory that a GPU may read by itself, filled and sent in turns."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._turn = device, 0
        self._buffers: list[torch.Tensor] = []
        self._sent: list[torch.cuda.Event] = []

    def blocks(self, part: Array) -> Iterator[torch.Tensor]:
        """A stored array [N/16, J, 16, ...] in blocks of whole tiles, on the device. Each is to be
        used before the next but one is asked for. What is sent of a mapped file leaves memory."""
        tile_bytes = part[:1].nbytes
        step = max(1, BLOCK_BYTES // tile_bytes)
        dtype = _DTYPES[part.dtype.name]
        for first in range(0, len(part), step):
            block = part[first : first + step]
            _expect(part[first + step : first + 2 * step])
            sent = self._send(block)
            _forget(block)
            yield sent.view(dtype).view(block.shape)

    def _send(self, block: Array) -> torch.Tensor:
        """The bytes of a block."""
        on_gpu = self._device.type == "cuda"
        size = max(block.nbytes, BLOCK_BYTES)
        if not self._buffers or self._buffers[0].nbytes < block.nbytes:
            self._buffers = [
                torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)
            ]
            self._sent = [_event() for _ in range(2)] if on_gpu else []
        self._turn ^= 1
        if on_gpu:
            self._sent[self._turn].synchronize()  # at once, where it was never recorded
        buffer = self._buffers[self._turn][: block.nbytes]
        flat = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
        np.copyto(buffer.numpy(), flat)
        if not on_gpu:
            return buffer
        there = buffer.to(self._device, non_blocking=True)
        self._sent[self._turn].record(torch.cuda.current_stream(self._device))
        return there


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _lines(block: torch.Tensor) -> torch.Tensor:
    """[N/16, J, 16, ...] -> [N, J, ...]: one line a row."""
    rows = block.transpose(1, 2)  # [N/16, 16, J, ...]
    return rows.reshape(-1, *rows.shape[2:])


def _laid(lines: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Stored codes, one line a row, -> those of the layout above."""
    if scheme.is_float:
        return lines
    if scheme.name == "int8":
        return lines.reshape(len(lines), -1)
    if scheme.name == "int6":
        return (_sixes(lines) - 32).to(torch.int8)
    # A stored byte has column k low and k + 4 high; two neighbours make a byte of either four.
    even, odd = lines[..., 0::2], lines[..., 1::2]  # [N, K/8, 2]
    first, second = (even << 4) | (odd & 15), (even & 0xF0) | (odd >> 4)
    return torch.cat([first, second], dim=-1).reshape(len(lines), -1)


def _sixes(lines: torch.Tensor) -> torch.Tensor:
    """[N, K/16 * 3, 4] uint8 -> [N, K] of 0..63: two blocks of low bits, one of high ones."""
    split = lines.reshape(len(lines), -1, 3, 4)
    halves = split[:, :, :2]  # [N, K/16, 2, 4]
    low = torch.stack([halves & 15, halves >> 4], dim=3).reshape(len(lines), -1)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=lines.device)[:, None]
    high = (split[:, :, 2, None] >> shifts) & 3  # [N, K/16, 4, 4]
    return low | (high.reshape(len(lines), -1) << 4)


# -- memory of a mapped file -----------------------------------------------------------------------


def _owner(array: Array) -> Any:
    """Whose memory an array's is: a mapped file, or the array that others are views of."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        below = owner.base.obj if isinstance(owner.base, memoryview) else owner.base
        if not isinstance(below, np.ndarray | mmap.mmap):
            break
        owner = below
    return owner


def _advise(block: Array, advice: str, *, whole_pages: bool) -> None:
    """Tell the system about the pages of a block, if it is mapped and the system listens."""
    owner = _owner(block)
    if not isinstance(owner, mmap.mmap) or not hasattr(mmap, advice) or not block.nbytes:
        return
    at = np.frombuffer(owner, np.uint8).__array_interface__["data"][0]
    start = block.__array_interface__["data"][0] - at
    stop = start + block.nbytes
    page = mmap.PAGESIZE
    if whole_pages:  # the neighbours' bytes stay
        start, stop = -(-start // page) * page, stop // page * page
    else:
        start = start // page * page
    if stop > start:
        owner.madvise(getattr(mmap, advice), start, stop - start)


def _expect(block: Array) -> None:
    """A block is about to be read: have the system read it now."""
    _advise(block, "MADV_WILLNEED", whole_pages=False)


def _forget(block: Array) -> None:
    """A block has been read: its pages count as this process's memory no more."""
    _advise(block, "MADV_DONTNEED", whole_pages=True)
