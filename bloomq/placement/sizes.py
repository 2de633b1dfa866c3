"""Bytes of a model's parts as a device holds them, known from the config and the schemes alone.

A GPU holds a matrix row-major, rows as they are and columns padded to whole groups (which those of
the published models are); the CPU holds a pack's own arrays. Biases and norms are float32.

             on a GPU                                       bytes of a weight
    int8     codes [N, K] int8, scales [N] f32              1
    int6     codes [N, K] int8, scales [N, K/64] f16        1 + 2/64
    nl4      codes [N, K/2] uint8, scales [N, K/G] f16      0.5 + 2/G
    int4     as nl4
    nf4      codes [N, K/2] uint8, scales [N, K/64] f32     0.5 + 4/64
    floats   codes [N, K]                                   2, f32: 4

Invariant: a tied table is counted once. Source of the layouts: backends/cuda/stored.py, cache.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from bloomq.config import BloomConfig, WeightSpec, weight_specs
from bloomq.layers import PAGE_TOKENS, CacheDtype
from bloomq.pack import stored_arrays
from bloomq.parallel.cuts import Cuts
from bloomq.schemes import Scheme, round_up
from bloomq.shards import array_bytes

Kind = Literal["cuda", "cpu"]
_FLOAT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
_CACHE_BYTES = {"f32": 4, "f16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class Rank:
    """One of the processes that share every matrix, and how they cut it."""

    cuts: Cuts
    number: int

    @property
    def heads(self) -> int:
        return self.cuts.heads[self.number + 1] - self.cuts.heads[self.number]

    def shape(self, spec: WeightSpec) -> tuple[int, int]:
        """Of its part of a matrix."""
        n, k = spec.shape
        return self.cuts.cut(spec.name).shape((n, k), self.number)

    def has_bias(self, spec: WeightSpec) -> bool:
        """Columns are summed over the ranks, so that the first alone adds the bias."""
        return spec.has_bias and (self.number == 0 or self.cuts.cut(spec.name).axis != "columns")


@dataclass(frozen=True, slots=True)
class Held:
    """Memory of some arrays. nbytes: of what they hold; rounding_bytes: what the allocator takes on
    top."""

    nbytes: int
    rounding_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.nbytes + self.rounding_bytes

    def __add__(self, other: Held) -> Held:
        return Held(self.nbytes + other.nbytes, self.rounding_bytes + other.rounding_bytes)

    def __sub__(self, other: Held) -> Held:
        return Held(self.nbytes - other.nbytes, self.rounding_bytes - other.rounding_bytes)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one kind of device, or of one rank. embedding: a table that is not the head's; head: its
    matrix, with the norms before and behind the layers; before: weights of so many layers."""

    embedding: Held
    head: Held
    before: tuple[Held, ...]

    def layers(self, which: range) -> Held:
        """Weights of layers that follow one another."""
        return self.before[which.stop] - self.before[which.start]


def sizes(
    config: BloomConfig, schemes: Mapping[str, Scheme], kind: Kind, rank: Rank | None = None
) -> Sizes:
    """The bytes of a model on a device of this kind, or of a rank's part of it."""
    layers, embedding, head = [Held(0)] * config.n_layer, Held(0), Held(0)
    known: dict[tuple[str, Scheme | None], Held] = {}  # layers are alike
    for spec in weight_specs(config):
        scheme, place = schemes.get(spec.name), spec.name.split(".", 2)
        key = (place[-1] if place[0] == "h" else spec.name, scheme)
        held = known.get(key)
        if held is None:
            held = known[key] = _held(weight_bytes(spec, scheme, kind, rank), kind)
        if place[0] == "h":
            layers[int(place[1])] += held
        elif spec.kind == "embedding" and not config.head_is_embedding:
            embedding += held
        else:
            head += held
    return Sizes(embedding, head, tuple(accumulate(layers, initial=Held(0))))


def weight_bytes(
    spec: WeightSpec, scheme: Scheme | None, kind: Kind, rank: Rank | None = None
) -> list[int]:
    """Bytes of each array that a device, or a rank, holds of a weight."""
    if kind == "cpu":
        assert rank is None  # ranks on CPUs are not planned for
        return [array_bytes(part) for part in stored_arrays(spec, scheme).values()]
    if scheme is None:
        return [4 * spec.shape[0]] * 2  # a norm's gain and bias
    n, k = spec.shape
    if rank is None:
        return matrix_bytes((n, k), scheme) + [4 * n] * spec.has_bias
    n, k = rank.shape(spec)
    return matrix_bytes((n, k), scheme) + [4 * n] * rank.has_bias(spec)


def matrix_bytes(shape: tuple[int, int], scheme: Scheme) -> list[int]:
    """Bytes of each array of a matrix [N, K] on a GPU."""
    n, k = shape[0], round_up(shape[1], scheme.group_size)
    if scheme.is_float:
        return [_FLOAT_BYTES[scheme.name] * n * k]
    groups = k // scheme.group_size
    if scheme.name in ("int8", "int6"):
        return [n * k, 4 * n if scheme.name == "int8" else 2 * n * groups]
    return [n * k // 2, (4 if scheme.name == "nf4" else 2) * n * groups]


def cache_bytes(
    config: BloomConfig, dtype: CacheDtype, kind: Kind, batch: int, context: int,
    heads: int | None = None,
) -> Held:  # fmt: skip
    """Keys and values of one layer, or of so many of its heads: `batch` rows of `context` tokens;
    int8 has a float32 scale for each head and token of both."""
    heads, item = config.n_head if heads is None else heads, _CACHE_BYTES[dtype]
    scale = 4 if dtype == "int8" else 0
    if kind == "cuda":
        vectors = 2 * (batch * context + 1) * heads  # one slot is nobody's
        arrays = [vectors * config.head_dim * item, vectors * scale]
        return _held([size for size in arrays if size], kind)
    pages = -(-context // PAGE_TOKENS)  # a page also has the largest |k| of each head
    width = round_up(config.head_dim, 16)  # Source: backends/numba_cpu/pages.py
    token = 2 * heads * (width * item + scale)
    return Held(batch * pages * (PAGE_TOKENS * token + 4 * heads))


# -- the allocator ---------------------------------------------------------------------------------

# Source: torch, c10/cuda/CUDACachingAllocator.cpp: up to 1 MiB from blocks of 2 MiB in steps of 512
# bytes, up to 10 MiB from blocks of 20 MiB, from there on a block of its own in steps of 2 MiB.
_MIB = 1 << 20
_SMALL, _LARGE, _LARGE_BLOCK, _STEP, _SMALL_STEP = _MIB, 10 * _MIB, 20 * _MIB, 2 * _MIB, 512


def _held(arrays: Iterable[int], kind: Kind) -> Held:
    each = list(arrays)
    on_top = 0 if kind == "cpu" else sum(_rounded(nbytes) - nbytes for nbytes in each)
    return Held(sum(each), on_top)


def _rounded(nbytes: int) -> int:
    """Bytes that torch takes for an array, where as many of its size as fit share a block."""
    if nbytes >= _LARGE:
        return round_up(nbytes, _STEP)
    if nbytes > _SMALL:
        return _LARGE_BLOCK // (_LARGE_BLOCK // nbytes)
    return round_up(nbytes, _SMALL_STEP)
