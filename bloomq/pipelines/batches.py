"""Rows of ids of any length through a model and its head, in steps without padding.

Invariant: a row's results have the same bits in whatever company it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bloomq.checks import is_whole
from bloomq.errors import UsageError
from bloomq.forward import cut
from bloomq.heads import Head
from bloomq.layers import Cache, Span
from bloomq.lora import Choice

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
BATCH_TOKENS = 2048  # of a cache: 200 MB on bloom-560m, 1 GB on bloom-7b1, with float16 in it
_ROUNDED_TO = 64  # tokens: a backend's cache has so many, or a multiple, for each row


def results(
    head: Head,
    rows: Sequence[Sequence[int]],
    *,
    batch_tokens: int,
    last: bool,
    adapters: Choice = None,
) -> Iterator[tuple[int, F32]]:
    """(index of the row, its results [T, columns]) as batches end, short rows first.

    last: of the last token alone, [1, columns]. batch_tokens: of the cache that a batch shares,
    each row's rounded up; a row that has more is a batch of its own. adapters: of all rows.

    Raises: UsageError for impossible batch_tokens or adapters; NumericError for results that are
    not finite.
    """
    if not is_whole(batch_tokens) or batch_tokens < 1:
        raise UsageError(f"batch_tokens is {batch_tokens!r}, expected 1 or more")
    if isinstance(adapters, list | tuple):
        raise UsageError("adapters is a list, expected one choice, which all texts share")
    cache, left = None, len(rows)
    for batch in plan([len(row) for row in rows], batch_tokens):
        longest = len(rows[batch[-1]])
        if cache is None or cache.batch < len(batch) or cache.capacity < longest:
            cache = None  # its memory goes before the next one's comes
            most = max(len(batch), min(left, batch_tokens // _rounded(longest)))
            cache = head.cache(most, longest)
            head.choose(cache, adapters)
        for row in range(len(batch)):
            cache.truncate(row, 0)
        found = _run(head, cache, [np.array(rows[i], np.int64) for i in batch], last)
        yield from zip(batch, found, strict=True)
        left -= len(batch)


def plan(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of the rows of each batch, from short to long, within batch_tokens of cache."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * _rounded(lengths[i]) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _rounded(length: int) -> int:
    return -(-length // _ROUNDED_TO) * _ROUNDED_TO


def _run(head: Head, cache: Cache, rows: list[I64], last: bool) -> list[F32]:
    """The results of one batch, row by row, from an empty cache."""
    parts: list[list[F32]] = [[] for _ in rows]
    for step in cut([len(row) for row in rows], head.backend.step_tokens):
        ids = np.concatenate([rows[row][start:stop] for row, start, stop in step])  # [M]
        span = Span.of([row for row, _, _ in step], [stop - start for _, start, stop in step])
        wanted = span.last if last else np.arange(len(ids))
        found = head.backend.numpy(head.step(ids, cache, span, wanted))  # [W, columns]
        if not np.isfinite(found).all():
            raise head.model.find_not_finite(ids, cache, span)
        ends = np.arange(1, len(step)) if last else span.starts[1:-1]
        for (row, _, _), part in zip(step, np.split(found, ends), strict=True):
            parts[row].append(part)
    return [part[-1] if last else np.concatenate(part) for part in parts]
