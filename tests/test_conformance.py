"""The contract of `bloomq.layers`, line by line, on every backend that can run here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from models import Tiny, pack

from bloomq import backends
from bloomq.backends.placed.layers import Place, PlacedBackend
from bloomq.backends.reference import layer_norm
from bloomq.errors import BackendError, CapacityError, UsageError
from bloomq.heads import Head
from bloomq.layers import Backend, Span
from bloomq.levels import sums_of
from bloomq.pack import Pack
from bloomq.schemes import SCHEME_NAMES, get_scheme
from bloomq.weights import Matrix

TINY = Tiny(n_head=3, head_dim=20, vocab_size=131, n_layer=2)
# The reference multiplies matrices by BLAS, whose order of summing depends on the number of rows: a
# few units in the last place of float32 for each of the some ten sums on the way to a logit. So do
# XLA's, which also depend on the sizes a step is padded to (measured: 2.3e-7), and torch's on its
# CPU device. There the CUDA backend has a float16 cache for quantized packs, in which such a unit
# may round a key or value to the neighbour, 2^-11 of itself: one component of 20 of a head, which a
# softmax weighs among others, so a few such in a row of logits are below 2^-11 / sqrt(20) = 1.1e-4
# (measured: 1.7e-5; 4e-7 with a float32 cache). On a GPU a product's inputs are bfloat16, where a
# flip is 2^-8: eight times as much.
CLOSE = {
    "numba": 0.0, "placed": 0.0, "reference": 1e-5, "jax": 1e-5, "cuda-cpu": 1e-4,
    "placed-cuda": 1e-4, "cuda": 1e-3,
}  # fmt: skip
# Of int8 packs the CUDA backend rounds activations to int8, where a last unit of a sum may tip one
# to the next code, and that tips others behind it. At worst all are rounded anew: by 0.7 % of each
# of eight products (NMSE 5e-5, see below), together 2 % (measured over six texts: up to 6.3e-3).
CLOSE_ROUNDED = 2e-2
IDS = np.random.default_rng(3).integers(0, TINY.vocab_size, 64)

Build = Callable[..., Head]


@pytest.fixture(scope="module", params=[*backends.available(), "cuda-cpu", "placed", "placed-cuda"])
def name(request: pytest.FixtureRequest) -> str:
    """ "cuda-cpu" is the CUDA backend on torch's CPU device, which nobody gets without asking;
    "placed" is a layer at each of two places, both Numba's, "placed-cuda" Numba's and that.
    """
    if request.param in ("cuda-cpu", "placed-cuda"):
        pytest.importorskip("bitsandbytes")
    return request.param


def choose(name: str, pack: Pack, threads: int | None, cache_dtype: str = "auto"):
    """`backends.choose` for a name of the fixture's."""
    kind, _, devices = name.partition("-")
    return backends.choose(kind, pack, threads, cache_dtype, devices or "auto")


def chosen(name: str, opened: Pack, threads: int | None) -> Backend:
    if not name.startswith("placed"):
        return choose(name, opened, threads).backend
    pair = ("numba", "cuda-cpu" if name == "placed-cuda" else "numba")
    first, last = (choose(each, opened, threads).backend for each in pair)
    return PlacedBackend([Place(first, range(1)), Place(last, range(1, TINY.n_layer))])


@pytest.fixture(scope="module")
def build(name: str, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`build("int8", threads=1)`: the tiny model on the backend under test."""

    def make(scheme: str = "int4", threads: int | None = None) -> Head:
        opened = Pack.open(pack(tmp_path_factory.getbasetemp(), TINY, scheme))
        return Head(opened, chosen(name, opened, threads), "BloomForCausalLM")

    return make


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return Pack.open(pack(tmp_path_factory.getbasetemp(), TINY, "int4"))


def run(lm: Head, cache, rows: list[int], pieces: list[np.ndarray]) -> list[np.ndarray]:
    """Feed `pieces` to `rows` in one step; the logits [T, V] of each row's new tokens."""
    span = Span.of(rows, [len(piece) for piece in pieces])
    total = sum(len(piece) for piece in pieces)
    logits = lm.backend.numpy(lm.step(np.concatenate(pieces), cache, span, np.arange(total)))
    return np.split(np.array(logits), span.starts[1:-1])


def close(found: np.ndarray, expected: np.ndarray, name: str, scheme: str = "int4") -> bool:
    """Equal up to what the backend may differ by; 0: the same bits."""
    most = CLOSE_ROUNDED if "cuda" in name and scheme == "int8" else CLOSE.get(name, 1e-4)
    if not most:
        return found.tobytes() == expected.tobytes()
    return bool(np.abs(found - expected).max() <= most * np.abs(expected).max())


def held(cache) -> list[list[bytes]]:
    """What each row of a cache holds, token by token."""
    found = []
    for row in range(cache.batch):
        stored = cache.stored(row)
        parts = [np.moveaxis(stored.keys, 1, 0), np.moveaxis(stored.values, 1, 0)]
        if stored.scales.size:
            parts.append(np.moveaxis(stored.scales, 2, 0))
        found.append([b"".join(part[i].tobytes() for part in parts) for i in range(stored.length)])
    return found


# -- decisions are made at construction ------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_a_scheme_runs_or_is_refused_when_the_layer_is_built(build: Build, scheme: str):
    backend = build().backend
    w = np.random.default_rng(0).standard_normal((40, 70)).astype(np.float32)
    kind = get_scheme(scheme)
    weight = Matrix("w", kind, w.shape, kind.quantize(w))
    try:
        layer = backend.linear(weight)
    except BackendError:
        pytest.skip(f"{backend.name} refuses {scheme} at construction, as it may")
    x = np.random.default_rng(1).standard_normal((5, 70)).astype(np.float32)
    y, expected = backend.numpy(layer(x)), x @ weight.dequantize().T
    # int8 activations: a step of peak / 127 is about 1 / 40 of a deviation, its error 1 / 140: NMSE
    # 5e-5; the bound of the project is 5e-4
    assert np.square(y - expected).sum() <= 5e-4 * np.square(expected).sum()


def test_the_head_of_an_int8_pack_reads_more_than_int8(build: Build, tmp_path_factory):
    """Rounded once its activations would have the NMSE of 5e-5 above; bfloat16 has 2^-9 / sqrt(3)
    squared, 1e-6."""
    lm, source = build("int8"), Pack.open(pack(tmp_path_factory.getbasetemp(), TINY, "int8"))
    x = np.random.default_rng(1).standard_normal((9, TINY.config.hidden_size)).astype(np.float32)
    y = lm.backend.numpy(lm.read(x))
    expected = layer_norm(x, source.norm("ln_f")) @ source.matrix("wte").dequantize().T
    assert np.square(y - expected).sum() <= 5e-6 * np.square(expected).sum()


def test_a_backend_says_what_it_chose(build: Build, name: str):
    backend = build().backend
    assert backend.name == name.partition("-")[0]
    assert backend.description
    assert "\n" not in backend.description


# -- only attention writes, and only to the rows of its span ---------------------------------------


def test_a_step_writes_only_its_rows_and_only_beyond_their_lengths(build: Build):
    lm = build()
    cache = lm.cache(4, 48)
    run(lm, cache, [0, 1, 2, 3], [IDS[:20], IDS[20:25], IDS[30:47], IDS[50:51]])
    before = held(cache)
    run(lm, cache, [2, 0], [IDS[:9], IDS[5:6]])
    for old, new in zip(before, held(cache), strict=True):
        assert new[: len(old)] == old
    assert cache.lengths.tolist() == [21, 5, 26, 1]


def test_lengths_grow_only_when_the_cache_is_told(build: Build):
    lm = build()
    cache, span = lm.cache(1, 16), Span.of([0], [3])
    lm.model._forward(IDS[:3], cache, span, np.arange(3))
    assert cache.lengths.tolist() == [0]
    cache.advance(span)
    assert cache.lengths.tolist() == [3]


def test_layers_do_not_change_what_they_are_given(build: Build):
    lm = build()
    cache, span = lm.cache(1, 16), Span.of([0], [3])
    block = lm.model.blocks[0]
    x = np.random.default_rng(0).standard_normal((3, 60)).astype(np.float32)
    qkv = np.array(lm.backend.numpy(block.qkv(x, cache, span)))
    kept_x, kept_qkv, kept_ids = x.copy(), qkv.copy(), IDS[:3].copy()
    block.attention(qkv, cache, span)
    block.out(x, cache, span, add=x)
    lm.model.emb_ln(lm.model.wte(IDS[:3]))
    lm.backend.top(x, 2)
    for now, then in ((x, kept_x), (qkv, kept_qkv), (IDS[:3], kept_ids)):
        assert now.tobytes() == then.tobytes()


# -- continuing equals recomputing, rows are independent -------------------------------------------


@pytest.mark.parametrize("scheme", ["nl4", "int4", "int8", "f32"])
def test_continuing_a_cache_equals_recomputing(build: Build, name: str, scheme: str):
    lm = build(scheme)
    whole = run(lm, lm.cache(1, 64), [0], [IDS[:50]])[0]
    for cuts in ([1] * 50, [17, 1, 16, 16], [49, 1], [3, 47]):
        cache, at, parts = lm.cache(1, 64), 0, []
        for count in cuts:
            parts += run(lm, cache, [0], [IDS[at : at + count]])
            at += count
        assert close(np.concatenate(parts), whole, name, scheme), cuts


@pytest.mark.parametrize("scheme", ["nl4", "int4", "int8", "f32"])
def test_rows_of_different_length_are_independent(build: Build, name: str, scheme: str):
    lm = build(scheme)
    lengths = (1, 33, 16, 7)
    prompts = [IDS[i : i + length] for i, length in enumerate(lengths)]
    cache = lm.cache(4, 64)
    together = run(lm, cache, [0, 1, 2, 3], prompts)
    after = run(lm, cache, [3, 1], [IDS[:1], IDS[:2]])
    for prompt, found in zip(prompts, together, strict=True):
        assert close(found, run(lm, lm.cache(1, 64), [0], [prompt])[0], name, scheme)
    for row, found in ((3, after[0]), (1, after[1])):
        alone = np.concatenate([prompts[row], IDS[: len(found)]])
        expected = run(lm, lm.cache(1, 64), [0], [alone])[0][-len(found) :]
        assert close(found, expected, name, scheme)


def test_nan_in_one_row_does_not_reach_another(build: Build):
    attention = build("f32").model.blocks[0].attention
    lm = build("f32")
    qkv = np.random.default_rng(0).standard_normal((8, 180)).astype(np.float32)
    span, numpy = Span.of([0, 1], [4, 4]), lm.backend.numpy
    clean = np.array(numpy(attention(qkv, lm.cache(2, 16), span)))
    qkv[2] = np.nan
    found = np.array(numpy(attention(qkv, lm.cache(2, 16), span)))
    assert found[4:].tobytes() == clean[4:].tobytes()
    assert np.isnan(found[2:4]).all()


def test_a_block_of_wanted_tokens_gives_their_rows_of_all(build: Build, name: str):
    lm, span = build(), Span.of([0, 1], [9, 4])
    x = lm.model.emb_ln(lm.model.wte(IDS[:13]))
    for wanted in ([12], [12, 3, 8], [], list(range(13))):
        every, some = (
            np.array(lm.backend.numpy(lm.model.blocks[-1](x, lm.cache(2, 16), span, index)))
            for index in (None, np.array(wanted, np.int64))
        )
        assert some.shape == (len(wanted), every.shape[1])
        assert not wanted or close(some, every[wanted], name)


# -- compiled equals eager, any number of threads --------------------------------------------------


def test_compiled_equals_eager(build: Build, name: str):
    lm = build()
    spans = [Span.of([0, 1], [9, 4]), Span.of([1], [1]), Span.of([1, 0], [1, 1])]
    hidden = []

    def forward(ids, cache, span, wanted):
        return lm.model._forward(ids, cache, span, wanted)

    for step in (forward, lm.backend.compile(forward)):
        for _ in range(2):  # recorded, then replayed
            cache = lm.cache(2, 32)
            for span in spans:
                wanted = np.arange(span.starts[-1])[::-1]
                x = step(IDS[: span.starts[-1]], cache, span, wanted)
                cache.advance(span)
                hidden.append(np.array(lm.backend.numpy(x)))
    for found in (hidden[3:6], hidden[6:9], hidden[9:]):
        for eager, compiled in zip(hidden[:3], found, strict=True):
            assert close(compiled, eager, name)


def test_a_compiled_step_may_be_given_hidden_states(build: Build, name: str):
    lm = build()
    backend, blocks = lm.backend, lm.model.blocks

    def behind_the_first(x, cache, span, wanted):
        return backend.take(blocks[1](x, cache, span), wanted)

    compiled = backend.compile(behind_the_first)
    pieces = [(Span.of([0, 1], [9, 4]), 0), (Span.of([1], [1]), 13), (Span.of([1, 0], [1, 1]), 14)]
    for _ in range(2):  # recorded, then replayed
        caches = [lm.cache(2, 32) for _ in range(3)]
        for span, start in pieces:
            own = lm.model.emb_ln(lm.model.wte(IDS[start : start + span.starts[-1]]))
            wanted = np.arange(span.starts[-1])[::-1]
            given = ((behind_the_first, own), (compiled, own), (compiled, backend.numpy(own)))
            found = []
            for (step, x), cache in zip(given, caches, strict=True):
                found.append(np.array(backend.numpy(step(x, cache, span, wanted))))
                cache.advance(span)
            assert close(found[1], found[0], name)
            assert close(found[2], found[0], name)


def test_a_result_is_the_callers_to_keep(build: Build):
    lm = build()
    cache = lm.cache(1, 32)
    first = lm.step(IDS[:1], cache, Span.of([0], [1]), np.array([0]))
    kept = np.array(lm.backend.numpy(first))
    lm.step(IDS[1:2], cache, Span.of([0], [1]), np.array([0]))
    assert np.array(lm.backend.numpy(first)).tobytes() == kept.tobytes()


@pytest.mark.parametrize("scheme", ["nl4", "int4", "nf4", "f32"])
def test_one_and_two_threads_give_the_same_bits(build: Build, scheme: str):
    found = []
    for threads in (1, 2):
        lm = build(scheme, threads)
        cache = lm.cache(2, 64)
        steps = [([0, 1], [IDS[:37], IDS[:5]]), ([1], [IDS[:1]]), ([0, 1], [IDS[:1], IDS[:9]])]
        found.append([piece for rows, ids in steps for piece in run(lm, cache, rows, ids)])
    for one, two in zip(*found, strict=True):
        assert one.tobytes() == two.tobytes()


# -- the cache -------------------------------------------------------------------------------------


def test_a_truncated_row_continues_as_if_the_rest_had_never_been(build: Build, name: str):
    lm = build()
    cache = lm.cache(2, 64)
    run(lm, cache, [0, 1], [IDS[:40], IDS[:10]])
    cache.truncate(0, 18)
    assert cache.lengths.tolist() == [18, 10]
    found = run(lm, cache, [0], [IDS[50:55]])[0]
    expected = run(lm, lm.cache(1, 64), [0], [np.concatenate([IDS[:18], IDS[50:55]])])[0][18:]
    assert close(found, expected, name)


def test_truncating_to_more_than_a_row_holds_changes_nothing(build: Build):
    cache = build().cache(2, 64)
    cache.truncate(1, 5)
    assert cache.lengths.tolist() == [0, 0]


def test_a_copied_row_continues_as_its_source_and_leaves_it_alone(build: Build, name: str):
    lm = build()
    cache = lm.cache(3, 64)
    run(lm, cache, [0, 1, 2], [IDS[:20], IDS[20:50], IDS[5:9]])
    cache.copy(0, 1)
    assert cache.lengths.tolist() == [20, 20, 4]
    run(lm, cache, [1], [IDS[60:64]])  # the copy goes its own way
    assert cache.lengths.tolist() == [20, 24, 4]
    found = run(lm, cache, [0], [IDS[40:43]])[0]
    expected = run(lm, lm.cache(1, 64), [0], [np.concatenate([IDS[:20], IDS[40:43]])])[0][20:]
    assert close(found, expected, name)


def test_a_cache_says_its_size(build: Build):
    lm = build()
    cache = lm.cache(2, 64)
    assert cache.batch == 2
    assert cache.capacity >= 64
    smallest = 2 * lm.config.n_layer * lm.config.hidden_size  # k and v, 1 byte each
    assert smallest < cache.token_bytes <= 8 * smallest
    run(lm, cache, [0, 1], [IDS, IDS])
    assert 2 * 64 * cache.token_bytes <= cache.nbytes < 2.2 * 64 * cache.token_bytes


def test_a_full_cache_is_refused_and_is_as_before(build: Build, name: str):
    lm = build()
    cache = lm.cache(2, 32)
    many = np.resize(IDS, cache.capacity)
    run(lm, cache, [0, 1], [many[:-2], IDS[:3]])
    before = held(cache)
    expected = (
        f"^{cache.capacity + 1} tokens in a row, the cache holds {cache.capacity}: use a shorter"
    )
    with pytest.raises(CapacityError, match=expected):
        run(lm, cache, [1, 0], [IDS[:1], IDS[:3]])
    assert cache.lengths.tolist() == [cache.capacity - 2, 3]
    assert held(cache) == before
    found = run(lm, cache, [0], [many[-2:]])[0]
    assert close(found, run(lm, lm.cache(1, len(many)), [0], [many])[0][-2:], name)


@pytest.mark.parametrize("wrong", [-1, TINY.vocab_size, 2**40])
def test_an_id_outside_the_vocabulary_is_refused_and_the_cache_is_as_before(
    build: Build, wrong: int
):
    lm = build()
    cache = lm.cache(1, 32)
    with pytest.raises(UsageError, match=f"^token id {wrong}, expected 0 to 130$"):
        run(lm, cache, [0], [np.array([3, wrong, 5])])
    assert cache.lengths.tolist() == [0]


# -- the rest of a backend -------------------------------------------------------------------------


def test_take_and_numpy_give_rows_back(build: Build):
    backend = build().backend
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    assert np.array_equal(backend.numpy(backend.take(x, np.array([4, 0, 4]))), x[[4, 0, 4]])


@pytest.mark.parametrize("surveyed", [False, True], ids=["plain", "surveyed"])
def test_the_best_of_rows_come_in_a_stable_order_with_the_logsumexp(build: Build, surveyed: bool):
    values = np.array([[1, 3, 3, -2, 3], [0, 0, 0, 0, 0]], np.float32)
    backend = build().backend
    logits = backend.survey(values) if surveyed else values
    top = backend.top(logits, 3)
    assert top.ids.tolist() == [[1, 2, 4], [0, 1, 2]]
    assert top.logits.tolist() == [[3, 3, 3], [0, 0, 0]]
    assert top.logsumexp == pytest.approx(np.log(np.exp(values).sum(axis=1)), rel=1e-6)
    assert backend.numpy(logits).tolist() == values.tolist()
    second = backend.take(logits, np.array([1]))
    assert backend.top(second, 1).logsumexp[0] == top.logsumexp[1]
    assert backend.numpy(second).tolist() == values[1:].tolist()


@pytest.mark.parametrize("surveyed", [False, True], ids=["plain", "surveyed"])
def test_what_is_asked_of_one_row(build: Build, surveyed: bool):
    values = np.array([[1, 3, 3, -2, 3, -np.inf]], np.float32)
    backend = build().backend
    row = backend.survey(values) if surveyed else values
    ids, best = backend.best(row, 4)
    assert (ids.tolist(), best.tolist()) == ([1, 2, 4, 0], [3, 3, 3, 1])
    found, wanted = backend.sums(row, 2.0), sums_of(values[0], 2.0)
    assert (found.best, found.temperature, found.count) == (3.0, 2.0, 5)
    for name in ("mass", "total", "squares", "moment"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-6)
    assert found.logsumexp() == pytest.approx(np.log(np.exp(values / 2.0).sum()), rel=1e-6)
    assert backend.levels(row, 2.0).sums.count == 5
    masked = backend.masked(row, np.array([True, False, True, True, True, True]))
    assert backend.numpy(masked).tolist() == [[1, -np.inf, 3, -2, 3, -np.inf]]
    assert backend.best(masked, 1)[0].tolist() == [2]


def test_a_step_knows_of_its_logits_what_top_finds_in_them(build: Build):
    lm = build()
    logits = lm.step(IDS[:5], lm.cache(1, 8), Span.of([0], [5]), np.array([4, 2]))
    known, found = lm.backend.top(logits, 3), lm.backend.top(lm.backend.numpy(logits), 3)
    assert known.ids.tolist() == found.ids.tolist()
    assert known.logits.tolist() == found.logits.tolist()
    assert known.logsumexp == pytest.approx(found.logsumexp, rel=1e-12)


def test_an_embedding_reads_the_rows_asked_for(build: Build, opened: Pack):
    backend, table = build().backend, opened.matrix("wte")
    ids = np.array([130, 0, 17, 17])
    found = backend.numpy(backend.embedding(table)(ids))
    assert found.tolist() == table.dequantize()[ids].tolist()


def test_a_norm_centres_scales_and_shifts(build: Build, opened: Pack):
    backend, norm = build().backend, opened.norm("emb_ln")
    x = np.random.default_rng(0).standard_normal((5, 60)).astype(np.float32)
    wide = x.astype(np.float64) - x.mean(axis=1, keepdims=True, dtype=np.float64)
    wide /= np.sqrt(np.square(wide).mean(axis=1, keepdims=True) + norm.epsilon)
    found = backend.numpy(backend.norm(norm)(x))
    assert found == pytest.approx(wide * norm.gain + norm.bias, abs=1e-5)


def test_delta_is_added_before_the_activation_and_add_behind_it(build: Build):
    backend, rng = build().backend, np.random.default_rng(0)
    w, x = (rng.standard_normal((9, n)).astype(np.float32) for n in (30, 30))
    delta, add = rng.standard_normal((2, 9, 9)).astype(np.float32)
    kind = get_scheme("f32")
    weight = Matrix("w", kind, w.shape, kind.quantize(w))
    z = (x @ w.T + delta).astype(np.float64)
    gelu = 0.5 * z * (1 + np.tanh(0.79788456 * z * (1 + 0.044715 * z * z)))
    found = backend.numpy(backend.linear(weight, act="gelu")(x, add=add, delta=delta))
    assert found == pytest.approx(gelu + add, abs=2e-5)
    assert backend.numpy(backend.linear(weight)(x, delta=delta)) == pytest.approx(z, abs=2e-5)


def test_gates_are_those_of_the_row_that_a_token_belongs_to(build: Build):
    backend = build().backend
    cache, span = backend.cache(TINY.config, 3, 16, 5), Span.of([2, 0], [3, 4])
    x = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    assert not cache.gates.any()
    assert not np.any(backend.numpy(backend.gate(x, cache, span)))
    cache.gates[:] = np.random.default_rng(1).standard_normal((3, 5))
    expected = x * cache.gates[[2, 2, 2, 0, 0, 0, 0]]
    assert backend.numpy(backend.gate(x, cache, span)).tolist() == expected.tolist()
    kind = get_scheme("f32")
    table = backend.embedding(Matrix("w", kind, x.shape, kind.quantize(x)))
    step = backend.compile(
        lambda ids, cache, span, wanted: backend.take(backend.gate(table(ids), cache, span), wanted)
    )
    for _ in range(2):  # recorded, then replayed
        found = backend.numpy(step(np.arange(7), cache, span, np.arange(7)))
        assert found.tolist() == expected.tolist()
        cache.gates[:] *= 2
        expected = expected * 2


def test_keys_are_those_that_were_stored(build: Build, name: str):
    lm = build("f32")
    cache, n_head, head_dim = lm.cache(2, 64), TINY.n_head, TINY.head_dim
    qkv = np.random.default_rng(0).standard_normal((40, 3 * n_head * head_dim)).astype(np.float32)
    lm.model.blocks[1].attention(qkv[:4], cache, Span.of([0], [4]))
    lm.model.blocks[1].attention(qkv[4:], cache, Span.of([1], [36]))
    split = qkv.reshape(-1, n_head, 3, head_dim)[:, :, 1]
    assert cache.keys(1, 0, 4).tolist() == split[:4].tolist()
    assert cache.keys(1, 1, 36).tolist() == split[4:].tolist()
    assert cache.keys(1, 1, 0).shape == (0, n_head, head_dim)


def test_a_cache_that_cannot_grow_is_as_before(build: Build, name: str):
    lm = build()
    cache, other = lm.cache(1, 24), lm.cache(1, 24)
    for each in (cache, other):
        run(lm, each, [0], [IDS[:20]])
    capacity = cache.capacity
    with pytest.raises(CapacityError, match=r"^no memory for a cache of "):
        cache.grow(1 << 50)
    assert cache.capacity == capacity
    found, expected = (run(lm, each, [0], [IDS[:3]])[0] for each in (cache, other))
    assert found.tobytes() == expected.tobytes()


def test_a_cache_that_has_grown_holds_what_it_held(build: Build, name: str):
    lm = build()
    small, large = lm.cache(2, 24), lm.cache(2, 300)
    for cache in (small, large):
        run(lm, cache, [0, 1], [IDS[:20], IDS[20:25]])
    small.grow(10)
    assert small.capacity >= 24
    small.grow(280)
    assert small.capacity >= 280
    tail = np.random.default_rng(5).integers(0, TINY.vocab_size, 250)
    found, expected = (run(lm, cache, [1, 0], [tail, IDS[:3]]) for cache in (small, large))
    for one, other in zip(found, expected, strict=True):
        assert close(one, other, name)


# -- choosing --------------------------------------------------------------------------------------


def test_auto_takes_the_first_available_and_says_so(opened: Pack):
    choice = backends.choose("auto", opened, 1)
    assert choice.backend.name == backends.available()[0]
    assert choice.reason == f"auto: the fastest available here; {choice.backend.description}"


def test_a_backend_asked_for_is_given_and_said(opened: Pack):
    choice = backends.choose("reference", opened, None)
    assert choice.reason == "asked for; NumPy float32, f32 activations"


def test_an_unknown_backend_is_refused_with_the_known_ones(opened: Pack):
    with pytest.raises(BackendError, match=r"^unknown backend 'tpu', expected auto, numba, cuda"):
        backends.choose("tpu", opened, None)


def test_an_absent_backend_is_refused_with_the_reason_and_the_present_ones(
    opened: Pack, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(backends, "why_not", {"cuda": "no driver"}.get)
    expected = (
        r"^backend cuda is not available: no driver: use one of \['numba', 'jax', 'reference'\]$"
    )
    with pytest.raises(BackendError, match=expected):
        backends.choose("cuda", opened, None)


def test_without_numba_the_reference_is_what_there_is(
    opened: Pack, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "numba", None)  # as Python marks what is not there
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    reason = "import of numba halted; None in sys.modules"
    assert backends.why_not("numba") == reason
    assert backends.why_not("cuda") is not None
    assert backends.available() == ["reference"]
    assert backends.choose("auto", opened, None).reason == (
        f"auto: the fastest available here; not numba: {reason}; not cuda: "
        f"{backends.why_not('cuda')}; not jax: jax is not installed (it comes with pip install "
        "'bloomq[jax]'); NumPy float32, f32 activations"
    )
    expected = rf"^backend numba is not available: {reason}: use one of \['reference'\]$"
    with pytest.raises(BackendError, match=expected):
        backends.choose("numba", opened, None)


BROKEN_NUMBA = """
raise ImportError("Numba needs NumPy 2.2 or less. Got NumPy 2.9.\\nSee the manual.")
"""


def test_a_numba_that_does_not_import_is_passed_over_with_its_reason(tmp_path: Path):
    """As Numba does where it meets a NumPy that is too new for it."""
    (tmp_path / "numba.py").write_text(BROKEN_NUMBA)
    code = (
        "import bloomq; model = bloomq.load(); print(model.backend_reason); "
        "print(model.generate('The', max_new_tokens=2).finish_reason)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    reason, finish = done.stdout.splitlines()
    assert "; not numba: Numba needs NumPy 2.2 or less. Got NumPy 2.9.; not cuda: " in reason
    assert finish == "length"


def test_a_numba_that_does_not_say_why_is_passed_over_too(monkeypatch: pytest.MonkeyPatch):
    def refuse(name: str) -> None:
        raise ImportError

    with monkeypatch.context() as patch:
        patch.setattr(backends.importlib, "import_module", refuse)
        assert isinstance(backends.why_not("numba"), str)


def test_the_reference_has_no_other_cache_than_float32(opened: Pack):
    assert backends.choose("reference", opened, None, "f32").backend.name == "reference"
    with pytest.raises(UsageError) as caught:
        backends.choose("reference", opened, None, "int8")
    assert str(caught.value) == "cache_dtype is 'int8', the reference backend has f32 alone"


@pytest.mark.parametrize("name", [*backends.available(), "cuda-cpu"])
@pytest.mark.parametrize("cache_dtype", ["f64", "", None, "F16", 16], ids=str)
def test_an_impossible_cache_dtype_is_refused(opened: Pack, name: str, cache_dtype):
    with pytest.raises(UsageError) as caught:
        choose(name, opened, None, cache_dtype)
    assert str(caught.value) == f"cache_dtype is {cache_dtype!r}, expected auto, f16, f32 or int8"


@pytest.mark.parametrize("cache_dtype", ["f16", "f32", "int8"])
def test_a_cache_dtype_asked_for_is_given(opened: Pack, cache_dtype: str):
    choice = backends.choose("numba", opened, 1, cache_dtype)
    assert choice.backend.cache_dtype == cache_dtype
    assert choice.reason.endswith(f", {cache_dtype} cache")


def test_float_packs_get_a_float32_cache_and_quantized_ones_float16(tmp_path_factory):
    base: Path = tmp_path_factory.getbasetemp()
    found = {
        scheme: backends.choose("numba", Pack.open(pack(base, TINY, scheme)), 1).backend.cache_dtype
        for scheme in ("int4", "f32")
    }
    assert found == {"int4": "f16", "f32": "f32"}


@pytest.mark.parametrize("name", [*backends.available(), "cuda-cpu"])
@pytest.mark.parametrize("threads", [0, -4, 1.5, True])
def test_impossible_threads_are_refused_on_every_backend(opened: Pack, name: str, threads):
    expected = "expected 1 to" if name == "numba" else "expected 1 or more, or None"
    with pytest.raises(UsageError, match=rf"^threads is {threads}, {expected}"):
        choose(name, opened, threads)
