"""Logits and what the step that made them found out about them: within a CUDA graph this costs no
launch, and the host asks the device once for all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bloomq.backends.cuda.top import best_id, logsumexp
from bloomq.layers import Top

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LogitRows:
    """values: logits [W, V]; told: float64 [W, 3], of each row its best token, that one's logit and
    the logsumexp."""

    values: Tensor
    told: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> LogitRows:
        ids = best_id(logits)
        best = logits.gather(1, ids[:, None])[:, 0]
        return cls(logits, torch.stack([ids.double(), best.double(), logsumexp(logits)], dim=1))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Any) -> LogitRows:
        return LogitRows(self.values[rows], self.told[rows])

    def clone(self) -> LogitRows:
        return LogitRows(self.values.clone(), self.told.clone())

    def top(self) -> Top:
        """The best token of each row."""
        told = self.told.cpu().numpy()
        return Top(told[:, :1].astype(np.int64), told[:, 1:2].astype(np.float32), told[:, 2])
