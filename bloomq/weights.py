"""Weights as values: a stored matrix and a layer norm, wherever their bytes lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bloomq.config import BloomConfig
from bloomq.schemes import Array, Scheme

F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A matrix [N, K] in the layout of its scheme.

    parts: the arrays that `scheme.parts(shape)` lists; bf16 values as uint16.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    parts: Mapping[str, Array]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def dequantize(self) -> F32:
        """[N, K] float32."""
        return self.scheme.dequantize(self.parts, self.shape)

    def rows(self, ids: NDArray[np.int64]) -> F32:
        """Rows `ids` [M] of the matrix as float32 [M, K], without touching the others."""
        return self.scheme.dequantize_rows(self.parts, ids)[:, : self.shape[1]]


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """A layer norm: gain [C], bias [C] and the epsilon added to the variance."""

    name: str
    gain: F32
    bias: F32
    epsilon: float


class Weights(Protocol):
    """Where a model's layers come from: a pack, or anything with the same weights."""

    @property
    def config(self) -> BloomConfig: ...
    def matrix(self, name: str) -> Matrix:
        """The matrix of a weight: `lm_head` is `wte` where they are tied."""
        ...

    def vector(self, key: str, length: int) -> F32:
        """A bias, by its key: `h.0.attn.qkv.bias`."""
        ...

    def norm(self, name: str) -> Norm: ...
