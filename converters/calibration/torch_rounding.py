"""Rows of a matrix rounded on torch's device: GPTQ, then descent, thousands of rows at once."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from bloomq.schemes import Scheme, int8_scales

from .engine import Found
from .factor import column_order
from .gptq import Codes
from .rounding import ROW_SHRINK, damping_of, grid_of, group_of, ordered_by, spans_of
from .torch_factor import factor
from .torch_gptq import TorchGrid, descend, gptq
from .torch_sums import there

Tensor = torch.Tensor
F32 = NDArray[np.float32]
_ROWS = 16384  # at once: of a group of 128, 16 scales that are tried are 0.7 GB
_REACH = 512  # columns whose errors are summed in float64 at a time


class TorchRounding:
    """`Rounding` on the moment's device. moment: [K, K], taken over and overwritten."""

    def __init__(self, moment: Tensor, scheme: Scheme, *, damping: float, sweeps: int) -> None:
        k = scheme.padded((1, len(moment)))[1]
        self._scheme, self._sweeps, border = scheme, sweeps, k - len(moment)
        self._h = torch.nn.functional.pad(moment, (0, border, 0, border)) if border else moment
        diagonal = self._h.diagonal()  # a view
        added = damping_of(diagonal.cpu().numpy(), damping)
        self._added = torch.from_numpy(added).to(self._h.device)
        diagonal += self._added
        self._group = group_of(scheme, k)
        self._grid = TorchGrid(grid_of(scheme), self._h.device)
        order = column_order(diagonal.cpu().numpy().copy(), ordered_by(scheme))
        self._factor = factor(self._h, order)

    def rows(self, w: F32, nearest: F32) -> list[Found]:
        starts = range(0, len(w), _ROWS)
        return [
            found
            for at in starts
            for found in self._some(w[at : at + _ROWS], nearest[at : at + _ROWS])
        ]

    def _some(self, w: F32, nearest: F32) -> list[Found]:
        wt, others = (self._columns_first(rows) for rows in (w, nearest))
        int8 = self._scheme.name == "int8"
        fixed = row_scales(wt, self._h.diagonal()) if int8 else None
        codes, scales = gptq(wt, self._factor, self._group, self._grid, fixed=fixed)
        left = descend(wt, self._h, codes, scales, self._grid, self._sweeps)
        ours = self._errors(left)
        worse = ~(ours <= self._errors(torch.sub(wt, others, out=others)))  # or no number
        q, s, rows = codes.to(torch.int8).cpu().numpy(), scales.cpu().numpy(), worse.cpu().numpy()
        return [
            Found(Codes(q[:, at], s[:, at], self._group), np.flatnonzero(rows[at]))
            for at in spans_of(q.shape[1])
        ]

    def _columns_first(self, w: F32) -> Tensor:
        """w [n, k] -> [K, N], bordered with zeros to what the scheme stores."""
        n, k = self._scheme.padded(w.shape)
        border = (0, n - w.shape[0], 0, k - w.shape[1])
        return torch.nn.functional.pad(there(w, self._h.device).T, border).contiguous()

    def _errors(self, e: Tensor) -> Tensor:
        """e [K, N] -> float64 [N]: each row's error under the moment as it was, without damping."""
        total = torch.zeros(e.shape[1], dtype=torch.float64, device=e.device)
        for start in range(0, len(e), _REACH):
            own = slice(start, start + _REACH)
            part = self._h[own] @ e
            part.addcmul_(self._added[own, None], e[own], value=-1)
            total += (part.double() * e[own]).sum(dim=0)
        return total


def row_scales(wt: Tensor, diagonal: Tensor) -> Tensor:
    """[1, N]: the scale of each of int8's rows, of a few by the error that H's diagonal weighs."""
    largest = torch.from_numpy(int8_scales(wt.abs().amax(dim=0).cpu().numpy())).to(wt.device)
    best, least = largest, torch.full_like(largest, torch.inf)
    for shrink in ROW_SHRINK:
        scale = largest * shrink
        codes = (wt / torch.where(scale == 0, 1, scale)).round_().clamp_(-127, 127)
        error = diagonal @ torch.sub(wt, codes.mul_(scale)).square_()
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best[None]
