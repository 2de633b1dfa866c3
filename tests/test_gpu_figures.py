"""The GPU figures' own code, on torch's CPU device and tiny shapes: what it draws, measures, judges
and says when something fails."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import gpu_cuts  # noqa: E402
import gpu_figures  # noqa: E402
import gpu_goals  # noqa: E402
import gpu_loading  # noqa: E402
import gpu_peers  # noqa: E402
import gpu_profile  # noqa: E402
import gpu_ways  # noqa: E402
from gpu_engines import Bloomq, DrawnLoader, prompts  # noqa: E402
from gpu_run import ROWS, Run, built, in_turns, report  # noqa: E402
from gpu_weights import RandomWeights, write_pack  # noqa: E402

from bloomq.backends.cuda.layers import CudaBackend  # noqa: E402
from bloomq.backends.cuda.stored import Loader  # noqa: E402
from bloomq.backends.reference import ReferenceBackend  # noqa: E402
from bloomq.heads import Head  # noqa: E402
from bloomq.layers import Backend, Span  # noqa: E402
from bloomq.pack import Pack  # noqa: E402


@pytest.fixture
def run(tmp_path: Path) -> Run:
    torch.set_num_threads(1)
    return Run("decode", "cpu", tmp_path, tmp_path, tiny=True, seconds=60)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All but the single samples."""
    rows = [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]
    return [row for row in rows if not row["what"].startswith("sample ")]


def logits(weights: Any, backend: Backend) -> np.ndarray:
    head = Head(weights, backend, "BloomForCausalLM")
    ids = prompts("tiny", 1, 9)[0]
    span = Span.of([0], [9])
    return np.array(backend.numpy(head.step(ids, head.cache(1, 9), span, np.arange(9))))


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "nl4", "int4", "nf4", "bf16"])
def test_random_weights_are_as_a_pack_has_them_and_nearly_as_large_as_blooms(scheme: str):
    weights = RandomWeights("tiny", scheme)
    matrix = weights.matrix("h.0.mlp.up")
    expected = matrix.scheme.parts(matrix.shape)
    assert {name: part.shape for name, part in matrix.parts.items()} == {
        name: part.shape for name, part in expected.items()
    }
    values = matrix.dequantize()
    assert len(np.unique(values, axis=0)) == len(values)  # no two rows alike
    assert 0.015 < values.std() < 0.03


def test_a_written_pack_of_random_weights_is_a_whole_pack(tmp_path: Path):
    weights = RandomWeights("tiny", "int4")
    size = write_pack(weights, tmp_path / "pack")
    pack = Pack.open(tmp_path / "pack")
    pack.verify()
    assert size == sum(file.stat().st_size for file in (tmp_path / "pack").glob("*.safetensors"))
    same = logits(pack, ReferenceBackend()), logits(weights, ReferenceBackend())
    assert same[0].tobytes() == same[1].tobytes()


def test_random_weights_give_the_same_logits_on_every_backend():
    weights = RandomWeights("tiny", "int8")
    cuda = CudaBackend("cpu", "f32", activations="float")
    found, expected = logits(weights, cuda), logits(weights, ReferenceBackend())
    # float32 on both sides, sums of 256 to 1024 terms in another order
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("scheme", ["int8", "int6", "nl4", "int4", "nf4", "bf16"])
def test_weights_drawn_on_the_device_lie_as_loaded_ones_do(scheme: str):
    matrix = RandomWeights("tiny", scheme).matrix("h.1.attn.qkv")
    drawn, loaded = (kind(torch.device("cpu")).load(matrix) for kind in (DrawnLoader, Loader))
    for ours, theirs in ((drawn.codes, loaded.codes), (drawn.scales, loaded.scales)):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


# -- engines ---------------------------------------------------------------------------------------


def test_attention_by_one_call_computes_what_transformers_does(run: Run):
    pytest.importorskip("transformers")
    settings = gpu_peers.BF16, gpu_peers.BF16_SDPA
    engines = built(run, gpu_peers.makers(run, "tiny", settings))
    found = []
    for engine in engines.values():
        engine.start(prompts("tiny", 2, 12))
        ids = torch.tensor(prompts("tiny", 2, 12))
        with torch.inference_mode():
            found.append(engine._model(ids).logits.float())
    # bf16 rounds at other places: 2**-8 of a value, in each of two layers
    assert (found[0] - found[1]).abs().max() <= 2 * 2**-8 * found[0].abs().max()
    assert not torch.equal(found[0], found[1])  # it is another attention


def test_every_engine_is_sampled_in_every_round_and_reported(run: Run, tmp_path: Path):
    pytest.importorskip("transformers")
    makers = gpu_peers.makers(run, "tiny", (gpu_peers.INT8, gpu_peers.NF4))
    engines = built(run, {"bloomq nf4": lambda: Bloomq(run, "tiny", "nf4", 2, 16), **makers})
    ids = prompts("tiny", 2, 8)

    def take(engine: Any) -> float:
        engine.start(ids)
        return run.seconds(lambda: engine.decode(2)) / 2

    report(run, "tiny", 2, 9, engines, in_turns(run, engines, take))
    rows = rows_of(tmp_path)
    assert [row["what"] for row in rows] == ["bloomq nf4", *makers]
    assert all(len(row["step_s"]) == run.sizes.repeat for row in rows)
    assert all(row["tokens_per_s"] > 0 and row["step_gb"] >= 0 for row in rows)


def test_figures_are_said_after_every_round_and_the_latest_count(run: Run, tmp_path: Path):
    run.sizes = replace(run.sizes, repeat=3)
    engine = Bloomq(run, "tiny", "nf4", 1, 16)
    engines = {"bloomq nf4": engine}
    in_turns(run, engines, lambda _: 0.5, lambda found: report(run, "tiny", 1, 9, engines, found))
    rows = [row for row in rows_of(tmp_path) if "tokens_per_s" in row]
    assert [len(row["step_s"]) for row in rows] == [1, 2, 3]
    failed = {"section": "decode", "what": "bloomq nf4", "failed": "out of memory"}
    assert gpu_goals.latest([*rows, failed]) == [rows[2], failed]


def test_tests_are_counted_as_pytest_says_them_with_workers_and_without():
    said = (
        "test_a.py::test_b[cuda:0-f16] PASSED   [ 50%]\n"
        "test_a.py::test_c FAILED   [100%]\n"
        "[gw1] [  3%] PASSED test_a.py::test_b \n[gw0] [ 99%] SKIPPED test_a.py::test_d \n"
        "FAILED test_a.py::test_c - assert PASSED\n1 failed, 2 passed in 3.1s\n"
    )
    assert gpu_figures.counted(said) == {"passed": 2, "failed": 1, "skipped": 1}


def test_a_machine_without_pytest_has_a_line_that_says_so(tmp_path: Path, monkeypatch):
    job = gpu_figures.Job(tmp_path, tmp_path, "cpu", tiny=True)
    missing = tmp_path / "python"
    missing.write_text("#!/bin/sh\necho python: No module named pytest\nexit 1\n")
    missing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(missing))
    gpu_figures.run(job, "conformance", time.monotonic() + 60)
    (row,) = rows_of(tmp_path)
    assert row["failed"] == "python: No module named pytest (exit code 1, log.txt)"


def test_an_engine_that_fails_costs_only_its_own_row(run: Run, tmp_path: Path):
    def take(engine: Any) -> float:
        if engine == "bad":
            raise RuntimeError("no kernel image\nis available")
        return 0.5

    samples = in_turns(run, {"good": "good", "bad": "bad"}, take)  # type: ignore[dict-item]
    assert list(samples) == ["good"]
    assert rows_of(tmp_path) == [
        {"section": "decode", "what": "bad", "failed": "RuntimeError: no kernel image"}
    ]


def test_a_strict_run_stops_at_the_first_error(tmp_path: Path):
    run = Run("smoke", "cpu", tmp_path, tmp_path, tiny=True, seconds=60, strict=True)

    def make() -> Any:
        raise ImportError("no module named nothing")

    with pytest.raises(ImportError, match="no module named nothing"):
        built(run, {"peer": make})


def test_every_way_to_a_product_that_runs_here_is_timed(run: Run, tmp_path: Path):
    gpu_ways.ways(run)
    lines = gpu_goals.ways_table(rows_of(tmp_path))
    assert lines[0] == "| us of a block, tokens: | 1 | 20 |"
    named = [line.split(" | ")[0] for line in lines[2:-1]]
    assert "| int8 by torch" in named
    assert "| nf4 by bitsandbytes" in named
    assert len(named) == len(gpu_ways.SCHEMES) * (len(gpu_ways.WAYS) - 1)  # Triton wants a GPU


def test_cuts_are_measured_and_the_fastest_is_a_line_of_the_table(run: Run, tmp_path, monkeypatch):
    products = pytest.importorskip("bloomq.backends.cuda.triton_products")
    times = iter([3.0, 2.0, 1.0, 4.0])

    def timed(run: Run, work: Any) -> float:
        work()
        return next(times)

    monkeypatch.setattr(gpu_cuts, "_seconds", timed)
    gpu_cuts.cuts(run)
    rows = rows_of(tmp_path)
    assert not [row for row in rows if "failed" in row]
    named = [row["what"] for row in rows if "cut_us" in row]
    assert named == ["cut of ('int8', 'tile')", "cut of ('book', 'one')"]
    lines = gpu_goals.cuts_table(rows)[1:-2]
    table: dict[Any, Any] = eval("\n".join(["{", *lines, "}"]), {"Blocks": products.Blocks})
    # Of the first the other candidate was faster, of the second what is there now.
    assert table == {
        ("int8", "tile"): gpu_cuts.candidates("int8", 1, torch.int8)[1],
        ("book", "one"): products.CUTS["book", "one"],
    }


# -- goals -----------------------------------------------------------------------------------------


def speed(what: str, *step_s: float, **facts: object) -> dict[str, Any]:
    return {"section": "decode", "what": what, "step_s": list(step_s), "percent": 61.0, **facts}


def test_a_ratio_is_of_neighbours_in_time_and_over_the_fastest_peer():
    slow, fast = gpu_goals.INT8_PEERS
    rows = [speed("bloomq int8", 1, 2, 1), speed(slow, 90, 90, 90), speed(fast, 9, 18, 5)]
    assert gpu_goals.times("bloomq int8", (slow, fast))(rows) == 9


def test_goals_are_met_missed_or_say_why_they_were_not_measured():
    rows = [
        speed("bloomq int8", 1),
        speed("bloomq int4", 1) | {"percent": 49.9},
        {"section": "decode", "what": "bloomq nf4", "failed": "CUDA out of memory"},
        {"section": "big", "what": "big", "failed": "ended after its 150 s"},
    ]
    lines = "\n".join(gpu_goals.table(rows, meaning=True))
    assert "| 7b1 int8 decode, of bandwidth | >= 60 % | 61 % | yes |" in lines
    assert "| 7b1 int4 decode, of bandwidth | >= 50 % | 49.9 % | **no** |" in lines
    assert "| >= 50 % | not measured: CUDA out of memory | - |" in lines
    assert (
        "| 176B, 4 bits, decode | >= 20 tokens/s | not measured: ended after its 150 s |" in lines
    )
    assert "not measured: transformers bitsandbytes int8 was not run" in lines


def test_memory_may_be_off_the_plan_either_way():
    rows = [{"section": "memory", "what": str(p), "off_plan": p} for p in (3.0, -5.5)]
    assert gpu_goals.deviation(rows) == 5.5
    line = next(line for line in gpu_goals.table(rows, meaning=True) if "7b1 memory" in line)
    assert line.endswith("| 5.5 % | **no** |")


# -- the whole -------------------------------------------------------------------------------------


def figures(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "gpu_figures.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_dry_run_measures_sections_and_writes_the_table(tmp_path: Path):
    done = figures("--dry-run", "--out", str(tmp_path), "--sections", "machine", "big")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert not [row for row in rows if "failed" in row], log
    assert [row["section"] for row in rows] == ["machine", *["big"] * 4]
    assert rows[0]["copy_gb_s"]
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("Dry run on tiny shapes: no figure means anything.")
    assert table.strip() in done.stdout
    assert "| 176B, 4 bits, rows of 2,048 tokens | >= 4 | 2 rows | dry run |" in table


def test_a_section_that_fails_is_a_line_of_the_table(tmp_path: Path):
    done = figures("--dry-run", "--device", "cuda:99", "--out", str(tmp_path), "--sections", "load")
    assert done.returncode == 0, done.stderr
    (row,) = rows_of(tmp_path)
    assert row["section"] == "load"
    assert "(exit code 1, log.txt)" in row["failed"]
    assert "Traceback" in (tmp_path / "log.txt").read_text()
    assert f"- load, load: {row['failed']}" in (tmp_path / "table.md").read_text()


def test_a_section_for_which_no_time_is_left_is_a_line_of_the_table(tmp_path: Path):
    job = gpu_figures.Job(tmp_path, tmp_path, "cpu", tiny=True)
    gpu_figures.run(job, "big", time.monotonic() + 1)
    job.write_table()
    assert "- big, big: skipped: no time was left" in (tmp_path / "table.md").read_text()


def test_a_pack_comes_to_the_device_from_disk_and_from_memory(tmp_path: Path):
    run = Run("load", "cpu", tmp_path, tmp_path, tiny=True, seconds=60)
    gpu_loading.load(run)
    rows = rows_of(tmp_path)
    assert [row["what"] for row in rows] == ["load from disk", "load from memory"]
    assert all(row["gb_s"] >= 0 and row["peak_rss_mb"] > 0 for row in rows)
    assert not (tmp_path / "pack").exists()


def test_what_a_plan_said_stands_beside_what_is_in_use(tmp_path: Path):
    gpu_loading.memory(Run("memory", "cpu", tmp_path, tmp_path, tiny=True, seconds=60))
    (row,) = rows_of(tmp_path)
    assert row["planned_gb"] > 0
    assert row["used_gb"] == 0  # a CPU's is not asked for
    assert row["off_plan"] == -100
    assert f"planned {row['planned_gb']} GB" in "\n".join(gpu_goals.figures([row]))


def test_a_profile_lists_what_took_the_time(run: Run, tmp_path: Path):
    gpu_profile.profile(run)
    what = [row["what"] for row in rows_of(tmp_path)]
    assert what == [
        f"profile of {step} {scheme}"
        for scheme in ("int8", "nl4")
        for step in ("prefill", "decode")
    ]
    listing = (tmp_path / "profile.txt").read_text()
    assert listing.count("ms a call without the profiler") == 4
    assert "aten::" in listing


def test_a_section_that_takes_too_long_is_ended(tmp_path: Path):
    with (tmp_path / "log").open("w") as log:
        slow = [sys.executable, "-c", "import time; time.sleep(600)"]
        assert gpu_figures.finish(slow, log, 0.1 - gpu_figures.GRACE_SECONDS) is None
        assert gpu_figures.finish([sys.executable, "-c", "raise SystemExit(3)"], log, 60) == 3


def test_the_script_says_what_to_run_first():
    done = subprocess.run(
        ["bash", str(FOLDER / "gpu_figures.sh"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "The first time on a GPU, with half an hour to spend, in this order:" in done.stdout
    assert "set -u" not in done.stdout
