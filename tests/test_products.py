"""The float32 product of calibration against NumPy's: odd sizes, views, every tier."""

from __future__ import annotations

import numpy as np
import pytest

from bloomq.backends.numba_cpu.processor import cpu_features
from bloomq.backends.numba_cpu.products import add_product
from bloomq.backends.numba_cpu.simd import TIERS

TIERS_HERE = [tier for tier, needs in TIERS.items() if cpu_features().issuperset(needs)]
EPSILON = 2.0**-24  # half a unit in the last place of 1
# [K, M, N]: less than a tile, ragged ends, more than a chunk of rows, more than a block of columns.
SIZES = [(1, 1, 1), (5, 3, 40), (192, 8, 32), (193, 17, 33), (400, 270, 50), (30, 9, 530)]


def arrays(k: int, m: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(k + m + n)
    c, a, b = (rng.standard_normal(shape, np.float32) for shape in ((m, n), (k, m), (k, n)))
    return c, a, b


def twin(c: np.ndarray, a: np.ndarray, b: np.ndarray, sign: int) -> tuple[np.ndarray, np.ndarray]:
    """The sum in float64, and what float32 may be off by: one rounding for each term and chunk."""
    exact = c + sign * (a.T.astype(np.float64) @ b)
    bound = np.abs(c) + np.abs(a.T).astype(np.float64) @ np.abs(b)
    return exact, (2 * len(a) + 2) * EPSILON * bound


@pytest.mark.parametrize("tier", TIERS_HERE)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("negative", [False, True], ids=["plus", "minus"])
def test_the_product_is_added_or_subtracted(tier, size, negative):
    c, a, b = arrays(*size)
    exact, bound = twin(c, a, b, -1 if negative else 1)
    add_product(c, a, b, negative=negative, tier=tier)
    assert (np.abs(c - exact) <= bound).all()


@pytest.mark.parametrize("tier", TIERS_HERE)
def test_whole_numbers_are_multiplied_exactly(tier):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 8, shape).astype(np.float32) for shape in ((500, 40), (500, 70)))
    c = np.zeros((40, 70), np.float32)
    add_product(c, a, b, tier=tier)
    assert np.array_equal(c, a.T @ b)


@pytest.mark.parametrize("tier", TIERS_HERE)
def test_an_elements_bits_do_not_depend_on_the_others(tier):
    """Cut anywhere, of views of larger arrays, whatever lies beside them."""
    c, a, b = arrays(400, 300, 600)
    whole = c.copy()
    add_product(whole, a, b, tier=tier)
    for rows, columns in ((slice(0, 7), slice(3, 4)), (slice(37, 300), slice(100, 590))):
        part = c.copy()
        around = part.copy()
        add_product(part[rows, columns], a[:, rows], b[:, columns], tier=tier)
        assert np.array_equal(part[rows, columns], whole[rows, columns])
        part[rows, columns] = around[rows, columns]
        assert np.array_equal(part, around)  # nothing is written beside it


def test_every_tier_with_fused_multiply_adds_gives_the_same_bits():
    c, a, b = arrays(450, 40, 90)
    found = {}
    for tier in set(TIERS_HERE) - {"portable"}:
        found[tier] = c.copy()
        add_product(found[tier], a, b, tier=tier)
    assert len({result.tobytes() for result in found.values()}) <= 1


def test_what_is_not_a_number_reaches_its_row_and_column_alone():
    c, a, b = arrays(20, 12, 40)
    a[3, 5], b[7, 31] = np.nan, np.inf
    add_product(c, a, b)
    bad = np.zeros(c.shape, np.bool_)
    bad[5], bad[:, 31] = True, True
    assert np.array_equal(~np.isfinite(c), bad)


@pytest.mark.parametrize("size", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_nothing_times_nothing_changes_nothing(size):
    c, a, b = arrays(*size)
    before = c.copy()
    add_product(c, a, b)
    assert np.array_equal(c, before)
