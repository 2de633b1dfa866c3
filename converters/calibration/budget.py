"""Which scheme each matrix gets, so that the least is lost within a budget of bits a weight.

Invariant: the choice fits the budget, every stored bit counted, and loses no more than any other
that fits, up to the cells that sizes are counted in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from bloomq.checks import check_number
from bloomq.config import BloomConfig, weight_specs
from bloomq.errors import UsageError
from bloomq.pack import stored_arrays
from bloomq.schemes import Scheme, get_scheme
from bloomq.tensorfile import DTYPES

# Smallest first.
CANDIDATES = (
    get_scheme("nl4", 128), get_scheme("nl4", 64), get_scheme("nl4", 32), get_scheme("int6"),
    get_scheme("int8"),
)  # fmt: skip
_CELLS = 1 << 16  # the budget is counted in; a size is rounded up to whole cells
Costs = Mapping[str, Mapping[Scheme, float]]  # of each matrix in each scheme: what is lost


def choose(config: BloomConfig, costs: Costs, bits: float) -> dict[str, Scheme]:
    """The scheme of every matrix; those without costs, a classifier's rows, stay as they are.

    bits: of the whole pack for each weight, scales and vectors included. The sum of costs is least:
    the knapsack with one choice for each matrix, by dynamic programming. Raises: UsageError.
    """
    sizes = _sizes(config, costs)
    room = _room(config, sizes, bits)
    fixed = {name: next(iter(by)) for name, by in sizes.items() if name not in costs}
    room -= sum(sizes[name][scheme] for name, scheme in fixed.items())
    found = _knapsack({n: sizes[n] for n in sizes if n in costs}, costs, room)
    return {name: fixed.get(name) or found[name] for name in sizes}


def check_bits(config: BloomConfig, bits: float) -> None:
    """Asked before hours of measuring: is there any choice? Raises: UsageError."""
    specs = [spec for spec in weight_specs(config) if spec.is_matrix and spec.kind != "classifier"]
    _room(config, _sizes(config, {spec.name: CANDIDATES for spec in specs}), bits)


def _sizes(
    config: BloomConfig, candidates: Mapping[str, Iterable[Scheme]]
) -> dict[str, dict[Scheme, int]]:
    """Bytes of each matrix in each of its candidates; one that has none is stored exactly."""
    exact = (get_scheme("f32"),)
    return {
        spec.name: {
            s: _stored_bytes(spec.name, config, s) for s in candidates.get(spec.name, exact)
        }
        for spec in weight_specs(config) if spec.is_matrix
    }  # fmt: skip


def _room(config: BloomConfig, sizes: Mapping[str, Mapping[Scheme, int]], bits: float) -> float:
    """Bytes for all matrices. Raises: UsageError."""
    check_number("bits", bits, 0, 64, "a number of bits a weight, up to 64")
    parameters = sum(
        math.prod(spec.shape) + spec.shape[0] * spec.has_bias for spec in weight_specs(config)
    )
    room = bits * parameters / 8 - _vector_bytes(config)
    least = sum(min(by_scheme.values()) for by_scheme in sizes.values())
    if least > room:
        fewest = 8 * (least + _vector_bytes(config)) / parameters
        raise UsageError(
            f"bits is {bits:g} a weight, expected {math.ceil(100 * fewest) / 100:.2f} or more: the "
            "smallest scheme takes so many for this model"
        )
    return room


def _knapsack(
    sizes: Mapping[str, Mapping[Scheme, int]], costs: Costs, room: float
) -> dict[str, Scheme]:
    """One scheme for each name, of the least cost that fits. Cells are what each takes beyond the
    smallest scheme, so that counting them loses nothing where nothing is to be chosen."""
    smallest = {name: min(by.values()) for name, by in sizes.items()}
    spare = room - sum(smallest.values())
    cell = max(spare / _CELLS, 1e-9)
    best = np.zeros(_CELLS + 1)  # the least cost of the names so far, in so many cells
    taken = []
    for name, by in sizes.items():
        options = sorted(by, key=lambda scheme: by[scheme])
        trial = np.full((len(options), _CELLS + 1), np.inf)
        for row, scheme in zip(trial, options, strict=True):
            cells = math.ceil((by[scheme] - smallest[name]) / cell - 1e-9)
            if cells <= _CELLS:
                row[cells:] = best[: _CELLS + 1 - cells] + costs[name][scheme]
        pick = trial.argmin(axis=0)
        best = np.take_along_axis(trial, pick[None], axis=0)[0]
        taken.append((name, options, pick.astype(np.int8)))
    at, found = _CELLS, {}
    for name, options, pick in reversed(taken):
        scheme = options[int(pick[at])]
        found[name] = scheme
        at -= math.ceil((sizes[name][scheme] - smallest[name]) / cell - 1e-9)
    return found


def _stored_bytes(name: str, config: BloomConfig, scheme: Scheme) -> int:
    spec = next(spec for spec in weight_specs(config) if spec.name == name)
    n, k = spec.shape
    return sum(
        math.prod(part.shape) * np.dtype(DTYPES[part.dtype]).itemsize
        for part in scheme.parts((n, k)).values()
    )


def _vector_bytes(config: BloomConfig) -> int:
    """Of all norms and biases."""
    exact, total = get_scheme("f32"), 0
    for spec in weight_specs(config):
        for key, part in stored_arrays(spec, exact if spec.is_matrix else None).items():
            if not key.endswith(".values"):
                total += 4 * math.prod(part.shape)
    return total
