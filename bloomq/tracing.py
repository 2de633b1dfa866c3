"""What forward calls can show on the way: hidden states and attentions, layer by layer.

The layers are those of a step, run one after another on their own: the results have the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bloomq.config import BloomConfig
from bloomq.heads import Head
from bloomq.inputs import Inputs, Mask
from bloomq.layers import Cache, Span, X, slopes, zeros

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Trace:
    """What to record: hidden states, attentions, both or neither.

    hidden_states: [B, T, C] for the input of each block and the output of all, behind the last
    norm; attention_weights: [B, H, T, S] of each block.
    """

    states: bool = False
    attentions: bool = False
    hidden_states: list[F32] = field(default_factory=list)
    attention_weights: list[F32] = field(default_factory=list)

    def begin(self, config: BloomConfig, batch: int, length: int, keys: int) -> None:
        """Make arrays of zeros, of which a run fills the real tokens. Raises: CapacityError."""
        c, layers = config.hidden_size, config.n_layer
        if self.states:
            shape = (layers + 1, batch, length, c)
            self.hidden_states = list(zeros(shape, np.float32, "hidden states"))
        if self.attentions:
            shape = (layers, batch, config.n_head, length * keys)
            weights = zeros(shape, np.float32, "attentions")
            self.attention_weights = list(weights.reshape(*shape[:3], length, keys))


def layer_by_layer(
    head: Head, inputs: Inputs, cache: Cache, span: Span, at: tuple[I64, I64], columns: Mask,
    trace: Trace,
) -> X:  # fmt: skip
    """Hidden states [M, C] before the last norm, of the tokens `at` (row, column) of the batch.

    columns: [B, S], which columns of the past and of this batch are real tokens.
    """
    model, numpy = head.model, head.backend.numpy
    model.check_gates(cache)
    start = model.wte(inputs.ids[at]) if inputs.ids is not None else _at(inputs.embeds, at)
    x = model.emb_ln(start)
    for i, block in enumerate(model.blocks):
        y = block(x, cache, span)
        if trace.states:
            trace.hidden_states[i][at] = numpy(x)
        if trace.attentions:
            qkv = numpy(block.qkv(block.ln_1(x), cache, span))
            _record_attention(trace.attention_weights[i], i, qkv, cache, span, columns)
        x = y
    if trace.states:
        trace.hidden_states[-1][at] = numpy(head.ln_f(x))
    return x


def _at(embeds: F32 | None, at: tuple[I64, I64]) -> F32:
    assert embeds is not None  # Inputs holds one or the other
    return np.ascontiguousarray(embeds[at])


def _record_attention(
    out: F32, layer: int, qkv: F32, cache: Cache, span: Span, columns: Mask
) -> None:
    """Fill [B, H, T, S] with the attention of these tokens, from their queries and the keys in the
    cache: the softmax that `backend.attention` computes, written out."""
    _, n_head, length, total = out.shape
    split = qkv.reshape(len(qkv), n_head, 3, -1)  # [M, H, 3, D]
    slope = slopes(n_head)[:, None, None]
    for row, start, stop in zip(span.rows, span.starts[:-1], span.starts[1:], strict=True):
        past, real = int(cache.lengths[row]), np.flatnonzero(columns[row])
        query_at = past + np.arange(stop - start)
        keys = cache.keys(layer, int(row), int(query_at[-1]) + 1)  # [S, H, D]
        scores = np.einsum("thd,shd->hts", split[start:stop, :, 0], keys)
        scores *= np.float32(1 / np.sqrt(keys.shape[2]))
        distance = (np.arange(len(keys))[None] - query_at[:, None]).astype(np.float32)
        scores = np.where(distance > 0, np.float32(-np.inf), scores + slope * distance)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        queries = real[query_at] - (total - length)  # columns of this call's batch
        out[row][:, queries[:, None], real[: len(keys)][None]] = weights
