"""Calibration: the solver against a textbook GPTQ, activations against the reference's, and whole
conversions, interrupted and not.
"""

from __future__ import annotations

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bloomq.converters.calibration import cpu_engine, forward
from bloomq.converters.calibration import moments as moments_module
from bloomq.converters.calibration import rounding as rounding_module
from bloomq.converters.calibration import scratch as scratch_module
from bloomq.converters.calibration.compiled import corner, nearest
from bloomq.converters.calibration.conversion import plan_calibrated
from bloomq.converters.calibration.cpu_engine import CpuEngine
from bloomq.converters.calibration.estimate import Rates, peak_bytes, seconds_of
from bloomq.converters.calibration.factor import column_order, factor
from bloomq.converters.calibration.forward import Kept, Runner, UnderWay, linears_of
from bloomq.converters.calibration.gptq import Codes, descend, gptq
from bloomq.converters.calibration.look_up import look_up_moment
from bloomq.converters.calibration.making_up import Wanted, stream_behind
from bloomq.converters.calibration.moments import Moments
from bloomq.converters.calibration.producer import HEAD_TOKENS, Settings, calibrated
from bloomq.converters.calibration.rounding import grid_of
from bloomq.converters.calibration.scratch import Scratch
from bloomq.converters.calibration.solver import Solver
from bloomq.converters.calibration.text import read_windows, spread
from bloomq.converters.convert import convert, run
from bloomq.converters.group_scales import book_of
from bloomq.converters.reading import read_checkpoint
from calibration_oracle import half, output_errors, problem, textbook, through_the_reference
from conftest import DEMO, write_checkpoint

from bloomq.backends.numba_cpu.threads import physical_cores
from bloomq.backends.reference import ReferenceBackend
from bloomq.config import BloomConfig, weight_specs
from bloomq.errors import (
    InputNotFound,
    NumericError,
    OutputError,
    TokenizerError,
    UsageError,
)
from bloomq.grids import GRIDS
from bloomq.layers import Span
from bloomq.model import Block
from bloomq.pack import Pack, stored_arrays
from bloomq.scheme_choice import choose_schemes
from bloomq.schemes import get_scheme

SCHEMES = [
    ("nl4", 32), ("nl4", 64), ("nl4", 128), ("int4", 32), ("int4", 128), ("int6", None),
    ("int8", None),
]  # fmt: skip


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture(scope="module")
def engine(pool):
    return CpuEngine(pool, 1)


# -- the solver ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nl4", "int4", "int6", "int8"])
def test_compiled_rounding_to_a_grid_is_numpys(name):
    """Ties and what lies beyond the ends too."""
    grid = grid_of(get_scheme(name))
    x = np.arange(2 * grid.lowest - 8, 2 * grid.highest + 9, dtype=np.float32) / 2
    x = np.concatenate([x, np.nextafter(x, np.float32(np.inf))])
    found = np.empty_like(x)
    nearest(x, len(x), book_of(grid), found)
    assert np.array_equal(found, grid.nearest(x))


@pytest.mark.parametrize(("name", "group"), [("nl4", 32), ("nl4", 64), ("int4", 32), ("int4", 64)])
def test_compiled_gptq_is_the_textbooks(pool, name, group):
    grid, (w, h) = GRIDS[name], problem(48, 256)
    h += 0.01 * np.diag(h).mean() * np.eye(256, dtype=np.float32)
    order = column_order(np.diag(h), group)
    found = gptq(np.ascontiguousarray(w.T), factor(h, order, pool), group, grid)
    codes, values = textbook(w, h, order, group, grid)
    same = (codes == found.codes.T)[:, order].reshape(48, -1, group)
    # In float32 a tie may fall the other way, and changes all that follows in its row.
    assert same[:, 0].all()
    assert same[:, 1].all(axis=1).mean() > 0.1
    ours, theirs = output_errors(w, found.values().T, h), output_errors(w, values, h)
    assert ours.sum() == pytest.approx(theirs.sum(), rel=0.01)


def test_compiled_gptq_with_scales_of_rows_is_the_textbooks(pool):
    w, h = problem(32, 256)
    h += 0.01 * np.diag(h).mean() * np.eye(256, dtype=np.float32)
    order, scale = column_order(np.diag(h), 1), np.abs(w).max(axis=1) / np.float32(127)
    by, grid = factor(h, order, pool), grid_of(get_scheme("int8"))
    found = gptq(np.ascontiguousarray(w.T), by, 256, grid, fixed=scale[None])
    codes, _ = textbook(w, h, order, 256, grid, fixed=scale)
    assert (codes == found.codes.T).mean() > 0.99


def test_factor_restores_the_moment(pool):
    _, h = problem(1, 96)
    order = column_order(np.diag(h), 32)
    by = factor(h + np.eye(96, dtype=np.float32), order, pool)
    restored = (by.unit * by.weight) @ by.unit.T
    assert np.allclose(restored, (h + np.eye(96))[np.ix_(order, order)], rtol=1e-4, atol=1e-3)
    assert np.array_equal(by.unit, np.triu(by.unit))
    assert (np.diag(by.unit) == 1).all()


@pytest.mark.parametrize("k", [32, 96, 256, 288, 832])
def test_a_factor_of_any_size_is_choleskys(pool, k):
    """In one corner, in several, and of tiles that meet in the middle."""
    _, h = problem(1, k)
    h += np.diag(h).mean() * np.eye(k, dtype=np.float32)
    order = np.random.default_rng(k).permutation(k)
    back = order[::-1]
    lower = np.linalg.cholesky(h[np.ix_(back, back)].astype(np.float64))
    diagonal = np.diag(lower)[::-1]
    by = factor(h, order, pool)
    assert np.allclose(by.unit, lower[::-1, ::-1] / diagonal, atol=1e-4)
    assert np.allclose(by.weight, diagonal**2, rtol=1e-4)


def test_the_compiled_corner_is_choleskys():
    _, h = problem(1, 40)
    part, inverse = h + np.eye(40, dtype=np.float32), np.empty((40, 40), np.float32)
    upper = np.linalg.cholesky(part.astype(np.float64)).T
    assert corner(part, inverse)
    assert np.allclose(part, upper, rtol=1e-6, atol=1e-6)
    assert np.allclose(inverse, np.linalg.inv(upper), rtol=1e-5, atol=1e-6)
    bad = -h
    assert not corner(bad, inverse)
    assert np.array_equal(bad, -h)


def test_groups_stay_whole_in_the_order_of_columns():
    diagonal = np.random.default_rng(1).random(128).astype(np.float32)
    order = column_order(diagonal, 32)
    assert sorted(order) == list(range(128))
    groups = order.reshape(-1, 32) // 32
    assert (groups == groups[:, :1]).all()
    assert (np.diff(diagonal[order].reshape(-1, 32), axis=1) <= 0).all()


@pytest.mark.parametrize("name", ["nl4", "int4"])
def test_descent_never_raises_an_error(pool, name):
    grid, (w, h) = GRIDS[name], problem(32, 256)
    wt = np.ascontiguousarray(w.T)
    found = gptq(wt, factor(h, column_order(np.diag(h), 32), pool), 32, grid)
    before = output_errors(w, found.values().T, h)
    for _ in range(3):
        descend(wt, h, found, grid, 1)
        after = output_errors(w, found.values().T, h)
        assert (after <= before * (1 + 1e-4)).all()
        before = after


@pytest.mark.parametrize("name", ["nl4", "int4"])
def test_descent_finds_what_is_exactly_there(name):
    """Codes one step off, with the right scales: one sweep puts them right."""
    rng, grid = np.random.default_rng(2), GRIDS[name]
    at, numbers = rng.integers(1, 15, (64, 16)), np.array(grid.book, np.int8)
    found = Codes(numbers[at], half(rng.random((2, 16)).astype(np.float32) + 0.1), 32)
    exact = found.values()
    found.codes[5] = numbers[at[5] + 1]
    descend(exact, np.eye(64, dtype=np.float32), found, grid, 2)
    assert np.allclose(found.values(), exact, atol=1e-6)


@pytest.mark.parametrize(("name", "group"), SCHEMES)
@pytest.mark.parametrize("shape", [(32, 128), (70, 200), (5, 96)], ids=str)
def test_no_row_is_worse_than_rounded_to_nearest(engine, name, group, shape):
    scheme, (w, moment) = get_scheme(name, group), problem(*shape, seed=3)
    w[0], moment[:, 3], moment[3] = 0, 0, 0  # a row of zeros, an input that is always 0
    solved = Solver(moment.copy(), scheme, engine).rows(w)
    nearest = scheme.dequantize(scheme.quantize(w), shape)
    ours, theirs = (output_errors(w, values, moment) for values in (solved.values, nearest))
    assert (ours <= theirs * (1 + 1e-4) + 1e-12).all()
    assert ours.sum() < 0.8 * theirs.sum()
    for leaf, part in scheme.parts(shape).items():
        assert solved.parts[leaf].shape == part.shape
    assert np.array_equal(scheme.dequantize(solved.parts, shape), solved.values)
    assert np.isfinite(solved.values).all()


@pytest.mark.parametrize(("name", "group"), SCHEMES)
def test_rows_that_nearest_rounds_better_are_taken_from_it(engine, name, group, monkeypatch):
    def spoilt(wt: np.ndarray, by: Any, group: int, *rest: Any, **options: Any) -> Codes:
        found = gptq(wt, by, group, *rest, **options)
        found.codes[:, ::3] = 0
        return found

    monkeypatch.setattr(rounding_module, "gptq", spoilt)
    scheme, (w, moment) = get_scheme(name, group), problem(32, 128)
    solved = Solver(moment.copy(), scheme, engine, sweeps=0).rows(w)
    nearest = scheme.dequantize(scheme.quantize(w), w.shape)
    assert np.array_equal(solved.values[::3], nearest[::3])
    assert not np.array_equal(solved.values[1::3], nearest[1::3])


def test_schemes_of_other_than_whole_numbers_are_rounded_to_nearest(engine):
    w, moment = problem(32, 128)
    for name in ("nf4", "bf16"):
        scheme = get_scheme(name)
        solved = Solver(moment.copy(), scheme, engine).rows(w)
        assert np.array_equal(solved.values, scheme.dequantize(scheme.quantize(w), w.shape))


def test_same_bytes_for_any_threads_and_any_cut_into_rows():
    w, moment = problem(600, 128)
    found = []
    for threads, cuts in ((1, [0, 600]), (3, [0, 600]), (2, [0, 320, 600])):
        with ThreadPoolExecutor(threads) as threads_pool:
            solver = Solver(moment.copy(), get_scheme("int4", 32), CpuEngine(threads_pool))
            pairs = itertools.pairwise(cuts)
            found.append(np.concatenate([solver.rows(w[a:b]).values for a, b in pairs]))
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()


def test_inputs_that_are_always_zero_are_rounded_plainly(engine):
    w, _ = problem(32, 64)
    solved = Solver(np.zeros((64, 64), np.float32), get_scheme("int4", 32), engine).rows(w)
    assert np.abs(solved.values - w).max() < 0.02


@pytest.mark.parametrize("name", ["nl4", "int6"])
def test_weights_beyond_the_scales_range_are_refused(engine, name):
    w, moment = problem(32, 64)
    with pytest.raises(NumericError, match=f"weights too large for {name}"):
        Solver(moment, get_scheme(name), engine).rows(w * np.float32(1e9))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "chosen", [{"scheme": "nl4"}, {"scheme": "int6"}, {"scheme": "nf4"}, {"bits": 5}], ids=str
)
@pytest.mark.parametrize(
    ("matrix", "size"), [("h_to_4h", 1e30), ("4h_to_h", 1e30), ("4h_to_h", 2e38)]
)
def test_weights_too_large_are_one_error_and_no_warning(tmp_path, text, chosen, matrix, size):
    def enlarge(tensors: Any) -> None:
        tensors[f"transformer.h.0.mlp.dense_{matrix}.weight"][1][3, 5] = size

    source = write_checkpoint(tmp_path / "c", vocab_size=8192, edit=enlarge)
    shutil.copy(DEMO / "tokenizer.json", source)
    with pytest.raises(NumericError, match="holds weights too large for"):
        convert(source, tmp_path / "pack", calibrate=text, calibration_tokens=64, **chosen)


def test_moments_that_are_not_finite_are_refused(engine):
    with pytest.raises(NumericError, match="activations are not finite: the checkpoint is"):
        Solver(np.full((64, 64), np.nan, np.float32), get_scheme("int4", 32), engine)


def test_a_moment_without_a_factor_is_refused(pool):
    with pytest.raises(NumericError, match="of activations are not positive definite"):
        factor(-np.eye(32, dtype=np.float32), np.arange(32), pool)


def test_a_singular_moment_gets_more_on_its_diagonal(pool):
    ones = np.ones((32, 32), np.float32)
    by = factor(ones, np.arange(32), pool)
    assert np.isfinite(by.unit).all()


# -- activations -----------------------------------------------------------------------------------


def test_moments_hold_a_channel_that_is_large_and_nearly_constant(pool, monkeypatch):
    monkeypatch.setattr(moments_module, "SUMMED_ROWS", 200)
    monkeypatch.setattr(moments_module, "_TRIANGLE", 3)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((700, 8)).astype(np.float32)
    x[:, 2] = 3000 + 0.01 * x[:, 2]
    for central in (True, False):
        moments = Moments(pool)
        for part in np.array_split(x, 5):
            moments.add(part)
        mean, moment = moments.result(central=central)
        wide = x.astype(np.float64)
        exact = np.cov(wide.T, bias=True) if central else wide.T @ wide / len(wide)
        assert np.allclose(mean, wide.mean(axis=0), rtol=1e-6, atol=1e-6)
        assert np.allclose(moment, exact, rtol=1e-3, atol=1e-6 if central else 1e-2)


@pytest.mark.parametrize("post", [False, True], ids=["pre-norm", "post-norm"])
def test_inputs_are_those_of_the_references_block(pool, tmp_path, post, monkeypatch):
    engine = CpuEngine(pool, 1)
    engine.at_once = 16
    monkeypatch.setattr(forward, "STEP_TOKENS", 40)  # two steps
    settings = {"apply_residual_connection_post_layernorm": post}
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "c", n_layer=2, config=settings))
    ids = np.random.default_rng(0).integers(0, 96, (3, 20))
    weights = UnderWay(checkpoint)
    weights.add_rounded(linears_of(1), get_scheme("f32"), pool)
    runner = Runner(ids, checkpoint.config, engine)
    x = np.random.default_rng(1).standard_normal((60, 64)).astype(np.float32)
    seen: dict[str, np.ndarray] = {}
    for name in linears_of(1):
        parts: list[np.ndarray] = []
        runner.inputs_of(name, 1, weights, x, parts.append)
        seen[name] = np.concatenate(parts)
    out = np.empty_like(x)
    runner.through(1, weights, x, out)
    kept = Kept(np.empty_like(x))
    for name in linears_of(1):
        parts = []
        runner.inputs_of(name, 1, weights, x, parts.append, kept)
        assert np.array_equal(np.concatenate(parts), seen[name]), name
    runner.through(1, weights, x, kept.rows, kept)
    assert np.array_equal(out, kept.rows)

    expected, result = through_the_reference(weights, 1, x, ids.shape)
    assert np.allclose(out, result, atol=1e-4)
    for name in linears_of(1):
        assert np.allclose(seen[name], expected[name], atol=1e-4), name


# -- what is wanted of a matrix --------------------------------------------------------------------


def test_what_a_matrix_should_add_is_a_regression_held_to_its_own_weights(pool):
    rng = np.random.default_rng(0)
    a, before, stream = (rng.standard_normal((300, n)).astype(np.float32) for n in (24, 16, 16))
    w = rng.standard_normal((16, 24)).astype(np.float32)
    moments = Moments(pool)
    wanted = Wanted(stream, moments, pool)
    for start in range(0, 300, 70):
        wanted.add(a[start : start + 70], before[start : start + 70])
    mean, moment = moments.result(central=True)
    found, bias = wanted.weights(w, mean, moment)
    r = (stream - before).astype(np.float64)
    x, y = a - a.mean(axis=0, dtype=np.float64), r - r.mean(axis=0)
    h = x.T @ x / 300
    damping = (0.4 + 10 * 24 / 300) * np.diag(h).mean() * np.eye(24)
    expected = np.linalg.solve(h + damping, (y.T @ x / 300 + w @ damping).T).T
    assert np.allclose(found, expected, atol=1e-5)
    assert np.allclose(bias, r.mean(axis=0) - expected @ a.mean(axis=0), atol=1e-5)


def test_a_stream_that_is_not_finite_is_told(pool):
    wanted = Wanted(np.full((4, 2), np.inf, np.float32), Moments(pool), pool)
    with np.errstate(invalid="ignore"):
        wanted.add(np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32))
    with pytest.raises(NumericError, match="the checkpoint's own activations are not finite"):
        wanted.weights(np.ones((2, 3), np.float32), np.ones(3, np.float32), np.eye(3, dtype="f4"))


def test_streams_behind_matrices_are_those_of_the_block(small, engine, pool):
    checkpoint = read_checkpoint(small)
    runner, weights = Runner(IDS, checkpoint.config, engine), UnderWay(checkpoint)
    weights.add_rounded(linears_of(1), get_scheme("f32"), pool)
    x = np.random.default_rng(1).standard_normal((IDS.size, 64)).astype(np.float32)
    found, kept = {}, Kept(np.empty_like(x))
    for name in ("attn.out", "mlp.down"):
        stream_behind(f"h.1.{name}", 1, weights, x, runner, kept)
        found[name] = kept.rows.copy()
    reference = ReferenceBackend()
    block, span = Block(weights, reference, 1), Span.of(range(6), [32] * 6)
    cache = reference.cache(checkpoint.config, 6, 32)
    middle = block.out(block.attention(block.qkv(x, cache, span), cache, span), cache, span, add=x)
    assert np.allclose(found["attn.out"], middle, atol=1e-4)
    end = block.down(block.up(middle, cache, span), cache, span, add=middle)
    assert np.allclose(found["mlp.down"], end, atol=1e-4)


def test_errors_of_looked_up_rows_count_as_the_first_block_sees_them(small, pool):
    checkpoint = read_checkpoint(small)
    moment = look_up_moment(checkpoint).astype(np.float64)
    weights, e = UnderWay(checkpoint), np.random.default_rng(0).standard_normal((5, 64))
    weights.add_rounded(linears_of(0), get_scheme("f32"), pool)

    def behind(rows: np.ndarray, norm: str) -> np.ndarray:
        gain = weights.norm(norm).gain.astype(np.float64)
        return np.asarray((rows - rows.mean(axis=1, keepdims=True)) * gain)

    def seen(rows: np.ndarray) -> np.ndarray:
        """Summed over what is seen of each matrix, each as much on average over the columns."""
        total = np.zeros(len(rows))
        for norm, name in (("ln_1", "attn.qkv"), ("ln_2", "mlp.up")):
            w = weights.matrix(f"h.0.{name}").dequantize().astype(np.float64)
            both = [
                np.square(behind(x, f"h.0.{norm}") @ w.T).sum(axis=1) for x in (rows, np.eye(64))
            ]
            total += both[0] / both[1].mean()
        return total

    expected = seen(behind(e, "emb_ln")) / seen(behind(np.eye(64), "emb_ln")).mean()
    assert np.allclose(((e @ moment) * e).sum(axis=1), expected, rtol=1e-4)
    assert np.allclose(moment.sum(axis=0), 0, atol=1e-4)  # a norm takes off what all have alike


# -- conversions -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A random checkpoint of two blocks."""
    folder = tmp_path_factory.mktemp("calibration") / "checkpoint"
    return write_checkpoint(folder, n_layer=2, vocab_size=200, seed=4)


IDS = np.random.default_rng(5).integers(0, 200, (6, 32))
MANY = np.random.default_rng(6).integers(0, 200, (32, 32))  # four tokens to a column of mlp.down


def pieces(
    checkpoint: Path, folder: Path, done: tuple[str, ...] = (), *, ids: Any = IDS, **options: Any
) -> list[Any]:
    source = read_checkpoint(checkpoint)
    schemes = {
        spec.name: get_scheme("int6") if spec.name == "wte" else get_scheme("int4", 32)
        for spec in weight_specs(source.config) if spec.is_matrix
    }  # fmt: skip
    return list(calibrated(ids, folder, **options)(source, schemes, done))


def bytes_of(found: list[Any]) -> dict[str, bytes]:
    joined: dict[str, bytes] = {}
    for piece in found:
        for key, array in piece.arrays.items():
            joined[key] = joined.get(key, b"") + np.ascontiguousarray(array).tobytes()
    return joined


def test_pieces_come_in_order_and_whole(small, tmp_path):
    found = pieces(small, tmp_path / "scratch")
    source = read_checkpoint(small)
    names = list(dict.fromkeys(piece.weight for piece in found))
    assert names == [spec.name for spec in weight_specs(source.config)]
    expected = {}
    for spec in weight_specs(source.config):
        scheme = get_scheme("int6") if spec.name == "wte" else get_scheme("int4", 32)
        for key, part in stored_arrays(spec, scheme if spec.is_matrix else None).items():
            width = {"U8": 1, "F16": 2, "F32": 4}[part.dtype]
            expected[key] = width * int(np.prod(part.shape))
    assert {key: len(data) for key, data in bytes_of(found).items()} == expected
    assert sum(piece.source_bytes for piece in found) == source.nbytes
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("ids", [IDS, MANY], ids=["few tokens", "enough to make up for errors"])
def test_going_on_gives_the_same_bytes_wherever_it_stopped(small, tmp_path, ids):
    source = read_checkpoint(small)
    names = [spec.name for spec in weight_specs(source.config)]
    undisturbed = bytes_of(pieces(small, tmp_path / "undisturbed", ids=ids))
    schemes = {
        spec.name: get_scheme("int6") if spec.name == "wte" else get_scheme("int4", 32)
        for spec in weight_specs(source.config) if spec.is_matrix
    }  # fmt: skip
    for stop in range(1, len(names), 2):
        folder = tmp_path / f"stopped-{stop}"
        producer = calibrated(ids, folder)
        begun = producer(source, schemes, ())
        first = []
        for piece in begun:
            if piece.weight == names[stop]:
                break
            first.append(piece)
        begun.close()  # type: ignore[attr-defined]
        if stop % 4 == 3:
            shutil.rmtree(folder, ignore_errors=True)  # the activations were lost
        rest = list(producer(source, schemes, names[:stop]))
        assert {piece.weight for piece in rest} == set(names[stop:])
        assert bytes_of(first + rest) == undisturbed, names[stop]


@pytest.mark.parametrize("ids", [IDS, MANY], ids=["few tokens", "enough to make up for errors"])
def test_no_byte_depends_on_the_number_of_threads(small, tmp_path, ids, monkeypatch):
    made, weights = [], Wanted.weights
    monkeypatch.setattr(
        Wanted, "weights", lambda *given: made.append(given) or weights(*given)
    )  # fmt: skip
    one, all_cores = (
        bytes_of(pieces(small, tmp_path / str(threads), ids=ids, threads=threads))
        for threads in (1, None)
    )
    assert one == all_cores
    assert len(made) == (8 if ids is MANY else 0)  # two matrices of two blocks, twice


def test_what_an_interrupted_block_left_makes_room_for_the_next(tmp_path, monkeypatch):
    scratch = Scratch(tmp_path / "scratch", "key", 4, 8)
    scratch.new()
    seen = []

    def usage(folder: Path) -> Any:
        seen.append((folder / "new.npy").exists())
        return shutil._ntuple_diskusage(1000, 0, 4 * 4 * 8)

    monkeypatch.setattr(scratch_module.shutil, "disk_usage", usage)
    assert scratch.new().shape == (4, 8)
    assert seen == [False]


def test_the_next_blocks_work_does_not_repeat_the_last_ones(small, tmp_path):
    source = read_checkpoint(small)
    names = [spec.name for spec in weight_specs(source.config)]
    schemes = {s.name: get_scheme("int4", 32) for s in weight_specs(source.config) if s.is_matrix}
    producer = calibrated(IDS, tmp_path / "scratch")
    begun = producer(source, schemes, ())
    for piece in begun:
        if piece.weight == "h.1.ln_1":
            break
    begun.close()  # type: ignore[attr-defined]
    seen: list[tuple[int, int]] = []
    producer = calibrated(IDS, tmp_path / "scratch", progress=lambda *at: seen.append(at))
    list(producer(source, schemes, names[: names.index("h.1.ln_1")]))
    assert seen == [(1, 1)]


def test_biases_take_the_mean_error(small, tmp_path):
    """Of the first matrix: on the text that was calibrated on, its mean output is the exact one."""
    source = read_checkpoint(small)
    arrays = bytes_of(pieces(small, tmp_path / "scratch"))
    plain = bytes_of(pieces(small, tmp_path / "plain", settings=Settings(correct_bias=False)))
    key = "h.0.attn.qkv.bias"
    exact = source.tensors[key].rows(0, 192).astype(np.float32)
    assert np.frombuffer(plain[key], np.float32)[:192].tobytes() == exact.tobytes()
    bias = np.frombuffer(arrays[key], np.float32)[:192]
    assert not np.array_equal(bias, exact)
    assert np.abs(bias - exact).max() < 0.1


def test_matrices_that_write_to_the_stream_bring_it_back(small, tmp_path):
    """Behind the last block the stored model is nearer to the checkpoint's own than without."""
    ends = {}
    for make_up in (False, True):
        folder, source = tmp_path / str(make_up), read_checkpoint(small)
        schemes = {
            s.name: get_scheme("int4", 32) for s in weight_specs(source.config) if s.is_matrix
        }
        ids = np.random.default_rng(5).integers(0, 200, (64, 32))
        producer = calibrated(ids, folder, settings=Settings(make_up=make_up))
        for piece in producer(source, schemes, ()):
            if piece.weight == "ln_f":
                break
        (path,) = folder.glob("x-*-00002.npy")
        stored, own = np.split(np.load(path), 2)
        ends[make_up] = np.square(stored - own).sum() / np.square(own).sum()
    assert ends[True] < ends[False]


@pytest.mark.parametrize(("windows", "columns"), [(7, []), (8, [64]), (31, [64]), (32, [64, 256])])
def test_a_matrix_of_less_than_four_tokens_a_column_makes_up_for_nothing(
    windows, columns, small, tmp_path, monkeypatch
):
    solved: list[int] = []

    class Recording(Wanted):
        def weights(self, w: Any, *moments: Any) -> Any:
            solved.append(w.shape[1])
            return super().weights(w, *moments)

    monkeypatch.setattr(cpu_engine, "Wanted", Recording)
    ids = np.random.default_rng(5).integers(0, 200, (windows, 32))
    pieces(small, tmp_path / "scratch", ids=ids)
    assert solved == 2 * columns


def test_a_damaged_weight_is_named(tmp_path):
    def spoil(tensors: Any) -> None:
        tensors["transformer.h.0.mlp.dense_h_to_4h.weight"][1][3, 5] = np.nan

    checkpoint = write_checkpoint(tmp_path / "c", vocab_size=200, edit=spoil)
    with pytest.raises(NumericError, match=r"h_to_4h.*NaN or infinity: the checkpoint is damaged"):
        pieces(checkpoint, tmp_path / "scratch")


def test_a_full_disk_is_told(small, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(scratch_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="activations need 0 MB, 0 MB are free: free some"):
        pieces(small, tmp_path / "scratch")


def test_activations_that_cannot_be_read_are_told(tmp_path):
    scratch = Scratch(tmp_path, "key", 4, 8)
    (tmp_path / "x-key-00000.npy").write_bytes(b"nonsense")
    assert scratch.latest(3) == 0
    with pytest.raises(OutputError, match="activations cannot be read"):
        scratch.open(0)


def test_untied_heads_and_classifiers_are_calibrated_too(tmp_path):
    def untie(tensors: Any) -> None:
        dtype, table = tensors["transformer.word_embeddings.weight"]
        tensors["lm_head.weight"] = (dtype, table[::-1].copy())

    checkpoint = write_checkpoint(
        tmp_path / "c", vocab_size=200, edit=untie, config={"tie_word_embeddings": False}
    )
    found = bytes_of(pieces(checkpoint, tmp_path / "scratch"))
    assert {"lm_head.codes", "wte.codes"} <= found.keys()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder of two texts."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    (folder / "b.txt").write_text("def f(x):\n    return [y for y in x if y]\n\n\n" * 60)
    return folder


def test_a_calibrated_demo_is_nearer_to_the_checkpoint(tmp_path, pack_of):
    import bloomq

    root = Path(__file__).parent.parent
    options = {"head_scheme": "nl4", "calibration_tokens": 2048}
    convert(DEMO, tmp_path / "pack", calibrate=root / "docs/architecture.md", **options)  # type: ignore[arg-type]
    Pack.open(tmp_path / "pack").verify()
    provenance = Pack.open(tmp_path / "pack").manifest["provenance"]
    assert provenance["method"] == "gptq"
    assert provenance["calibration"]["tokens"] == 2048
    exact, ours, nearest = (
        bloomq.load(path)
        for path in (pack_of("f32"), tmp_path / "pack", pack_of("nl4", head_scheme="nl4"))
    )
    said = (root / "docs/generation.md").read_text()[:4000]
    figures = [model.perplexity(said, base=exact).comparison.kl for model in (ours, nearest)]
    assert figures[0] < 0.9 * figures[1]


def test_windows_come_from_every_file_in_equal_shares(text):
    checkpoint = read_checkpoint(DEMO)
    ids = read_windows(checkpoint, text, tokens=256, window=32)
    assert ids.shape == (8, 32)
    one = read_windows(checkpoint, text / "b.txt", tokens=128, window=32)
    assert np.array_equal(one, ids[4:])
    assert sorted(map(tuple, spread(ids))) == sorted(map(tuple, ids))


def test_more_files_than_windows_give_no_more_tokens_than_asked(text):
    checkpoint = read_checkpoint(DEMO)
    all_files = read_windows(checkpoint, text, tokens=64, window=32)
    assert len(all_files) == 2
    assert np.array_equal(read_windows(checkpoint, text, tokens=32, window=32), all_files[:1])


def test_a_short_text_is_one_short_window(tmp_path):
    (tmp_path / "short.txt").write_text("A few words only.")
    ids = read_windows(read_checkpoint(DEMO), tmp_path / "short.txt")
    assert ids.shape[0] == 1
    assert 2 <= ids.shape[1] < 20


def test_texts_that_cannot_be_calibrated_on_are_refused(tmp_path, text):
    checkpoint = read_checkpoint(DEMO)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    for error, match, path, options in (
        (InputNotFound, "no such text to calibrate on", tmp_path / "none", {}),
        (UsageError, r"no \.txt file in this folder", tmp_path / "folder", {}),
        (UsageError, "too short to calibrate on", tmp_path / "empty.txt", {}),
        (UsageError, "calibration tokens are 1, expected", text, {"tokens": 1}),
        (UsageError, "calibration window is 1, expected 2 to", text, {"window": 1}),
    ):
        with pytest.raises(error, match=match):
            read_windows(checkpoint, path, **options)


def test_a_text_needs_a_tokenizer_of_the_model(tmp_path, text):
    bare = write_checkpoint(tmp_path / "bare")
    with pytest.raises(TokenizerError, match="is needed to read a text to calibrate on"):
        read_windows(read_checkpoint(bare), text)
    other = write_checkpoint(tmp_path / "other")
    shutil.copy(DEMO / "tokenizer.json", other)
    with pytest.raises(TokenizerError, match="tokenizer is of another model"):
        read_windows(read_checkpoint(other), text)


def test_bits_and_tokens_need_a_text(tmp_path):
    for options in ({"bits": 4.5}, {"calibration_tokens": 100}):
        with pytest.raises(UsageError, match="bits and calibration_tokens need a text"):
            convert(DEMO, tmp_path / "pack", **options)  # type: ignore[arg-type]


def test_an_interrupted_calibrated_conversion_goes_on_to_the_same_bytes(text, tmp_path):
    source = write_checkpoint(tmp_path / "source", n_layer=2, vocab_size=8192)
    shutil.copy(DEMO / "tokenizer.json", source)

    def planned(target: Path) -> Any:
        return plan_calibrated(source, target, text, tokens=256, window=64, bits=5.2)

    plan, producer, method = planned(tmp_path / "a")
    run(plan, producer=producer, method=method)

    def stop(done: int, total: int) -> None:
        if done > 0.95 * total:
            raise KeyboardInterrupt

    plan, producer, method = planned(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        run(plan, producer=producer, method=method, progress=stop)
    plan, producer, method = planned(tmp_path / "b")
    result = run(plan, producer=producer, method=method)
    assert result.resumed_bytes > 0
    assert result.bits_per_weight <= 5.2
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "source"]


def test_a_text_that_cannot_be_read_is_named(tmp_path):
    checkpoint = read_checkpoint(DEMO)
    (tmp_path / "folder" / "a.txt").mkdir(parents=True)
    (tmp_path / "binary.txt").write_bytes(b"some words \xff\x00\x81")
    for name, match in (
        ("folder", r"a\.txt: cannot be read to calibrate on: Is a directory"),
        ("binary.txt", r"binary\.txt: is not UTF-8 \(byte 11\)"),
    ):
        with pytest.raises(UsageError, match=match):
            read_windows(checkpoint, tmp_path / name)


def test_a_character_that_the_limit_cuts_is_left_out(tmp_path):
    (tmp_path / "text.txt").write_text("é" * 4000)
    (tmp_path / "shifted.txt").write_text("a" + "é" * 4000)  # cut in the middle, at 16 * 2 * 8
    for name in ("text.txt", "shifted.txt"):
        assert read_windows(read_checkpoint(DEMO), tmp_path / name, tokens=16, window=8).size


def test_more_tokens_than_a_disk_could_hold_are_refused(text):
    with pytest.raises(UsageError, match="calibration tokens are 1000000000, expected 2 to"):
        read_windows(read_checkpoint(DEMO), text, tokens=10**9)


def test_options_that_a_calibration_would_not_heed_are_refused(text, tmp_path):
    for options, match in (
        ({"bits": 5, "scheme": "int8"}, "found bits beside a scheme, group size or head"),
        ({"bits": 5, "group_size": 64}, "found bits beside a scheme, group size or head"),
        ({"bits": 5, "head_scheme": "int8"}, "found bits beside a scheme, group size or head"),
        ({"scheme": "bf16"}, "scheme is bf16, which a calibration leaves as it is"),
    ):
        with pytest.raises(UsageError, match=match):
            convert(DEMO, tmp_path / "pack", calibrate=text, **options)  # type: ignore[arg-type]


def test_what_cannot_be_is_refused_before_anything_is_measured(text, tmp_path, monkeypatch):
    from bloomq.converters.calibration import conversion

    def measured(*arguments: object, **options: object) -> None:
        raise AssertionError("measured sensitivities for nothing")

    monkeypatch.setattr(conversion, "measure", measured)
    for bits in (3.0, float("nan"), 99):
        with pytest.raises(UsageError, match=r"bits is .*expected"):
            convert(DEMO, tmp_path / "pack", calibrate=text, bits=bits)
    (tmp_path / "pack").write_text("a file")
    with pytest.raises(OutputError, match="already exists"):
        convert(DEMO, tmp_path / "pack", calibrate=text, bits=5)


def test_a_plans_operations_are_counted(tmp_path):
    (tmp_path / "text.txt").write_text("A few words only. " * 50)
    plan, _, _ = plan_calibrated(DEMO, tmp_path / "pack", tmp_path / "text.txt", tokens=128)
    tokens, c = 128, plan.checkpoint.config.hidden_size
    vocab, layers = plan.checkpoint.config.vocab_size, plan.checkpoint.config.n_layer
    shapes = [(3 * c, c), (c, c), (4 * c, c), (c, 4 * c)] * layers
    products = sum(tokens * k * k for _, k in shapes)
    products += sum(k**3 / 3 + 7 * n * k * k for n, k in [*shapes, (vocab, c)])
    window = plan.options["calibration"]["window"]
    products += 3 * 2 * (tokens + HEAD_TOKENS) * window * c * layers  # attention
    multiplied = layers * 2 * c * c * (16 * tokens + 12 * HEAD_TOKENS)  # mlp.up twice
    weights = 12 * c * c * layers + vocab * c
    assert seconds_of(plan, Rates(2.0, 1e30, 0)) == pytest.approx(products / 2)
    assert seconds_of(plan, Rates(1e30, 4.0, 0)) == pytest.approx(multiplied / 4)
    assert seconds_of(plan, Rates(1e30, 1e30, 8.0)) == pytest.approx(weights * 8)
    assert peak_bytes(plan) > 4 * (4 * c) ** 2


def test_making_up_for_errors_is_foretold_too(tmp_path):
    """Its products, the checkpoint's own stream and a regression's memory; of a second stream the
    files."""
    (tmp_path / "text.txt").write_text("A few words only. " * 2000)
    plans = [
        plan_calibrated(
            DEMO, tmp_path / "pack", tmp_path / "text.txt", tokens=4096, window=256,
            settings=Settings(make_up=make_up),
        )[0]
        for make_up in (True, False)
    ]  # fmt: skip
    tokens, c = 4096, plans[0].checkpoint.config.hidden_size
    layers = plans[0].checkpoint.config.n_layer
    products = 3 * 2 * tokens * 256 * c * layers  # attention
    for k in (c, 4 * c):
        products += layers * (2 * tokens * c * k + 2 * k**3 / 3 + 2 * c * k * k)

    def more(rates: Rates) -> float:
        return seconds_of(plans[0], rates) - seconds_of(plans[1], rates)

    assert more(Rates(2.0, 1e30, 0)) == pytest.approx(products / 2)
    assert more(Rates(1e30, 4.0, 0)) == pytest.approx(layers * 2 * 12 * c * c * tokens / 4)
    assert more(Rates(1e30, 1e30, 8.0)) == 0
    assert [plan.scratch_bytes for plan in plans] == [s * 3 * 4 * tokens * c for s in (2, 1)]


def test_a_regression_of_many_columns_needs_more_memory_than_solving():
    config = BloomConfig(hidden_size=4096, n_layer=1, n_head=32, vocab_size=512)
    schemes = choose_schemes(config, get_scheme("int4", 32), get_scheme("int6"))

    def planned(tokens: int) -> Any:
        calibration = {"tokens": tokens, "correct_bias": True, "make_up": True}
        return SimpleNamespace(
            checkpoint=SimpleNamespace(config=config), schemes=schemes, workers=2, device=None,
            options={"calibration": calibration},
        )  # fmt: skip

    k = 4 * 4096  # four tokens to a column from 65,536 on
    assert peak_bytes(planned(65535)) < 3 * 4 * k * k
    assert peak_bytes(planned(65536)) == 3 * 4 * k * k + 3 * 4 * 4096 * k


def test_as_many_threads_are_foretold_as_run(tmp_path):
    (tmp_path / "text.txt").write_text("A few words only. " * 50)
    for threads in (None, 3):
        plan, _, _ = plan_calibrated(
            DEMO, tmp_path / "pack", tmp_path / "text.txt", tokens=64, threads=threads
        )
        assert plan.workers == (threads or physical_cores())


def test_a_text_that_is_much_too_short_is_noted(tmp_path):
    (tmp_path / "short.txt").write_text("A few words only.")
    plan, _, _ = plan_calibrated(DEMO, tmp_path / "pack", tmp_path / "short.txt")
    assert plan.checkpoint.notes[-1].endswith("of 24576: a longer text does better")


def test_a_disk_that_refuses_activations_is_told_and_nobody_is_killed(tmp_path, monkeypatch):
    def refuse(handle: int, start: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch_module.os, "posix_fallocate", refuse)
    with pytest.raises(OutputError, match="cannot be written: No space left on device: free some"):
        Scratch(tmp_path / "scratch", "key", 4, 8).new()
