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
    """Ids [B, T] or float32 embeddings [B, T, C], and which of these tokens are real, bool [B, T].

    Raises: UsageError for wrong shapes or kinds.
    """
    if (input_ids is None) == (inputs_embeds is None):
        found = "both" if input_ids is not None else "neither"
        raise UsageError(f"found {found} of input_ids and inputs_embeds, expected one of them")
    check_past(config, past)
    tokens = (
        _ids(input_ids) if inputs_embeds is None else _embeds(inputs_embeds, config.hidden_size)
    )
    batch, length = tokens.shape[:2]
    if past is not None and len(past.mask) != batch:
        raise UsageError(f"{batch} rows, past_key_values has {len(past.mask)}")
    if attention_mask is None:
        return tokens, jnp.ones((batch, length), bool)
    mask = _numbers("attention_mask", attention_mask) != 0
    widths = (length,) if past is None else range(length, past.mask.shape[1] + 1)
    if mask.ndim != 2 or len(mask) != batch or mask.shape[1] not in widths:
        wider = "" if past is None else ", or with a column for each of past_key_values too"
        raise UsageError(
            f"attention_mask is {list(mask.shape)}, expected {[batch, length]} as the tokens{wider}"
        )
    if past is not None and mask.shape[1] > length:
        mask = jax.lax.dynamic_slice_in_dim(mask, past.seen, length, axis=1)
    return tokens, mask


def check_past(config: BloomConfig, past: Any) -> None:
    """Raises: UsageError for what is no `Past`, or one of a model with other layers or heads."""
    if past is None:
        return
    if not isinstance(past, Past):
        raise UsageError(
            f"past_key_values is a {type(past).__name__}, expected what init_cache or an earlier "
            "call of a Flax class returned"
        )
    columns = np.shape(past.mask)  # [B, S]
    layer = (*columns, config.n_head, config.head_dim)
    found = [[np.shape(part) for part in kept] for kept in past.layers]
    if len(columns) != 2 or np.shape(past.seen) or found != [[layer, layer]] * config.n_layer:
        raise UsageError(
            f"past_key_values is of another model: this one has {config.n_layer} layers with "
            f"{config.n_head} heads of {config.head_dim}"
        )


def _ids(input_ids: Any) -> Array:
    """[B, T]"""
    ids = _numbers("input_ids", input_ids)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer) or not ids.size:
        raise UsageError(
            f"input_ids is {ids.dtype} {list(ids.shape)}, expected whole numbers of shape [B, T]"
        )
    return ids


def _embeds(inputs_embeds: Any, hidden_size: int) -> Array:
    """[B, T, C] float32"""
    embeds = _numbers("inputs_embeds", inputs_embeds)
    whole = embeds.ndim == 3 and embeds.shape[2] == hidden_size and embeds.size
    if not whole or not jnp.issubdtype(embeds.dtype, jnp.floating):
        raise UsageError(
            f"inputs_embeds is {embeds.dtype} {list(embeds.shape)}, expected floats of shape "
            f"[B, T, {hidden_size}]"
        )
    return embeds.astype(jnp.float32)


def _numbers(name: str, given: Any) -> Array:
    """jax's array of what is given. Raises: UsageError for what is none, or not of numbers."""
    try:
        array = jnp.asarray(given)
        if any(jnp.issubdtype(array.dtype, kind) for kind in (np.bool_, np.number)):
            return array
    except (TypeError, ValueError, OverflowError):
        pass
    raise UsageError(f"{name} is {_brief(given)}, expected an array of numbers")


def _brief(given: Any) -> str:
    """What is given, in a line."""
    if hasattr(given, "dtype") and hasattr(given, "shape"):
        return f"{given.dtype} {list(given.shape)}"
    return " ".join(f"{given!r:.60}".split())


def as_array(name: str, given: Any) -> Any:
    """NumPy's array of what is given; a tracer, None, or what NumPy does not take, as it is.

    Raises: UsageError for rows of different lengths.
    """
    if given is None or isinstance(given, jax.core.Tracer):
        return given
    try:
        return np.asarray(given)
    except TypeError:  # tracers in a list; what else there is, `batch_of` refuses
        return given
    except ValueError:
        raise UsageError(
            f"{name} has rows of different lengths: pad them and pass attention_mask"
        ) from None


def check_ids(ids: Any, mask: Any, vocab_size: int) -> None:
    """ids, mask: [B, T]; what the mask hides may be any id.

    Raises: UsageError for another one outside the vocabulary.
    """
    if not isinstance(ids, np.ndarray) or isinstance(mask, jax.core.Tracer):
        return
    real = ids[np.asarray(mask)]
    if real.size:
        for token in (int(real.min()), int(real.max())):
            if not 0 <= token < vocab_size:
                raise UsageError(f"token id {token}, expected 0 to {vocab_size - 1}")


def checked_mask(attention_mask: Any) -> Any:
    """As an array. Raises: UsageError for other values than 0 and 1."""
    mask = as_array("attention_mask", attention_mask)
    if isinstance(mask, np.ndarray):
        real = mask.dtype.kind in "biuf" or mask.dtype == jnp.bfloat16
        if not real or not np.isin(mask.astype(np.float64), (0, 1)).all():
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
