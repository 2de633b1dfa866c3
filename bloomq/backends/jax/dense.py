"""Attention over a padded batch [B, T], wherever the padding lies, with everything traced.

A token's position is the number of real tokens before it in its row. What is stored lies by column,
as the batch does: `Past` is a value that a pure function takes and returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from bloomq.backends.jax.attention import KeyValue, empty, mix
from bloomq.config import BloomConfig
from bloomq.layers import Span
from bloomq.outputs import BaseModelOutput, CausalLMOutput

Array = jax.Array

# So that a traced function may return them; what was not asked for is None, which has no leaves.
jax.tree_util.register_dataclass(
    BaseModelOutput,
    data_fields=("last_hidden_state", "past_key_values", "hidden_states", "attentions"),
    meta_fields=(),
)
jax.tree_util.register_dataclass(
    CausalLMOutput,
    data_fields=("loss", "logits", "past_key_values", "hidden_states", "attentions"),
    meta_fields=(),
)


@partial(jax.tree_util.register_dataclass, data_fields=("layers", "mask", "seen"), meta_fields=())
@dataclass(frozen=True, slots=True, eq=False)
class Past:
    """`past_key_values`: what a batch's tokens left, to continue from.

    layers: keys and values of each layer, [B, S, H, D]; mask: bool [B, S], which columns hold real
    tokens; seen: int32, how many columns are taken, padding too.
    """

    layers: list[KeyValue]
    mask: Array
    seen: Array

    @classmethod
    def empty(cls, config: BloomConfig, batch: int, length: int) -> Past:
        """Room for `length` columns. Raises: CapacityError where there is no such memory."""
        return cls(
            empty(config, batch, length), jnp.zeros((batch, length), bool), jnp.zeros((), jnp.int32)
        )


class Columns:
    """What the attention of every layer is given as its cache in one pass over a batch.

    mask: bool [B, T], the real tokens. `attentions` [B, H, T, S] are recorded, and dropped by XLA
    where nobody returns them.
    """

    def __init__(self, mask: Array, past: Past | None) -> None:
        length = mask.shape[1]
        self.mask, self._past = mask, past
        self._seen = jnp.zeros((), jnp.int32) if past is None else past.seen
        self._all = mask
        if past is not None:
            self._all = _written(past.mask, mask, past.seen)  # [B, S]
        key_at = jnp.cumsum(self._all, axis=1) - 1  # [B, S]
        query_at = jax.lax.dynamic_slice_in_dim(key_at, self._seen, length, axis=1)
        before = jnp.arange(key_at.shape[1]) <= self._seen + jnp.arange(length)[:, None]  # [T, S]
        self._distance = key_at[:, None] - query_at[:, :, None]  # [B, T, S]
        self._visible = before & self._all[:, None]
        self._layers: list[KeyValue] = []
        self.attentions: list[Array] = []

    def attend(self, layer: int, q: Array, k: Array, v: Array, slope: Array, span: Span) -> Array:
        batch, length = self.mask.shape
        q, keys, values = (x.reshape(batch, length, *x.shape[1:]) for x in (q, k, v))
        if self._past is not None:
            stored = self._past.layers[layer]
            keys, values = (
                _written(old, new, self._seen)
                for old, new in zip(stored, (keys, values), strict=True)
            )
            self._layers.append((keys, values))
        mixed, weights = mix(q, keys, values, slope, self._distance, self._visible)
        self.attentions.append(jnp.where(self.mask[:, None, :, None], weights, 0))
        return mixed.reshape(batch * length, *mixed.shape[2:])

    @property
    def past(self) -> Past | None:
        """What to continue from, once every layer has been through; None where none was given."""
        if self._past is None:
            return None
        return Past(self._layers, self._all, self._seen + self.mask.shape[1])


def _written(old: Array, new: Array, column: Array) -> Array:
    """[B, S, ...] with `new` [B, T, ...] from a column on."""
    return jax.lax.dynamic_update_slice_in_dim(old, new, column, axis=1)
