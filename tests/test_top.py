"""`top` of the Numba backend at the size of BLOOM's vocabulary and at the edges of its blocks: the
order of a stable sort, on every tier, for any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bloomq.backends.numba_cpu.layers import NumbaBackend
from bloomq.backends.numba_cpu.processor import cpu_features
from bloomq.backends.numba_cpu.simd import TIERS
from bloomq.backends.numba_cpu.top import BLOCK, PART

VOCABULARY = 250_880
TIERS_HERE = [tier for tier, needs in TIERS.items() if cpu_features().issuperset(needs)]
BACKENDS = [NumbaBackend(1), NumbaBackend(2)]


def check(logits: np.ndarray, k: int, backend: NumbaBackend) -> None:
    """The best k of each row are those of a stable sort, and the sums those of float64."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    top = backend.top(logits, k)
    assert np.array_equal(top.ids, order)
    assert np.array_equal(top.logits, np.take_along_axis(logits, order, axis=1))
    peak = logits.max(axis=1).astype(np.float64)
    total = np.exp(logits.astype(np.float64) - peak[:, None]).sum(axis=1)
    assert top.logsumexp == pytest.approx(peak + np.log(total), abs=1e-4)


def rows(size: int) -> np.ndarray:
    """Three rows: all different, many ties with zeros of either sign, half of it forbidden."""
    values = (3 * np.random.default_rng(size).standard_normal((3, size))).astype(np.float32)
    values[1] = np.rint(values[1] / 4)
    values[2, ::2] = -np.inf
    if size == 1:
        values[2] = 1
    return values


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK + 1, PART - 1, PART, PART + 1, 3 * PART + 77])
@pytest.mark.parametrize("tier", TIERS_HERE)
def test_top_is_that_of_a_stable_sort_at_the_edges_of_blocks(tier, size, monkeypatch):
    for backend in BACKENDS:
        monkeypatch.setattr(backend, "tier", tier)
        for k in sorted({1, min(3, size), min(70, size), size}):
            check(rows(size), k, backend)


@pytest.mark.parametrize("k", [1, 2, 40, 1024, 1960, 1961, 3920, 20_000, VOCABULARY])
def test_top_is_that_of_a_stable_sort_over_a_large_vocabulary(k):
    check(rows(VOCABULARY), k, BACKENDS[1])


@settings(max_examples=100, deadline=None)
@given(
    values=arrays(
        np.float32, st.integers(1, 300),
        elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-40, -1e-40, -np.inf]),
    ),
    k=st.integers(1, 300),
)  # fmt: skip
def test_top_orders_extremes_and_zeros_of_either_sign(values, k):
    top = BACKENDS[0].top(values[None], k)
    assert top.ids[0].tolist() == np.argsort(-values, kind="stable")[:k].tolist()


def test_more_than_the_vocabulary_is_all_of_it():
    assert BACKENDS[0].top(np.array([[1, 3, 2]], np.float32), 9).ids.tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("k", [1, 5, 60, 130])
def test_numbers_that_are_none_come_last_and_show_in_the_sum(k):
    values = np.random.default_rng(0).standard_normal((1, 130)).astype(np.float32)
    values[0, 40:] = np.nan
    top = BACKENDS[1].top(values, k)
    assert np.isnan(top.logsumexp[0])
    assert sorted(set(top.ids[0].tolist())) == sorted(top.ids[0].tolist())
    best = np.argsort(-values[0, :40], kind="stable")
    assert top.ids[0, : min(k, 40)].tolist() == best[:k].tolist()


def test_a_row_has_the_same_top_in_any_batch_and_for_any_number_of_threads():
    values = rows(VOCABULARY)
    together = BACKENDS[1].top(values, 50)
    for row in range(3):
        alone = BACKENDS[0].top(values[row : row + 1], 50)
        assert alone.ids[0].tolist() == together.ids[row].tolist()
        assert alone.logsumexp[0] == together.logsumexp[row]
        assert BACKENDS[1].top(values[row : row + 1], 1).logsumexp[0] == alone.logsumexp[0]


@pytest.mark.parametrize("size", [1, 63, 64, 65, 127, 1000, 4096, 8193])
def test_the_best_of_one_row_are_those_of_a_stable_sort(size):
    for values in rows(size):
        values[-1] = 9  # in the last block, which may not be whole
        order = np.argsort(-values, kind="stable")
        for k in sorted({1, min(5, size), size // 64, size // 64 + 1, size}):
            ids, best = BACKENDS[0].best(values[None], k)
            assert ids.tolist() == order[: max(k, 1)].tolist()
            assert best.tolist() == values[ids].tolist()


def test_rows_taken_from_surveyed_ones_are_known_as_they_were():
    values = rows(3000)
    values[0] += 50
    surveyed = BACKENDS[1].survey(values)
    for index in ([1], [2, 0], [0, 1, 2]):
        found = BACKENDS[1].top(BACKENDS[1].take(surveyed, np.array(index)), 40)
        wanted = BACKENDS[0].top(values[index], 40)
        assert found.ids.tolist() == wanted.ids.tolist()
        assert found.logsumexp.tolist() == wanted.logsumexp.tolist()


def test_a_row_that_is_all_forbidden_begins_with_the_lowest_id():
    values = np.full((1, 3000), -np.inf, np.float32)
    assert BACKENDS[0].top(values, 1).ids.tolist() == [[0]]
    values[0, 900] = -3.2e38
    top = BACKENDS[0].top(values, 1)
    assert (top.ids[0, 0], top.logits[0, 0]) == (900, np.float32(-3.2e38))


def test_rows_whose_columns_lie_apart_are_read_as_they_are():
    plain = rows(500)[:2]
    apart, backend = np.asfortranarray(plain), BACKENDS[0]
    assert backend.top(apart, 3).ids.tolist() == backend.top(plain, 3).ids.tolist()
    assert backend.best(apart[:1], 3)[0].tolist() == backend.top(plain, 3).ids[0].tolist()
    assert backend.sums(apart[:1]) == backend.sums(plain[:1])
