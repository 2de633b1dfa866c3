"""Which part of each matrix a rank has: whole heads, their share of the MLP, rows of the table.

Rows of attn.qkv lie as [H, 3, D], so a rank's heads are one piece of them, and one piece of the
columns of attn.out; mlp.up and mlp.down are cut alike, 4 D units of the MLP going with each head.

Invariant: no cut lies inside a group of columns that share a weight's scale, so every rank has the
stored codes and scales themselves, and nothing is quantized again.

Source: Megatron-LM (arXiv 1909.08053), section 3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from bloomq.config import BloomConfig, weight_specs
from bloomq.errors import UsageError
from bloomq.schemes import GROUPED, ROW_MULTIPLE, Scheme

# A linear of a block, or what an adapter has beside it: see `lora.LowRank`.
_LINEAR = re.compile(r"h\.\d+\.(attn\.qkv|attn\.out|mlp\.up|mlp\.down)(\.down|\.up)?")
_ROWS_A_HEAD = {"attn.qkv": 3, "mlp.up": 4}  # times head_dim
_COLUMNS_A_HEAD = {"attn.out": 1, "mlp.down": 4}
_OF_VOCABULARY = ("wte", "lm_head")


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a matrix is cut: rank r has rows (or columns) edges[r] .. edges[r + 1]; "whole": every
    rank has all of it."""

    axis: Literal["rows", "columns", "whole"]
    edges: tuple[int, ...] = ()

    def of(self, rank: int) -> tuple[int, int]:
        """The first row or column of a rank, and the one behind its last."""
        return self.edges[rank], self.edges[rank + 1]

    def shape(self, shape: tuple[int, int], rank: int) -> tuple[int, int]:
        """Of a rank's part of a matrix [N, K]."""
        if self.axis == "whole":
            return shape
        start, stop = self.of(rank)
        return (stop - start, shape[1]) if self.axis == "rows" else (shape[0], stop - start)


WHOLE = Cut("whole")


@dataclass(frozen=True, slots=True)
class Cuts:
    """How `world` ranks share a model: rank r has the heads heads[r] .. heads[r + 1] and rows
    vocabulary[r] .. vocabulary[r + 1] of the embedding and the head."""

    head_dim: int
    heads: tuple[int, ...]
    vocabulary: tuple[int, ...]

    @classmethod
    def of(cls, config: BloomConfig, schemes: Mapping[str, Scheme], world: int) -> Cuts:
        """The most even cuts; where heads do not divide evenly, the first ranks have one more.

        schemes: of every matrix, by its name.
        Raises: UsageError where there are more ranks than pieces to give them.
        """
        stored = _joint(schemes, config.head_dim, GROUPED)
        # Activations of int8 share scales too: with cuts between them the codes are those of one
        # process. Where that leaves a rank without heads, its first group is a smaller one.
        rounded = _joint(schemes, config.head_dim, (*GROUPED, "int8"))
        most = -(-config.n_head // stored)
        if not 1 <= world <= min(most, config.vocab_size):
            raise UsageError(
                f"{world} ranks for a model of {config.n_head} heads, expected 1 to {most}: a rank "
                f"has whole heads, and here {stored} at a time share scales"
            )
        unit = rounded if world <= -(-config.n_head // rounded) else stored
        rows = ROW_MULTIPLE if world * ROW_MULTIPLE <= config.vocab_size else 1
        heads, vocabulary = _even(config.n_head, unit, world), _even(config.vocab_size, rows, world)
        return cls(config.head_dim, heads, vocabulary)

    @property
    def world(self) -> int:
        return len(self.heads) - 1

    def cut(self, name: str) -> Cut:
        """Where the matrix of that name is cut."""
        if name in _OF_VOCABULARY:
            return Cut("rows", self.vocabulary)
        match = _LINEAR.fullmatch(name)
        if match is None:
            return WHOLE
        linear, factor = match.groups()
        if linear in _ROWS_A_HEAD and factor != ".down":
            return Cut("rows", self._times(_ROWS_A_HEAD[linear]))
        if linear in _COLUMNS_A_HEAD and factor != ".up":
            return Cut("columns", self._times(_COLUMNS_A_HEAD[linear]))
        return WHOLE

    def _times(self, count: int) -> tuple[int, ...]:
        return tuple(count * self.head_dim * head for head in self.heads)


def rank_bytes(
    config: BloomConfig, schemes: Mapping[str, Scheme], world: int, rank: int
) -> dict[str, int]:
    """The bytes of codes and scales that a rank reads of each matrix, by its name, the padding of
    its part included. Raises: UsageError, see `Cuts.of`."""
    cuts, found = Cuts.of(config, schemes, world), {}
    for spec in weight_specs(config):
        if spec.is_matrix:
            n, k = spec.shape
            shape = cuts.cut(spec.name).shape((n, k), rank)
            parts = schemes[spec.name].parts(shape).values()
            found[spec.name] = sum(math.prod(part.shape) * _SIZES[part.dtype] for part in parts)
    return found


_SIZES = {"I8": 1, "U8": 1, "F16": 2, "BF16": 2, "F32": 4}


def _joint(schemes: Mapping[str, Scheme], head_dim: int, names: Iterable[str]) -> int:
    """How many heads must stay together, so that columns in one group do, where the scheme of a
    matrix that is cut by columns is one of `names`."""
    unit = 1
    for name, scheme in schemes.items():
        match = _LINEAR.fullmatch(name)
        if match is not None and match[1] in _COLUMNS_A_HEAD and scheme.name in names:
            columns = _COLUMNS_A_HEAD[match[1]] * head_dim
            unit = math.lcm(unit, scheme.group_size // math.gcd(scheme.group_size, columns))
    return unit


def _even(total: int, unit: int, world: int) -> tuple[int, ...]:
    """The edges of `world` pieces of `total`, each of whole units but the last."""
    each, more = divmod(-(-total // unit), world)
    ends = (rank * each + min(rank, more) for rank in range(world + 1))
    return tuple(min(end * unit, total) for end in ends)
