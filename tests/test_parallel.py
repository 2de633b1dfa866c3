"""Tensor parallelism: slices, layers on them, and processes that share a model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm
from models import Tiny, pack
from parallel_threads import ThreadGroup, on_ranks

import bloomq
from bloomq import backends
from bloomq.config import BloomConfig, weight_specs
from bloomq.errors import BackendError, CapacityError, UsageError
from bloomq.heads import Head
from bloomq.language_model import LanguageModel
from bloomq.layers import Span, Stored
from bloomq.lora import Adapter, Adapters, Factors
from bloomq.modeling import BloomForCausalLM
from bloomq.pack import Pack
from bloomq.parallel.cuts import Cut, Cuts, rank_bytes
from bloomq.parallel.layers import ParallelBackend
from bloomq.parallel.place import Place
from bloomq.parallel.slices import part_of
from bloomq.parallel.talk import Split, check_step
from bloomq.parallel.workers import Workers, started
from bloomq.schemes import get_scheme
from bloomq.tokenizer import BloomTokenizer
from bloomq.weights import Matrix

BLOOM = BloomConfig(hidden_size=14336, n_layer=1, n_head=112)
TINY = Tiny(n_head=5, head_dim=32, vocab_size=131, n_layer=2)
# How far results may be from those of one process, of the largest. The same products are summed in
# another order: some ten sums on the way to a result, each off by a few units (6e-8) of its largest
# terms. Before integer kernels a last bit may also move an activation to its other int8 code, 1/127
# of its group's largest, which is 1 / (127 sqrt(K)) = 6e-4 of a sum of K = 160 terms; the next
# layers see it and round anew, so there may be some ten such.
FLOATS, INTEGERS = 1e-5, 1e-2
RANKS = Path(__file__).parent / "parallel_ranks.py"
SCHEMES = ("int8", "int6", "nl4", "int4", "nf4", "f32", "bf16")
# What torchrun leaves in the environment of the second of two processes.
SECOND = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip


def schemes_of(config: BloomConfig, name: str, group: int | None = None) -> dict[str, Any]:
    scheme = get_scheme(name, group)
    return {spec.name: scheme for spec in weight_specs(config) if spec.is_matrix}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pack]:
    """`opened("int4")`: the tiny model's pack."""
    base = tmp_path_factory.getbasetemp()
    return lambda scheme, tiny=TINY: Pack.open(pack(base, tiny, scheme))


# -- cuts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "group", "world", "heads"),
    [
        ("int8", None, 2, [56, 56]),
        ("int8", None, 3, [38, 37, 37]),
        ("int4", 128, 3, [38, 37, 37]),
        ("nl4", None, 8, [14] * 8),
        ("nf4", None, 8, [14] * 8),
        ("f32", None, 112, [1] * 112),
    ],
)
def test_the_176b_is_cut_evenly(scheme: str, group: int | None, world: int, heads: list[int]):
    cuts = Cuts.of(BLOOM, schemes_of(BLOOM, scheme, group), world)
    assert np.diff(cuts.heads).tolist() == heads
    assert cuts.vocabulary[-1] == BLOOM.vocab_size
    assert not np.any(np.array(cuts.vocabulary) % 32)


def test_heads_whose_columns_share_scales_stay_together():
    config = BloomConfig(hidden_size=1024, n_layer=1, n_head=16)  # heads of 64 columns
    by_two = Cuts.of(config, schemes_of(config, "int4", 128), 3)
    assert np.diff(by_two.heads).tolist() == [6, 6, 4]
    assert Cuts.of(config, schemes_of(config, "nl4", 128), 3) == by_two
    # int8 shares scales of activations alone: whole groups as long as each rank gets one.
    assert np.diff(Cuts.of(config, schemes_of(config, "int8"), 3).heads).tolist() == [6, 6, 4]
    assert np.diff(Cuts.of(config, schemes_of(config, "int8"), 16).heads).tolist() == [1] * 16


def test_more_ranks_than_pieces_are_refused_with_the_numbers_that_work():
    config = BloomConfig(hidden_size=1024, n_layer=1, n_head=16)
    with pytest.raises(UsageError, match=r"9 ranks for a model of 16 heads, expected 1 to 8: .* 2"):
        Cuts.of(config, schemes_of(config, "int4", 128), 9)


def test_biases_of_adapters_and_heads_are_cut_as_their_linear_is():
    cuts = Cuts.of(TINY.config, schemes_of(TINY.config, "f32"), 2)
    axes = {name: cuts.cut(name).axis for name in (
        "wte", "lm_head", "score", "h.1.attn.qkv", "h.1.attn.out", "h.1.mlp.up", "h.1.mlp.down",
        "h.1.attn.qkv.down", "h.1.attn.qkv.up", "h.1.mlp.down.down", "h.1.mlp.down.up",
    )}  # fmt: skip
    assert list(axes.values()) == [
        "rows", "rows", "whole", "rows", "columns", "rows", "columns", "whole", "rows", "columns",
        "whole",
    ]  # fmt: skip


# -- slices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranks_have_the_stored_weights_themselves(scheme: str, opened: Callable[..., Pack]):
    """Restored, the parts of all ranks are the restored matrix: no bit is quantized anew."""
    source = opened(scheme)
    worlds = [w for w in (2, 3, 5) if w < 5 or scheme not in ("int6", "nl4", "nf4")]
    for world in worlds:
        cuts = Cuts.of(source.config, source.schemes, world)
        for spec in weight_specs(source.config):
            cut = cuts.cut(spec.name)
            if not spec.is_matrix or cut.axis == "whole":
                continue
            matrix = source.matrix(spec.name)
            parts = [part_of(matrix, cut, rank) for rank in range(world)]
            for part in parts:
                stored = part.scheme.parts(part.shape)
                assert {name: array.shape for name, array in part.parts.items()} == {
                    name: one.shape for name, one in stored.items()
                }
            axis = 0 if cut.axis == "rows" else 1
            joined = np.concatenate([part.dequantize() for part in parts], axis)
            np.testing.assert_array_equal(joined, matrix.dequantize())


@pytest.mark.parametrize("scheme", ["int8", "nl4", "int4", "nf4", "f16"])
def test_whole_tiles_are_used_as_they_are_mapped(scheme: str):
    w = np.random.default_rng(1).standard_normal((192, 64)).astype(np.float32)
    kind = get_scheme(scheme)
    matrix = Matrix("h.0.attn.qkv", kind, (192, 64), kind.quantize(w))
    part = part_of(matrix, Cut("rows", (0, 96, 192)), 1)
    assert all(np.shares_memory(part.parts[name], matrix.parts[name]) for name in part.parts)


def test_a_rank_touches_its_share_of_the_bytes(opened: Callable[..., Pack]):
    source = opened("int4", Tiny(n_head=4, head_dim=64, vocab_size=512, n_layer=1))
    cuts = Cuts.of(source.config, source.schemes, 4)
    names = [spec.name for spec in weight_specs(source.config) if spec.is_matrix]
    whole = sum(source.matrix(name).nbytes for name in names)
    for rank in range(4):
        parts = {name: part_of(source.matrix(name), cuts.cut(name), rank) for name in names}
        told = rank_bytes(source.config, source.schemes, 4, rank)
        assert told == {name: part.nbytes for name, part in parts.items()}
        assert sum(told.values()) == whole // 4


def test_a_cut_inside_a_group_of_scales_is_refused():
    kind = get_scheme("nl4")
    w = np.ones((32, 128), np.float32)
    matrix = Matrix("h.0.attn.out", kind, (32, 128), kind.quantize(w))
    with pytest.raises(UsageError, match="columns 32 to 128 of 128 cut a group of 64 that has one"):
        part_of(matrix, Cut("columns", (0, 32, 128)), 1)


# -- layers ----------------------------------------------------------------------------------------


def results(head: Head) -> tuple[np.ndarray, np.ndarray]:
    """Two rows in one step, then one of them continued: all results."""
    cache, ids = head.cache(2, 64), np.arange(21) * 6 % head.config.vocab_size
    first = head.step(ids[:20], cache, Span.of([0, 1], [13, 7]), np.arange(20))
    more = head.step(ids[20:], cache, Span.of([1], [1]), np.arange(1))
    return head.backend.numpy(first), head.backend.numpy(more)


def parallel(source: Pack, name: str, group: ThreadGroup) -> ParallelBackend:
    cuts = Cuts.of(source.config, source.schemes, group.world)
    return ParallelBackend(backends.choose(name, source, 1).backend, group, cuts)


@pytest.mark.parametrize("architecture", ["BloomForCausalLM", None])
@pytest.mark.parametrize(
    ("scheme", "world", "name"),
    [
        ("f32", 5, "reference"),
        ("int8", 2, "numba"),
        ("int6", 3, "numba"),
        ("nl4", 3, "numba"),
        ("int4", 5, "numba"),
        ("nf4", 2, "reference"),
    ],
)
def test_ranks_agree_with_each_other_and_with_one_process(
    scheme: str, world: int, name: str, architecture: Any, opened: Callable[..., Pack]
):
    source = opened(scheme)
    alone = results(Head(source, backends.choose(name, source, 1).backend, architecture))
    ranks = on_ranks(
        world, lambda g: results(Head(source, parallel(source, name, g), architecture))
    )
    close = FLOATS if name == "reference" else INTEGERS
    for mine in ranks:
        for found, first, wanted in zip(mine, ranks[0], alone, strict=True):
            np.testing.assert_array_equal(found, first)
            assert np.abs(found - wanted).max() <= close * np.abs(wanted).max()


def test_an_untied_head_and_one_of_few_words_are_shared_too(opened: Callable[..., Pack]):
    source = opened("f32", Tiny(n_head=4, head_dim=8, vocab_size=37, n_layer=1, tied=False))
    alone = results(Head(source, backends.choose("reference", source, None).backend, None))

    def work(group: ThreadGroup) -> Any:
        backend = ParallelBackend(
            backends.choose("reference", source, None).backend, group,
            Cuts.of(source.config, source.schemes, 3),
        )  # fmt: skip
        logits = Head(source, backend, "BloomForCausalLM")
        return results(Head(source, backend, None)), results(logits), logits.columns

    hidden, logits, columns = on_ranks(3, work)[0]
    np.testing.assert_allclose(hidden[0], alone[0], rtol=0, atol=1e-5 * np.abs(alone[0]).max())
    assert logits[0].shape == (20, 37) == (20, columns)


def test_adapters_are_shared_with_their_linears(opened: Callable[..., Pack]):
    source = opened("f32")
    rng = np.random.default_rng(5)

    def factors(n: int, k: int) -> Factors:
        values = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, k), (n, 3)))
        return Factors(*(value / 10 for value in values))

    c = source.config.hidden_size
    shapes = {"attn.qkv": (3 * c, c), "attn.out": (c, c), "mlp.up": (4 * c, c)}
    shapes["mlp.down"] = (c, 4 * c)
    adapter = Adapter({f"h.1.{name}": factors(*shape) for name, shape in shapes.items()})

    def adapted(backend: Any) -> np.ndarray:
        head = Head(source, backend, "BloomForCausalLM").adapted(Adapters().added("it", adapter))
        cache = head.cache(1, 16)
        head.choose(cache, "it")
        return backend.numpy(head.step(np.arange(9), cache, Span.of([0], [9]), np.arange(9)))

    alone = adapted(backends.choose("reference", source, None).backend)
    plain = results(Head(source, backends.choose("reference", source, None).backend, None))[0]
    ranks = on_ranks(2, lambda group: adapted(parallel(source, "reference", group)))
    np.testing.assert_array_equal(*ranks)
    np.testing.assert_allclose(ranks[0], alone, rtol=0, atol=1e-5 * np.abs(alone).max())
    assert plain.shape[1] == c  # and the adapter is not nothing:
    head = Head(source, backends.choose("reference", source, None).backend, "BloomForCausalLM")
    base = head.step(np.arange(9), head.cache(1, 16), Span.of([0], [9]), np.arange(9))
    assert np.abs(base - alone).max() > 0.01


@pytest.mark.parametrize("k", [1, 3, 40, 131])
def test_the_best_of_all_ranks_are_those_of_the_whole(k: int, opened: Callable[..., Pack]):
    source = opened("f32")
    logits = np.random.default_rng(2).integers(-3, 3, (4, 131)).astype(np.float32)  # many equals
    logits[1, 50:] = -np.inf
    logits[2, 130] = np.nan
    reference = backends.choose("reference", source, None).backend
    wanted = reference.top(logits, k)

    def work(group: ThreadGroup) -> Any:
        backend = parallel(source, "reference", group)
        edges = backend.cuts.vocabulary
        split = Split(logits[:, edges[group.rank] : edges[group.rank + 1]], edges)
        levels = backend.levels(backend.take(split, np.array([3])), 0.7)
        row = backend.take(split, np.array([1]))
        masked = backend.numpy(backend.masked(row, np.arange(131) % 2 == 0))
        return backend.top(split, k), levels, backend.numpy(split), backend.sums(row, 0.7), masked

    alone = reference.sums(logits[1:2], 0.7)
    for top, levels, everything, sums, masked in on_ranks(3, work):
        assert sums.logsumexp() == pytest.approx(alone.logsumexp())
        assert sums.entropy() == pytest.approx(alone.entropy())
        assert masked[0, ::2].tolist() == logits[1, ::2].tolist()
        assert (masked[0, 1::2] == -np.inf).all()
        np.testing.assert_array_equal(top.ids, wanted.ids)
        np.testing.assert_array_equal(top.logits, wanted.logits)
        np.testing.assert_allclose(top.logsumexp, wanted.logsumexp, rtol=1e-14)
        np.testing.assert_array_equal(everything, logits)
        np.testing.assert_array_equal(levels.levels, reference.levels(logits[3:], 0.7).levels)


def test_a_row_of_the_cache_can_be_kept_and_put_back(opened: Callable[..., Pack]):
    source = opened("f32")
    alone = Head(source, backends.choose("numba", source, 1, "int8").backend, None)
    cache = alone.cache(1, 64)
    alone.step(np.arange(9), cache, Span.of([0], [9]), np.arange(1))

    def work(group: ThreadGroup) -> tuple[Stored, Stored, np.ndarray]:
        inner = backends.choose("numba", source, 1, "int8").backend
        cuts = Cuts.of(source.config, source.schemes, group.world)
        head = Head(source, ParallelBackend(inner, group, cuts), None)
        mine = head.cache(1, 64)
        head.step(np.arange(9), mine, Span.of([0], [9]), np.arange(1))
        kept = mine.stored(0)
        mine.grow(64, 3)
        mine.copy(0, 1)
        mine.restore(2, kept)
        mine.truncate(0, 0)
        assert mine.keys(0, 0, 0).shape == (0, 5, 32)
        assert (mine.batch, mine.capacity, mine.lengths.tolist()) == (3, 64, [0, 9, 9])
        assert mine.paged and 0 < mine.token_bytes < cache.token_bytes
        mine.drop(1, 0, 0)
        halved = Stored(kept.keys[:, :, :2], kept.values[:, :, :2], kept.scales[..., :2])
        with pytest.raises(UsageError, match="they are of another model or cache dtype"):
            mine.restore(0, halved)
        return kept, mine.stored(2), mine.keys(1, 1, 9)

    wanted = cache.stored(0)
    for kept, again, keys in on_ranks(2, work):
        for name in ("keys", "values", "scales"):
            np.testing.assert_array_equal(getattr(kept, name), getattr(again, name))
        assert kept.keys.shape == wanted.keys.shape
        np.testing.assert_allclose(kept.scales, wanted.scales, rtol=1e-5)
        np.testing.assert_allclose(keys, cache.keys(1, 0, 9), atol=2 * wanted.scales.max())


def test_a_backend_that_compiles_whole_steps_is_refused(opened: Callable[..., Pack]):
    class Jax:
        name = "jax"

    cuts = Cuts.of(TINY.config, schemes_of(TINY.config, "f32"), 2)
    with pytest.raises(UsageError, match="backend jax on 2 ranks, expected one of numba, cuda"):
        ParallelBackend(Jax(), ThreadGroup(0, [None, None], None), cuts)  # type: ignore[arg-type]


def test_ranks_that_draw_other_tokens_are_told():
    def work(group: ThreadGroup) -> None:
        check_step(group, np.array([1, 2]))
        check_step(group, np.array([3, 4 + (group.rank == 2)]))

    with pytest.raises(BackendError, match="rank 2 runs other tokens than rank 0: the ranks have"):
        on_ranks(3, work)


def test_a_model_knows_how_many_share_it(opened: Callable[..., Pack]):
    source = opened("f32")
    one, other = on_ranks(2, lambda group: parallel(source, "reference", group))
    assert one.description.endswith("rank 0 of 2") and other.description.endswith("rank 1 of 2")
    assert one.arithmetic == other.arithmetic != one.inner.arithmetic
    assert one.arithmetic.endswith("heads on ranks 3+2")


def test_all_that_a_model_does_it_does_on_ranks(pack_of: Callable[..., Path]):
    """Searches, guesses, constraints, attentions and hidden states: each asks layers in its way."""
    source = Pack.open(pack_of("int4"))
    options: dict[str, dict[str, Any]] = {
        "beams": {"search": bloomq.BeamOptions(num_beams=3)},
        "contrast": {"search": bloomq.ContrastOptions(penalty_alpha=0.6)},
        "guesses": {"draft": "lookup"},
        "penalty": {"repetition_penalty": 1.3, "window": bloomq.Window(128)},
    }

    def work(backend: Any) -> tuple[dict[str, str], np.ndarray, np.ndarray]:
        model = LanguageModel(
            BloomForCausalLM(source, backend), BloomTokenizer.of_pack(source), 256, "", 0.0
        )
        texts = {
            name: model.generate("The river", max_new_tokens=10, **given).text
            for name, given in options.items()
        }
        out = model.model([[5, 6, 7, 8]], output_attentions=True, output_hidden_states=True)
        return texts, np.stack(out.attentions), np.stack(out.hidden_states)

    alone = work(backends.choose("numba", source, 1).backend)
    for texts, *arrays in on_ranks(2, lambda group: work(parallel(source, "numba", group))):
        assert texts == alone[0]
        for found, wanted in zip(arrays, alone[1:], strict=True):
            assert found.shape == wanted.shape
            assert np.abs(found - wanted).max() <= INTEGERS * np.abs(wanted).max()


def test_the_cuda_backend_is_shared_too(pack_of: Callable[..., Path]):
    """On torch's CPU device: the padded steps that a GPU records run here as well."""
    pytest.importorskip("torch")
    cuda = pytest.importorskip("bloomq.backends.cuda.layers")
    source = Pack.open(pack_of("int8"))
    ids = [np.arange(7), np.array([9]), np.array([4])]  # a prompt, then one token a step

    def work(backend: Any) -> list[np.ndarray]:
        head = Head(source, backend, "BloomForCausalLM")
        cache, found = head.cache(1, 64), []
        for some in ids:
            logits = head.step(some, cache, Span.of([0], [len(some)]), np.array([len(some) - 1]))
            found += [backend.numpy(logits), backend.top(logits, 3).ids]
        return found

    alone = work(cuda.CudaBackend("cpu", "f32"))
    cuts = Cuts.of(source.config, source.schemes, 2)
    ranks = on_ranks(2, lambda g: work(ParallelBackend(cuda.CudaBackend("cpu", "f32"), g, cuts)))
    for found, other, wanted in zip(*ranks, alone, strict=True):
        np.testing.assert_array_equal(found, other)
        assert np.abs(found - wanted).max() <= INTEGERS * np.abs(wanted).max()


# -- places ----------------------------------------------------------------------------------------


def test_a_process_that_torchrun_did_not_start_is_alone():
    assert started({}) is None
    assert started({**SECOND, "RANK": "0", "WORLD_SIZE": "1"}) is None
    without = {name: text for name, text in SECOND.items() if name != "MASTER_PORT"}
    assert Place.of(without) is None


def test_the_environment_says_which_process_this_is():
    place = Place.of({**SECOND, "TORCHELASTIC_RESTART_COUNT": "2"})
    assert place == Place(1, 2, 1, 2, "localhost", 29500, True, 2)
    assert Workers(place, None).threads(5) == 2  # type: ignore[arg-type]
    assert Workers(replace(place, local_world=8), None).threads(5) == 1  # type: ignore[arg-type]


def test_ranks_have_the_devices_of_their_numbers():
    workers = Workers(Place(1, 2, 1, 2, "localhost", 1), None)  # type: ignore[arg-type]
    assert workers.device == "cuda:1"
    for given in ({"devices": "cuda:0,1"}, {"max_memory": "0:1GiB"}):
        with pytest.raises(UsageError, match="on 2 ranks, expected neither: each rank has the GPU"):
            bloomq.load(workers=workers, **given)  # type: ignore[arg-type]


def test_a_part_that_its_gpu_has_no_room_for_is_refused(monkeypatch: pytest.MonkeyPatch):
    class Small:
        def free_bytes(self) -> int:
            return 10**6

    monkeypatch.setattr(backends, "why_not", lambda name: None)
    workers = Workers(Place(1, 2, 1, 2, "localhost", 1), Small())  # type: ignore[arg-type]
    said = r"of weights, cuda:1 has 0\.0 GB free: start more ranks"
    with pytest.raises(CapacityError, match=said):
        bloomq.load(workers=workers)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("RANK", "two", "RANK is 'two', expected a whole number: start with torchrun"),
        ("RANK", "2", "RANK 2 of WORLD_SIZE 2, expected 0 to 1"),
    ],
)
def test_an_environment_that_torchrun_does_not_make_is_refused(name: str, text: str, message: str):
    with pytest.raises(UsageError, match=message):
        Place.of({**SECOND, name: text})


def test_without_torch_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match="2 ranks need torch, which is not installed"):
        started(SECOND)


def test_a_rank_that_waits_in_vain_says_for_how_long():
    group_of = pytest.importorskip("bloomq.parallel.group").ProcessGroup
    group = object.__new__(group_of)
    group.rank, group.world, group.timeout_s = 0, 2, 4.0
    with (
        pytest.raises(BackendError, match="rank 0 of 2 stops, since another one has not answered"),
        group._together(),
    ):
        raise RuntimeError("unbound_buffer.cc:129] Timed out waiting 4000ms for send")


def test_a_rank_that_is_told_to_end_says_so():
    workers = Workers(Place(1, 2, 1, 2, "localhost", 1), None)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="rank 1 of 2 was told to end, as when another one"):
        workers._end(signal.SIGTERM, None)


# -- processes -------------------------------------------------------------------------------------


def torchrun(world: int, *command: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(world), *command,
    ]  # fmt: skip


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_four_processes_are_one_model(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, pack_of: Callable[..., Path]
):
    pytest.importorskip("torch")
    base, first, second = tmp_path_factory.getbasetemp(), pack_of("int4"), pack_of("int8")
    few = pack(base, Tiny(n_head=3, head_dim=32), "int4")
    done = subprocess.run(
        torchrun(4, str(RANKS), str(tmp_path), str(first), str(second), str(few)),
        capture_output=True, text=True, env=ONE_THREAD, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    each = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(4)]
    assert each[1:] == each[:1] * 3  # bit for bit
    found = each[0]
    assert found["sums"] == [True, True]
    assert found["shared"] == "of rank 0"
    assert found["other pack"].startswith("BackendError: the pack of rank 1 is ")
    assert ", of rank 0 " in found["other pack"]
    assert found["few heads"].startswith("UsageError: 4 ranks for a model of 3 heads, expected 1 t")
    assert found["drawn apart"].startswith("BackendError: rank 3 runs other tokens than rank 0")

    alone = bloomq.load(first, backend="numba", threads=1)
    assert found["text"] == alone.generate("The river", max_new_tokens=64).text
    assert found["drawn"].startswith(", and")  # the same on all, but not as alone: see above
    wanted = alone([alone.prompt_ids("Once upon a time there was a small village")]).logits[0]
    close = INTEGERS * np.abs(wanted).max()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), wanted, rtol=0, atol=close)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_command_on_two_processes_prints_once_and_ends_with_one_that_is_killed(
    pack_of: Callable[..., Path],
):
    """The prompt comes by standard input, which rank 0 reads for both."""
    pytest.importorskip("torch")
    source = pack_of("int8")
    wanted = bloomq.load(source, backend="numba", threads=1).generate("The river").text.encode()
    running = subprocess.Popen(
        torchrun(2, "-m", "bloomq", "generate", "-m", str(source), "-n", "1900", "-t", "1", "-q"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ONE_THREAD,
    )  # fmt: skip
    assert running.stdin is not None and running.stdout is not None
    running.stdin.write(b"The river\n")
    running.stdin.close()
    shown = running.stdout.read(len(wanted))
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    rest, said = running.stdout.read(), running.stderr.read().decode()  # type: ignore[union-attr]
    assert shown == wanted, said
    assert running.wait(timeout=60) != 0
    assert len(rest) < 1900
    ours = [line for line in said.splitlines() if line.startswith("error: rank 0 of 2 ")]
    assert len(ours) == 1, said
    assert "another one has died" in ours[0]


def test_the_page_about_parallelism_says_what_its_code_prints():
    page = (Path(__file__).parent.parent / "docs" / "parallel.md").read_text()
    sizes, program = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = warm.python("-c", sizes + program)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert "\n".join(printed[:6]) in page and len(printed) > 6


def test_commands_of_one_process_refuse_to_run_on_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    class Alone(Workers):
        def speak_as_one(self) -> None: ...
        def may_report(self) -> bool:
            return True

        def __exit__(self, *rest: object) -> None: ...

    alone = Alone(Place(0, 2, 0, 2, "localhost", 1), None)  # type: ignore[arg-type]
    monkeypatch.setattr("bloomq.cli.started", lambda: alone)
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    from bloomq.cli import main

    with pytest.raises(SystemExit, match="2"):
        main(["info"])
    assert "'bloomq info' runs in one process, generate, score" in capsys.readouterr().err
    (tmp_path / "texts.txt").write_text("Hello\n")
    with pytest.raises(SystemExit, match="2"):
        main(["score", str(tmp_path / "texts.txt"), "-o", str(tmp_path / "out.jsonl")])
    assert "--out is of one process, and torchrun has started" in capsys.readouterr().err
