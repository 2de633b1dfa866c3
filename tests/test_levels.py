"""The levels of a row of logits: every backend's against plain NumPy, on every tier, for any number
of threads."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from bloomq.backends.jax.layers import JaxBackend
from bloomq.backends.numba_cpu.layers import NumbaBackend
from bloomq.backends.numba_cpu.levels import BLOCK, PART
from bloomq.backends.numba_cpu.processor import cpu_features
from bloomq.backends.numba_cpu.simd import TIERS
from bloomq.backends.reference import ReferenceBackend
from bloomq.levels import LEVELS, level_of, levels_of, merged, sums_of

TIERS_HERE = [tier for tier, needs in TIERS.items() if cpu_features().issuperset(needs)]
BACKENDS = [NumbaBackend(1), NumbaBackend(2)]


def row(size: int, scale: float = 3.0) -> np.ndarray:
    """Some of it forbidden."""
    values = (scale * np.random.default_rng(size).standard_normal(size)).astype(np.float32)
    values[1::7] = -np.inf
    return values


def same(found, wanted):
    """Sums of up to a few thousand float32 terms, in 64 lanes and four tables of a part: each is
    rounded some hundred times, 2**-24 each."""
    same_sums(found.sums, wanted.sums)
    assert found.levels.tolist() == wanted.levels.tolist()
    assert found.masses == pytest.approx(wanted.masses, rel=1e-5, abs=1e-30)


def same_sums(found, wanted):
    assert found.best == wanted.best
    assert found.count == wanted.count
    for name in ("mass", "total", "squares", "moment"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("size", [1, 5, BLOCK - 1, BLOCK + 1, PART - 1, PART + 1, 3 * PART + 77])
@pytest.mark.parametrize("tier", TIERS_HERE)
def test_levels_are_those_of_numpy_at_the_edges_of_blocks(tier, size, monkeypatch):
    values = row(size)
    for backend in BACKENDS:
        monkeypatch.setattr(backend, "tier", tier)
        for temperature in (0.8, 1.0, 5.0):
            same(backend.levels(values[None], temperature), levels_of(values, temperature))
            same_sums(backend.sums(values[None], temperature), sums_of(values, temperature))


@pytest.mark.parametrize("backend", [ReferenceBackend(), JaxBackend(), *BACKENDS],
                         ids=["reference", "jax", "one thread", "two threads"])  # fmt: skip
def test_levels_of_a_known_row(backend):
    values = np.log(np.array([[0.25, 0.5, 0, 0.25]], np.float32), where=[[1, 1, 0, 1]],
                    out=np.full((1, 4), -np.inf, np.float32))  # fmt: skip
    levels = backend.levels(values)
    assert levels.levels.tolist() == [22, 0, LEVELS - 1, 22]  # ln 2 = 22.2 / 32
    assert levels.masses[[0, 22]] == pytest.approx([1, 1])
    assert levels.masses.sum() == pytest.approx(2)
    assert levels.sums.count == 3
    assert levels.sums.entropy() == pytest.approx(1.5 * np.log(2))
    assert levels.sums.deviation() == pytest.approx(np.std(np.log([0.25, 0.5, 0.25])), rel=1e-5)
    assert levels.tokens([0]).tolist() == [1]
    assert levels.tokens([0, 21, 22]).tolist() == [0, 1, 3]
    assert levels.tokens([]).tolist() == []


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 100.0])
def test_a_token_further_away_than_float32_reaches_adds_nothing_to_the_entropy(temperature):
    values = np.array([[0.0, 0.0, -1e38]], np.float32)
    assert BACKENDS[0].levels(values, temperature).sums.entropy() == pytest.approx(np.log(2))


def test_levels_are_the_same_bits_for_any_number_of_threads():
    values = row(250_880)[None]
    one, two = (backend.levels(values, 0.7) for backend in BACKENDS)
    assert one.masses.tobytes() == two.masses.tobytes()
    assert one.sums == two.sums
    same(one, levels_of(values[0], 0.7))


@pytest.mark.parametrize("temperature", [1e-3, 0.7, 100.0])
def test_every_possible_token_is_in_one_level(temperature):
    values = row(3003, scale=20.0)
    levels = BACKENDS[0].levels(values[None], temperature)
    found = [levels.tokens([level]) for level in range(LEVELS)]
    assert sorted(np.concatenate(found).tolist()) == list(range(3003))
    for level in (0, 3, 500):
        assert (
            level_of(values[found[level]], np.float32(levels.sums.best), temperature) == level
        ).all()
    assert levels.tokens(range(LEVELS)).tolist() == list(range(3003))
    some = sorted(np.concatenate([found[level] for level in (1, 2, 5)]).tolist())
    assert levels.tokens([1, 2, 5]).tolist() == some


@pytest.mark.parametrize("tier", TIERS_HERE)
def test_tokens_of_levels_come_best_first_of_equals_the_lower_id(tier, monkeypatch):
    values = row(3 * PART + 77)
    values[: 2 * PART] = np.rint(values[: 2 * PART])  # many equal, zeros of either sign
    monkeypatch.setattr(BACKENDS[1], "tier", tier)
    levels, plain = BACKENDS[1].levels(values[None], 0.8), levels_of(values, 0.8)
    for wanted in ([0], [LEVELS - 1], [3, 4, 5, 90], range(LEVELS)):
        ids, logits = levels.listed(values, wanted)
        expected, scores = plain.listed(values, wanted)
        assert ids.tolist() == expected.tolist()
        assert logits.tolist() == scores.tolist()
    possible = int((values > -np.inf).sum())
    assert ids.tolist() == np.argsort(-values, kind="stable")[:possible].tolist()


@pytest.mark.parametrize(
    "values",
    [[3e38, -3e38, 0.0], [1e-40, -1e-40, 0.0], [0.0, np.nan, 1.0], [np.inf, 0.0, 1.0], [-np.inf]],
    ids=["far apart", "tiny", "one is none", "infinite", "forbidden"],
)
def test_extremes_fall_into_a_level(values):
    logits = np.array([values], np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        found, wanted = BACKENDS[0].levels(logits), levels_of(logits[0], 1.0)
    assert found.levels.tolist() == wanted.levels.tolist()
    assert np.isnan(found.masses.sum()) == np.isnan(wanted.masses.sum())


@pytest.mark.parametrize("edges", [[0, 100, 1000], [0, 7, 8, 1000], [0, 1000]], ids=str)
def test_sums_of_parts_are_those_of_the_row(edges):
    values = row(1000)
    values[:7] = -np.inf
    with np.errstate(invalid="ignore"):
        parts = [sums_of(values[a:b], 0.7) for a, b in pairwise(edges)]
    same_sums(merged(parts), sums_of(values, 0.7))
