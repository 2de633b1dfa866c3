"""The sums of a calibration on torch's device: moments, and what matrices should make up for.

As on the CPU, sums are taken about the first rows' mean and in float32. Products are float32's own,
not TF32's: see `torch_engine`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .engine import Sums
from .making_up import check_finite, damping_of
from .torch_factor import cholesky

Tensor = torch.Tensor
F32 = NDArray[np.float32]


def there(x: Any, device: torch.device) -> Tensor:
    """x, a tensor or NumPy's, float32 on the device."""
    if isinstance(x, Tensor):
        return x
    # Scratch files are mapped to be read only, which torch cannot express: it is never written to.
    return torch.from_numpy(np.require(x, np.float32, ["C", "W"])).to(device)


class TorchMoments:
    """`Sums` on a device. Bytes: 4 K^2, and 12 M K for rows [M, K] under way."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._count = device, 0
        self._centre: Tensor | None = None
        self._total: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, x: Any) -> None:
        x = there(x, self._device)
        if self._centre is None or self._total is None or self._squares is None:
            k = x.shape[1]
            self._centre = x.mean(dim=0, dtype=torch.float64).float()
            self._total = torch.zeros(k, dtype=torch.float64, device=self._device)
            self._squares = torch.zeros((k, k), dtype=torch.float32, device=self._device)
        x = x - self._centre
        self._total += x.sum(dim=0, dtype=torch.float64)
        self._squares.addmm_(x.T, x)
        self._count += len(x)

    def result(self, *, central: bool) -> tuple[F32, Tensor]:
        moment, self._squares = self._squares, None
        assert self._centre is not None and self._total is not None and moment is not None
        shift = self._total / self._count
        mean = (self._centre + shift).float()
        moment.div_(self._count).addr_(shift.float(), shift.float(), alpha=-1)
        if not central:
            moment.addr_(mean, mean)
        return mean.cpu().numpy(), moment


class TorchWanted:
    """`Regression` on a device: `making_up.Wanted`, and its equations.

    stream: [tokens, N], NumPy's. Bytes: 4 N K while it sums; then a copy of the moment, its factor
    and twice 4 N K more.
    """

    def __init__(self, stream: F32, moments: Sums, device: torch.device) -> None:
        self._stream, self._moments, self._device, self._count = stream, moments, device, 0
        self._centres: tuple[Tensor, Tensor] | None = None
        self._totals: tuple[Tensor, Tensor] | None = None
        self._cross: Tensor | None = None

    def add(self, a: Any, before: Any) -> None:
        a, before = there(a, self._device), there(before, self._device)
        self._moments.add(a)
        wanted = there(self._stream[self._count : self._count + len(a)], self._device)
        both = wanted - before, a
        if self._centres is None or self._totals is None or self._cross is None:
            n, k = both[0].shape[1], a.shape[1]
            self._centres = both[0].mean(dim=0), a.mean(dim=0)
            self._totals = tuple(  # type: ignore[assignment]
                torch.zeros(m, dtype=torch.float64, device=self._device) for m in (n, k)
            )
            self._cross = torch.zeros((n, k), dtype=torch.float32, device=self._device)
        assert self._totals is not None
        r, a = both[0] - self._centres[0], a - self._centres[1]
        self._totals[0].add_(r.sum(dim=0, dtype=torch.float64))
        self._totals[1].add_(a.sum(dim=0, dtype=torch.float64))
        self._count += len(a)
        self._cross.addmm_(r.T, a)

    def weights(self, w: F32, mean: F32, moment: Tensor) -> tuple[F32, F32]:
        """As `making_up.Wanted.weights`. Raises: NumericError."""
        assert self._centres is not None and self._totals is not None and self._cross is not None
        cross, self._cross = self._cross, None
        shift_r, shift_a = (total / self._count for total in self._totals)
        cross.div_(self._count).addr_(shift_r.float(), shift_a.float(), alpha=-1)
        check_finite(float(cross.sum(dtype=torch.float64)))
        damping = float(damping_of(moment.diagonal().cpu().numpy(), self._count))
        cross.add_(there(w, self._device), alpha=damping)
        damped = moment.clone()
        damped.diagonal().add_(damping)
        lower = cholesky(damped)
        del damped
        found = torch.cholesky_solve(cross.T, lower).T.cpu().numpy()
        wanted = (self._centres[0] + shift_r).float().cpu().numpy()
        return np.ascontiguousarray(found), wanted - np.einsum("nk,k->n", found, mean)
