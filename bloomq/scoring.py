"""What a model makes of given tokens: the logprob of each, its rank, and what it likes better.

Invariant: a text's scores have the same bits whatever is scored beside it, however it is cut into
steps, and whichever text's keys and values its beginning was taken from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.checks import is_whole
from bloomq.errors import UsageError
from bloomq.forward import cut
from bloomq.heads import Head
from bloomq.layers import Cache, Span, Top
from bloomq.sharing import Batch, Text, batches

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
# Positions whose logits are there at once: 64 MB of 250,880 each. On bloom-560m a step of 64 tokens
# runs as many a second as one of 512; one of 32 is 15 % slower, one of 16 60 %.
PIECE_TOKENS = 64
BATCH_TOKENS = 2048  # of a cache: 200 MB on bloom-560m, 1 GB on bloom-7b1, with float16 in it


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Of the T tokens of a text that are scored: not the first, which nothing precedes.

    ids: [T]; logprobs: [T], natural log; ranks: [T], how many tokens the model likes better (of
    equals the lower id), 0 for the likeliest; top_ids, top_logprobs: [T, n], likeliest first.
    """

    ids: I64
    logprobs: F64
    ranks: I64
    top_ids: I64
    top_logprobs: F64

    @property
    def total(self) -> float:
        """The logprob of all of them together."""
        return float(self.logprobs.sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean of -logprob; NaN of no tokens."""
        return float(np.exp(-self.total / len(self.ids))) if len(self.ids) else float("nan")

    @property
    def is_greedy(self) -> bool:
        """Would greedy decoding write exactly these?"""
        return not self.ranks.any()


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """The logits [W, V] of one step. where: for each text in it (its row of the cache, start,
    stop): the next logits, in order, predict its tokens start .. stop. best: of each logits' row.
    """

    logits: F32
    best: Top
    where: list[tuple[int, int, int]]


def score(
    head: Head,
    rows: Sequence[Sequence[int]],
    *,
    first: Sequence[int] | None = None,
    top: int = 0,
    gates: F32 | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Scores]:
    """The scores of each row's tokens from first[i] on (None, or 0: all but the row's first).

    top: alternatives to give for each token; gates: [rows, ranks] of the rows' adapters, None: of
    none; batch_tokens: see `each`, which has the results as they come.

    Raises: UsageError; NumericError for logits that are not finite.
    """
    found: list[Scores | None] = [None] * len(rows)
    for index, scores in each(
        head, rows, first=first, top=top, gates=gates, batch_tokens=batch_tokens
    ):
        found[index] = scores
    return [scores for scores in found if scores is not None]


def each(
    head: Head,
    rows: Sequence[Sequence[int]],
    *,
    first: Sequence[int] | None = None,
    top: int = 0,
    gates: F32 | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[int, Scores]]:
    """(index of the row, its scores) as batches end, short rows first: see `score`.

    batch_tokens: of the cache that a batch shares, each row's rounded up; a row that has more is a
    batch of its own. Rows that begin with the same tokens, which are not scored, run them once.
    """
    if not is_whole(batch_tokens) or batch_tokens < 1:
        raise UsageError(f"batch_tokens is {batch_tokens!r}, expected 1 token or more")
    if not is_whole(top) or not 0 <= top <= head.columns:
        raise UsageError(f"top is {top!r}, expected 0 to {head.columns} alternatives")
    carried = [b""] * len(rows) if gates is None else [row.tobytes() for row in gates]
    texts = [
        Text(i, _checked(i, row, head.columns), _first(i, first, len(row)), carried[i])
        for i, row in enumerate(rows)
    ]
    cache: Cache | None = None
    for batch in batches(texts, int(batch_tokens)):
        if cache is None or not batch.continued:
            cache = None  # its memory goes before the next one's comes
            cache = head.cache(batch.rows, batch.longest)
        for row, scores in _run(head, cache, batch, int(top)).items():
            yield batch.texts[row].index, scores


def pieces(
    head: Head, cache: Cache, rows: dict[int, I64], first: dict[int, int], *, top: int = 1
) -> Iterator[Piece]:
    """The logits that predict rows[r][first[r]:] for each r, a row of the cache, which holds the
    beginning of it (less than first[r] tokens); top: how many of the best are found, at least 1.

    Raises: NumericError for logits that are not finite.
    """
    held, most = {r: int(cache.lengths[r]) for r in rows}, head.backend.step_tokens
    for ids, span, _ in _steps(rows, held, {r: first[r] - 1 for r in rows}, most):
        head.step(ids, cache, span, np.zeros(0, np.int64))  # nobody reads these logits
    last = {r: len(row) - 1 for r, row in rows.items()}  # which predicts nothing
    for ids, span, where in _steps(rows, {r: first[r] - 1 for r in rows}, last, PIECE_TOKENS):
        logits = head.step(ids, cache, span, np.arange(len(ids)))  # [W, V]
        best = head.backend.top(logits, max(1, top))
        if not np.isfinite(best.logsumexp).all():
            raise head.model.find_not_finite(ids, cache, span)
        predicted = [(r, start + 1, stop + 1) for r, start, stop in where]
        yield Piece(head.backend.numpy(logits), best, predicted)


def _steps(
    rows: dict[int, I64], starts: dict[int, int], stops: dict[int, int], most: int
) -> Iterator[tuple[I64, Span, list[tuple[int, int, int]]]]:
    """Steps of at most `most` of the tokens starts[r] .. stops[r]: ids [M], their span, and which
    tokens of which row they are."""
    names = list(rows)
    for step in cut([stops[r] - starts[r] for r in names], most):
        where = [(names[i], starts[names[i]] + a, starts[names[i]] + b) for i, a, b in step]
        ids = np.concatenate([rows[r][a:b] for r, a, b in where])
        yield ids, Span.of([r for r, _, _ in where], [b - a for _, a, b in where]), where


def token_logprobs(piece: Piece, ids: I64) -> F64:
    """logits[i, ids[i]] - logsumexp(logits[i]), float64 [W]."""
    picked: F64 = piece.logits[np.arange(len(ids)), ids].astype(np.float64)
    return picked - piece.best.logsumexp


def ranks(piece: Piece, ids: I64) -> I64:
    """How many tokens each logits' row puts before ids[i], [W]."""
    found = np.zeros(len(ids), np.int64)
    for i in np.flatnonzero(piece.best.ids[:, 0] != ids):  # of most tokens nothing is counted
        row, token = piece.logits[i], ids[i]
        found[i] = np.count_nonzero(row > row[token])
        found[i] += np.count_nonzero(row[:token] == row[token])
    return found


def _run(head: Head, cache: Cache, batch: Batch, top: int) -> dict[int, Scores]:
    """Score a batch in rounds: a text that begins as another does waits for it."""
    parents = batch.parents()
    rounds: list[int] = []  # of each text
    for parent, _ in parents:
        rounds.append(0 if parent < 0 else rounds[parent] + 1)
    found: dict[int, Scores] = {}
    for number in range(max(rounds) + 1):
        rows = [row for row, its in enumerate(rounds) if its == number]
        if batch.continued and number == 0:
            rows = rows[1:]
        for row in rows:
            _begin(cache, row, batch.texts[row], *parents[row])
        found |= _scores(head, cache, {row: batch.texts[row] for row in rows}, top)
    return found


def _begin(cache: Cache, row: int, text: Text, parent: int, shared: int) -> None:
    """Make a row of the cache hold what a text takes from its parent, and nothing else."""
    cache.truncate(row, 0)
    if shared:
        cache.copy(parent, row)
        cache.truncate(row, shared)
    elif text.gates:
        cache.gates[row] = np.frombuffer(text.gates, np.float32)


def _scores(head: Head, cache: Cache, texts: dict[int, Text], top: int) -> dict[int, Scores]:
    """Of each text, by its row of the cache."""
    parts: dict[int, list[tuple[F64, I64, I64, F64]]] = {
        row: [
            (np.zeros(0), np.zeros(0, np.int64), np.zeros((0, top), np.int64), np.zeros((0, top)))
        ]
        for row in texts
    }
    ids, first = ({r: t.ids for r, t in texts.items()}, {r: t.first for r, t in texts.items()})
    for piece in pieces(head, cache, ids, first, top=top):
        wanted = np.concatenate([ids[row][start:stop] for row, start, stop in piece.where])
        logprobs, places = token_logprobs(piece, wanted), ranks(piece, wanted)
        best = piece.best.logits.astype(np.float64) - piece.best.logsumexp[:, None]  # [W, n]
        at = 0
        for row, start, stop in piece.where:
            here = slice(at, at + stop - start)
            found = logprobs[here], places[here], piece.best.ids[here, :top], best[here, :top]
            parts[row].append(found)
            at += stop - start
    return {
        row: Scores(texts[row].ids[first[row] :], *map(np.concatenate, zip(*found, strict=True)))
        for row, found in parts.items()
    }


def _checked(index: int, row: Sequence[int], vocab_size: int) -> I64:
    if not len(row):
        raise UsageError(f"text {index + 1} has no tokens to score: leave it out")
    ids = np.asarray(row)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UsageError(f"text {index + 1} is no list of token ids: tokenize texts before")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise UsageError(
            f"text {index + 1} has the token id {wrong}, expected 0 to {vocab_size - 1}: use this "
            "model's tokenizer"
        )
    return ids.astype(np.int64)


def _first(index: int, first: Sequence[int] | None, length: int) -> int:
    given = 0 if first is None else first[index]
    if not is_whole(given) or not 0 <= given <= length:
        raise UsageError(f"text {index + 1} is scored from token {given!r}, expected 0 to {length}")
    return max(1, int(given))
