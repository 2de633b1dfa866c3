"""The factor of a moment on torch's device: see `factor`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .factor import EXTRA, not_definite

Tensor = torch.Tensor
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class TorchFactor:
    """H = R D R.T of the columns in `order`: unit [K, K] is R; weight [K] is D, on the host, which
    launches a kernel with each of its values."""

    order: Tensor
    unit: Tensor
    weight: list[float]


def cholesky(h: Tensor) -> Tensor:
    """Its lower factor. Raises: NumericError where it is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(h)
    if int(failed):
        raise not_definite()
    found: Tensor = lower
    return found


def factor(h: Tensor, order: I64) -> TorchFactor:
    """The factor of h, with more of its own mean added where it is not positive definite.

    Bytes: at once three times h's. Raises: NumericError.
    """
    back = torch.from_numpy(order[::-1].copy()).to(h.device)
    lower = _decomposed(h, back)
    diagonal = lower.diagonal().flip(0).clone()
    unit = lower.flip((0, 1))
    del lower
    unit /= diagonal
    weight = diagonal.double().square().tolist()
    return TorchFactor(back.flip(0), unit, weight)


def _decomposed(h: Tensor, back: Tensor) -> Tensor:
    """Of h turned round. Raises: NumericError."""
    mean = float(h.diagonal().mean(dtype=torch.float64))
    for extra in EXTRA:
        turned = h[back[:, None], back]
        turned.diagonal().add_(extra * mean)
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not int(failed):
            found: Tensor = lower
            return found
        del turned, lower
    raise not_definite()
