"""`bloomq bench`: what is measured, what it is called, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

import bloomq
from bloomq.backends.numba_cpu.ceilings import Ceilings
from bloomq.backends.numba_cpu.processor import best_tier, cpu_features
from bloomq.backends.numba_cpu.threads import Pool
from bloomq.bench import Bench, Workload, peak_rss_mb, plan
from bloomq.cli import commands
from bloomq.errors import UsageError


@pytest.fixture(scope="module")
def bench() -> Bench:
    model = bloomq.load(backend="numba")
    return Bench(model.head, model.pack)


def test_names_are_those_of_llama_bench():
    assert Workload(prompt=512).name == "pp512"
    assert Workload(generated=64, depth=2048).name == "tg64 @ d2048"
    assert Workload(generated=8, batch=4).name == "tg8 x 4"


def test_a_plan_is_every_length_at_every_depth_in_every_batch():
    tests = plan([16, 0], [4], [0, 32], [1, 2])
    assert [test.name for test in tests] == [
        "pp16", "tg4", "pp16 x 2", "tg4 x 2",
        "pp16 @ d32", "tg4 @ d32", "pp16 @ d32 x 2", "tg4 @ d32 x 2",
    ]  # fmt: skip


def test_every_run_has_a_sample_and_ceilings_of_its_own(bench: Bench):
    tests = [Workload(prompt=20), Workload(generated=5, depth=40, batch=3)]
    prefill, decode = bench.run(tests, repeat=4)
    for result in (prefill, decode):
        assert len(result.sample_s) == len(result.bandwidth_gb_s) == len(result.dot_gmac_s) == 4
        assert min(result.sample_s + result.bandwidth_gb_s + result.dot_gmac_s) > 0
    assert prefill.step_s == []
    assert len(decode.step_s) == 4 * 5
    assert decode.tokens_per_s == pytest.approx(15 / np.median(decode.sample_s))


def test_a_row_counts_products_of_prompts_and_bytes_of_decode(bench: Bench):
    prefill, decode = bench.run([Workload(prompt=20), Workload(generated=4)], repeat=1)
    row = bench.row(prefill)
    # Layers, qkv + out + up + down (the last block's MLP for one token alone), hidden size.
    matrices = (4 * 12 - 8) * 256 * 256
    assert row["gmac_s"] == round(prefill.tokens_per_s * matrices / 1e9)
    assert "ms_p50" not in row
    row = bench.row(decode)
    pack = bloomq.load(backend="numba").pack
    cache = (
        2 * 4 * 256 * 2 * 2
    )  # keys and values, layers, hidden size, float16; 2 tokens on average
    expected = decode.tokens_per_s * (pack.bytes_per_token + cache) / 1e9
    assert row["gb_s"] == pytest.approx(expected, abs=0.06)
    assert row["ms_p50"] <= row["ms_p90"]


@pytest.mark.parametrize("threads", [1, 2, 6])
def test_ceilings_are_those_of_a_machine(threads: int):
    """A processor of this century: no figure is judged, only that something was measured."""
    ceilings = Ceilings(best_tier(cpu_features()), Pool(threads))
    assert 0.1 < ceilings.read_gb_s() < 10_000
    assert 0.1 < ceilings.dot_gmac_s() < 100_000
    assert ceilings.nbytes > 1 << 28


def test_peak_memory_is_more_than_a_library_and_less_than_a_machine():
    assert 30 < peak_rss_mb() < 1e6


def test_json_is_a_line_a_test():
    done = CliRunner().invoke(
        commands, ["bench", "-p", "16", "-n", "3,2", "-r", "1", "--json"], catch_exceptions=False
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["test"] for row in rows] == ["pp16", "tg3", "tg2"]
    assert all(row["model"] == "demo" and row["tokens_per_s"] > 0 for row in rows)


def test_the_table_begins_with_the_ceilings():
    done = CliRunner().invoke(
        commands, ["bench", "-p", "16", "-n", "2", "-r", "1"], catch_exceptions=False
    )
    lines = done.stdout.splitlines()
    assert lines[1].startswith("ceilings: ")
    assert lines[3].split()[:2] == ["test", "tok/s"]
    assert [line.split()[0] for line in lines[4:6]] == ["pp16", "tg2"]
    assert lines[6].startswith("peak memory ")


def test_numbers_that_are_none_are_refused():
    done = CliRunner().invoke(commands, ["bench", "-p", "x"])
    assert done.exit_code == 2
    assert "'x', expected whole numbers with commas between them" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], [0], [0], [1]), "nothing to measure: give -p or -n above 0"),
        (([-3], [0], [0], [1]), "prompt of -3 tokens, expected 0 to 1048576"),
        (([4], [0], [1 << 21], [1]), "depth of 2097152 tokens, expected 0 to 1048576"),
        (([4], [0], [0], [0]), "batch of 0 rows, expected 1 to 1024"),
    ],
)
def test_impossible_plans_are_refused(arguments, message):
    with pytest.raises(UsageError) as caught:
        plan(*arguments)
    assert str(caught.value) == message


def test_no_repetitions_are_refused(bench: Bench):
    with pytest.raises(UsageError, match=r"^repetitions 0, expected at least 1$"):
        list(bench.run([Workload(prompt=4)], repeat=0))


def test_another_backend_is_refused():
    model = bloomq.load(backend="reference")
    with pytest.raises(UsageError, match=r"^bench measures the numba backend, not reference$"):
        Bench(model.head, model.pack)
