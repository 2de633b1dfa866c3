"""`top` of the CUDA backend on torch's CPU device: the order of a stable sort, float64 sums."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import numpy as np
import pytest

from bloomq.backends.reference import ReferenceBackend

pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

import torch

from bloomq.backends.cuda.layers import CudaBackend
from bloomq.backends.cuda.surveyed import LogitRows
from bloomq.backends.cuda.top import best_of, row_sums
from bloomq.layers import SURVEYED_ROWS

pytestmark = pytest.mark.usefixtures("one_torch_thread")
BACKEND = CudaBackend("cpu")


def rows(size: int) -> np.ndarray:
    """All different; many ties with zeros of either sign; half of it forbidden; all alike."""
    values = (3 * np.random.default_rng(size).standard_normal((4, size))).astype(np.float32)
    values[1] = np.rint(values[1] / 4)
    values[2, ::2] = -np.inf
    if size == 1:
        values[2] = 1
    values[3] = -0.0
    return values


@pytest.mark.parametrize(("size", "k"), [(1, 1), (7, 3), (1000, 40), (1000, 1000), (250_880, 50)])
def test_top_is_that_of_a_stable_sort(size: int, k: int):
    logits = rows(size)
    found, expected = (each.top(logits, k) for each in (BACKEND, ReferenceBackend()))
    assert np.array_equal(found.ids, expected.ids)
    assert found.logits.tobytes() == expected.logits.tobytes()
    # Sums of up to 250,880 float64 in another order, of which log takes away most.
    assert found.logsumexp == pytest.approx(expected.logsumexp, rel=1e-12, abs=1e-10)


def test_more_than_there_are_is_all_there_are():
    found = BACKEND.top(rows(5), 50)
    assert found.ids.shape == found.logits.shape == (4, 5)


def test_nan_comes_last_and_is_in_the_sum():
    logits = np.array([[1, np.nan, -np.inf, 2], [1, 3, 3, 2], [np.inf, 0, 1, 2]], np.float32)
    found, expected = (each.top(logits, 4) for each in (BACKEND, ReferenceBackend()))
    assert found.ids.tolist() == expected.ids.tolist() == [[3, 0, 2, 1], [1, 2, 3, 0], [0, 3, 2, 1]]
    assert np.isnan(found.logsumexp).tolist() == [True, False, True]


def test_levels_are_the_references():
    logits = rows(1000)[:1]
    found, expected = (each.levels(logits, 0.7) for each in (BACKEND, ReferenceBackend()))
    assert np.array_equal(found.levels, expected.levels)
    assert np.array_equal(found.masses, expected.masses)


@pytest.mark.parametrize("size", [1, 7, 1000, 250_880])
def test_what_a_step_finds_out_is_what_top_finds(size: int):
    logits = rows(size)
    surveyed = BACKEND.survey(logits)
    found, expected = BACKEND.top(surveyed, 1), ReferenceBackend().top(logits, 1)
    assert np.array_equal(found.ids, expected.ids)
    assert found.logits.tobytes() == expected.logits.tobytes()
    assert found.logsumexp == pytest.approx(expected.logsumexp, rel=1e-12, abs=1e-10)


def most_bytes(work: Callable[[], object]) -> int:
    """That torch holds at a time, while it does this."""
    with torch.profiler.profile(profile_memory=True) as profile:
        held = work()
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del held
    return max(accumulate(sizes))


@pytest.mark.parametrize("batch", [1, 8])
def test_finding_out_takes_the_bytes_that_a_plan_counts(batch: int):
    """`placement.work` has 12 bytes of a logit and 8 of a token, and 33 of one row's sums."""
    logits = torch.from_numpy(np.tile(rows(50_000), (2, 1))[:batch])
    few = 4096  # of what is one number for each row
    assert 0 <= most_bytes(lambda: LogitRows.of(logits)) - 50_000 * (12 * batch + 8) < few
    assert 0 <= most_bytes(lambda: best_of(logits, 1)) - 50_000 * (12 * batch + 8) < few
    assert 0 <= most_bytes(lambda: row_sums(logits[0], 0.7)) - 50_000 * 33 < few


def test_a_step_of_many_rows_finds_nothing_out():
    many = np.zeros((SURVEYED_ROWS + 1, 3), np.float32)
    assert isinstance(BACKEND.survey(many), torch.Tensor)
