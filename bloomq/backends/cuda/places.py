"""Where the tokens of a step lie in a cache, as its layers read it on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bloomq.layers import Span

I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Ones:
    """Rows that get one token each, whose keys are read together.

    at: int64 [R], which tokens of the step they are, None: all; rows: int64 [R]; lengths: int64
    [R], tokens held after the step (0: padding, which sees nothing); reach: how many keys are
    looked at, no length is more; in_order: rows are 0 .. R - 1, so their keys lie together.
    """

    at: torch.Tensor | None
    rows: torch.Tensor
    lengths: torch.Tensor
    reach: int
    in_order: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """A row that gets tokens start .. stop of the step, behind the `past` that it holds."""

    row: int
    start: int
    stop: int
    past: int


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where the tokens of a step lie in a cache. slots: int64 [M]; each token belongs to `ones` or
    to one of `pieces`."""

    batch: int
    capacity: int
    slots: torch.Tensor
    ones: Ones | None
    pieces: tuple[Piece, ...]

    @classmethod
    def of(
        cls, span: Span, lengths: I64, batch: int, capacity: int, device: torch.device
    ) -> Places:
        """lengths: of all rows, before the step."""
        counts, past = span.counts, lengths[span.rows]
        within = np.arange(span.starts[-1]) - np.repeat(span.starts[:-1], counts)
        slots = np.repeat(span.rows * capacity + past, counts) + within  # [M]
        single = counts == 1
        at, rows, totals = span.starts[:-1][single], span.rows[single], past[single] + 1
        packed = torch.from_numpy(np.concatenate([slots, at, rows, totals])).to(device)
        ones = None
        if len(at):
            tokens, in_cache, held = packed[len(slots) :].view(3, len(at))
            ones = Ones(
                None if single.all() else tokens, in_cache, held, int(totals.max()),
                in_order=np.array_equal(rows, np.arange(len(rows))),
            )  # fmt: skip
        long = zip(span.rows, span.starts[:-1], span.starts[1:], past, strict=True)
        pieces = tuple(Piece(*map(int, each)) for each in long if each[2] - each[1] > 1)
        return cls(batch, capacity, packed[: len(slots)], ones, pieces)
