"""Padded and recorded steps of the CUDA backend. A tape of torch's operations stands for a CUDA
graph: it does again what was done, on the same memory, and knows nothing of Python, the host, or
what has changed since."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Tiny, pack

from bloomq.backends.reference import ReferenceAttention, ReferenceCache
from bloomq.config import BloomConfig
from bloomq.errors import CapacityError
from bloomq.heads import Head
from bloomq.layers import Span
from bloomq.pack import Pack

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402  # they need torch
from torch.utils._pytree import tree_leaves  # noqa: E402

from bloomq.backends.cuda import steps  # noqa: E402
from bloomq.backends.cuda.attention import attention  # noqa: E402
from bloomq.backends.cuda.cache import CudaCache  # noqa: E402
from bloomq.backends.cuda.steps import Recorder, Shape, bucket, in_graphs  # noqa: E402

CPU = torch.device("cpu")
CONFIG = BloomConfig(hidden_size=24, n_layer=2, n_head=3, vocab_size=50)
GPUS = ["cuda:0"] if torch.cuda.is_available() else []
CLOSE = 2e-5  # see test_cuda_attention; two layers add up, none amplifies
RNG = np.random.default_rng(7)
TABLE = RNG.standard_normal((50, 24)).astype(np.float32)
QKV = RNG.standard_normal((2, 24, 72)).astype(np.float32) / 5
RANKS = 2
NO_MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")


class Tape(TorchDispatchMode):
    """Records the operations of a step, to do them again with the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        result = func(*args, **(kwargs or {}))
        self._done.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self._done:
            pairs = zip(tree_leaves(func(*args, **kwargs)), tree_leaves(result), strict=True)
            for again, first in pairs:
                if isinstance(first, torch.Tensor) and again.data_ptr() != first.data_ptr():
                    first.copy_(again)


class Taped:
    """What `steps` uses of `torch.cuda`, with tapes for graphs."""

    CUDAGraph = Tape

    def __init__(self) -> None:
        self.recorded: list[Any] = []  # the pool of each graph
        self.trouble: RuntimeError | None = None
        self.has_blas = False

    def Stream(self, device: Any) -> str:
        return f"a stream of {device}"

    def current_stream(self, device: Any) -> str:
        return f"the current stream of {device}"

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        assert stream == "the current stream of cpu"
        yield

    def graph_pool_handle(self) -> object:
        return object()

    def current_blas_handle(self) -> int:
        self.has_blas = True
        return 1

    @contextmanager
    def graph(self, tape: Tape, *, pool, stream, capture_error_mode) -> Iterator[None]:
        assert self.has_blas, "a recording may not make cuBLAS' handle"
        assert (stream, capture_error_mode) == ("a stream of cpu", "thread_local")
        if self.trouble is not None:
            raise self.trouble
        self.recorded.append(pool)
        with tape:
            yield


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> Taped:
    taped = Taped()
    monkeypatch.setattr(steps, "CUDA", taped)
    return taped


class Model:
    """Two layers of attention with residuals over a table; `step` records as on a GPU if `records`,
    `seen` has the frame and the addresses of what each run was given."""

    def __init__(self, *, records: bool = False, device: Any = CPU) -> None:
        self.device = device
        self._layers = [attention(i, 3, 8, device) for i in range(2)]
        self._table, self._qkv = (torch.from_numpy(part).to(device) for part in (TABLE, QKV))
        self.seen: list[tuple[int, int]] = []
        self.step = in_graphs(self.forward, device)
        assert isinstance(self.step, Recorder)
        self.step._records = records

    def forward(self, ids: Any, cache: Any, span: Any, wanted: Any) -> Any:
        self.seen.append((ids.data_ptr(), wanted.data_ptr()))
        x = self._table.index_select(0, ids)
        for i, layer in enumerate(self._layers):
            x = x + layer(x @ self._qkv[i], cache, span)
        gates = cache.token_gates(span)
        return torch.cat([x, gates], dim=1).index_select(0, wanted)


def expected(ids: np.ndarray, cache: ReferenceCache, span: Span, wanted: np.ndarray) -> np.ndarray:
    x = TABLE[ids]
    for i in range(2):
        x = x + ReferenceAttention(i, 3, 8)(x @ QKV[i], cache, span)
    gates = np.repeat(cache.gates[span.rows], span.counts, axis=0)
    return np.concatenate([x, gates], axis=1)[wanted]


class Both:
    """A cache here and one of the reference, which are given the same steps."""

    def __init__(self, model: Model, batch: int = 5, capacity: int = 600) -> None:
        self.model = model
        self.cache = CudaCache(CONFIG, batch, capacity, RANKS, "f32", model.device)
        self.expected = ReferenceCache(CONFIG, batch, capacity, RANKS)
        self._given = np.random.default_rng(0)

    def feed(self, rows: list[int], counts: list[int] | None = None) -> None:
        span = Span.of(rows, counts or [1] * len(rows))
        count = int(span.starts[-1])
        ids = self._given.integers(0, 50, count)
        wanted = self._given.permutation(count)[: self._given.integers(1, count + 1)]
        gates = self._given.standard_normal(self.cache.gates.shape)
        self.cache.gates[:] = self.expected.gates[:] = gates
        found = self.model.step(ids, self.cache, span, wanted)
        right = expected(ids, self.expected, span, wanted)
        assert found.shape == right.shape
        assert np.abs(found.cpu().numpy() - right).max() <= CLOSE
        for each in (self.cache, self.expected):
            each.advance(span)
        for row in range(self.cache.batch):
            ours, theirs = (each.stored(row) for each in (self.cache, self.expected))
            assert np.abs(ours.keys - theirs.keys).max(initial=0) <= CLOSE
            assert np.abs(ours.values - theirs.values).max(initial=0) <= CLOSE

    def take(self, what: str, *sizes: int) -> None:
        for each in (self.cache, self.expected):
            getattr(each, what)(*sizes)


# -- shapes ----------------------------------------------------------------------------------------


def test_buckets_are_powers_of_two():
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 5, 31, 32, 33)] == [0, 1, 2, 4, 4, 8, 32, 32, 64]


@pytest.mark.parametrize(
    ("rows", "lengths", "shape"),
    [
        ([0], [0, 9, 9, 9, 9], Shape(1, 256, True)),
        ([1], [0, 255, 9, 9, 9], Shape(1, 256, False)),
        ([0, 1, 2], [3, 256, 9, 9, 9], Shape(4, 512, True)),
        ([0, 2], [3, 256, 9, 9, 9], Shape(2, 256, False)),
        ([4, 3, 2, 1, 0], [512, 0, 0, 0, 0], Shape(5, 600, False)),  # as many as there are
    ],
)
def test_a_step_is_padded_to_few_shapes(rows: list[int], lengths: list[int], shape: Shape):
    cache = CudaCache(CONFIG, 5, 600, 0, "f32", CPU)
    cache.lengths[:] = lengths
    ids = np.arange(len(rows))
    assert Shape.of(ids, Span.of(rows, [1] * len(rows)), cache, ids) == shape
    hidden = np.zeros((len(rows), 24), np.float32)
    found = Shape.of(hidden, Span.of(rows, [1] * len(rows)), cache, ids)
    assert found == replace(shape, width=24)


def test_where_a_kernel_reads_each_rows_own_keys_rows_alone_make_a_shape(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(steps, "reads_own_keys", lambda layer: True)
    cache = CudaCache(CONFIG, 5, 600, 0, "f32", CPU)
    found = set()
    for rows, length in (([0, 1, 2], 3), ([4, 1, 0, 2], 3), ([1, 2, 3], 300)):
        cache.lengths[:] = length
        ids = np.arange(len(rows))
        found.add(Shape.of(ids, Span.of(rows, [1] * len(rows)), cache, ids))
    assert found == {Shape(4, 600, False)}


def test_prompts_and_many_results_are_not_padded():
    cache = CudaCache(CONFIG, 5, 600, 0, "f32", CPU)
    ids = np.arange(3)
    assert Shape.of(ids, Span.of([0, 1], [1, 2]), cache, ids) is None
    assert Shape.of(ids, Span.of([0], [3]), cache, ids[:1]) is None
    assert Shape.of(ids[:1], Span.of([0], [1]), cache, np.array([0, 0])) is None


# -- results ---------------------------------------------------------------------------------------

ROWS = st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ones"), ROWS),
        st.tuples(st.just("ones"), ROWS),
        st.tuples(st.just("first"), st.integers(1, 5)),
        st.tuples(st.just("spans"), ROWS, st.integers(1, 130)),
        st.tuples(st.just("copy"), st.integers(0, 4), st.integers(0, 4)),
        st.tuples(st.just("truncate"), st.integers(0, 4), st.integers(0, 130)),
    ),
    min_size=4, max_size=16,
)  # fmt: skip


@pytest.mark.parametrize("how", ["plain", "taped", *GPUS])
def test_any_order_of_steps_agrees_with_the_reference(how: str):
    @settings(max_examples=8, deadline=None)
    @given(order=STEPS)
    def check(order) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(steps, "LEAST_KEYS", 8)
            if how == "taped":
                patch.setattr(steps, "CUDA", Taped())
            device = torch.device(how) if how in GPUS else CPU
            both = Both(Model(records=how != "plain", device=device))
            for what, *sizes in order:
                if what == "ones":
                    both.feed(sizes[0])
                elif what == "first":
                    both.feed(list(range(sizes[0])))
                elif what == "spans":
                    rows = [row for row in sizes[0] if both.cache.lengths[row] < 400]
                    if rows:
                        both.feed(rows, [1 + (sizes[1] * row) % 64 for row in rows])
                else:
                    both.take(what, *sizes)

    check()


@pytest.mark.parametrize("scheme", ["f32", "int8", "nl4", "int4", "nf4"])
def test_a_whole_models_step_does_as_a_tape_what_it_does_as_it_is(
    scheme: str, taped: Taped, tmp_path_factory: pytest.TempPathFactory
):
    """No layer of the backend waits for the device, or brings something along from the host."""
    layers = pytest.importorskip("bloomq.backends.cuda.layers")
    tiny = Tiny(n_head=3, head_dim=20, vocab_size=131)
    opened = Pack.open(pack(tmp_path_factory.getbasetemp(), tiny, scheme))
    head = Head(opened, layers.CudaBackend("cpu", "f16"), "BloomForCausalLM")
    step = head.backend.compile(
        lambda ids, cache, span, wanted: head.read(head.model._forward(ids, cache, span, wanted))
    )
    caches = [head.cache(3, 40) for _ in range(2)]
    for count in (7, *[1] * 4):
        span, wanted = Span.of([2, 0, 1], [count, 1, 1]), np.arange(3)
        ids = RNG.integers(0, 131, count + 2)
        found = []
        for records, cache in zip((False, True), caches, strict=True):
            step._records = records
            found.append(step(ids, cache, span, wanted))
            cache.advance(span)
        assert torch.equal(*found)
    assert len(taped.recorded) == 1


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_step_may_begin_with_hidden_states(taped: Taped, kind: str):
    """As that of a model's second device does."""
    weight = torch.from_numpy(QKV[0])
    layer = attention(0, 3, 8, CPU)
    step = in_graphs(
        lambda x, cache, span, wanted: (x + layer(x @ weight, cache, span))[wanted], CPU
    )
    assert isinstance(step, Recorder)
    step._records = True
    ours, theirs = CudaCache(CONFIG, 3, 40, 0, "f32", CPU), ReferenceCache(CONFIG, 3, 40, 0)
    steps_of = [([0, 2], [5, 1]), ([0, 1, 2], [1, 1, 1]), ([2, 0, 1], [1, 1, 1]), ([0], [1])]
    for rows, counts in [*steps_of, *steps_of[1:]]:
        span = Span.of(rows, counts)
        x = RNG.standard_normal((int(span.starts[-1]), 24)).astype(np.float32)
        kept, wanted = x.copy(), np.arange(len(x))[::-1]
        given = x if kind == "numpy" else torch.from_numpy(x)
        found = step(given, ours, span, wanted)
        right = (x + ReferenceAttention(0, 3, 8)(x @ QKV[0], theirs, span))[wanted]
        assert np.abs(found.numpy() - right).max() <= CLOSE
        assert x.tobytes() == kept.tobytes()
        for each in (ours, theirs):
            each.advance(span)
    assert len(taped.recorded) == 3


def test_a_text_goes_on_over_the_edges_of_shapes(taped: Taped):
    both = Both(Model(records=True), batch=2, capacity=600)
    both.feed([0, 1], [253, 509])
    for _ in range(6):
        both.feed([1, 0])
        both.feed([0])
    assert len(taped.recorded) == 3  # of two rows 512 and 600 keys, of one 512; 256 came once


def test_a_full_row_takes_its_last_token(taped: Taped):
    both = Both(Model(records=True), batch=3, capacity=20)
    both.feed([0, 1, 2], [16, 1, 17])
    for _ in range(3):
        both.feed([0, 1, 2])
    assert both.cache.lengths.tolist() == [19, 4, 20]


def test_a_result_is_the_callers_to_keep(taped: Taped):
    both = Both(Model(records=True))
    span, found = Span.of([0, 1, 2], [1, 1, 1]), []
    for ids in ([1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]):
        result = both.model.step(np.array(ids), both.cache, span, np.arange(3))
        found.append((result, result.clone()))
        both.cache.advance(span)
    assert all(torch.equal(*each) for each in found)


# -- recording -------------------------------------------------------------------------------------


def test_a_shape_is_recorded_when_it_comes_again_and_then_not_run(taped: Taped):
    both = Both(Model(records=True))
    for _ in range(5):
        both.feed([0, 1])
    assert len(both.model.seen) == 2  # as it is, and to record it
    assert len(taped.recorded) == 1
    both.feed([2, 0])  # other rows
    assert len(both.model.seen) == 3


def test_runs_of_a_shape_read_the_same_memory():
    both = Both(Model())
    for rows in ([0, 1, 2], [0, 1, 2, 3], [0, 1, 2]):
        both.feed(rows)
    assert len(set(both.model.seen)) == 1
    both.feed([0])
    assert len(set(both.model.seen)) == 2


def test_the_graphs_of_a_cache_share_one_pool_and_those_of_another_have_theirs(taped: Taped):
    model = Model(records=True)
    for both in (Both(model), Both(model)):
        for rows in ([0], [0, 1], [3, 2, 1]):
            both.feed(rows)
            both.feed(rows)
    assert len(taped.recorded) == 6
    assert len(set(taped.recorded[:3])) == len(set(taped.recorded[3:])) == 1
    assert len(set(taped.recorded)) == 2


def test_what_was_recorded_goes_when_the_cache_grows(taped: Taped):
    both = Both(Model(records=True))
    for _ in range(3):
        both.feed([0, 4])
    graph = weakref.ref(next(iter(both.cache.recorded[both.model.step].by_shape.values())).graph)
    buffers = weakref.ref(both.cache.layers[0].codes)
    both.take("grow", 700, 6)
    gc.collect()
    assert graph() is None
    assert buffers() is None
    for _ in range(3):
        both.feed([0, 5, 4])
    assert len(taped.recorded) == 2


def test_what_was_recorded_goes_with_the_cache_and_with_the_step(taped: Taped):
    model, other = Model(records=True), Model(records=True)
    both = Both(model)
    both.feed([0])
    both.feed([0])
    both.model = other
    both.feed([0])
    assert len(both.cache.recorded) == 2
    del model
    gc.collect()
    assert list(both.cache.recorded) == [other.step]
    buffers = weakref.ref(both.cache.layers[0].codes)
    del both
    gc.collect()
    assert buffers() is None


def test_a_step_that_no_graph_can_hold_is_not_recorded(taped: Taped):
    step = in_graphs(lambda ids, cache, span, wanted: ids, torch.device("cuda"), record=False)
    assert isinstance(step, Recorder)
    assert not step._records
    assert in_graphs(step, torch.device("cuda"))._records
    assert not in_graphs(step, CPU)._records


# -- no memory -------------------------------------------------------------------------------------


def test_without_memory_for_a_graph_steps_run_as_they_are(taped: Taped):
    both = Both(Model(records=True))
    both.feed([0])
    taped.trouble = NO_MEMORY
    both.feed([0])
    taped.trouble = None
    both.feed([0])
    both.feed([0, 1])
    both.feed([0, 1])
    assert not taped.recorded
    both.take("grow", 700)
    both.feed([0])
    both.feed([0])
    assert len(taped.recorded) == 1


def test_a_step_that_cannot_be_recorded_runs_as_it_is_and_says_so_once(taped: Taped):
    both = Both(Model(records=True))
    both.feed([0])
    taped.trouble = RuntimeError("CUDA error: operation not permitted\nCompile with ...")
    expected = "^decoding runs without CUDA graphs, slower: CUDA error: operation not permitted$"
    with pytest.warns(UserWarning, match=expected):
        both.feed([0])
    taped.trouble = None
    both.take("grow", 700)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both.feed([0])
        both.feed([0])
    assert not taped.recorded


@pytest.mark.parametrize("counts", [[1, 1], [3, 1]])
def test_a_device_out_of_memory_is_a_plain_error_and_the_cache_as_before(counts: list[int]):
    both = Both(Model())
    both.feed([0, 1], [5, 1])
    whole = both.model.step._step

    def refuse(*given: Any) -> None:
        raise NO_MEMORY

    both.model.step._step = refuse
    expected = (
        rf"^no memory on cpu for a step of {sum(counts)} tokens: use fewer rows, a shorter prompt "
        "or a smaller cache$"
    )
    with pytest.raises(CapacityError, match=expected):
        both.model.step(np.arange(sum(counts)), both.cache, Span.of([0, 1], counts), np.arange(2))
    assert both.cache.lengths.tolist() == [5, 1, 0, 0, 0]
    assert not both.cache.recorded
    both.model.step._step = whole
    both.feed([0, 1], counts)
