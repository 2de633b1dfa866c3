"""What a forward call is given: a padded batch, checked, and the past that it continues."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bloomq.config import BloomConfig
from bloomq.errors import UsageError
from bloomq.heads import Head
from bloomq.layers import Cache

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]


class KeyValues:
    """`past_key_values`: what a batch's tokens left in the cache, to continue from. A call that is
    given it changes it in place.

    mask: [B, past], which of the past columns were real tokens; kind: of the model that made it.
    """

    def __init__(self, cache: Cache, kind: object) -> None:
        self.cache, self.kind = cache, kind
        self.mask: Mask = np.zeros((cache.batch, 0), bool)

    def check(self, head: Head) -> None:
        """Raises: UsageError where this model would misread its memory."""
        if self.kind != head.cache_kind:
            raise UsageError(
                "past_key_values is of a model with other layers, heads or adapters, or on another "
                "backend: start a new one"
            )

    def get_seq_length(self) -> int:
        """Columns of the batch so far, padding too."""
        return int(self.mask.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """A checked batch: ids int64 [B, T] or embeds float32 [B, T, C]; mask [B, T], True for real
    tokens; past, where it continues one."""

    ids: I64 | None
    embeds: F32 | None
    mask: Mask
    past: KeyValues | None

    @property
    def shape(self) -> tuple[int, int]:
        batch, length = self.mask.shape
        return batch, length


def check_inputs(
    config: BloomConfig,
    input_ids: ArrayLike | None,
    inputs_embeds: ArrayLike | None,
    attention_mask: ArrayLike | None,
    past: KeyValues | None,
) -> Inputs:
    """Raises: UsageError for anything of wrong shape, kind or range."""
    if (input_ids is None) == (inputs_embeds is None):
        found = "both" if input_ids is not None else "neither"
        raise UsageError(f"found {found} of input_ids and inputs_embeds, expected one of them")
    if past is not None and not isinstance(past, KeyValues):
        raise UsageError(
            f"past_key_values is a {type(past).__name__}, expected what an earlier call returned"
        )
    ids = None if input_ids is None else _ids(input_ids)
    embeds = None if inputs_embeds is None else _embeds(inputs_embeds, config.hidden_size)
    given = embeds if ids is None else ids
    assert given is not None
    batch, length = given.shape[:2]
    if past is not None and past.cache.batch != batch:
        raise UsageError(f"{batch} rows, past_key_values has {past.cache.batch}")
    mask = _mask(attention_mask, (batch, length), past)
    if not mask.any():
        raise UsageError("attention_mask hides every token: nothing to compute")
    return Inputs(_in_vocabulary(ids, mask, config.vocab_size), embeds, mask, past)


def _in_vocabulary(ids: NDArray[np.integer[Any]] | None, mask: Mask, vocab_size: int) -> I64 | None:
    """As int64; what the mask hides may be anything."""
    if ids is None:
        return None
    for token in (int(ids[mask].min()), int(ids[mask].max())):  # unsigned ones may exceed int64
        if not 0 <= token < vocab_size:
            raise UsageError(f"token id {token}, expected 0 to {vocab_size - 1}")
    return ids.astype(np.int64)


def _ids(input_ids: ArrayLike) -> NDArray[np.integer[Any]]:
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
    return ids


def _embeds(inputs_embeds: ArrayLike, hidden_size: int) -> F32:
    try:
        embeds = np.asarray(inputs_embeds)
    except ValueError:
        raise UsageError("inputs_embeds has rows of different lengths") from None
    whole = embeds.ndim == 3 and embeds.shape[2] == hidden_size and embeds.size > 0
    if not whole or embeds.dtype.kind != "f":
        raise UsageError(
            f"inputs_embeds is {embeds.dtype} {list(embeds.shape)}, expected floats of shape "
            f"[B, T, {hidden_size}]"
        )
    with np.errstate(over="ignore"):
        single = embeds.astype(np.float32)
    if not np.isfinite(single).all():
        raise UsageError("inputs_embeds holds NaN, infinity or more than float32 can hold")
    return single


def _mask(attention_mask: ArrayLike | None, shape: tuple[int, int], past: KeyValues | None) -> Mask:
    """True where a token of this call is real. A mask covers the past too, as in transformers."""
    if attention_mask is None:
        return np.ones(shape, bool)
    try:
        given = np.atleast_2d(np.asarray(attention_mask))
    except ValueError:
        raise UsageError("attention_mask has rows of different lengths") from None
    before = 0 if past is None else past.get_seq_length()
    if given.shape != (shape[0], before + shape[1]):
        past_columns = f" with {before} past columns" if before else ""
        raise UsageError(
            f"attention_mask is {list(given.shape)}, expected {[shape[0], before + shape[1]]} as "
            f"the tokens{past_columns}"
        )
    if given.dtype.kind not in "biuf" or not np.isin(given, (0, 1)).all():
        raise UsageError("attention_mask holds other values than 0 and 1")
    mask = given != 0
    if past is not None and not np.array_equal(mask[:, :before], past.mask):
        raise UsageError("attention_mask differs from the one that past_key_values was made with")
    return np.asarray(mask[:, before:], bool)
