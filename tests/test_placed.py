"""A model over several places gives what one backend gives, and fails as one: all or nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from models import Tiny, pack

from bloomq.backends.numba_cpu.layers import NumbaBackend
from bloomq.backends.placed.layers import Place, PlacedBackend, Receives
from bloomq.backends.reference import ReferenceBackend
from bloomq.errors import BackendError, CapacityError, NumericError, UsageError
from bloomq.forward import run as run_batch
from bloomq.heads import Head
from bloomq.inputs import Inputs, KeyValues
from bloomq.layers import Backend, Span, Stored
from bloomq.lora import Adapter, Adapters, Factors
from bloomq.pack import Pack
from bloomq.tracing import Trace
from bloomq.weights import Matrix, Norm

TINY = Tiny(n_head=3, head_dim=20, vocab_size=131, n_layer=4)
IDS = np.random.default_rng(3).integers(0, TINY.vocab_size, 64)
# Each of the some ten sums on the way to a logit is in another order: see test_conformance.
CLOSE = 1e-5

Opened = Callable[[str], Pack]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return lambda scheme: Pack.open(pack(tmp_path_factory.getbasetemp(), TINY, scheme))


def jax_backend() -> Backend:
    pytest.importorskip("jax")
    from bloomq.backends.jax.layers import JaxBackend

    return JaxBackend()


def placed(*backends: Backend) -> PlacedBackend:
    """Two layers at the first of two places and two at the other; of three, one, two and one."""
    cuts = {1: [0, 4], 2: [0, 2, 4], 3: [0, 1, 3, 4]}[len(backends)]
    spans = zip(backends, cuts, cuts[1:], strict=False)
    return PlacedBackend([Place(backend, range(a, b)) for backend, a, b in spans])


def head(pack: Pack, backend: Backend) -> Head:
    return Head(pack, backend, "BloomForCausalLM")


def logits(lm: Head, cache: Any, rows: list[int], pieces: list[np.ndarray]) -> np.ndarray:
    """Of every token of one step."""
    span = Span.of(rows, [len(piece) for piece in pieces])
    total = int(span.starts[-1])
    return np.array(
        lm.backend.numpy(lm.step(np.concatenate(pieces), cache, span, np.arange(total)))
    )


def session(lm: Head, cache: Any = None) -> list[np.ndarray]:
    """The logits of prompts, single tokens and both together, of two rows."""
    cache = cache or lm.cache(2, 64)
    steps = [
        ([0, 1], [IDS[:20], IDS[20:27]]), ([1], [IDS[:1]]), ([0, 1], [IDS[5:6], IDS[9:10]]),
        ([1, 0], [IDS[40:57], IDS[3:4]]), ([0, 1], [IDS[1:2], IDS[2:3]]),
    ]  # fmt: skip
    return [logits(lm, cache, rows, pieces) for rows, pieces in steps]


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))


def near(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(np.abs(a - b).max() <= CLOSE * np.abs(b).max() for a, b in pairs)


# -- places that are alike ------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int4", "int8", "f32"])
@pytest.mark.parametrize("places", [1, 2, 3])
def test_numba_over_places_gives_the_bits_of_one(opened: Opened, scheme: str, places: int):
    found = session(head(opened(scheme), placed(*(NumbaBackend(1) for _ in range(places)))))
    assert same(found, session(head(opened(scheme), NumbaBackend(2))))


def test_one_backend_may_have_two_places(opened: Opened):
    backend = NumbaBackend(1)
    assert same(session(head(opened("int4"), placed(backend, backend))),
                session(head(opened("int4"), backend)))  # fmt: skip


@pytest.mark.parametrize("places", [2, 3])
def test_the_reference_over_places_gives_the_bits_of_one(opened: Opened, places: int):
    found = session(head(opened("int4"), placed(*(ReferenceBackend() for _ in range(places)))))
    assert same(found, session(head(opened("int4"), ReferenceBackend())))


def test_jax_over_places_gives_what_one_gives(opened: Opened):
    found = []
    for backend in (placed(jax_backend(), jax_backend()), jax_backend()):
        lm = head(opened("f32"), backend)
        cache = lm.cache(2, 64)
        pieces = ([IDS[:5], IDS[5:7]], [IDS[7:8], IDS[8:9]])
        found.append([logits(lm, cache, [0, 1], each) for each in pieces])
    assert near(*found)


def test_alike_places_have_the_arithmetic_of_one():
    numba = NumbaBackend(1)
    assert placed(numba, NumbaBackend(2)).arithmetic == numba.arithmetic


# -- places that are not ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order", ["numba reference", "reference numba", "numba jax", "jax numba reference"]
)
def test_different_backends_meet_at_a_seam(opened: Opened, order: str):
    make = {
        "numba": lambda: NumbaBackend(1, "f32"), "reference": ReferenceBackend, "jax": jax_backend
    }  # fmt: skip
    found = session(head(opened("f32"), placed(*(make[name]() for name in order.split()))))
    assert near(found, session(head(opened("f32"), ReferenceBackend())))


def torch_backend() -> Any:
    """The CUDA backend on torch's CPU device."""
    pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    from bloomq.backends.cuda.layers import CudaBackend

    return CudaBackend("cpu", "f32")


@pytest.mark.parametrize("order", ["cpu gpu", "gpu cpu", "cpu gpu gpu"])
def test_gpus_and_the_cpu_share_a_model(opened: Opened, order: str):
    """Where torch's CPU device stands for a GPU."""
    make = {"cpu": lambda: NumbaBackend(1, "f32"), "gpu": torch_backend}
    found = session(head(opened("f32"), placed(*(make[kind]() for kind in order.split()))))
    assert near(found, session(head(opened("f32"), ReferenceBackend())))


def test_gpus_give_what_one_gives(opened: Opened):
    found = session(head(opened("int4"), placed(torch_backend(), torch_backend())))
    assert near(found, session(head(opened("int4"), torch_backend())))


def test_a_torch_backend_receives_from_another():
    assert isinstance(torch_backend(), Receives)
    assert not isinstance(NumbaBackend(1), Receives)
    assert not isinstance(ReferenceBackend(), Receives)


def test_what_bits_depend_on_and_what_was_chosen_is_a_line_each():
    backend = placed(NumbaBackend(1), ReferenceBackend(), ReferenceBackend())
    tier = backend.places[0].backend.tier
    assert backend.description == (
        f"layers 0 on numba ({tier}, 1 thread, f16 cache); layers 1-2 on reference (NumPy float32, "
        "f32 activations); layers 3 on reference (NumPy float32, f32 activations)"
    )
    assert backend.arithmetic == (
        f"placed: 0 numba: {tier}, f16 cache; 1-2 reference: NumPy float32, f32 activations; "
        "3 reference: NumPy float32, f32 activations"
    )


# -- what belongs where ----------------------------------------------------------------------------


class Listed(ReferenceBackend):
    """The reference, which tells the names of what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def norm(self, norm: Norm) -> Any:
        self.names.append(norm.name)
        return super().norm(norm)

    def linear(self, weight: Matrix, *args: Any, **options: Any) -> Any:
        self.names.append(weight.name)
        return super().linear(weight, *args, **options)

    def attention(self, layer: int, n_head: int, head_dim: int, *, slope: Any = None) -> Any:
        self.names.append(f"attention {layer}")
        return super().attention(layer, n_head, head_dim)


def test_layers_belong_where_their_names_say(opened: Opened):
    backends = [Listed(), Listed(), Listed()]
    head(opened("f32"), placed(*backends))
    names = ["attn.qkv", "attention", "attn.out", "mlp.up", "mlp.down"]

    def block(layer: int, inner: int) -> list[str]:
        own = [f"h.{layer}.{name}" for name in names]
        return [f"attention {inner}" if "attention" in name else name for name in own]

    first, second, third = (backend.names for backend in backends)
    assert first == ["emb_ln", *block(0, 0)]
    assert second == [*block(1, 0), *block(2, 1)]
    assert third == ["ln_f", "wte", *block(3, 0)]  # the tied table is the head's


def test_no_place_holds_a_table_to_look_ids_up_in(opened: Opened):
    table = opened("int4").matrix("wte")
    backend = placed(Listed(), Listed())
    found = backend.embedding(table)(np.array([130, 0, 17]))
    assert backend.numpy(found).tolist() == table.dequantize()[[130, 0, 17]].tolist()
    assert not any(place.backend.names for place in backend.places)


def test_adapters_belong_to_the_layers_they_are_beside(opened: Opened):
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / 8).astype(np.float32)

    factors = {f"h.{i}.attn.qkv": Factors(random(4, 60), random(180, 4)) for i in (0, 1, 3)}
    factors["h.3.mlp.down"] = Factors(random(4, 240), random(60, 4))
    loaded = Adapters().added("some", Adapter(factors))
    found = []
    for backend in (placed(NumbaBackend(1), NumbaBackend(1), NumbaBackend(1)), NumbaBackend(1)):
        lm = head(opened("int4"), backend).adapted(loaded)
        cache = lm.cache(2, 64)
        lm.choose(cache, [None, {"some": 0.5}])
        first = logits(lm, cache, [0, 1], [IDS[:9], IDS[:9]])
        lm.choose(cache, ["some", None])
        found.append([first, logits(lm, cache, [0, 1], [IDS[:3], IDS[:1]])])
    assert same(*found)
    assert found[0][0][:9].tobytes() != found[0][0][9:].tobytes()


def test_hidden_states_on_the_way_are_those_of_one(opened: Opened):
    found = []
    for backend in (placed(ReferenceBackend(), ReferenceBackend()), ReferenceBackend()):
        lm = head(opened("f32"), backend)
        inputs = Inputs(IDS[None, :12], None, np.ones((1, 12), bool), None)
        past = KeyValues(lm.cache(1, 12), lm.cache_kind)
        trace = Trace(states=True, attentions=True)
        run_batch(lm, inputs, past, inputs.mask, trace=trace)
        found.append([*trace.hidden_states, *trace.attention_weights])
    assert same(*found)


def test_a_layer_that_is_not_finite_is_named(opened: Opened):
    class Damaged(ReferenceBackend):
        def linear(self, weight: Matrix, *args: Any, **options: Any) -> Any:
            damaged = weight.name == "h.2.attn.out"
            return super().linear(weight, *args, **options) if not damaged else not_a_number

    def not_a_number(x: np.ndarray, *_: Any) -> np.ndarray:
        return np.full_like(x, np.nan)

    lm = head(opened("f32"), placed(ReferenceBackend(), Damaged()))
    cache, span = lm.cache(1, 16), Span.of([0], [3])
    lm.step(IDS[:3], cache, span, np.array([2]))
    error = lm.model.find_not_finite(IDS[:3], cache, span)
    assert isinstance(error, NumericError)
    assert str(error).startswith("NaN or infinity after h.2:")


# -- steps -----------------------------------------------------------------------------------------


class Recording(ReferenceBackend):
    """The reference, which tells what its steps are given and give."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[Any, Any]] = []

    def compile(self, step: Any) -> Any:
        def call(ids: Any, cache: Any, span: Span, wanted: Any) -> Any:
            result = step(ids, cache, span, wanted)
            self.shapes.append((ids.shape, result.shape))
            return result

        return call


def test_each_place_replays_its_own_part_of_a_step(opened: Opened):
    backends = [Recording(), Recording(), Recording()]
    lm = head(opened("f32"), placed(*backends))
    lm.step(IDS[:9], lm.cache(1, 16), Span.of([0], [9]), np.array([8, 3]))
    assert [backend.shapes for backend in backends] == [
        [((9, 60), (9, 60))], [((9, 60), (9, 60))], [((9, 60), (2, 131))]
    ]  # fmt: skip


def test_a_step_that_carries_two_things_over_a_seam_is_run_call_by_call(opened: Opened):
    found = []
    for backends in ([Recording(), Recording()], [Recording()]):
        backend = placed(*backends)
        lm = head(opened("f32"), backend)

        def both(ids: Any, cache: Any, span: Any, wanted: Any, lm: Head = lm) -> Any:
            x = lm.model.emb_ln(lm.model.wte(ids))
            y = x
            for block in lm.model.blocks:
                y = block(y, cache, span)
            y = lm.model.blocks[3].out(y, cache, span, add=x)
            return lm.backend.take(y, wanted)

        step = backend.compile(both)
        result = step(IDS[:5], lm.cache(1, 16), Span.of([0], [5]), np.array([4]))
        found.append([np.array(backend.numpy(result))])
    assert same(*found)


def test_a_step_that_ends_early_gives_its_result_to_the_last_place(opened: Opened):
    first, last = ReferenceBackend(), Device(1)
    backend = placed(first, last)
    lm = head(opened("f32"), backend)
    step = backend.compile(lambda ids, cache, span, wanted: backend.take(lm.model.wte(ids), wanted))
    for at in ([4, 0], [1]):
        found = step(IDS[:5], lm.cache(1, 16), Span.of([0], [5]), np.array(at))
        assert np.array_equal(backend.numpy(found), lm.model.wte(IDS[:5]).values[at])


class Tensor:
    """An array of a device, as a library might have them: nothing else may use it."""

    def __init__(self, device: int, values: np.ndarray) -> None:
        self.device, self.values = device, values


class Device(ReferenceBackend):
    """The reference on such a device, which counts what comes from others and what is read back."""

    def __init__(self, device: int) -> None:
        super().__init__()
        self.device, self.received, self.read = device, 0, 0

    def receive(self, x: Tensor) -> Tensor:
        self.received += 1
        return Tensor(self.device, x.values)

    def numpy(self, x: Any) -> np.ndarray:
        self.read += 1
        return self._values(x)

    def _values(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            assert x.device == self.device
            return x.values
        return x

    def norm(self, norm: Norm) -> Any:
        inner = super().norm(norm)
        return lambda x: Tensor(self.device, inner(self._values(x)))

    def linear(
        self, weight: Matrix, bias: Any = None, *, norm: Any = None, act: Any = None, limbs: int = 1
    ) -> Any:
        inner = super().linear(weight, bias, norm=norm, act=act, limbs=limbs)

        def call(x: Any, add: Any = None, delta: Any = None) -> Tensor:
            given = (self._values(each) for each in (x, add, delta))
            return Tensor(self.device, inner(*given))

        return call

    def attention(self, layer: int, n_head: int, head_dim: int, *, slope: Any = None) -> Any:
        inner = super().attention(layer, n_head, head_dim)
        return lambda x, *rest: Tensor(self.device, inner(self._values(x), *rest))

    def take(self, x: Any, index: Any) -> Tensor:
        return Tensor(self.device, super().take(self._values(x), index))


def test_devices_of_one_library_hand_arrays_over_without_the_host(opened: Opened):
    devices = [Device(0), Device(1)]
    lm = head(opened("f32"), placed(*devices))
    found = lm.step(IDS[:9], lm.cache(1, 16), Span.of([0], [9]), np.array([8]))
    assert found.device == 1
    assert [(device.received, device.read) for device in devices] == [(0, 0), (1, 0)]
    expected = head(opened("f32"), ReferenceBackend())
    alone = logits(expected, expected.cache(1, 16), [0], [IDS[:9]])[8:]
    assert near([lm.backend.numpy(found)], [alone])


def test_a_device_and_the_cpu_meet_in_numpy(opened: Opened):
    device = Device(0)
    lm = head(opened("f32"), placed(device, NumbaBackend(1, "f32"), device))
    found = [lm.backend.numpy(lm.step(IDS[:9], lm.cache(1, 16), Span.of([0], [9]), np.array([8])))]
    expected = head(opened("f32"), ReferenceBackend())
    assert near(found, [logits(expected, expected.cache(1, 16), [0], [IDS[:9]])[8:]])
    assert (device.received, device.read) == (0, 2)


# -- the cache -------------------------------------------------------------------------------------


def test_rows_go_to_and_from_one_backend(opened: Opened):
    alone = head(opened("int4"), NumbaBackend(1, "int8"))
    lm = head(opened("int4"), placed(NumbaBackend(1, "int8"), NumbaBackend(1, "int8")))
    caches = [each.cache(2, 64) for each in (alone, lm)]
    for each, cache in zip((alone, lm), caches, strict=True):
        session(each, cache)
    kept = [cache.stored(1) for cache in caches]
    for a, b in zip(*((k.keys, k.values, np.moveaxis(k.scales, 1, 0)) for k in kept), strict=True):
        assert a.tobytes() == b.tobytes()
    others = [each.cache(1, 64) for each in (alone, lm)]
    for cache, stored in zip(others, reversed(kept), strict=True):
        cache.restore(0, stored)
    assert same(*([logits(each, cache, [0], [IDS[:2]])]
                  for each, cache in zip((alone, lm), others, strict=True)))  # fmt: skip


def test_float_caches_of_two_kinds_are_stored_in_the_wider(opened: Opened):
    backend = placed(NumbaBackend(1, "f16"), ReferenceBackend())
    lm = head(opened("int8"), backend)
    cache, other = lm.cache(2, 64), lm.cache(1, 64)
    session(lm, cache)
    stored = cache.stored(0)
    assert stored.keys.dtype == np.float32
    other.restore(0, stored)
    found = logits(lm, other, [0], [IDS[:2]])
    assert found.tobytes() == logits(lm, cache, [0], [IDS[:2]]).tobytes()


def test_a_cache_adds_its_parts_up(opened: Opened):
    lm = head(opened("int4"), placed(NumbaBackend(1), ReferenceBackend()))
    alone = [head(opened("int4"), b).cache(2, 64) for b in (NumbaBackend(1), ReferenceBackend())]
    cache = lm.cache(2, 64)
    assert cache.token_bytes == sum(each.token_bytes for each in alone) // 2
    assert cache.nbytes == alone[1].nbytes // 2
    assert not cache.paged
    assert head(opened("int4"), placed(NumbaBackend(1), NumbaBackend(1))).cache(1, 64).paged
    assert cache.capacity == 64


def test_rows_are_copied_dropped_truncated_and_added_at_every_place(opened: Opened):
    found = []
    for backend in (placed(NumbaBackend(1), NumbaBackend(1), NumbaBackend(1)), NumbaBackend(1)):
        lm = head(opened("int4"), backend)
        cache = lm.cache(2, 64)
        cache.grow(300, 3)
        text = np.random.default_rng(5).integers(0, TINY.vocab_size, 200)
        steps = [logits(lm, cache, [0, 1], [text, text[:5]])]
        cache.copy(0, 2)
        cache.drop(0, 64, 64)
        cache.truncate(2, 70)
        assert cache.lengths.tolist() == [136, 5, 70]
        steps.append(logits(lm, cache, [2, 0, 1], [text[:2], text[:3], text[:1]]))
        found.append(steps)
    assert same(*found)


def no_memory(*_: Any) -> None:
    raise CapacityError("no memory for a cache of 9.9 GB: ask for fewer tokens or rows")


def test_a_place_that_cannot_grow_leaves_all_as_before(opened: Opened, monkeypatch):
    lm = head(opened("int4"), placed(NumbaBackend(1), ReferenceBackend()))
    cache, other = lm.cache(2, 24), lm.cache(2, 24)
    for each in (cache, other):
        logits(lm, each, [0, 1], [IDS[:20], IDS[:3]])
    with monkeypatch.context() as patch:
        patch.setattr(cache.at(1), "grow", no_memory)
        with pytest.raises(CapacityError, match=r"^no memory for a cache of 9\.9 GB"):
            cache.grow(5000, 4)
    assert (cache.capacity, cache.batch, cache.lengths.tolist()) == (24, 2, [20, 3])
    cache.grow(100, 3)
    assert cache.capacity >= 100
    assert cache.lengths.tolist() == cache.at(1).lengths.tolist() == [20, 3, 0]
    other.grow(100, 3)
    steps = ([0, 2, 1], [IDS[:4], IDS[:30], IDS[7:9]])
    assert logits(lm, cache, *steps).tobytes() == logits(lm, other, *steps).tobytes()


@pytest.mark.parametrize("wrong", [CapacityError("no memory for a page"), KeyboardInterrupt()],
                         ids=["no memory", "ctrl-c"])  # fmt: skip
def test_a_step_that_fails_at_a_place_leaves_all_as_before(
    opened: Opened, monkeypatch, wrong: BaseException
):
    lm = head(opened("int4"), placed(NumbaBackend(1), NumbaBackend(1)))
    cache, other = lm.cache(1, 300), lm.cache(1, 300)
    for each in (cache, other):
        logits(lm, each, [0], [IDS[:20]])
    held_bytes, second = cache.nbytes, cache.at(1)

    def fail(*_: Any) -> None:
        raise wrong

    with monkeypatch.context() as patch:
        patch.setattr(type(second), "bind", lambda self, *rest: fail() if self is second else
                      bind(self, *rest))  # fmt: skip
        with pytest.raises(type(wrong)):
            logits(lm, cache, [0], [np.resize(IDS, 200)])
    if isinstance(wrong, CapacityError):
        assert cache.at(0).pages_in_use == cache.at(1).pages_in_use == 1
        assert cache.nbytes >= held_bytes
    assert cache.lengths.tolist() == [20]
    assert (
        logits(lm, cache, [0], [IDS[:3]]).tobytes() == logits(lm, other, [0], [IDS[:3]]).tobytes()
    )


bind = type(NumbaBackend(1).cache(TINY.config, 1, 1)).bind


@pytest.mark.parametrize("length", [0, 7])
def test_a_row_that_cannot_be_restored_is_as_before(opened: Opened, monkeypatch, length: int):
    lm = head(opened("int4"), placed(NumbaBackend(1), ReferenceBackend()))
    cache, other = lm.cache(2, 64), lm.cache(1, 64)
    logits(lm, cache, [0], [IDS[:30]])
    stored = cache.stored(0)
    if length:
        logits(lm, cache, [1], [IDS[:length]])
        logits(lm, other, [0], [IDS[:length]])
    with monkeypatch.context() as patch:
        patch.setattr(cache.at(1), "restore", no_memory)
        with pytest.raises(CapacityError, match=r"^no memory for a cache of 9\.9 GB"):
            cache.restore(1, stored)
    assert cache.lengths.tolist() == [30, length]
    found = logits(lm, cache, [1], [IDS[9:12]])
    assert found.tobytes() == logits(lm, other, [0], [IDS[9:12]]).tobytes()


def test_stored_rows_of_another_model_or_too_long_are_refused(opened: Opened):
    lm = head(opened("int4"), placed(NumbaBackend(1), NumbaBackend(1)))
    cache = lm.cache(1, 64)
    logits(lm, cache, [0], [IDS[:5]])
    stored = cache.stored(0)
    half = Stored(stored.keys[:2], stored.values[:2], stored.scales)
    with pytest.raises(UsageError, match=r"^stored keys are float16 \[2, 5, 3, 20\], expected"):
        cache.restore(0, half)
    many = Stored(*(np.zeros((4, 65, 3, 20), np.float16),) * 2, stored.scales)
    with pytest.raises(CapacityError, match=r"^65 stored tokens, the cache holds 64: grow it"):
        cache.restore(0, many)
    assert cache.lengths.tolist() == [5]


def test_a_cache_whose_change_was_interrupted_says_so(opened: Opened, monkeypatch):
    lm = head(opened("int4"), placed(NumbaBackend(1), NumbaBackend(1)))
    cache = lm.cache(2, 64)
    logits(lm, cache, [0], [IDS[:20]])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.at(1), "copy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.copy(0, 1)
    with pytest.raises(BackendError, match="was lost when a change of its rows was interrupted"):
        logits(lm, cache, [0], [IDS[:1]])


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranges", "told"),
    [
        ([], "none"),
        ([range(1, 4)], "1 to 4"),
        ([range(2), range(3, 4)], "0 to 2, 3 to 4"),
        ([range(2), range(2, 2)], "0 to 2, 2 to 2"),
        ([range(2, 4), range(2)], "2 to 4, 0 to 2"),
        ([range(0, 4, 2)], "0 to 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_places_that_do_not_follow_one_another_are_refused(ranges: list[range], told: str):
    with pytest.raises(UsageError) as caught:
        PlacedBackend([Place(ReferenceBackend(), layers) for layers in ranges])
    assert str(caught.value) == (
        f"the places have layers {told}, expected ranges that follow one another from 0 on, none "
        "of them empty"
    )


def test_places_for_another_number_of_layers_are_refused(opened: Opened):
    few = PlacedBackend([Place(ReferenceBackend(), range(3))])
    with pytest.raises(UsageError, match=r"^layer 3 has no place, the places hold 3 layers: give"):
        head(opened("f32"), few)
    with pytest.raises(UsageError, match=r"^the places hold 3 layers, the model has 4$"):
        few.cache(TINY.config, 1, 16)
    with pytest.raises(UsageError, match=r"^the places hold 3 layers, the model has 2$"):
        few.cache(replace(TINY.config, n_layer=2), 1, 16)


def test_int8_caches_at_some_places_alone_are_refused():
    with pytest.raises(UsageError) as caught:
        placed(NumbaBackend(1, "int8"), NumbaBackend(1, "f16"))
    assert str(caught.value) == (
        "the caches of the places are int8, float16, expected int8 at all of them or at none: "
        "choose one cache dtype"
    )
