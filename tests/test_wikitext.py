"""The WikiText-2 script: its figure against transformers on the same ids, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import bloomq

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "wikitext.py"
TEXT = (
    " \n = Robert Boulter = \n \n Robert Boulter is an English film , television and theatre "
    "actor . "
    "He had a guest @-@ starring role on the television series The Bill in 2000 . \n \n"
) * 8


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wikitext", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["wikitext"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "wiki.test.raw"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The script with these arguments: exit code, what it printed, and its errors."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["wikitext.py", *map(str, args)])
        try:
            code = script.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def papers_perplexity(checkpoint: Path, window: int) -> tuple[float, int]:
    """By the loop of IST-DASLab/gptq's bloom.py over transformers' own model."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    # huggingface/datasets' wikitext: an element a line, those of white space empty.
    elements = [line if line.strip() else "" for line in TEXT.splitlines(keepends=True)]
    tokenizer = bloomq.load().tokenizer
    assert tokenizer is not None
    ids = torch.tensor([tokenizer.encode("\n\n".join(elements))])
    model = transformers.BloomForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    count, nlls = ids.numel() // window, []
    with torch.no_grad():
        for i in range(count):
            batch = ids[:, i * window : (i + 1) * window]
            logits = model(batch).logits[:, :-1].double()
            loss = torch.nn.functional.cross_entropy(logits[0], batch[0, 1:])
            nlls.append(loss * window)
    return float(torch.exp(torch.stack(nlls).sum() / (count * window))), count


def test_it_equals_the_papers_loop(
    script: ModuleType, pack_of: Callable[..., Path], demo_checkpoint: Path
) -> None:
    expected, windows = papers_perplexity(demo_checkpoint, 64)
    row = script.measure(pack_of("f32"), TEXT, 64, None, None)
    assert row.perplexity == pytest.approx(expected, rel=1e-5)
    assert (row.windows, row.window) == (windows, 64)
    assert windows > 3


def test_a_checkpoint_is_measured_by_every_scheme(
    run: Callable[..., tuple[int, str, str]], demo_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    code, out, err = run("--checkpoint", demo_checkpoint, "--text", text_file, "--window", 64,
                         "--tokens", 256, "--schemes", "f32,int8", "--json", rows)  # fmt: skip
    assert code == 0, err
    assert "is not the test split (40 lines and" in err
    lines = out.splitlines()
    assert len(lines) == 3
    assert "no figure was published for these sizes" in lines[1]
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["scheme"] for row in found] == ["f32", "int8"]
    assert math.isclose(found[0]["perplexity"], found[1]["perplexity"], rel_tol=0.02)
    assert found[0]["ratio"] is None


def test_a_real_model_stands_beside_what_was_published(script: ModuleType) -> None:
    row = script.Row("bloom-560m-int4", "560m", "int4-g32", 4.9, 24.03, 166, 2048, "GPTQ 4 bits",
                     24.03, 1.0)  # fmt: skip
    assert script.line(row).endswith(
        "560m: fp16 22.42, RTN 4 bits 25.9, GPTQ 4 bits 24.03; 1.0000 of GPTQ 4 bits "
        "(166 windows of 2048)"
    )
    fp16 = [figures["fp16"] for _, figures in script.PUBLISHED.values()]
    np.testing.assert_array_equal(fp16, [22.42, 17.69, 15.39, 13.48, 11.37])


def test_the_test_split_is_known_by_its_checksum(script: ModuleType) -> None:
    assert "expected 4,358 and 1,290,590" in script.other_than_the_test_split(b"a\nb\n")
    data = b"\n" * 4358 + b"a" * (1_290_590 - 4358)
    assert script.other_than_the_test_split(data) == "as long as it, of other bytes"


def test_errors_are_one_line(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, text_file: Path,
    pack_of: Callable[..., Path],
) -> None:  # fmt: skip
    code, _, err = run("--models", tmp_path / "none", "--text", text_file)
    assert (code, err.splitlines()[-1][:7]) == (1, "error: ")
    code, _, err = run("--models", pack_of("f32"), "--text", text_file)
    assert (code, "expected a whole window of 2048" in err) == (1, True)
    code, _, err = run("--models", pack_of("f32"), "--text", tmp_path / "missing.txt")
    assert (code, "cannot be read" in err) == (2, True)
