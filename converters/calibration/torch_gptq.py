"""GPTQ and the descent after it on torch's device: `gptq`, with all rows at once.

A column is a handful of kernels over its rows, so their launches decide the time, and rows are
many. What 128 columns get from all before them, or from all others, is one product. Nothing in the
loops waits for the device. Invariant: products are float32's own, see `torch_engine`.
"""

from __future__ import annotations

import torch

from bloomq.grids import Grid

from .gptq import BLOCK, SHRINK
from .torch_factor import TorchFactor

Tensor = torch.Tensor


class TorchGrid:
    """A grid whose numbers lie on torch's device."""

    def __init__(self, grid: Grid, device: torch.device) -> None:
        self.lowest, self.highest, self._is_uniform = grid.lowest, grid.highest, grid.is_uniform
        self._numbers, self._midpoints = (
            torch.from_numpy(x).to(device) for x in (grid.numbers, grid.midpoints)
        )

    def nearest(self, x: Tensor) -> Tensor:
        """`Grid.nearest`; x may be overwritten."""
        if self._is_uniform:
            return x.round_().clamp_(self.lowest, self.highest)
        return self._numbers.take(torch.bucketize(x, self._midpoints))


def gptq(
    wt: Tensor, by: TorchFactor, group: int, grid: TorchGrid, *, fixed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes float32 [K, N] and scales [K/group, N], or `fixed` [1, N], of wt [K, N]."""
    k, n = wt.shape
    codes, errors = torch.empty_like(wt), torch.empty_like(wt)  # errors in the factor's order
    scales = torch.empty((k // group, n), dtype=wt.dtype, device=wt.device)
    shrink = torch.tensor(SHRINK, device=wt.device)[:, None, None]
    firsts = by.order[::group].tolist()  # of each group a column
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        fed = by.unit[:start, start:stop].T @ errors[:start]
        for at in range(start, stop, min(group, stop - start)):
            part = slice(at, min(at + group, stop))
            columns, own = by.order[part], slice(part.start - start, part.stop - start)
            w, to_come = wt[columns], fed[own]
            tried = _scales_of(w + to_come, shrink, grid) if fixed is None else fixed
            q, scale = _best(w, to_come, by.unit[part, part], by.weight[part], tried, grid)
            codes[columns] = q
            torch.sub(w, q * scale, out=errors[part])
            fed[own.stop :].addmm_(by.unit[part, part.stop : stop].T, errors[part])
            if fixed is None:
                scales[firsts[at // group] // group] = scale
    return codes, scales if fixed is None else fixed


def _scales_of(v: Tensor, shrink: Tensor, grid: TorchGrid) -> Tensor:
    """What a group's scale is tried at, [S, N], of its values v [g, N], as on the CPU."""
    up, down = v.amax(dim=0).clamp(min=0), (-v).amax(dim=0).clamp(min=0)
    above = torch.maximum(up / grid.highest, down / -grid.lowest)
    below = -torch.maximum(up / -grid.lowest, down / grid.highest)
    return half(shrink * torch.stack([above, below])).flatten(0, 1)


def half(x: Tensor) -> Tensor:
    return x.half().float()


def _best(
    w: Tensor, fed: Tensor, unit: Tensor, weight: list[float], tried: Tensor, grid: TorchGrid
) -> tuple[Tensor, Tensor]:
    """Codes [g, N] of w + fed [g, N] with that of the scales `tried` [S, N] which leaves least, and
    this scale [N]; infinity, which is refused, where all leave what is no number."""
    inverse = torch.where(tried == 0, 0, 1 / tried)
    later = fed.expand(len(tried), *fed.shape).clone()  # [S, g, N]
    codes = torch.empty(later.shape, dtype=torch.int8, device=w.device)
    loss = torch.zeros_like(tried)
    for k in range(len(w)):
        v = w[k] + later[:, k]
        q = grid.nearest(v * inverse)
        codes[:, k] = q
        stored = q.mul_(tried)
        v -= stored
        loss.addcmul_(v, v, value=weight[k])
        error = torch.sub(w[k], stored, out=stored)
        later[:, k + 1 :].addcmul_(unit[k, k + 1 :, None], error[:, None])
    if len(tried) == 1:
        return codes[0].float(), tried[0]
    least, pick = torch.where(loss.isnan(), torch.inf, loss).min(dim=0)
    scale = tried.gather(0, pick[None])[0]
    q = codes.gather(0, pick.expand(1, *w.shape))[0].float()
    return q, torch.where(least < torch.inf, scale, torch.inf)


def descend(
    wt: Tensor, h: Tensor, codes: Tensor, scales: Tensor, grid: TorchGrid, sweeps: int
) -> Tensor:
    """Set every scale (but one that a whole row shares), then every code, to what is best given all
    the others, `sweeps` times over; the errors [K, N] that are left."""
    k, group = len(wt), len(wt) // len(scales)
    diagonal = h.diagonal().tolist()
    errors = wt - values_of(codes, scales)
    for start in [at for _ in range(sweeps) for at in range(0, k, BLOCK)]:
        stop = min(start + BLOCK, k)
        own, left = h[start:stop, start:stop], h[start:stop] @ errors  # the gradient [128, N]
        for at in range(start, stop, min(group, stop - start)):
            end = min(at + group, stop)
            scale = scales[at // group]
            if group <= BLOCK:
                part, here = slice(at, end), slice(at - start, end - start)
                moved = _step_scale(own[here, here], codes[part], scale, left[here])
                errors[part] -= moved
                left[here.start :].addmm_(own[here.start :, here], moved, alpha=-1)
            inverse = torch.where(scale == 0, 0, 1 / scale)
            for column in range(at, end):
                j, old = column - start, codes[column]
                best = torch.addcmul(old, left[j], inverse, value=1 / diagonal[column])
                code = grid.nearest(best)
                step = torch.sub(code, old).mul_(scale)
                codes[column] = code
                errors[column] -= step
                left[j + 1 :].addcmul_(own[j, j + 1 :, None], step, value=-1)
    return errors


def _step_scale(h: Tensor, codes: Tensor, scale: Tensor, left: Tensor) -> Tensor:
    """Set a group's scale [N] to the best for its codes [g, N]; by how much its values change.
    left: the gradient of its columns."""
    change = h @ codes
    top, bottom = (codes * left).sum(dim=0), (codes * change).sum(dim=0)
    fresh = torch.where(bottom > 0, half(scale + top / bottom), scale)
    step = fresh - scale
    gain = step * (2 * top - step * bottom)
    # Rounded to half, it may be worse than it was.
    step = torch.where((gain > 0) & (fresh != 0), step, 0)
    scale += step
    return step * codes


def values_of(codes: Tensor, scales: Tensor) -> Tensor:
    """[K, N]."""
    grouped = codes.view(len(scales), -1, codes.shape[1])
    return (grouped * scales[:, None]).view(codes.shape)
