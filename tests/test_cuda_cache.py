"""The cache of the CUDA backend on torch's CPU device: the operations of `test_cache`, in any order
and with steps that are padded, and what only static buffers have to say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import as_int8
from test_cache import (  # noqa: F401  # the tests among them are run here too, on `rows` below
    CONFIG,
    QKV,
    STEPS,
    Rows,
    take,
    test_a_copy_takes_the_gates_along_and_a_restored_row_keeps_its_own,
    test_a_stored_row_goes_on_in_another_cache_with_the_same_bits,
    test_a_window_slides_behind_its_first_tokens,
    test_an_empty_row_copied_empties_its_target,
)

from bloomq.errors import CapacityError, UsageError
from bloomq.layers import Span

torch = pytest.importorskip("torch")

from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402

from bloomq.backends.cuda import cache as caches  # noqa: E402  # they need torch
from bloomq.backends.cuda.attention import attention  # noqa: E402
from bloomq.backends.cuda.buffers import Layer  # noqa: E402
from bloomq.backends.cuda.cache import CudaCache  # noqa: E402
from bloomq.backends.cuda.steps import in_graphs  # noqa: E402

CPU = torch.device("cpu")
DTYPES = ["f32", "f16", "int8"]


class OnDevice:
    """A backend that has attention and caches."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype

    def attention(self, layer: int, n_head: int, head_dim: int) -> Any:
        return attention(layer, n_head, head_dim, CPU)

    def cache(self, config, batch: int, capacity: int, ranks: int = 0) -> CudaCache:
        return CudaCache(config, batch, capacity, ranks, self._dtype, CPU)


class DeviceRows(Rows):
    """Rows whose steps run as a model's do, padded where they have one token a row."""

    def __init__(self, dtype: str, batch: int = 3, capacity: int = 256) -> None:
        self.kind = f"cuda {dtype}"
        self._backend = self._judge = OnDevice(dtype)
        self.cache = self._backend.cache(CONFIG, batch, capacity, 2)
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self._next = 0
        layers = [attention(i, 3, 8, CPU) for i in range(2)]
        table = torch.from_numpy(QKV.reshape(len(QKV), 2, -1))
        self._step = in_graphs(
            lambda ids, cache, span, wanted: torch.stack(
                [layer(table[ids, i], cache, span) for i, layer in enumerate(layers)], dim=1
            )[wanted],
            CPU,
        )

    def fresh(self, capacity: int = 256) -> DeviceRows:
        return DeviceRows(self.dtype, capacity=capacity)

    def run(self, span: Span, ids: np.ndarray) -> np.ndarray:
        found = self._step(ids, self.cache, span, np.arange(len(ids)))
        return found.numpy().swapaxes(0, 1)


@pytest.fixture(params=DTYPES)
def rows(request: pytest.FixtureRequest) -> DeviceRows:
    return DeviceRows(request.param)


# -- any order of everything -----------------------------------------------------------------------

GROWING = st.tuples(st.just("grow"), st.sampled_from([100, 300, 512]), st.integers(1, 5))
ALL = st.tuples(st.just("all"), st.just(0))  # one token for every row


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.one_of(STEPS, st.lists(st.one_of(GROWING, ALL), max_size=2)), max_size=4))
def test_any_order_of_operations_leaves_what_it_should(dtype: str, steps):
    rows = DeviceRows(dtype)
    for step in [step for part in steps for step in part]:
        if step[0] == "grow":
            rows.grow(*step[1:])
        elif step[0] == "all":
            rows.feed(*((row, 1) for row in range(rows.cache.batch) if len(rows.tokens[row]) < 256))
        else:
            take(rows, step)
        rows.check()


def test_copies_and_their_sources_go_their_own_ways(rows: DeviceRows):
    rows.feed((0, 100))
    rows.copy(0, 1)
    rows.feed((1, 1))
    rows.feed((0, 40))
    rows.copy(0, 2)
    rows.copy(2, 2)
    rows.feed((2, 1), (0, 70), (1, 1))
    rows.check()


def test_a_token_has_the_gates_of_its_row(rows: DeviceRows):
    rows.cache.gates[:] = [[1, 2], [3, 4], [5, 6]]
    gates = rows.cache.token_gates(Span.of([2, 0], [1, 2]))
    assert gates.tolist() == [[5, 6], [1, 2], [1, 2]]


def test_what_a_cache_gave_does_not_change_with_it(rows: DeviceRows):
    rows.feed((0, 70))
    stored, keys, tokens = rows.cache.stored(0), rows.cache.keys(0, 0, 70), rows.tokens[0]
    kept = keys.copy()
    rows.truncate(0, 5)
    rows.feed((0, 90))
    rows.check_stored(stored, tokens)
    assert keys.tobytes() == kept.tobytes()


# -- refusals --------------------------------------------------------------------------------------


def test_stored_tokens_that_do_not_fit_are_refused_and_the_row_is_as_before(rows: DeviceRows):
    rows.feed((0, 100), (1, 9))
    stored = rows.cache.stored(0)
    small = DeviceRows(rows.dtype, capacity=64)
    small.feed((0, 5))
    with pytest.raises(CapacityError, match=r"^100 stored tokens, the cache holds 64: grow it"):
        small.cache.restore(0, stored)
    small.check()
    other = DeviceRows("f16" if rows.dtype == "f32" else "f32")
    with pytest.raises(UsageError, match=r"^stored keys are \w+ \[2, 100, 3, 8\], expected "):
        other.cache.restore(0, stored)
    with pytest.raises(UsageError, match=r"^32 tokens to drop from 0 on, expected multiples of"):
        rows.cache.drop(0, 0, 32)
    rows.check()


@pytest.mark.parametrize(("capacity", "batch"), [(1 << 50, None), (256, 1 << 50)])
def test_a_cache_that_cannot_grow_is_as_before(rows: DeviceRows, capacity: int, batch):
    rows.feed((0, 20))
    with pytest.raises(CapacityError, match=r"^no memory for a cache of \S+ GB: ask for fewer"):
        rows.cache.grow(capacity, batch)
    assert (rows.cache.capacity, rows.cache.batch) == (256, 3)
    rows.feed((0, 1), (2, 1))
    rows.check()


def test_a_device_without_memory_is_named(rows: DeviceRows, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **others: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    monkeypatch.setattr(caches.torch, "zeros", refuse)
    rows.cache.device = torch.device("cuda:1")
    expected = r"^no memory for a cache of 0\.0 GB on cuda:1: ask for fewer tokens or rows$"
    with pytest.raises(CapacityError, match=expected):
        rows.cache.grow(300)
    assert rows.cache.capacity == 256


# -- growing ---------------------------------------------------------------------------------------


class Memory:
    """What caches have of a device, and the most that they may: of storages still alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._held: list[tuple[Any, int]] = []
        self.most = self.room = 1 << 30
        empty = CudaCache._empty

        def counted(cache: CudaCache, shape: tuple[int, ...], dtype: Any) -> Any:
            made = empty(cache, shape, dtype)
            if self.used + made.nbytes > self.room:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
            self._held.append((StorageWeakRef(made.untyped_storage()), made.nbytes))
            self.most = max(self.most, self.used)
            return made

        monkeypatch.setattr(CudaCache, "_empty", counted)

    @property
    def used(self) -> int:
        return sum(size for storage, size in self._held if not storage.expired())


LAYERS = 5


def filled(dtype: Any) -> CudaCache:
    """A cache of two rows of 40 tokens, with something in each."""
    config = replace(CONFIG, n_layer=LAYERS)
    cache = CudaCache(config, 2, 40, 0, dtype, CPU)
    rng = np.random.default_rng(0)
    for layer in cache.layers:
        vectors = rng.standard_normal((2, 80, 3, 8)).astype(np.float32)
        layer.store(torch.arange(80), torch.from_numpy(vectors))
    cache.lengths[:] = 40, 31
    return cache


def held_by(cache: CudaCache) -> list[bytes]:
    rows = [cache.stored(row) for row in (0, 1)]
    return [part.tobytes() for row in rows for part in (row.keys, row.values, row.scales)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_growing_takes_two_layers_more_than_what_is_there_then(dtype: str, monkeypatch):
    memory = Memory(monkeypatch)
    cache = filled(dtype)
    before, kept, memory.most = cache.nbytes, held_by(cache), 0
    cache.grow(100, 3)
    assert memory.used == cache.nbytes == before // 81 * 301
    assert memory.most == cache.nbytes + 2 * before // LAYERS
    assert held_by(cache) == kept


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_for_which_memory_ends_midway_is_as_before(dtype: str, layer: int, monkeypatch):
    memory = Memory(monkeypatch)
    cache = filled(dtype)
    before, kept = cache.nbytes, held_by(cache)
    slot = before // 81 // LAYERS  # bytes of a layer
    # So many layers have grown, the first one's memory is kept: one byte too few for the next.
    memory.room = before + slot * (layer * (200 - 81) + (81 if layer else 0)) + slot * 200 - 1
    with pytest.raises(CapacityError, match="ask for fewer tokens or rows"):
        cache.grow(100)
    assert (cache.capacity, cache.batch, held_by(cache)) == (40, 2, kept)
    assert memory.used == cache.nbytes == before
    memory.room = 1 << 30
    cache.grow(100, 3)
    assert held_by(cache) == kept


def test_a_cache_whose_growing_is_interrupted_is_as_before(monkeypatch: pytest.MonkeyPatch):
    cache = filled("f16")
    kept, copies = held_by(cache), []

    def interrupt(*given: Any) -> None:
        copies.append(given)
        if len(copies) == 3:
            raise KeyboardInterrupt
        copy_to(*given)

    copy_to = Layer.copy_to
    monkeypatch.setattr(Layer, "copy_to", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.grow(100)
    assert (cache.capacity, held_by(cache)) == (40, kept)


# -- buffers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "token_bytes"), [("f32", 384), ("f16", 192), ("int8", 144)])
def test_a_cache_says_its_size(dtype: str, token_bytes: int):
    """2 layers of keys and values, 3 heads of 8; int8 with 4 bytes of scale a head. One slot more
    than tokens, which is nobody's."""
    cache = CudaCache(CONFIG, 3, 100, 0, dtype, CPU)
    assert cache.token_bytes == token_bytes
    assert cache.nbytes == 301 * token_bytes
    assert not cache.paged


def test_steps_write_where_they_should_and_nowhere_else(rows: DeviceRows):
    """Also padding: 3 rows are padded to what a batch of 5 has room for, 4."""
    rows.grow(256, 5)
    rows.feed((0, 9), (1, 1), (4, 30))
    before = [part.clone() for part in rows.cache._parts()]
    rows.feed((4, 1), (0, 1), (1, 1))
    for old, new in zip(before, rows.cache._parts(), strict=True):
        changed = (old != new).flatten(2).any(dim=2).any(dim=0).nonzero()[:, 0].tolist()
        assert [slot for slot in changed if slot < 5 * 256] == [9, 256 + 1, 4 * 256 + 30]


def test_buffers_move_only_when_a_cache_grows_and_recordings_go_with_them(rows: DeviceRows):
    rows.feed((0, 3))
    rows.feed((0, 1))
    layers, places = rows.cache.layers, [part.data_ptr() for part in rows.cache._parts()]
    rows.copy(0, 1)
    rows.drop(0, 0, 0)
    rows.restore(0, 2)
    rows.feed((0, 1), (1, 1), (2, 1))
    rows.grow(100, 2)  # there is as much
    assert rows.cache.layers is layers
    assert [part.data_ptr() for part in rows.cache._parts()] == places
    assert len(rows.cache.recorded) == 1
    rows.grow(257)
    assert rows.cache.layers is not layers
    assert not rows.cache.recorded
    rows.feed((0, 1), (1, 1), (2, 1))
    rows.check()


@pytest.mark.parametrize("size", [1, 40])
def test_int8_vectors_are_those_of_the_cpu_backend(size: int):
    """Also zeros, faint ones and NaN, which stays one."""
    cache = CudaCache(CONFIG, 1, 128, 0, "int8", CPU)
    vectors = np.random.default_rng(size).standard_normal((2, size, 3, 8)).astype(np.float32)
    vectors[0, 0, 0], vectors[0, 0, 1], vectors[1, 0, 2] = 0, 1e-31, 1e37
    layer = cache.layers[0]
    layer.store(torch.arange(size), torch.from_numpy(vectors))
    codes, scales = as_int8(vectors)
    assert np.array_equal(layer.codes[:, :size].numpy(), codes)
    assert np.array_equal(layer.scales[:, :size].numpy(), scales[..., 0])
    vectors[0, 0, 0, 3] = np.nan
    layer.store(torch.arange(size), torch.from_numpy(vectors))
    assert np.isnan(cache.keys(0, 0, 1)[0, 0]).all()
    assert np.isfinite(cache.keys(0, 0, 1)[0, 1:]).all()
