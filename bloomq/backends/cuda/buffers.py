"""A layer's keys and values in buffers of a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FAINT = 1e-30  # largest component of a vector that int8 holds as zeros: 127 / it is finite


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer's keys and values in slots: token t of row r lies in slot r * capacity + t, and the
    last slot is nobody's, for what padding writes.

    codes: [2, slots, H, D], keys and then values, float32, float16 or int8; scales: float32
    [2, slots, H], what int8 codes are multiplied with, of size 0 for others. by_triton: may
    Triton's kernel read them?
    """

    codes: torch.Tensor
    scales: torch.Tensor
    by_triton: bool = False

    def store(self, slots: torch.Tensor, vectors: torch.Tensor) -> None:
        """Keys and values [2, M, H, D] into slots [M]; int8 rounded half to even, with the scale
        peak / 127 for each vector."""
        if self.codes.dtype == torch.int8:
            wide = vectors.float()
            peak = wide.abs().amax(dim=-1, keepdim=True)  # [2, M, H, 1]
            faint = peak < FAINT
            vectors = torch.round(wide * (127 / peak).masked_fill(faint, 0))
            self.scales.index_copy_(1, slots, (peak / 127).masked_fill(faint, 0)[..., 0])
        self.codes.index_copy_(1, slots, vectors.to(self.codes.dtype))

    @property
    def slots(self) -> int:
        return self.codes.shape[1]

    @property
    def parts(self) -> list[torch.Tensor]:
        """Its buffers, [2, slots, ...]."""
        return [part for part in (self.codes, self.scales) if part.numel()]

    def copy_to(self, other: Layer, mine: tuple[int, int], theirs: tuple[int, int]) -> None:
        """Copy what both have room for; mine, theirs: rows and capacity of each."""
        rows, tokens = map(min, mine, theirs)
        for source, target in zip(self.parts, other.parts, strict=True):
            target_rows = by_row(target, *theirs)[:, :rows, :tokens]
            target_rows.copy_(by_row(source, *mine)[:, :rows, :tokens])

    def first(self, slots: int) -> Layer:
        """A layer of so many slots in the memory of this one."""
        codes, scales = (
            part.view(-1)[: part[:, :slots].numel()].view(2, slots, *part.shape[2:])
            if part.numel() else part
            for part in (self.codes, self.scales)
        )  # fmt: skip
        return Layer(codes, scales, self.by_triton)

    def restored(self, codes: torch.Tensor, scales: torch.Tensor, to: torch.dtype) -> torch.Tensor:
        """Parts of both, [..., H, D] and [..., H], as numbers [..., H, D]."""
        if not self.scales.numel():
            return codes.to(to)
        return (codes.float() * scales[..., None]).to(to)


def by_row(part: torch.Tensor, batch: int, capacity: int) -> torch.Tensor:
    """A view of a buffer [2, slots, ...] as [2, batch, capacity, ...]."""
    return part[:, :-1].view(2, batch, capacity, *part.shape[2:])
