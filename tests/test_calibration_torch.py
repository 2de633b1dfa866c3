"""Calibration by torch, as on a GPU, on torch's CPU device: each piece against NumPy's in float64,
and whole conversions against those of the CPU's kernels.
"""

from __future__ import annotations

import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bloomq.converters.calibration import engine as engine_module
from bloomq.converters.calibration import estimate, forward, sensitivity
from bloomq.converters.calibration.conversion import plan_calibrated
from bloomq.converters.calibration.cpu_engine import CpuEngine
from bloomq.converters.calibration.engine import CPU, Device, device_of
from bloomq.converters.calibration.factor import column_order
from bloomq.converters.calibration.forward import Kept, Runner, UnderWay, linears_of
from bloomq.converters.calibration.rounding import grid_of
from bloomq.converters.calibration.solver import Solver
from bloomq.converters.calibration.torch_engine import TorchEngine
from bloomq.converters.calibration.torch_factor import cholesky, factor
from bloomq.converters.calibration.torch_gptq import TorchGrid, descend, gptq, values_of
from bloomq.converters.calibration.torch_sums import TorchMoments
from bloomq.converters.convert import convert, run
from bloomq.converters.deep_verify import deep_verify
from bloomq.converters.reading import read_checkpoint
from calibration_oracle import (
    output_errors,
    problem,
    textbook,
    textbook_descent,
    through_the_reference,
)
from click.testing import CliRunner
from conftest import DEMO, write_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

import bloomq
from bloomq.backends.cuda.stored import Loader, Stored
from bloomq.cli import commands
from bloomq.config import BloomConfig
from bloomq.errors import BackendError, CapacityError, NumericError, UsageError
from bloomq.grids import GRIDS
from bloomq.pack import Pack
from bloomq.pack_writer import partial_folder
from bloomq.scheme_choice import choose_schemes
from bloomq.schemes import get_scheme
from bloomq.weights import Matrix

TORCH = Device("cpu")  # no option gives it: "cuda" is never the CPU in disguise
EPSILON = 2.0**-24  # what rounding to float32 changes, of a value
SCHEMES = [("nl4", 32), ("nl4", 64), ("int4", 128), ("int6", None), ("int8", None)]
GRIDS_THERE = {name: TorchGrid(GRIDS[name], torch.device("cpu")) for name in ("nl4", "int4")}
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture(scope="module")
def engine(pool):
    return TorchEngine("cpu", pool)


def there(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


def check_as_good(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Of losses of rows or tokens that two calibrations left: where one code falls the other way
    all that follow do, so a row gains or loses by chance, and the mean is held to what chance makes
    of so many: four standard errors."""
    difference = np.asarray(ours - theirs, np.float64)
    chance = difference.std(ddof=1) / np.sqrt(difference.size)
    assert difference.mean() <= 4 * chance, (difference.mean(), chance)


# -- the pieces ------------------------------------------------------------------------------------


def test_moments_are_those_of_float64():
    """Within the rounding of sums of so many products, worst case; a channel is large and nearly
    constant."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((700, 8)).astype(np.float32)
    x[:, 2] = 3000 + 0.01 * x[:, 2]
    wide = x.astype(np.float64)
    parts = np.array_split(x, 5)
    about = np.abs(wide - parts[0].mean(axis=0, dtype=np.float64))
    mean = wide.mean(axis=0)
    for central in (True, False):
        moments = TorchMoments(torch.device("cpu"))
        for i, part in enumerate(parts):
            moments.add(part if i % 2 else there(part))
        found, moment = moments.result(central=central)
        exact = np.cov(wide.T, bias=True) if central else wide.T @ wide / len(wide)
        summed = about.T @ about / len(x) + (0 if central else np.outer(abs(mean), abs(mean)))
        assert (np.abs(moment.numpy() - exact) <= (len(x) + 8) * EPSILON * summed).all()
        assert (np.abs(found - mean) <= 2 * EPSILON * (abs(mean) + about.mean(axis=0))).all()


@pytest.mark.parametrize("k", [32, 96, 288])
def test_a_factor_is_choleskys(k):
    """Within the error of Cholesky's in float32: so many roundings of |L| |L.T|."""
    _, h = problem(1, k)
    h += np.diag(h).mean() * np.eye(k, dtype=np.float32)
    order = np.random.default_rng(k).permutation(k)
    by = factor(there(h), order)
    unit, weight = by.unit.double().numpy(), np.array(by.weight)
    root = np.abs(unit) * np.sqrt(weight)
    off = np.abs((unit * weight) @ unit.T - h[np.ix_(order, order)])
    assert (off <= (k + 8) * EPSILON * root @ root.T).all()
    assert np.array_equal(unit, np.triu(unit)) and (np.diag(unit) == 1).all()
    assert np.array_equal(by.order.numpy(), order)


def test_a_moment_without_a_factor_is_refused():
    bad = -torch.eye(32)
    for refused in (lambda: factor(bad, np.arange(32)), lambda: cholesky(bad)):
        with pytest.raises(NumericError, match="of activations are not positive definite"):
            refused()


def test_a_singular_moment_gets_more_on_its_diagonal():
    assert torch.isfinite(factor(torch.ones((32, 32)), np.arange(32)).unit).all()


@pytest.mark.parametrize("name", ["nl4", "int4", "int6", "int8"])
def test_rounding_to_a_grid_is_numpys(name):
    """Ties and what lies beyond the ends too."""
    grid = grid_of(get_scheme(name))
    x = np.arange(2 * grid.lowest - 8, 2 * grid.highest + 9, dtype=np.float32) / 2
    x = np.concatenate([x, np.nextafter(x, np.float32(np.inf))])
    found = TorchGrid(grid, torch.device("cpu")).nearest(there(x.copy()))
    assert np.array_equal(found.numpy(), grid.nearest(x))


@pytest.mark.parametrize(("name", "group"), [("nl4", 64), ("int4", 32), ("int4", 64)])
def test_gptq_is_the_textbooks(name, group):
    w, h = problem(48, 256)
    h += 0.01 * np.diag(h).mean() * np.eye(256, dtype=np.float32)
    order = column_order(np.diag(h), group)
    found, scales = gptq(there(w.T), factor(there(h), order), group, GRIDS_THERE[name])
    codes, values = textbook(w, h, order, group, GRIDS[name])
    same = (codes == found.numpy().T)[:, order].reshape(48, -1, group)
    # In float32 a tie may fall the other way, and changes all that follows in its row.
    assert same[:, 0].all()
    assert same[:, 1].all(axis=1).mean() > 0.1
    ours = output_errors(w, values_of(found, scales).numpy().T, h)
    check_as_good(ours, output_errors(w, values, h))


def test_gptq_with_scales_of_rows_is_the_textbooks():
    w, h = problem(32, 256)
    h += 0.01 * np.diag(h).mean() * np.eye(256, dtype=np.float32)
    order, scale = column_order(np.diag(h), 1), np.abs(w).max(axis=1) / np.float32(127)
    by, grid = factor(there(h), order), grid_of(get_scheme("int8"))
    whole = TorchGrid(grid, torch.device("cpu"))
    found, _ = gptq(there(w.T), by, 256, whole, fixed=there(scale[None]))
    codes, _ = textbook(w, h, order, 256, grid, fixed=scale)
    assert (codes == found.numpy().T).mean() > 0.99


@pytest.mark.parametrize(("name", "group"), [("nl4", 64), ("int4", 32), ("int4", 128)])
def test_descent_is_the_textbooks(name, group):
    w, h = problem(48, 256)
    h += 0.01 * np.diag(h).mean() * np.eye(256, dtype=np.float32)
    by = factor(there(h), column_order(np.diag(h), group))
    codes, scales = gptq(there(w.T), by, group, GRIDS_THERE[name])
    begun = output_errors(w, values_of(codes, scales).numpy().T, h)
    expected, steps = textbook_descent(w, h, codes.numpy().T, scales.numpy().T, GRIDS[name])
    left = descend(there(w.T), there(h), codes, scales, GRIDS_THERE[name], 1)
    same = (expected == codes.numpy().T).reshape(48, -1, group)
    assert same[:, 0].all(axis=1).mean() > 0.9  # ties apart, as above
    values = values_of(codes, scales).numpy().T
    assert np.allclose(left.numpy(), (w - values).T, atol=1e-6)
    ours = output_errors(w, values, h)
    assert (ours <= begun * (1 + 1e-4)).all()
    check_as_good(ours, output_errors(w, expected * np.repeat(steps, group, axis=1), h))


class Waits(TorchDispatchMode):
    """Counts what, on a GPU, has the host wait for what was launched before."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        self.count += func in (aten._local_scalar_dense.default, aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "group"), [("nl4", 32), ("int4", 32), ("int4", 128)])
def test_nothing_in_the_loops_over_columns_waits_for_the_device(name, group):
    w, h = problem(32, 256)
    by = factor(there(h + np.eye(256, dtype=np.float32)), np.arange(256))
    with Waits() as waits:
        codes, scales = gptq(there(w.T), by, group, GRIDS_THERE[name])
        descend(there(w.T), there(h), codes, scales, GRIDS_THERE[name], 2)
        assert waits.count == 0
        bool(codes[0, 0] < 8)
        assert waits.count == 1


@pytest.mark.parametrize(("name", "group"), SCHEMES)
@pytest.mark.parametrize("shape", [(32, 128), (70, 200), (5, 96)], ids=str)
def test_rows_are_as_good_as_those_of_the_cpu(engine, pool, name, group, shape):
    scheme, (w, moment) = get_scheme(name, group), problem(*shape, seed=3)
    w[0], moment[:, 3], moment[3] = 0, 0, 0  # a row of zeros, an input that is always 0
    solved = Solver(there(moment.copy()), scheme, engine).rows(w)
    cpu = Solver(moment.copy(), scheme, CpuEngine(pool, 1)).rows(w)
    nearest = scheme.dequantize(scheme.quantize(w), shape)
    ours, theirs, rounded = (
        output_errors(w, values, moment) for values in (solved.values, cpu.values, nearest)
    )
    check_as_good(ours, theirs)
    assert (ours <= rounded * (1 + 1e-4) + 1e-12).all()
    assert ours.sum() < 0.8 * rounded.sum()
    for leaf, part in scheme.parts(shape).items():
        assert solved.parts[leaf].shape == part.shape
    assert np.array_equal(scheme.dequantize(solved.parts, shape), solved.values)


@pytest.mark.parametrize("name", ["nl4", "int6"])
def test_weights_beyond_the_scales_range_are_refused(engine, name):
    w, moment = problem(32, 64)
    with pytest.raises(NumericError, match=f"weights too large for {name}"):
        Solver(moment, get_scheme(name), engine).rows(w * np.float32(1e9))


def test_moments_that_are_not_finite_are_refused(engine):
    with pytest.raises(NumericError, match="activations are not finite: the checkpoint is"):
        Solver(torch.full((64, 64), torch.nan), get_scheme("int4", 32), engine)


def test_what_a_matrix_should_add_is_a_regression_held_to_its_own_weights(engine):
    """Within the rounding of its sums, and of solving, by the damped moment's condition."""
    rng = np.random.default_rng(0)
    a, before, stream = (rng.standard_normal((300, n)).astype(np.float32) for n in (24, 16, 16))
    w = rng.standard_normal((16, 24)).astype(np.float32)
    moments = engine.moments()
    wanted = engine.wanted(stream, moments)
    for start in range(0, 300, 70):
        wanted.add(a[start : start + 70], before[start : start + 70])
    found, bias = wanted.weights(w, *moments.result(central=True))
    r = (stream - before).astype(np.float64)
    x, y = a - a.mean(axis=0, dtype=np.float64), r - r.mean(axis=0)
    h = x.T @ x / 300
    damped = h + (0.4 + 10 * 24 / 300) * np.diag(h).mean() * np.eye(24)
    sums = y.T @ x / 300 + w @ (damped - h)
    expected = np.linalg.solve(damped, sums.T).T
    eigenvalues = np.linalg.eigvalsh(damped)
    rounding = np.linalg.norm(np.abs(y).T @ np.abs(x) / 300) + np.linalg.norm(sums)
    bound = (300 + 24) * EPSILON * rounding * eigenvalues[-1] / eigenvalues[0] ** 2
    assert np.linalg.norm(found - expected) <= bound
    assert np.allclose(bias, r.mean(axis=0) - expected @ a.mean(axis=0), atol=bound)


def test_a_stream_that_is_not_finite_is_told(engine):
    wanted = engine.wanted(np.full((4, 2), np.inf, np.float32), engine.moments())
    wanted.add(np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32))
    with pytest.raises(NumericError, match="the checkpoint's own activations are not finite"):
        wanted.weights(np.ones((2, 3), np.float32), np.ones(3, np.float32), torch.eye(3))


@pytest.mark.parametrize("post", [False, True], ids=["pre-norm", "post-norm"])
def test_inputs_are_those_of_the_references_block(engine, pool, tmp_path, post, monkeypatch):
    monkeypatch.setattr(forward, "STEP_TOKENS", 40)  # two steps
    settings = {"apply_residual_connection_post_layernorm": post}
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "c", n_layer=2, config=settings))
    ids = np.random.default_rng(0).integers(0, 96, (3, 20))
    weights = UnderWay(checkpoint)
    weights.add_rounded(linears_of(1), get_scheme("f32"), pool)
    runner = Runner(ids, checkpoint.config, engine)
    x = np.random.default_rng(1).standard_normal((60, 64)).astype(np.float32)
    expected, result = through_the_reference(weights, 1, x, ids.shape)
    for kept in (None, Kept(np.empty_like(x))):
        for name in linears_of(1):
            parts: list[Any] = []
            runner.inputs_of(name, 1, weights, x, parts.append, kept)
            found = np.concatenate([runner.numpy(part) for part in parts])
            assert np.allclose(found, expected[name], atol=1e-4), name
        out = np.empty_like(x)
        runner.through(1, weights, x, out, kept)
        assert np.allclose(out, result, atol=1e-4)


# -- conversions -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A random checkpoint of two blocks that reads the demo's tokens."""
    folder = tmp_path_factory.mktemp("calibration") / "checkpoint"
    source = write_checkpoint(folder, n_layer=2, vocab_size=8192, seed=4)
    shutil.copy(DEMO / "tokenizer.json", source)
    return source


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 60)
    return path


def log_softmax(model: Any, ids: np.ndarray) -> np.ndarray:
    """[T, V] float64."""
    logits = model(ids).logits[0].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


def test_a_demo_is_as_near_to_the_checkpoint_as_by_the_cpu(tmp_path, pack_of):
    """By the divergence of each token of a text that neither has seen."""
    exact, divergences = bloomq.load(pack_of("f32")), {}
    ids = np.array(exact.tokenizer.encode((ROOT / "docs/generation.md").read_text())[:512])
    base = log_softmax(exact, ids)
    for device in (CPU, TORCH):
        target = tmp_path / device.label[:3]
        plan, producer, method = plan_calibrated(
            DEMO, target, ROOT / "docs/architecture.md", tokens=1024, window=256,
            scheme="int4", head_scheme="int4", device=device,  # nl4: three times as long here
        )  # fmt: skip
        run(plan, producer=producer, method=method)
        pack = Pack.open(target)
        report = deep_verify(pack, read_checkpoint(DEMO))
        assert len(report.differences) == 17
        assert pack.manifest["provenance"]["calibration"]["device"] == device.label
        p = log_softmax(bloomq.load(target), ids)
        divergences[device] = (np.exp(base) * (base - p)).sum(axis=1)
    assert TORCH.label == f"torch {torch.__version__}, CPU"
    check_as_good(divergences[TORCH], divergences[CPU])


def test_an_interrupted_conversion_goes_on_to_the_same_bytes_on_the_same_device(
    small, text, tmp_path
):
    def planned(target: str, device: Device) -> Any:
        plan, producer, method = plan_calibrated(
            small, tmp_path / target, text, tokens=1024, window=64, bits=4.9, device=device
        )
        return plan, {"producer": producer, "method": method}

    def stop(done: int, total: int) -> None:
        if done > 0.97 * total:
            raise KeyboardInterrupt

    plan, how = planned("whole", TORCH)
    assert plan.schemes["h.1.attn.out"].name == "int6"  # it makes up: both streams are in the files
    assert not run(plan, **how).resumed_bytes
    for target, begun in (("same", TORCH), ("other", CPU)):
        plan, how = planned(target, begun)
        with pytest.raises(KeyboardInterrupt):
            run(plan, **how, progress=stop)
        assert list(partial_folder(tmp_path / target).glob("calibration/x-*"))
        plan, how = planned(target, TORCH)
        result = run(plan, **how)
        assert (result.resumed_bytes > 0) == (begun is TORCH)
        assert begun is TORCH or "of another source, other options" in result.notes[-1]
        for file in (tmp_path / "whole").iterdir():
            assert file.read_bytes() == (tmp_path / target / file.name).read_bytes(), file.name


def test_a_device_that_is_not_there_is_told_with_the_remedy(text, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "why_not", lambda: "torch is not installed")
    with pytest.raises(
        BackendError, match=r"cannot calibrate on cuda: torch is not .* needs no GPU"
    ):
        convert(DEMO, tmp_path / "pack", calibrate=text, calibration_device="cuda")
    arguments = ["convert", DEMO, tmp_path / "pack", "--calibrate", text, "--device", "cuda:1"]
    ended = CliRunner().invoke(commands, [*map(str, arguments)], standalone_mode=False)
    assert str(ended.exception).startswith("cannot calibrate on cuda:1: torch is not installed")
    monkeypatch.setattr(engine_module, "why_not", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert (device_of("cuda"), device_of("cuda:0")) == (Device("cuda:0"), Device("cuda:0"))
    with pytest.raises(UsageError, match="one of the 1 GPUs that torch sees: they begin with"):
        device_of("cuda:1")
    for name in ("gpu", "cuda:x", "CUDA"):
        with pytest.raises(UsageError, match=r"calibration device is '.*', expected cpu, cuda"):
            device_of(name)
    with pytest.raises(UsageError, match="only a calibration has a device"):
        convert(DEMO, tmp_path / "pack", calibration_device="cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["torch", "cublas"],
)
def test_memory_that_runs_out_is_told(small, text, tmp_path, monkeypatch, error):
    def full(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(TorchMoments, "add", full)
    plan, producer, method = plan_calibrated(small, tmp_path / "p", text, tokens=64, device=TORCH)
    with pytest.raises(CapacityError, match="is too small to calibrate there, or others use it"):
        run(plan, producer=producer, method=method)
    with pytest.raises(CapacityError, match="is too small to calibrate there, or others use it"):
        estimate.measured_rates(plan)


def test_other_failures_of_torch_are_not_taken_for_memory(engine):
    with pytest.raises(RuntimeError, match="device-side assert"), engine.watched():
        raise RuntimeError("CUDA error: device-side assert triggered")


@pytest.mark.parametrize("api", ["older", "newer"])
def test_a_program_that_asked_for_tf32_gets_moments_of_whole_float32(engine, api):
    matmul = torch.backends.cuda.matmul
    try:
        if api == "older":
            torch.set_float32_matmul_precision("high")
        elif not hasattr(matmul, "fp32_precision"):
            pytest.skip("torch 2.8 has the older names alone")
        else:
            matmul.fp32_precision = "tf32"
        with engine.watched():
            assert not matmul.allow_tf32
        assert matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def test_sensitivities_bring_the_head_to_the_device_once(small, tmp_path, monkeypatch):
    """In each of its two schemes, not for every few tokens: it is the largest of all matrices."""
    load, loaded = Loader._loaded, Counter[str]()

    def counted(loader: Loader, matrix: Matrix) -> Stored:
        loaded[matrix.name] += 1
        return load(loader, matrix)

    monkeypatch.setattr(Loader, "_loaded", counted)
    monkeypatch.setattr(sensitivity, "_HEAD_TOKENS", 8)
    ids = np.random.default_rng(0).integers(0, 8192, (2, 16))
    sensitivity.measure(read_checkpoint(small), ids, tmp_path / "versions", device=TORCH)
    assert loaded["wte"] == 2


@pytest.mark.parametrize(
    ("tokens", "hidden_size", "n_layer", "n_head", "card_gb"),
    [(24576, 4096, 30, 32, 8), (65536, 4096, 30, 32, 8), (262144, 14336, 70, 112, 80)],
    ids=["7b1", "7b1, with regressions", "176b, with regressions"],
)  # fmt: skip
def test_a_block_fits_a_cards_memory(tokens, hidden_size, n_layer, n_head, card_gb):
    """With a tenth of it for whatever else is there."""
    config = BloomConfig(hidden_size=hidden_size, n_layer=n_layer, n_head=n_head, vocab_size=250880)
    schemes = choose_schemes(config, get_scheme("int4", 128), get_scheme("int6"))
    calibration = {"tokens": tokens, "window": 2048, "correct_bias": True, "make_up": True}
    plan: Any = SimpleNamespace(
        checkpoint=SimpleNamespace(config=config), schemes=schemes,
        options={"calibration": calibration},
    )  # fmt: skip
    assert estimate.device_bytes(plan) < 0.9 * card_gb * 1e9


def test_a_plan_for_a_device_says_its_memory_and_time(small, text, tmp_path, monkeypatch):
    plan, _, _ = plan_calibrated(small, tmp_path / "pack", text, tokens=64, device=TORCH)
    assert plan.describe(None)["estimated_device_bytes"] == estimate.device_bytes(plan) > 600 << 20
    assert any(line.startswith("device   cpu: about") for line in plan.lines(None))
    assert replace(plan, device=None).device_bytes == 0
    assert plan.peak_memory_bytes < 4 << 30
    monkeypatch.setattr(estimate, "_SAMPLE", 64)
    monkeypatch.setattr(estimate, "_DEVICE_ROWS", 64)
    rates = estimate.measured_rates(plan)
    assert rates.products > 0 and rates.layers > 0 and rates.loops >= 0
