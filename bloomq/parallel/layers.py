"""`Backend` over another one: the layers of a rank on its slices, and what ranks add up.

A linear that is cut by rows gives a rank some of the outputs, a `Split`; one that is cut by columns
takes a `Split` and its results are summed over the ranks, which happens twice in a block. All else
every rank computes whole. Residual streams are the same bits on every rank, and so is everything
that is decided from them.
"""

from __future__ import annotations

import re
from dataclasses import astuple, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.config import BloomConfig
from bloomq.errors import UsageError
from bloomq.layers import (
    Activation,
    Attention,
    Backend,
    Embedding,
    LayerNorm,
    Linear,
    Span,
    Step,
    Top,
    X,
    slopes,
)
from bloomq.levels import Levels, Sums, merged
from bloomq.parallel.cache import ParallelCache
from bloomq.parallel.cuts import Cuts
from bloomq.parallel.slices import part_of
from bloomq.parallel.talk import Group, Split, check_step, whole
from bloomq.weights import Matrix, Norm

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
_GPU = re.compile(r"cuda:\d+")
INNER = ("numba", "cuda", "reference")  # JAX compiles whole steps, in which ranks cannot meet


class ParallelBackend:
    """`Backend` of one rank: it is given whole matrices and cuts its own parts out of them.

    Raises: UsageError for an inner backend that cannot be cut, and in `linear` for a matrix that
    cannot.
    """

    def __init__(self, inner: Backend, group: Group, cuts: Cuts) -> None:
        if inner.name not in INNER:
            raise UsageError(
                f"backend {inner.name} on {group.world} ranks, expected one of {', '.join(INNER)}"
            )
        assert cuts.world == group.world
        self.inner, self.group, self.cuts = inner, group, cuts

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def description(self) -> str:
        return f"{self.inner.description}, rank {self.group.rank} of {self.group.world}"

    @property
    def arithmetic(self) -> str:
        """The same on every rank, whichever GPU it has."""
        heads = "+".join(map(str, np.diff(self.cuts.heads).tolist()))
        return f"{_GPU.sub('cuda', self.inner.arithmetic)}, heads on ranks {heads}"

    @property
    def step_tokens(self) -> int:
        return self.inner.step_tokens

    def embedding(self, table: Matrix) -> Embedding:
        start, stop = self.cuts.cut(table.name).of(self.group.rank)
        inner = self.inner.embedding(self._mine(table))

        def look_up(ids: Any) -> X:
            """Rows that others have are 0 here, so the sum is exact."""
            place = ids - start
            mine = (place >= 0) & (place < stop - start)
            rows = inner(place * mine)  # [M, C], the first row for what is not here
            return self.group.sum(rows * _like(mine[:, None], rows))

        return look_up

    def norm(self, norm: Norm) -> LayerNorm:
        return self.inner.norm(norm)

    def linear(
        self,
        weight: Matrix,
        bias: F32 | None = None,
        *,
        norm: Norm | None = None,
        act: Activation | None = None,
        limbs: int = 1,
    ) -> Linear:
        cut, rank = self.cuts.cut(weight.name), self.group.rank
        if cut.axis == "whole":
            return self.inner.linear(weight, bias, norm=norm, act=act, limbs=limbs)
        mine = self._mine(weight)
        if cut.axis == "rows":
            some = None if bias is None else bias[slice(*cut.of(rank))]
            inner = self.inner.linear(mine, some, norm=norm, act=act, limbs=limbs)
            return _SplitOutput(inner, cut.edges)
        assert norm is None and act is None, "neither can be computed of a part of the sum"
        # One rank's part has the bias, so the sum has it once.
        return _Summed(self.inner.linear(mine, bias if rank == 0 else None), self.group)

    def _mine(self, matrix: Matrix) -> Matrix:
        return part_of(matrix, self.cuts.cut(matrix.name), self.group.rank)

    def attention(
        self, layer: int, n_head: int, head_dim: int, *, slope: F32 | None = None
    ) -> Attention:
        edges, rank = self.cuts.heads, self.group.rank
        mine = (slopes(n_head) if slope is None else slope)[edges[rank] : edges[rank + 1]]
        inner = self.inner.attention(layer, len(mine), head_dim, slope=mine)
        columns = tuple(edge * head_dim for edge in edges)

        def attend(qkv: Split, cache: Any, span: Span) -> Split:
            return Split(inner(qkv.mine, _own(cache), span), columns)

        return attend

    def cache(
        self, config: BloomConfig, batch: int, capacity: int, ranks: int = 0
    ) -> ParallelCache:
        edges, rank = self.cuts.heads, self.group.rank
        heads = edges[rank + 1] - edges[rank]
        mine = replace(config, n_head=heads, hidden_size=heads * config.head_dim)
        return ParallelCache(self.inner.cache(mine, batch, capacity, ranks), self.group, edges)

    def gate(self, x: X, cache: Any, span: Span) -> X:
        return self.inner.gate(x, _own(cache), span)

    def compile(self, step: Step) -> Step:
        """The step as it is, but for the CUDA backend, which can record what ranks say too. Before
        each, the ranks compare what they are given."""
        replay = _Replay(self.inner, step) if self.inner.name == "cuda" else step

        def checked(ids: I64, cache: ParallelCache, span: Span, wanted: I64) -> X:
            past = cache.lengths[span.rows]
            given = (ids, span.rows, span.starts, wanted, past)
            check_step(self.group, *(one for one in given if isinstance(one, np.ndarray)))
            return replay(ids, cache, span, wanted)

        return checked

    def take(self, x: X, index: X) -> X:
        if isinstance(x, Split):
            return Split(self.inner.take(x.mine, index), x.edges)
        return self.inner.take(x, index)

    def survey(self, logits: X) -> X:
        if isinstance(logits, Split):
            return Split(self.inner.survey(logits.mine), logits.edges)
        return self.inner.survey(logits)

    def top(self, logits: X, k: int) -> Top:
        if not isinstance(logits, Split):
            return self.inner.top(logits, k)
        start = logits.edges[self.group.rank]
        mine = self.inner.top(logits.mine, min(k, int(logits.mine.shape[1])))
        told = np.full((len(logits), 2 * k + 1), np.nan)  # ids, logits, logsumexp: exact as float64
        count = mine.ids.shape[1]
        told[:, :count], told[:, k : k + count] = mine.ids + start, mine.logits
        # A part that is all -infinity adds nothing, where its own sum would not be a number.
        told[:, -1] = np.where(mine.logits[:, 0] == -np.inf, -np.inf, mine.logsumexp)
        return _best(self.group.gather(told), min(k, logits.edges[-1]))

    def best(self, logits: X, k: int) -> tuple[I64, F32]:
        if not isinstance(logits, Split):
            return self.inner.best(logits, k)
        top = self.top(logits, k)
        return top.ids[0], top.logits[0]

    def masked(self, logits: X, allowed: NDArray[np.bool_]) -> X:
        if not isinstance(logits, Split):
            return self.inner.masked(logits, allowed)
        start, stop = logits.edges[self.group.rank : self.group.rank + 2]
        return Split(self.inner.masked(logits.mine, allowed[start:stop]), logits.edges)

    def sums(self, logits: X, temperature: float = 1.0) -> Sums:
        if not isinstance(logits, Split):
            return self.inner.sums(logits, temperature)
        with np.errstate(invalid="ignore"):  # a part may be all -infinity
            mine = self.inner.sums(logits.mine, temperature)
        told = self.group.gather(np.array(astuple(mine)))
        return merged([Sums(*part.tolist()) for part in told])

    def levels(self, logits: X, temperature: float = 1.0) -> Levels:
        whole = self.numpy(logits) if isinstance(logits, Split) else logits
        return self.inner.levels(whole, temperature)

    def numpy(self, x: X) -> F32:
        """Of a `Split`, the columns of all ranks."""
        if isinstance(x, Split):
            return whole(self.group, self.inner.numpy(x.mine), x.edges, axis=1)
        return self.inner.numpy(x)


class _SplitOutput:
    """A linear of which a rank has some rows."""

    def __init__(self, inner: Linear, edges: tuple[int, ...]) -> None:
        self._inner, self._edges = inner, edges

    def __call__(self, x: X, add: X | None = None, delta: X | None = None) -> Split:
        return Split(self._inner(x, add=_part(add), delta=_part(delta)), self._edges)


class _Summed:
    """A linear of which a rank has some columns."""

    def __init__(self, inner: Linear, group: Group) -> None:
        self._inner, self._group = inner, group

    def __call__(self, x: Split, add: X | None = None, delta: X | None = None) -> X:
        y = self._group.sum(self._inner(x.mine))  # [M, N]
        if delta is not None:
            y = y + delta
        return y if add is None else y + add


class _Replay:
    """A step that the inner backend compiles, on its own arrays."""

    def __init__(self, inner: Backend, step: Step) -> None:
        self._step, self._edges = step, tuple[int, ...]()
        self._replay = inner.compile(self._plain)

    def _plain(self, ids: X, cache: Any, span: Span, wanted: X) -> X:
        result = self._step(ids, cache, span, wanted)
        if isinstance(result, Split):
            self._edges = result.edges
        return _part(result)

    def __call__(self, ids: X, cache: ParallelCache, span: Span, wanted: X) -> X:
        result = self._replay(ids, _own(cache), span, wanted)
        return Split(result, self._edges) if self._edges else result


def _part(x: X) -> X:
    return x.mine if isinstance(x, Split) else x


def _own(cache: Any) -> Any:
    """The inner backend's cache; a compiled step has it already."""
    return cache.inner if isinstance(cache, ParallelCache) else cache


def _like(mask: Any, x: X) -> Any:
    """A mask as an array of the kind, and on the device, of x."""
    if isinstance(x, np.ndarray) or not isinstance(mask, np.ndarray):
        return mask
    return x.new_tensor(mask)


def _best(told: F64, k: int) -> Top:
    """The best k of what ranks have found, [world, B, 2 k' + 1]: see `ParallelBackend.top`."""
    ids, logits = np.split(np.moveaxis(told[..., :-1], 0, 1), 2, axis=2)  # [B, world, k']
    batch = len(ids)
    ids, logits = ids.reshape(batch, -1), logits.reshape(batch, -1)
    # What a rank lacks sorts last; of equals the lower rank has the lower ids, and each its own in
    # order.
    order = np.lexsort((np.isnan(ids), -logits), axis=1)[:, :k]
    picked = np.take_along_axis(ids, order, 1).astype(np.int64)
    each = told[..., -1]  # [world, B]
    peak = each.max(axis=0)
    with np.errstate(invalid="ignore"):  # infinity less itself: the NaN is the answer
        logsumexp = peak + np.log(np.exp(each - peak).sum(axis=0))
    values = np.take_along_axis(logits, order, 1).astype(np.float32)
    return Top(picked, values, logsumexp)
