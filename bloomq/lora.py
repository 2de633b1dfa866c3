"""LoRA adapters beside a model's linears: y = act(norm(x) @ W.T + b + delta) + add, where
delta = (gates * (norm(x) @ down.T)) @ up.T.

The ranks of all loaded adapters lie side by side, in the same places for every linear, and the
gates of a row say how much it takes of each. So the rows of a batch use one adapter, several or
none, and no weight is ever changed.

Invariant: what a row computes depends on the adapters it uses alone, not on what else is loaded.

Source: LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import UsageError
from bloomq.schemes import get_scheme, round_up
from bloomq.weights import Matrix

F32 = NDArray[np.float32]
Choice = str | Mapping[str, float] | None  # an adapter, several with a scale each, or the base
Choices = Choice | Sequence[Choice]  # of every row, or of each
_F32 = get_scheme("f32")
_MOST_SCALE = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """What one adapter adds to a linear [N, K]: down [r, K]; up [N, r], times the adapter's
    alpha / r (or alpha / sqrt(r))."""

    down: F32
    up: F32


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """The factors of every linear that an adapter touches, by its name: `h.0.attn.qkv`."""

    factors: Mapping[str, Factors]

    @property
    def rank(self) -> int:
        """Of the linear where it is largest."""
        return max(len(factors.down) for factors in self.factors.values())


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The factors of all adapters for one linear: down [ranks, K], up [N, ranks], zeros where an
    adapter does not touch it."""

    down: Matrix
    up: Matrix


class Adapters:
    """The adapters that a model has loaded: a value, to which loading and unloading give another.

    ranks: of all together: the gates of a row.
    """

    def __init__(self, loaded: Mapping[str, Adapter] | None = None) -> None:
        self._loaded = dict(loaded or {})
        self._places: dict[str, slice] = {}
        self.ranks = 0
        group = _F32.group_size
        for name, adapter in self._loaded.items():
            start = self.ranks
            # Kernels sum ranks in groups, so the order of an adapter's sum is the same wherever it
            # lies as long as it is in one group, or begins one.
            if start % group + adapter.rank > group:
                start = round_up(start, group)
            self.ranks = start + adapter.rank
            self._places[name] = slice(start, self.ranks)

    @property
    def loaded(self) -> tuple[tuple[str, Adapter], ...]:
        """Each adapter by its name: equal for the same adapters alone."""
        return tuple(self._loaded.items())

    @property
    def names(self) -> dict[str, int]:
        """The rank of each adapter, in the order of loading."""
        return {name: adapter.rank for name, adapter in self._loaded.items()}

    def added(self, name: str, adapter: Adapter) -> Adapters:
        """Raises: UsageError for a name that is taken, or none."""
        if not isinstance(name, str) or not name:
            raise UsageError(f"the adapter's name is {name!r}, expected text")
        if name in self._loaded:
            raise UsageError(f"adapter {name!r} is loaded already: unload it, or use another name")
        return Adapters({**self._loaded, name: adapter})

    def removed(self, name: str) -> Adapters:
        """Raises: UsageError for a name that is not loaded."""
        self._place(name)
        return Adapters({other: a for other, a in self._loaded.items() if other != name})

    def low_rank(self, linear: str) -> LowRank | None:
        """What lies beside a linear; None where no adapter touches it."""
        found = {n: a.factors[linear] for n, a in self._loaded.items() if linear in a.factors}
        if not found:
            return None
        some = next(iter(found.values()))
        down = np.zeros((self.ranks, some.down.shape[1]), np.float32)
        up = np.zeros((some.up.shape[0], self.ranks), np.float32)
        for name, factors in found.items():
            start = self._places[name].start
            stop = start + len(factors.down)
            down[start:stop], up[:, start:stop] = factors.down, factors.up
        return LowRank(_matrix(f"{linear}.down", down), _matrix(f"{linear}.up", up))

    def gates(self, chosen: Choices, rows: int) -> F32:
        """How much each row takes of each rank, [rows, ranks].

        chosen: None for the base, an adapter's name, or a scale for each of several; or a list with
        one of these for each row.
        Raises: UsageError for names that are not loaded, scales that are no numbers, or a list of
        another length.
        """
        each = list(chosen) if isinstance(chosen, list | tuple) else [chosen] * rows
        if len(each) != rows:
            raise UsageError(
                f"{len(each)} adapters for {rows} rows: a list has one entry a row, a mapping of "
                "names to scales uses several in a row"
            )
        gates = np.zeros((rows, self.ranks), np.float32)
        for row, choice in enumerate(each):
            for name, scale in _scales(choice).items():
                gates[row, self._place(name)] = scale
        return gates

    def _place(self, name: object) -> slice:
        if not isinstance(name, str) or name not in self._places:
            known = ", ".join(map(repr, self._places)) or "none"
            raise UsageError(f"no adapter {name!r} is loaded, those loaded are: {known}")
        return self._places[name]


def _scales(choice: object) -> dict[object, float]:
    """The scale of each adapter that a row uses."""
    if choice is None:
        return {}
    if isinstance(choice, str):
        return {choice: 1.0}
    if not isinstance(choice, Mapping):
        raise UsageError(
            f"adapters is {choice!r:.80}, expected None, a name, a mapping of names to scales, or "
            "a list of these"
        )
    for name, scale in choice.items():
        number = isinstance(scale, int | float | np.integer | np.floating)
        # What is infinite as float32 would make a NaN of every rank that is 0.
        if not number or isinstance(scale, bool) or not -_MOST_SCALE <= scale <= _MOST_SCALE:
            raise UsageError(f"the scale of adapter {name!r} is {scale!r:.80}, expected a number")
    return {name: float(scale) for name, scale in choice.items()}


def _matrix(name: str, values: F32) -> Matrix:
    n, k = values.shape
    return Matrix(name, _F32, (n, k), _F32.quantize(values))
