"""The best tokens of each row, found on the device."""

from __future__ import annotations

import torch

Tensor = torch.Tensor
_MINUS_INFINITY = -2139095041  # of float32, as `_ordered` has it


def best_of(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """logits [B, V] float32 -> ids int64 and logits [B, k], best first (of equals the lower id, NaN
    last)."""
    keys, count = _keys(logits), logits.shape[1]
    ids = _id_of(torch.topk(keys, min(k, count), dim=1).values, count)
    return ids, logits.gather(1, ids)


def best_id(logits: Tensor) -> Tensor:
    """[B, V] -> int64 [B], of equals the lowest."""
    return _id_of(_keys(logits).amax(dim=1), logits.shape[1])


def _keys(logits: Tensor) -> Tensor:
    """int64 [B, V] that order as the logits do, of equals the lower id first: no two are equal."""
    places = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    keys = _ordered(logits).long()  # in place from here on: `placement.work` counts the bytes
    return keys.bitwise_left_shift_(32).bitwise_or_(places)


def _id_of(keys: Tensor, count: int) -> Tensor:
    return (count - 1) - (keys & 0xFFFFFFFF)


def _ordered(x: Tensor) -> Tensor:
    """float32 -> int32 in the same order, the zeros alike, NaN least."""
    bits = (x + 0.0).view(torch.int32)  # -0 + 0 is 0
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)  # negative ones backwards
    return ordered.masked_fill_(torch.isnan(x), _MINUS_INFINITY - 1)


def logsumexp(logits: Tensor) -> Tensor:
    """[B, V] -> float64 [B]: 250,880 terms in float32 may lose more than 1e-6. NaN where a logit
    is, or +inf."""
    wide = logits.to(torch.float64, copy=True)
    peak = wide.amax(dim=1, keepdim=True)
    return peak[:, 0] + wide.sub_(peak).exp_().sum(dim=1).log()


def row_sums(row: Tensor, temperature: float) -> Tensor:
    """[V] -> float64 [6]: the best logit and what `levels.Sums` has of the others, in its order."""
    wide = row.double()
    best = wide.max()
    d = (wide - best) / temperature
    possible = d != -torch.inf
    term, d = d.exp(), torch.where(possible, d, 0.0)
    return torch.stack([best, term.sum(), possible.sum(), d.sum(), (d * d).sum(), (term * d).sum()])
