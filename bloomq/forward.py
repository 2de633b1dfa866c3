"""A padded batch through the model and its head: what forward calls are made of.

Tokens that the mask hides are never run: a row is its real tokens, wherever the padding lies, and
positions count those alone. Results come back in the batch's shape, 0 where nothing was run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import CapacityError, NumericError
from bloomq.heads import Head
from bloomq.inputs import Inputs, KeyValues, Mask
from bloomq.layers import Cache, Span, zeros
from bloomq.tracing import Trace, layer_by_layer

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
RESULT_BYTES = 64 << 20  # that a step gives at once: 64 positions of 250,880 logits


def run(
    head: Head,
    inputs: Inputs,
    past: KeyValues,
    wanted: Mask,
    *,
    first: int = 0,
    trace: Trace | None = None,
) -> F32:
    """Results [B, T - first, columns] of the columns from `first` on: of tokens that are both real
    and `wanted` [B, T], 0 elsewhere.

    `past` then holds all of this batch; it is as before if anything is raised.

    Raises: CapacityError where there is no memory; NumericError for results that are not finite;
    see `Head.step`.
    """
    batch, length = inputs.shape
    wanted = wanted & inputs.mask
    before = past.cache.lengths.copy()
    out = zeros((batch, length - first, head.columns), np.float32, "the results")
    if trace is not None:
        trace.begin(head.config, batch, length, past.get_seq_length() + length)
    _make_room(past.cache, int((before + inputs.mask.sum(axis=1)).max()))
    columns = np.concatenate([past.mask, inputs.mask], axis=1)
    try:
        for rows, counts, at in _pieces(inputs.mask, wanted, head):
            span = Span.of(rows, counts)
            index = np.flatnonzero(wanted[at])
            if trace is None and inputs.ids is not None:
                found = head.step(inputs.ids[at], past.cache, span, index)
            else:
                hidden = layer_by_layer(
                    head, inputs, past.cache, span, at, columns, trace or Trace()
                )
                found = head.read(head.backend.take(hidden, index)) if len(index) else None
                past.cache.advance(span)
            if len(index):
                results = head.backend.numpy(found)
                if not np.isfinite(results).all():
                    if inputs.ids is not None:
                        raise head.model.find_not_finite(inputs.ids[at], past.cache, span)
                    raise NumericError(
                        "NaN or infinity from inputs_embeds: their numbers are too large"
                    )
                out[at[0][index], at[1][index] - first] = results
    except BaseException:
        for row in range(batch):
            past.cache.truncate(row, int(before[row]))
        raise
    past.mask = columns
    return out


def _make_room(cache: Cache, tokens: int) -> None:
    """Grow by doubling, so that continuing token by token copies each once or twice in all; by what
    is needed where there is no memory for that."""
    if tokens > cache.capacity:
        with suppress(CapacityError):
            cache.grow(max(tokens, 2 * cache.capacity))
        cache.grow(tokens)


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


def _pieces(
    mask: Mask, wanted: Mask, head: Head
) -> Iterator[tuple[list[int], list[int], tuple[I64, I64]]]:
    """Steps of as many real tokens as the backend takes, of fewer where their results would be more
    than RESULT_BYTES: rows, tokens of each, and their (row, column) indices in the batch."""
    real = [np.flatnonzero(row) for row in mask]
    fitting = max(1, RESULT_BYTES // (4 * head.columns) // 16) * 16
    for step in cut([len(columns) for columns in real], head.backend.step_tokens):
        results = sum(wanted[row, real[row][start:stop]].sum() for row, start, stop in step)
        for piece in [step] if results <= fitting else _recut(step, fitting):
            rows, counts = [row for row, _, _ in piece], [stop - start for _, start, stop in piece]
            column = np.concatenate([real[row][start:stop] for row, start, stop in piece])
            yield rows, counts, (np.repeat(rows, counts), column)


def _recut(step: list[tuple[int, int, int]], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """A step as steps of at most `most` tokens."""
    for piece in cut([stop - start for _, start, stop in step], most):
        yield [(step[i][0], step[i][1] + a, step[i][1] + b) for i, a, b in piece]
