"""The benchmarks that need no peer run, on the embedded demo, and print figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import warm

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
