"""The best tokens of each row, found on the device."""

from __future__ import annotations

import torch

Tensor = torch.Tensor
_MINUS_INFINITY = -2139095041  # of float32, as `_ordered` has it


def best_of(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """logits [B, V] float32 -> ids int64 and logits [B, k], best first (of equals the lower id, NaN
    last)."""
    count = logits.shape[1]
    places = torch.arange(count - 1, -1, -1, device=logits.device)  # [V], the first the largest
    keys = (_ordered(logits).long() << 32) | places
    best = torch.topk(keys, min(k, count), dim=1).values
    ids = (count - 1) - (best & 0xFFFFFFFF)
    return ids, logits.gather(1, ids)


def _ordered(x: Tensor) -> Tensor:
    """float32 -> int32 in the same order, the zeros alike, NaN least."""
    bits = torch.where(x == 0, 0, x).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative ones backwards
    return torch.where(torch.isnan(x), _MINUS_INFINITY - 1, ordered)


def logsumexp(logits: Tensor) -> Tensor:
    """[B, V] -> float64 [B]: 250,880 terms in float32 may lose more than 1e-6. NaN where a logit
    is, or +inf."""
    scaled = logits.double()
    peak = scaled.amax(dim=1, keepdim=True)
    return peak[:, 0] + (scaled - peak).exp().sum(dim=1).log()
