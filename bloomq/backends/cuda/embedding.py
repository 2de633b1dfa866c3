"""Rows of a stored table as float32."""

from __future__ import annotations

import torch

from bloomq.backends.cuda.stored import Stored, restored


class CudaEmbedding:
    """ids int64 [M] on the device -> table[ids] [M, C] float32, reading those rows alone."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return restored(self._stored.picked(ids))[:, : self._stored.shape[1]]
