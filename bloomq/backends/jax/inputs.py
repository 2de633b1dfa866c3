"""What a call of the Flax classes is given, checked: shapes always, values where they are known.

Inside a traced function there are no values to look at; then only `batch_of` has its say.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bloomq.backends.jax.dense import Past
from bloomq.config import BloomConfig
from bloomq.errors import CapacityError, UsageError

Array = jax.Array


def batch_of(
    config: BloomConfig, input_ids: Any, inputs_embeds: Any, attention_mask: Any, past: Past | None
) -> tuple[Array, Array]:
    """Ids [B, T] or embeddings [B, T, C], and which of these tokens are real, bool [B, T].

    Raises: UsageError for wrong shapes or kinds.
    """
    if (input_ids is None) == (inputs_embeds is None):
        found = "both" if input_ids is not None else "neither"
        raise UsageError(f"found {found} of input_ids and inputs_embeds, expected one of them")
    c, tokens = (
        config.hidden_size,
        jnp.asarray(input_ids if inputs_embeds is None else inputs_embeds),
    )
    found = f"{tokens.dtype} {list(tokens.shape)}"
    whole = jnp.issubdtype(tokens.dtype, jnp.integer)
    if inputs_embeds is None and (tokens.ndim != 2 or not whole or not tokens.size):
        raise UsageError(f"input_ids is {found}, expected whole numbers of shape [B, T]")
    if inputs_embeds is not None and (tokens.ndim != 3 or tokens.shape[2] != c or whole):
        raise UsageError(f"inputs_embeds is {found}, expected floats of shape [B, T, {c}]")
    batch, length = tokens.shape[:2]
    if past is not None and len(past.mask) != batch:
        raise UsageError(f"{batch} rows, past_key_values has {len(past.mask)}")
    if attention_mask is None:
        return tokens, jnp.ones((batch, length), bool)
    mask = jnp.asarray(attention_mask) != 0
    widths = (length,) if past is None else range(length, past.mask.shape[1] + 1)
    if mask.ndim != 2 or len(mask) != batch or mask.shape[1] not in widths:
        wider = "" if past is None else ", or with a column for each of past_key_values too"
        raise UsageError(
            f"attention_mask is {list(mask.shape)}, expected {[batch, length]} as the tokens{wider}"
        )
    if past is not None and mask.shape[1] > length:
        mask = jax.lax.dynamic_slice_in_dim(mask, past.seen, length, axis=1)
    return tokens, mask


def checked_ids(input_ids: Any, vocab_size: int) -> Any:
    """As an array. Raises: UsageError for an id outside the vocabulary."""
    ids = _array("input_ids", input_ids)
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu" and ids.size:
        for token in (int(ids.min()), int(ids.max())):
            if not 0 <= token < vocab_size:
                raise UsageError(f"token id {token}, expected 0 to {vocab_size - 1}")
    return ids


def checked_mask(attention_mask: Any) -> Any:
    """As an array. Raises: UsageError for other values than 0 and 1."""
    mask = _array("attention_mask", attention_mask)
    if isinstance(mask, np.ndarray) and not np.isin(mask, (0, 1)).all():
        raise UsageError("attention_mask holds other values than 0 and 1")
    return mask


def check_room(tokens: Any, mask: Any, past: Past | None) -> None:
    """Raises: CapacityError where `tokens` [B, T, ...] are more columns than there is room for,
    UsageError where a mask of the past too ends before them."""
    if past is None or isinstance(past.seen, jax.core.Tracer) or np.ndim(tokens) < 2:
        return
    length = np.shape(tokens)[1]
    needed, room = int(past.seen) + length, past.mask.shape[1]
    if needed > room:
        raise CapacityError(
            f"{needed} columns, past_key_values has room for {room}: ask init_cache for more"
        )
    if np.ndim(mask) == 2 and length < np.shape(mask)[1] < needed:
        raise UsageError(
            f"attention_mask has {np.shape(mask)[1]} columns, expected {length} for these tokens, "
            f"or {needed} with the past"
        )


def _array(name: str, given: Any) -> Any:
    """NumPy's array of what is given; a tracer, or None, as it is."""
    if given is None or isinstance(given, jax.core.Tracer):
        return given
    try:
        return np.asarray(given)
    except ValueError:
        raise UsageError(
            f"{name} has rows of different lengths: pad them and pass attention_mask"
        ) from None


def seed_of(prng_key: Any) -> int:
    """The bits of a key of `jax.random` as one number; None: those of the key of 0.

    Raises: UsageError for what is no key.
    """
    try:
        key = jax.random.key(0) if prng_key is None else prng_key
        bits = np.asarray(jax.random.key_data(key))
    except (TypeError, ValueError):
        raise UsageError(
            f"prng_key is {prng_key!r:.60}, expected what jax.random.key makes"
        ) from None
    return int.from_bytes(bits.astype(">u4").tobytes(), "big")
