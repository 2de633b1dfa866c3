"""What reads the hidden states: the language model's head, over the last layer norm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bloomq.errors import UsageError
from bloomq.layers import Backend, Cache, Span, X
from bloomq.model import Transformer
from bloomq.pack import Pack

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
STEP_TOKENS = 512  # of a prompt in one step: bounds the activations' memory


@dataclass(frozen=True, slots=True, eq=False)
class CausalLMOutput:
    """logits: float32 [B, T, V], before softmax; 0 where the attention mask is 0."""

    logits: F32


class CausalLM:
    """BLOOM with its language-model head (tied to the embedding, or its own)."""

    def __init__(self, weights: Pack, backend: Backend) -> None:
        self.config = weights.config
        self.backend = backend
        self.model = Transformer(weights, backend)
        head = backend.linear(weights.matrix("lm_head"), norm=weights.norm("ln_f"))
        self._step = self.model.compile(lambda x, wanted: head(backend.take(x, wanted)))

    def cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` rows of up to `capacity` tokens."""
        return self.backend.cache(self.config, batch, capacity)

    def step(self, ids: I64, cache: Cache, span: Span, wanted: I64) -> X:
        """Run the tokens of a step; logits [W, V] of those at the indices `wanted` [W] alone (512
        positions of 250,880 logits would be 514 MB). Raises: see `Transformer.compile`."""
        return self._step(ids, cache, span, wanted)

    def __call__(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None
    ) -> CausalLMOutput:
        """Logits of every position. input_ids: [B, T] or [T] whole numbers; attention_mask: the
        same shape, 0 for padding, on either side or in the middle: positions count real tokens
        alone.

        Raises: UsageError for wrong shapes, types or ids.
        """
        ids, mask = _checked_batch(input_ids, attention_mask, self.config.vocab_size)
        batch, length = ids.shape
        cache = self.cache(batch, length)
        logits = np.zeros((batch, length, self.config.vocab_size), np.float32)
        for row in range(batch):
            real = np.flatnonzero(mask[row])
            for start in range(0, len(real), STEP_TOKENS):
                at = real[start : start + STEP_TOKENS]
                span = Span.of([row], [len(at)])
                step = self.step(ids[row, at], cache, span, np.arange(len(at)))
                logits[row, at] = self.backend.numpy(step)
        return CausalLMOutput(logits)


def _checked_batch(
    input_ids: ArrayLike, attention_mask: ArrayLike | None, vocab_size: int
) -> tuple[I64, NDArray[np.bool_]]:
    """ids [B, T] and mask [B, T], at least one token unmasked."""
    try:
        ids = np.atleast_2d(np.asarray(input_ids))
    except ValueError:
        raise UsageError(
            "input_ids has rows of different lengths: pad them and pass attention_mask"
        ) from None
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise UsageError(
            f"input_ids is {ids.dtype} {list(ids.shape)}, expected whole numbers of shape [B, T]"
        )
    mask = np.ones(ids.shape, bool) if attention_mask is None else _mask(attention_mask, ids.shape)
    if not mask.any():
        raise UsageError("attention_mask hides every token: nothing to compute")
    for token in (int(ids[mask].min()), int(ids[mask].max())):  # unsigned ids may exceed int64
        if not 0 <= token < vocab_size:
            raise UsageError(f"token id {token}, expected 0 to {vocab_size - 1}")
    return ids.astype(np.int64), mask


def _mask(attention_mask: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """True where the mask is 1."""
    try:
        given = np.atleast_2d(np.asarray(attention_mask))
    except ValueError:
        raise UsageError("attention_mask has rows of different lengths") from None
    if given.shape != shape:
        raise UsageError(f"attention_mask is {list(given.shape)}, expected {list(shape)} as ids")
    if given.dtype.kind not in "biuf" or not np.isin(given, (0, 1)).all():
        raise UsageError("attention_mask holds other values than 0 and 1")
    return np.asarray(given != 0, bool)
