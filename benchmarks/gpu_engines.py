"""bloomq on the device under test, over weights that are drawn there."""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
import torch
from gpu_run import Run
from gpu_weights import CODE_DEVIATION, DEVIATION, RandomWeights, config_of

from bloomq.backends.cuda.layers import CudaBackend
from bloomq.backends.cuda.stored import Loader, Stored
from bloomq.heads import Head
from bloomq.layers import Cache, CacheDtype, Span
from bloomq.schemes import ROW_MULTIPLE
from bloomq.weights import Matrix


class DrawnLoader:
    """`Loader` that draws matrices on the device, whatever their parts say.

    How a scheme lies there is read off a matrix of a few rows that was loaded the usual way.
    """

    def __init__(self, device: torch.device) -> None:
        self._loader = Loader(device)
        self._random = torch.Generator(device).manual_seed(0)
        self._there: dict[str, Stored] = {}

    def load(self, matrix: Matrix) -> Stored:
        if matrix.name not in self._there:
            self._there[matrix.name] = self._drawn(matrix)
        return self._there[matrix.name]

    def _drawn(self, matrix: Matrix) -> Stored:
        few, name = (ROW_MULTIPLE, matrix.shape[1]), matrix.scheme.name
        zeros = np.zeros(few, np.float32)
        like = self._loader.load(Matrix("few", matrix.scheme, few, matrix.scheme.quantize(zeros)))
        codes, scales = (
            part.new_empty((matrix.shape[0], *part.shape[1:])) if len(part) else part
            for part in (like.codes, like.scales)
        )
        if codes.is_floating_point():
            codes.normal_(0, DEVIATION, generator=self._random)
        else:
            first, stop = (0, 256) if codes.dtype == torch.uint8 else (-127, 128)
            if name == "int6":
                first, stop = -32, 32
            codes.random_(first, stop, generator=self._random)
            mean = DEVIATION / CODE_DEVIATION[name]
            scales.uniform_(0.9 * mean, 1.1 * mean, generator=self._random)
        return Stored(matrix.scheme, matrix.shape, codes, scales)


class Bloomq:
    """A published model, or "tiny", in one scheme. drawn: on the device; else its weights come from
    the host, as a pack's do, which takes as long as loading one."""

    is_peer = False

    def __init__(
        self, run: Run, model: str, scheme: str, batch: int, capacity: int,
        *, cache_dtype: CacheDtype = "f16", drawn: bool = True,
    ) -> None:  # fmt: skip
        self.name = f"bloomq {scheme}"
        weights = RandomWeights(model, scheme)
        self.backend = CudaBackend(str(run.device), cache_dtype)
        if drawn:
            self.backend._loader = DrawnLoader(run.device)  # type: ignore[assignment]
        self.head = Head(weights, self.backend, "BloomForCausalLM")
        self.cache: Cache = self.head.cache(batch, capacity)
        self.bytes_per_token, self.token_bytes = weights.bytes_per_token, self.cache.token_bytes
        self._ids = np.zeros(batch, np.int64)

    def first_row(self) -> Bloomq:
        """The same model and cache, one row of it."""
        one = copy(self)
        one._ids = self._ids[:1].copy()
        return one

    def start(self, ids: np.ndarray[Any, Any]) -> None:
        """ids [B, T] in steps of whole rows, or of pieces of one."""
        (batch, length), most = ids.shape, self.backend.step_tokens
        for row in range(batch):
            self.cache.truncate(row, 0)
        rows = max(1, most // length)
        for first in range(0, batch, rows):
            some = list(range(first, min(first + rows, batch)))
            for at in range(0, length, most):
                piece = ids[some, at : at + most]
                span = Span.of(some, [piece.shape[1]] * len(some))
                logits = self.head.step(piece.reshape(-1), self.cache, span, span.last)
            self._ids[some] = self.backend.top(logits, 1).ids[:, 0]

    def decode(self, count: int) -> None:
        """As the generation loop does: every step's ids are on the host before the next begins."""
        batch = len(self._ids)
        span, wanted = Span.of(list(range(batch)), [1] * batch), np.arange(batch)
        for _ in range(count):
            logits = self.head.step(self._ids, self.cache, span, wanted)
            self._ids = self.backend.top(logits, 1).ids[:, 0]


def prompts(model: str, batch: int, length: int) -> np.ndarray[Any, Any]:
    """Random ids [B, T], the same for every engine."""
    rng = np.random.default_rng(0)
    return rng.integers(100, config_of(model).vocab_size, (batch, length))
