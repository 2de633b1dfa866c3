"""Rows of a cache on every backend: whatever was copied, cut out, forgotten, stored and restored,
a row holds the keys and values that it should, and gives what they alone would give.

The model of a cache is a list of token numbers for each row; a token's queries, keys and values
follow from its number.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import as_held, as_int8

from bloomq import backends
from bloomq.backends.reference import ReferenceBackend
from bloomq.config import BloomConfig
from bloomq.errors import CapacityError, UsageError
from bloomq.layers import PAGE_TOKENS, Span, Stored

CONFIG = BloomConfig(hidden_size=24, n_layer=2, n_head=3, vocab_size=16)  # heads of 8: padded to 16
KINDS = [f"numba {dtype}" for dtype in ("f32", "f16", "int8")] + ["reference f32", "jax f32"]
KINDS = [kind for kind in KINDS if kind.split()[0] in backends.available()]
PAGED = [kind for kind in KINDS if kind.startswith("numba")]
TOKENS = 500
QKV = np.random.default_rng(1).standard_normal((TOKENS, 2, 3, 3, 8)).astype(np.float32)


def backend_of(kind: str) -> Any:
    name, dtype = kind.split()
    if name == "numba":
        from bloomq.backends.numba_cpu.layers import NumbaBackend

        return NumbaBackend(2, dtype)
    if name == "jax":
        from bloomq.backends.jax.layers import JaxBackend

        return JaxBackend()
    return ReferenceBackend()


def run(backend: Any, cache: Any, span: Span, ids: np.ndarray) -> np.ndarray:
    """What both layers' attention gives, [layer, M, H * D]."""
    steps = []
    for i in range(2):
        qkv = QKV[ids, i].reshape(len(ids), -1)
        steps.append(np.asarray(backend.attention(i, 3, 8)(qkv, cache, span)))
    return np.stack(steps)


class Rows:
    """A cache of two layers, and the tokens that each of its rows should hold."""

    def __init__(self, kind: str, batch: int = 3, capacity: int = 256) -> None:
        self.kind, self._backend = kind, backend_of(kind)
        # What a row alone would give, in a cache of its own: a backend's own bits where they do not
        # depend on how the tokens are cut.
        self._judge = self._backend if kind in PAGED else ReferenceBackend()
        self.cache = self._backend.cache(CONFIG, batch, capacity, 2)
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self._next = 0

    def fresh(self, capacity: int = 256) -> Rows:
        """Empty ones of the same kind."""
        return Rows(self.kind, capacity=capacity)

    def feed(self, *counts: tuple[int, int]) -> None:
        """(row, tokens) of one step, whose results must be those of each row alone."""
        rows, new = [row for row, _ in counts], []
        for row, count in counts:
            new.append([(self._next + i) % TOKENS for i in range(count)])
            self._next += count
            self.tokens[row] = self.tokens[row] + new[-1]
        span = Span.of(rows, [count for _, count in counts])
        found = self.run(span, np.concatenate(new))
        self.cache.advance(span)
        for row, ids, y in zip(rows, new, np.split(found, span.starts[1:-1], axis=1), strict=True):
            whole, cache = self.tokens[row], self._judge.cache(CONFIG, 1, len(self.tokens[row]))
            alone = run(self._judge, cache, Span.of([0], [len(whole)]), np.array(whole))
            expected = alone[:, len(whole) - len(ids) :]
            if self.kind in PAGED:
                assert y.tobytes() == expected.tobytes()
            else:  # sums in another order
                assert np.abs(y - expected).max() <= 1e-5

    def run(self, span: Span, ids: np.ndarray) -> np.ndarray:
        """A step that is not counted, [layer, M, H * D]."""
        return run(self._backend, self.cache, span, ids)

    def check(self) -> None:
        """What is stored is what should be, and nothing else is kept."""
        assert self.cache.lengths.tolist() == [len(tokens) for tokens in self.tokens]
        for row, tokens in enumerate(self.tokens):
            self.check_stored(self.cache.stored(row), tokens)
            keys = self.cache.keys(1, row, len(tokens))
            expected = as_held(QKV[tokens][:, 1, :, 1], self.dtype).reshape(keys.shape)
            assert np.allclose(keys, expected, rtol=1e-6, atol=0)
        if self.kind in PAGED:
            self.check_pages()

    @property
    def dtype(self) -> str:
        return self.kind.split()[1]

    def check_stored(self, stored: Stored, tokens: list[int]) -> None:
        expected = QKV[tokens].transpose(3, 1, 0, 2, 4)[1:]  # [2, layer, S, H, D]
        found = np.stack([stored.keys, stored.values])
        if self.dtype == "int8":
            codes, scales = as_int8(expected)
            assert np.array_equal(found, codes)
            assert np.array_equal(stored.scales, scales[..., 0])
        else:
            assert np.array_equal(found, expected.astype(found.dtype))
            assert stored.scales.size == 0

    def check_pages(self) -> None:
        """Every page is counted as often as rows refer to it, and no row has one too many."""
        rows = [row.pages for row in self.cache._rows]
        for pages, tokens in zip(rows, self.tokens, strict=True):
            assert len(pages) == -(-len(tokens) // PAGE_TOKENS)
        every = [page for pages in rows for page in pages]
        assert all(page.rows == sum(page is other for other in every) for page in every)
        assert self.cache.pages_in_use == len({id(page) for page in every})
        assert self.cache.nbytes >= self.cache.pages_in_use * self.cache._layout.page_bytes

    def copy(self, source: int, target: int) -> None:
        self.cache.copy(source, target)
        self.tokens[target] = list(self.tokens[source])

    def truncate(self, row: int, length: int) -> None:
        self.cache.truncate(row, length)
        self.tokens[row] = self.tokens[row][:length]

    def drop(self, row: int, start: int, count: int) -> None:
        self.cache.drop(row, start, count)
        self.tokens[row] = self.tokens[row][:start] + self.tokens[row][start + count :]

    def restore(self, source: int, target: int) -> None:
        self.cache.restore(target, self.cache.stored(source))
        self.tokens[target] = list(self.tokens[source])

    def grow(self, capacity: int, batch: int | None = None) -> None:
        self.cache.grow(capacity, batch)
        self.tokens += [[] for _ in range(self.cache.batch - len(self.tokens))]


@pytest.fixture(params=KINDS)
def rows(request: pytest.FixtureRequest) -> Rows:
    return Rows(request.param)


@pytest.fixture(params=PAGED)
def paged(request: pytest.FixtureRequest) -> Rows:
    return Rows(request.param)


# -- copy ------------------------------------------------------------------------------------------


def test_a_copy_and_its_source_go_their_own_ways(rows: Rows):
    rows.feed((0, 100))
    rows.copy(0, 1)
    rows.feed((1, 1))  # the copy first
    rows.feed((0, 40))
    rows.copy(0, 2)
    rows.feed((0, 1))  # the source first
    rows.feed((2, 1))
    rows.feed((2, 1), (0, 70), (1, 1))
    rows.check()


def test_a_copy_of_a_copy_and_a_copy_over_a_used_row(rows: Rows):
    rows.feed((0, 70), (1, 130), (2, 3))
    rows.copy(0, 2)
    rows.copy(2, 1)
    rows.check()
    rows.feed((0, 1), (1, 1), (2, 1))
    rows.copy(1, 1)
    rows.feed((1, 64), (0, 1))
    rows.check()


def test_a_row_copied_at_the_edge_of_a_page_is_written_beyond_it(rows: Rows):
    rows.feed((0, 128))
    rows.copy(0, 1)
    rows.feed((1, 2), (0, 1))
    rows.truncate(0, 64)
    rows.feed((0, 3))
    rows.check()


def test_an_empty_row_copied_empties_its_target(rows: Rows):
    rows.feed((0, 90))
    rows.copy(1, 0)
    rows.feed((0, 1), (1, 1))
    rows.check()


def test_a_copy_takes_the_gates_along_and_a_restored_row_keeps_its_own(rows: Rows):
    rows.feed((0, 3))
    rows.cache.gates[:] = [[1, 2], [3, 4], [5, 6]]
    rows.cache.copy(0, 1)
    rows.cache.restore(2, rows.cache.stored(0))
    assert rows.cache.gates.tolist() == [[1, 2], [1, 2], [5, 6]]


def test_a_row_cut_below_what_it_shares_writes_to_pages_of_its_own(rows: Rows):
    rows.feed((0, 150))
    rows.copy(0, 1)
    rows.copy(0, 2)
    rows.truncate(1, 70)
    rows.truncate(2, 64)
    rows.feed((1, 80), (2, 1))
    rows.feed((0, 1))
    rows.check()


# -- drop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "count"), [(0, 64), (64, 64), (64, 128), (0, 192), (128, 64), (64, 0)]
)
def test_a_row_without_some_tokens_is_as_if_it_had_never_had_them(rows: Rows, start, count):
    rows.feed((0, 200), (1, 1))
    rows.copy(0, 1)
    rows.drop(0, start, count)
    rows.check()
    rows.feed((0, 1), (1, 1))
    rows.feed((0, 9))
    rows.check()


def test_a_window_slides_behind_its_first_tokens(rows: Rows):
    rows.feed((0, 64))
    for _ in range(6):
        rows.feed((0, 64))
        if len(rows.tokens[0]) == 256:
            rows.drop(0, 64, 64)
    rows.check()


@pytest.mark.parametrize(
    ("start", "count"), [(0, 1), (32, 64), (0, 256), (192, 64), (-64, 64), (64, -64), (256, 0)]
)
def test_only_whole_pages_that_a_row_holds_are_dropped(rows: Rows, start, count):
    rows.feed((0, 200))
    expected = (
        rf"^{count} tokens to drop from {start} on, expected multiples of 64 within the 200 that "
        "the row holds$"
    )
    with pytest.raises(UsageError, match=expected):
        rows.cache.drop(0, start, count)
    rows.check()


# -- stored, restore -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 64, 131])
def test_a_stored_row_goes_on_in_another_cache_with_the_same_bits(rows: Rows, count: int):
    other = rows.fresh()
    if count:
        rows.feed((1, count))
    other.feed((0, 7), (2, 250))
    stored = rows.cache.stored(1)
    assert stored.length == count
    for row in (0, 2):
        other.cache.restore(row, stored)
        other.tokens[row] = list(rows.tokens[1])
    other.check()
    other.feed((2, 1), (0, 70))
    other.check()


def test_what_is_stored_does_not_change_with_the_row(rows: Rows):
    rows.feed((0, 70))
    stored, tokens = rows.cache.stored(0), rows.tokens[0]
    rows.truncate(0, 5)
    rows.feed((0, 90))
    rows.check_stored(stored, tokens)
    rows.check_stored(stored.first(13), tokens[:13])
    rows.cache.restore(0, stored.first(13))
    rows.tokens[0] = tokens[:13]
    rows.check()


def changed(stored: Stored, what: str) -> Stored:
    """`stored` with one thing wrong."""
    keys, values, scales = stored.keys, stored.values, stored.scales
    wrong: dict[str, dict[str, Any]] = {
        "a layer less": {"keys": keys[1:]},
        "a head less": {"keys": keys[:, :, 1:]},
        "narrower heads": {"values": values[..., 1:]},
        "fewer values": {"values": values[:, 1:]},
        "flat": {"keys": keys.reshape(-1)},
        "no array": {"keys": np.float32(1)},
        "another dtype": {"values": values.astype(np.float64)},
        "another byte order": {"keys": keys.astype(">f4")},
        "other scales": {"scales": np.zeros((2, 2, 5, 2), np.float32)},
        "wide scales": {"scales": scales.astype(np.float64)},
    }
    return replace(stored, **wrong[what])


@pytest.mark.parametrize(
    "what",
    [
        "a layer less", "a head less", "narrower heads", "fewer values", "flat", "no array",
        "another dtype", "another byte order", "other scales", "wide scales",
    ],
)  # fmt: skip
def test_stored_arrays_that_do_not_fit_are_refused_and_the_row_is_as_before(rows: Rows, what):
    rows.feed((0, 5), (1, 9))
    wrong = changed(rows.cache.stored(0), what)
    expected = r"^stored (keys|values|scales) are \S+ \[.*\], expected \w+ \[.*\]: they are of an"
    with pytest.raises(UsageError, match=expected):
        rows.cache.restore(1, wrong)
    rows.check()


def test_more_stored_tokens_than_a_row_has_room_for_are_refused(rows: Rows):
    rows.feed((0, 250))
    small = rows.fresh(capacity=128)
    small.feed((0, 5))
    with pytest.raises(CapacityError, match=r"^250 stored tokens, the cache holds 128: grow it"):
        small.cache.restore(0, rows.cache.stored(0))
    small.check()


def test_damaged_keys_end_as_nan_at_worst(rows: Rows):
    """What a file says may be anything."""
    rows.feed((0, 200))
    stored = rows.cache.stored(0)
    if rows.dtype == "int8":
        stored.keys[:] = -128
        stored.scales[:, :, 3] = [[[np.nan, -np.inf, 1e38]] * 2] * 2
    else:
        stored.keys[:, 3] = np.finfo(stored.keys.dtype).max
        stored.values[:, 5] = np.nan
    rows.cache.restore(1, stored)
    with np.errstate(invalid="ignore", over="ignore"):
        rows.run(Span.of([1], [1]), np.array([0]))
    rows.feed((0, 1))  # another row does not see them


# -- grow ------------------------------------------------------------------------------------------


def test_rows_are_added_and_the_others_keep_what_they_hold(rows: Rows):
    rows.feed((0, 100), (2, 5))
    rows.cache.gates[:] = 1
    rows.grow(100, 5)
    assert rows.cache.batch == 5
    assert rows.cache.gates.tolist() == [[1, 1]] * 3 + [[0, 0]] * 2
    assert rows.cache.capacity == 256
    rows.copy(0, 4)
    rows.feed((4, 1), (3, 2), (2, 60), (0, 1))
    rows.grow(500, 2)  # never fewer
    assert rows.cache.batch == 5
    assert rows.cache.capacity >= 500
    rows.feed((0, 200), (4, 1))
    rows.check()


def test_a_cache_without_memory_for_more_rows_is_as_before(rows: Rows):
    rows.feed((0, 20))
    with pytest.raises(CapacityError, match=r"^no memory for a cache of "):
        rows.grow(256, 1 << 50)
    assert rows.cache.batch == len(rows.cache.lengths) == len(rows.cache.gates) == 3
    rows.feed((0, 1), (2, 1))
    rows.check()


# -- any order of it all ---------------------------------------------------------------------------

SIZES = st.sampled_from([1, 1, 2, 40, 64, 100])
ROW = st.integers(0, 2)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), ROW, SIZES),
        st.tuples(st.just("both"), ROW, SIZES),
        st.tuples(st.just("copy"), ROW, ROW),
        st.tuples(st.just("restore"), ROW, ROW),
        st.tuples(st.just("truncate"), ROW, st.integers(0, 256)),
        st.tuples(st.just("drop"), ROW, st.integers(0, 3), st.integers(1, 3)),
    ),
    max_size=14,
)


def take(rows: Rows, step: tuple[Any, ...]) -> None:
    """One operation, if it is possible."""
    what, row, *sizes = step
    length = len(rows.tokens[row])
    if what == "drop":
        start, count = (64 * pages for pages in sizes)
        if start + count <= length:
            rows.drop(row, start, count)
    elif what in ("feed", "both"):
        other = (row + 1) % 3
        if length + sizes[0] <= 256 and len(rows.tokens[other]) < 256:
            rows.feed((row, sizes[0]), *([(other, 1)] if what == "both" else []))
    else:
        getattr(rows, what)(row, sizes[0])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("jax")])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_any_order_of_operations_leaves_what_it_should_and_leaks_nothing(kind, steps):
    rows = Rows(kind)
    for step in steps:
        take(rows, step)
        rows.check()
    for row in range(3):
        rows.truncate(row, 0)
    rows.check()
    assert kind not in PAGED or rows.cache.pages_in_use == 0


# -- pages -----------------------------------------------------------------------------------------


def test_a_copy_takes_no_memory_until_it_is_written_and_then_a_page(paged: Rows):
    assert paged.cache.pages_in_use == 0  # none before it is needed
    paged.feed((0, 200))
    assert paged.cache.pages_in_use == 4
    paged.copy(0, 1)
    paged.copy(1, 2)
    assert paged.cache.pages_in_use == 4
    paged.feed((2, 1))
    assert paged.cache.pages_in_use == 5
    paged.feed((1, 1), (0, 1))  # two rows are left: one of them needs a copy
    assert paged.cache.pages_in_use == 6
    paged.truncate(0, 0)
    assert paged.cache.pages_in_use == 5
    paged.check()


def test_a_large_capacity_takes_no_memory(paged: Rows):
    paged.grow(1 << 24, 100)
    paged.feed((99, 65))
    assert paged.cache.pages_in_use == 2


def test_memory_that_rows_gave_up_is_used_again_and_little_of_it_kept(
    paged: Rows, monkeypatch: pytest.MonkeyPatch
):
    page_bytes = paged.cache._layout.page_bytes
    paged.cache._spare.most_bytes = 2 * page_bytes
    paged.feed((0, 256), (1, 10))
    assert paged.cache.nbytes == 5 * page_bytes
    paged.truncate(0, 0)
    assert paged.cache.nbytes == 3 * page_bytes
    no_memory_after(0, monkeypatch)
    paged.run(Span.of([1], [118]), np.arange(118))  # two pages: one more
    with pytest.raises(CapacityError, match=NO_MEMORY):
        paged.run(Span.of([1], [240]), np.arange(240))  # four: one of them is too many
    monkeypatch.undo()
    paged.check()


def no_memory_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many more pages, and no other."""
    from bloomq.backends.numba_cpu import pages

    mapped, made = pages._mapped, []

    def limited(size: int) -> Any:
        made.append(size)
        if len(made) > count:
            raise MemoryError
        return mapped(size)

    monkeypatch.setattr(pages, "_mapped", limited)


NO_MEMORY = r"^no memory for a cache of 0\.0 GB: ask for fewer tokens or rows$"


@pytest.mark.parametrize("pages", range(4))
def test_a_step_without_memory_for_its_pages_leaves_the_cache_as_before(
    paged: Rows, monkeypatch: pytest.MonkeyPatch, pages: int
):
    paged.feed((0, 70), (1, 10))
    paged.copy(0, 2)
    span, ids = Span.of([1, 0, 2], [60, 1, 100]), np.arange(161)
    no_memory_after(pages, monkeypatch)  # the step needs one, one and one
    if pages < 3:
        with pytest.raises(CapacityError, match=NO_MEMORY):
            paged.run(span, ids)
    monkeypatch.undo()
    paged.check()
    paged.feed((1, 60), (0, 1), (2, 100))
    paged.check()


def test_a_row_that_there_is_no_memory_to_restore_is_as_before(
    paged: Rows, monkeypatch: pytest.MonkeyPatch
):
    paged.feed((0, 200), (1, 70))
    stored = paged.cache.stored(0)
    no_memory_after(2, monkeypatch)
    with pytest.raises(CapacityError, match=NO_MEMORY):
        paged.cache.restore(1, stored)
    paged.check()


def test_a_page_that_is_beyond_addresses_is_no_memory():
    pages = pytest.importorskip("bloomq.backends.numba_cpu.pages")
    for size in (1 << 60, 1 << 70):
        with pytest.raises(MemoryError):
            pages._mapped(size)


def test_what_a_broken_step_left_behind_is_used_or_given_back(paged: Rows):
    paged.feed((0, 60), (1, 3))
    ids = np.arange(200)
    paged.run(Span.of([0], [200]), ids)  # as one that was interrupted: not counted
    assert paged.cache.pages_in_use == 6
    paged.copy(0, 1)  # leaves it out
    paged.feed((0, 1), (1, 2))
    assert paged.cache.pages_in_use == 5 + 1
    paged.truncate(0, 60)
    paged.truncate(1, 60)
    paged.check()


def test_a_running_program_keeps_the_pages_that_it_was_told_of(paged: Rows):
    """Though its row is emptied, and its memory asked for again."""
    from bloomq.backends.numba_cpu.layers import _INPUTS
    from bloomq.backends.numba_cpu.program import Program

    paged.feed((0, 100))
    program = Program(_INPUTS)
    paged.cache.bind(program, Span.of([0], [1]))
    address = paged.cache._rows[0].pages[0].address
    paged.truncate(0, 0)
    paged.feed((1, 200), (2, 200))
    assert address not in [page.address for row in paged.cache._rows for page in row.pages]
    program.held = None


def test_threads_may_use_rows_that_share_pages(paged: Rows):
    paged.feed((0, 100))
    stored, errors = paged.cache.stored(0), []
    paged.copy(0, 1)
    paged.copy(0, 2)

    def work(row: int) -> None:
        for _ in range(20):
            span = Span.of([row], [50])
            paged.run(span, np.arange(50))
            paged.cache.advance(span)
            paged.cache.truncate(row, 100)
            found = paged.cache.stored(row)
            if found.keys.tobytes() != stored.keys.tobytes():
                errors.append(row)

    threads = [threading.Thread(target=work, args=[row]) for row in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    paged.check()
