"""The benchmarks that need no peer run, on the embedded demo, and print figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import warm

from bloomq.backends.numba_cpu.processor import cpu_features
from bloomq.backends.numba_cpu.simd import TIERS

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["horizon.py", "--depths", "64"], r"64 tokens: [\d.]+ ms of attention a step, [\d.]+ wi"),
        (["search.py", "-n", "8", "--repeat", "1"], r"4 beams +[\d.]+ +[\d.]+-[\d.]+ +[\d.]+"),
        (["sampling.py", "--repeat", "1", "--no-peer"], r"mirostat 5 +\d+ +\d+ to \d+ +[\d.]+%"),
        (
            ["sampling.py", "-m", "../bloomq/demo", "--repeat", "1", "--no-peer"],
            r"drawn between steps\n.*\ngreedy +\d+ +\d+ to \d+ +[\d.]+%",
        ),
        (
            ["generation.py", "-n", "4", "--texts", "4", "--repeat", "1", "--prompt", "64"],
            r"from a file +[\d.]+ ms",
        ),
        (["speculation.py", "-n", "8", "--repeat", "1"], r"repetition +\d+ +\d+ +[\d.]+ +[\d.]+"),
    ],
)
def test_a_benchmark_runs(command: list[str], expected: str):
    done = warm.python(*command, cwd=FOLDER)
    assert done.returncode == 0, done.stderr
    assert re.search(expected, done.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--avx2", "--peers", "transformers"], "only llama.cpp, ctranslate2 can be kept to it"),
        (["--avx2", "--quality"], "perplexity is no matter of speed"),
        (["--quality", "--text", "nowhere"], "nowhere: no such text"),
        (["--quality", "--text", ".", "--checkpoint", "nowhere"], "nowhere: no config.json there"),
    ],
)
def test_peers_refuses_what_it_cannot_compare(arguments: list[str], message: str):
    done = warm.python("peers.py", *arguments, cwd=FOLDER)
    assert (done.returncode, message in done.stderr) == (2, True)


@pytest.mark.skipif(
    not cpu_features().issuperset(TIERS["avx2"]), reason="no AVX2 to lower bloomq to"
)
def test_peers_lowers_bloomq_to_avx2():
    lowered = "import peer_setup; peer_setup.lower_to_avx2(); "
    tier = "import bloomq.backends.numba_cpu.processor as p; print(p.best_tier(p.cpu_features()))"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {tier!r}])"
    done = warm.python("-c", lowered + child, cwd=FOLDER)
    assert done.stdout.strip() == "avx2", done.stderr
    none = "import peer_setup; peer_setup.llvm.get_host_cpu_features = dict; "
    done = warm.python("-c", none + lowered, cwd=FOLDER)
    assert "has no AVX2: run this on an x86 that has" in done.stderr
