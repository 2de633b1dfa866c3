"""What reads the hidden states: the last layer norm, and the head of an architecture over it."""

from __future__ import annotations

from copy import copy

import numpy as np
from numpy.typing import NDArray

from bloomq.config import Architecture, weight_specs
from bloomq.errors import UsageError
from bloomq.layers import Backend, Cache, Span, Step, X
from bloomq.lora import Adapters, Choices
from bloomq.model import Transformer
from bloomq.weights import Weights

I64 = NDArray[np.int64]


class Head:
    """BLOOM with the head of `architecture`; None: without, hidden states behind the last norm.

    columns: what a token's result has: V logits, one for each label, or C.
    Raises: UsageError where the weights have another head.
    """

    def __init__(
        self, weights: Weights, backend: Backend, architecture: Architecture | None
    ) -> None:
        self.config, self.backend = weights.config, backend
        norm = weights.norm("ln_f")
        self.ln_f = backend.norm(norm)
        if architecture is None:
            self.columns, self.read = self.config.hidden_size, self.ln_f
        else:
            if architecture != self.config.architecture:
                raise UsageError(
                    f"this model has the head of {self.config.architecture}, not of "
                    f"{architecture}: load it as bloomq.{self.config.architecture}"
                )
            spec = weight_specs(self.config)[-1]
            tied = spec.name == "ln_f"  # the embedding is the head
            matrix = weights.matrix("lm_head" if tied else spec.name)
            self.columns = matrix.shape[0]
            has_bias = spec.has_bias and not tied
            bias = weights.vector(f"{spec.name}.bias", self.columns) if has_bias else None
            # A fifth of int8's tokens that are no longer the likeliest are so by rounding what the
            # head reads; its weights' bytes are what a token takes time for, not its products.
            limbs = 2 if matrix.scheme.name == "int8" else 1
            self.read = backend.linear(matrix, bias, norm=norm, limbs=limbs)
        self._gives_logits = architecture == "BloomForCausalLM"
        self.adapters = Adapters()
        self.model = Transformer(weights, backend)
        self._step = self._compiled()

    def _compiled(self) -> Step:
        def read(x: X) -> X:
            found = self.read(x)
            return self.backend.survey(found) if self._gives_logits else found

        return self.model.compile(read)

    def adapted(self, adapters: Adapters) -> Head:
        """The same layers, with other adapters. This head, and what runs on it, stays as it is."""
        head = copy(self)
        head.adapters, head.model = adapters, self.model.adapted(adapters)
        head._step = head._compiled()
        return head

    def cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` rows of up to `capacity` tokens, which use no adapter yet."""
        return self.backend.cache(self.config, batch, capacity, self.adapters.ranks)

    def choose(self, cache: Cache, chosen: Choices) -> None:
        """From now on the rows of a cache use these adapters: see `Adapters.gates`.

        Raises: UsageError; also for a cache made when other adapters were loaded.
        """
        self.model.check_gates(cache)
        cache.gates[:] = self.adapters.gates(chosen, cache.batch)

    @property
    def cache_kind(self) -> tuple[object, ...]:
        """What the caches of two models must share for one to continue the other's."""
        sizes = self.config.n_layer, self.config.n_head, self.config.head_dim
        return self.backend.arithmetic, *sizes, *self.adapters.loaded

    def step(self, ids: I64, cache: Cache, span: Span, wanted: I64) -> X:
        """Run the tokens of a step; results [W, columns] of those at the indices `wanted` [W] alone
        (512 positions of 250,880 logits would be 514 MB). Raises: see `Transformer.compile`."""
        return self._step(ids, cache, span, wanted)
