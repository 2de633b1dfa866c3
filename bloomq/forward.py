"""A padded batch through the model and its head: what forward calls are made of.

Tokens that the mask hides are never run: a row is its real tokens, wherever the padding lies, and
positions count those alone. Results come back in the batch's shape, 0 where nothing was run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bloomq.config import BloomConfig
from bloomq.errors import UsageError
from bloomq.heads import Head
from bloomq.layers import Cache, Span, X, slopes

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]
STEP_TOKENS = 512  # of a prompt in one step: bounds the activations' memory


class KeyValues:
    """`past_key_values`: what a batch's tokens left in the cache, to continue from. A call that is
    given it changes it in place.

    mask: [B, past], which of the past columns were real tokens; kind: of the model that made it.
    """

    def __init__(self, cache: Cache, kind: object) -> None:
        self.cache, self.kind = cache, kind
        self.mask: Mask = np.zeros((cache.batch, 0), bool)

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


@dataclass(slots=True, eq=False)
class Trace:
    """What to record of a run on its way: hidden states, attentions, or both.

    Layers then run one by one instead of as a recorded step; the results have the same bits.
    """

    states: bool
    attentions: bool
    hidden_states: list[F32] = field(default_factory=list)
    attention_weights: list[F32] = field(default_factory=list)


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
    return embeds.astype(np.float32)


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


def run(
    head: Head, inputs: Inputs, past: KeyValues, wanted: Mask, trace: Trace | None = None
) -> F32:
    """Results [B, T, columns] of the tokens that are both real and `wanted` [B, T], 0 elsewhere.

    `past` then holds all of this batch; it is as before if anything is raised.

    Raises: UsageError for a `past` whose memory this model would misread; see `Head.step`.
    """
    if past.kind != head.cache_kind:
        raise UsageError(
            "past_key_values is of a model with other layers or heads, or on another backend"
        )
    batch, length = inputs.shape
    wanted = wanted & inputs.mask
    before = past.cache.lengths.copy()
    _make_room(past.cache, int((before + inputs.mask.sum(axis=1)).max()))
    out = np.zeros((batch, length, head.columns), np.float32)
    if trace is not None:
        _prepare_trace(trace, head.config, (batch, length, past.get_seq_length() + length))
    columns = np.concatenate([past.mask, inputs.mask], axis=1)
    try:
        for rows, counts, at in _pieces(inputs.mask):
            span = Span.of(rows, counts)
            index = np.flatnonzero(wanted[at])
            if trace is None and inputs.ids is not None:
                found = head.step(inputs.ids[at], past.cache, span, index)
            else:
                hidden = _layer_by_layer(head, inputs, past.cache, span, at, columns, trace)
                found = head.read(head.backend.take(hidden, index)) if len(index) else None
                past.cache.advance(span)
            if len(index):
                out[at[0][index], at[1][index]] = head.backend.numpy(found)
    except BaseException:
        for row in range(batch):
            past.cache.truncate(row, int(before[row]))
        raise
    past.mask = columns
    return out


def _make_room(cache: Cache, tokens: int) -> None:
    """Grow by doubling, so that continuing token by token copies each once or twice in all."""
    if tokens > cache.capacity:
        cache.grow(max(tokens, 2 * cache.capacity))


def cut(lengths: list[int], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Steps of (row, start, stop) pieces, in order, together at most `most` tokens each."""
    step: list[tuple[int, int, int]] = []
    room = most
    for row, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            step.append((row, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield step
                step, room = [], most
    if step:
        yield step


def _pieces(mask: Mask) -> Iterator[tuple[list[int], list[int], tuple[I64, I64]]]:
    """Steps of at most STEP_TOKENS real tokens: rows, tokens of each, and their (row, column)
    indices in the batch."""
    real = [np.flatnonzero(row) for row in mask]
    for step in cut([len(columns) for columns in real], STEP_TOKENS):
        rows, counts = [row for row, _, _ in step], [stop - start for _, start, stop in step]
        column = np.concatenate([real[row][start:stop] for row, start, stop in step])
        yield rows, counts, (np.repeat(rows, counts), column)


# -- layer by layer: inputs_embeds, hidden states, attentions --------------------------------------


def _layer_by_layer(
    head: Head, inputs: Inputs, cache: Cache, span: Span, at: tuple[I64, I64], columns: Mask,
    trace: Trace | None,
) -> X:  # fmt: skip
    """Hidden states [M, C] before the last norm."""
    model, numpy = head.model, head.backend.numpy
    model.check_gates(cache)
    start = model.wte(inputs.ids[at]) if inputs.ids is not None else _at(inputs.embeds, at)
    x = model.emb_ln(start)
    for i, block in enumerate(model.blocks):
        y = block(x, cache, span)
        if trace is not None and trace.states:
            trace.hidden_states[i][at] = numpy(x)
        if trace is not None and trace.attentions:
            qkv = numpy(block.qkv(block.ln_1(x), cache, span))
            _record_attention(trace.attention_weights[i], i, qkv, cache, span, columns)
        x = y
    if trace is not None and trace.states:
        trace.hidden_states[-1][at] = numpy(head.ln_f(x))
    return x


def _at(embeds: F32 | None, at: tuple[I64, I64]) -> F32:
    assert embeds is not None  # Inputs holds one or the other
    return np.ascontiguousarray(embeds[at])


def _prepare_trace(trace: Trace, config: BloomConfig, shape: tuple[int, int, int]) -> None:
    """Arrays of zeros, of which a run fills the real tokens. shape: B, T, S."""
    batch, length, keys = shape
    if trace.states:
        trace.hidden_states = [
            np.zeros((batch, length, config.hidden_size), np.float32)
            for _ in range(config.n_layer + 1)
        ]
    if trace.attentions:
        trace.attention_weights = [
            np.zeros((batch, config.n_head, length, keys), np.float32)
            for _ in range(config.n_layer)
        ]


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
