"""`bloomq plan` as people call it: what it prints, its exit codes, its page."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bloomq.cli import main

PAGE = Path(__file__).parent.parent / "docs" / "placement.md"
Ran = tuple[int, str, str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`run("--model", ...)`: exit code, stdout and stderr of `bloomq plan`."""

    def call(*args: str) -> Ran:
        with pytest.raises(SystemExit) as ended:
            main(["plan", *args])
        told = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, told.out, told.err

    return call


def big(*more: str) -> list[str]:
    return ["--model", "bloom-176b", "--batch", "4", *more]


def facts(ran: Ran) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ran[1])
    return found


def test_the_plan_of_int8_on_three_gpus_says_what_fits(run: Callable[..., Ran]):
    code, out, err = run(*big("--scheme", "int8", "--gpus", "3x80GB"))
    assert (code, err) == (0, "")
    assert "bloom-176b: 176.25 billion parameters, 70 layers of 14336, 112 heads" in out
    assert "int8, embedding int8: 176.32 GB" in out
    assert "4 x 2048 tokens, f16, 4014.6 kB a token: 32.89 GB" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("cuda:")]
    assert [row[0] for row in rows] == ["cuda:0", "cuda:1", "cuda:2"]
    assert rows[0][5:8] == ["0-23", "59.22", "GB"]
    assert "fits" in out.splitlines()


def test_json_adds_up(run: Callable[..., Ran]):
    found = facts(run(*big("--scheme", "int8", "--gpus", "3x80GB", "--json")))
    assert found["fits"] and found["parameters"] == 176_247_271_424
    assert found["weights_bytes"] == 176_323_710_976
    for share in found["devices"]:
        parts = share["weights_bytes"] + share["cache_bytes"] + share["work_bytes"]
        assert share["bytes"] == parts <= share["memory_bytes"]
        assert share["work_bytes"] == sum(share["work"].values())
    assert found["bytes"] == sum(share["bytes"] for share in found["devices"])
    assert [share["has_head"] for share in found["devices"]] == [False, False, True]


def test_the_best_scheme_that_fits_is_chosen(run: Callable[..., Ran]):
    chosen = {
        gpus: facts(run(*big("--gpus", gpus, "--json")))["schemes"]
        for gpus in ("3x80GB", "1x141GB", "1x130GB")
    }
    assert chosen == {
        "3x80GB": "int8, embedding int8",
        "1x141GB": "nl4-g32, embedding int6",
        "1x130GB": "nl4-g128, embedding int6",
    }


def test_what_does_not_fit_is_refused_with_the_plan_and_the_ways_out(run: Callable[..., Ran]):
    code, out, err = run(*big("--scheme", "int8", "--gpus", "2x80GB"))
    assert code == 1
    assert "DOES NOT FIT: " in out
    assert "would fit  --scheme nl4 --group-size 32" in out
    assert "would fit  1 more GPU (80GB as H100-PCIe)" in out
    assert err.count("\n") == 1
    assert err.startswith("error: the model does not fit: ")
    assert "what would fit: --scheme nl4 --group-size 32; 1 more GPU" in err


def test_a_pack_is_planned_with_its_own_bytes(
    run: Callable[..., Ran], pack_of: Callable[..., Path]
):
    pack = pack_of("int8")
    code, out, _ = run("-m", str(pack), "--gpus", "1x8GB", "--context", "128", "--json")
    assert code == 0
    assert json.loads(out)["schemes"] == "int8, embedding int8"
    code, out, _ = run("-m", str(pack), "--gpus", "cpu:8GB", "--context", "128", "--json")
    from bloomq.pack import Pack

    assert json.loads(out)["weights_bytes"] == Pack.open(pack).nbytes


def test_caps_and_cache_dtypes_count(run: Callable[..., Ran]):
    wanted = big("--scheme", "int8", "--gpus", "3x80GB", "--json")
    capped = facts(run(*wanted, "--max-memory", "0:40GB,2:75GiB"))
    assert not capped["fits"]
    assert "cache dtype int8" not in capped["would_fit"]
    halved = facts(run(*wanted, "--cache-dtype", "int8"))
    # 128 codes and a float32 scale for each head, where float16 has 256 bytes.
    whole = facts(run(*wanted))["cache_bytes"]
    assert halved["cache_bytes"] * 256 == whole * 132


def test_a_faster_link_makes_tensor_parallel_faster(run: Callable[..., Ran]):
    wanted = big("--scheme", "int8", "--gpus", "4x80GB", "--split", "tensor", "--json")
    speeds = [
        facts(run(*wanted, *more))["tokens_per_s_at_most"]["all_rows_full_cache"]
        for more in ((), ("--link", "450"))
    ]
    assert speeds[0] < speeds[1]


def test_an_unknown_bandwidth_gives_no_speed(run: Callable[..., Ran]):
    code, out, _ = run("--model", "bloom-560m", "--gpus", "1x12GB")
    assert code == 0
    assert "not known: say how fast memory is read, as in 24GB@900" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--gpus 1x80GB", "what to plan for: expected one of --pack and --model"),
        ("-m x --model y --gpus 1x80GB", "what to plan for: expected one of --pack and --model"),
        ("--model bloom-176b", "no hardware to plan for: give it with --gpus"),
        ("--model bloom-6b --gpus 1x80GB", "unknown model 'bloom-6b'"),
        ("--model bloom-3b --gpus 1xGTX", "unknown GPU 'GTX'"),
        ("--model bloom-3b --gpus 1x8GB --context 0", "context to plan for is 0"),
        ("--model bloom-3b --gpus 1x8GB --batch -1", "batch to plan for is -1"),
        ("--model bloom-3b --gpus 1x8GB --cache-dtype f8", "cache_dtype to plan for is 'f8'"),
        ("--model bloom-3b --gpus 1x8GB --group-size 64", "a group size to plan with: name its"),
        ("--model bloom-3b --gpus 1x8GB --scheme int8 --group-size 64", "has no group size"),
        ("--model bloom-3b --gpus 1x8GB --max-memory 1:4GB", "most memory is given for cuda:1"),
        ("--model bloom-3b --gpus 1x8GB --link 0", "--link is 0 GB/s, expected more"),
        ("--model bloom-3b --gpus 1x8GB --nodes 0", "0 machines, expected 1 to 1024"),
        ("--model bloom-3b --gpus 33x8GB --split tensor", "33 ranks for a model of 32 heads"),
        ("-m x --gpus 1x8GB --scheme int8", "x is stored in its own schemes: drop --scheme"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    run: Callable[..., Ran], args: str, message: str
):
    code, out, err = run(*args.split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_a_pack_that_is_not_there_is_exit_code_1(run: Callable[..., Ran]):
    code, _, err = run("-m", "nowhere", "--gpus", "1x8GB")
    assert code == 1
    assert "no such pack" in err


def commands_of_the_page() -> list[tuple[str, str]]:
    """Each command, and what the page says that it prints."""
    blocks = re.findall(
        r"```console\n\$ bloomq plan ([^\n]+)\n(.*?)```", PAGE.read_text(), re.DOTALL
    )
    assert len(blocks) >= 6
    return blocks


@pytest.mark.parametrize("command", commands_of_the_page(), ids=lambda at: at[0].split(" --con")[0])
def test_the_page_shows_what_its_commands_print(
    run: Callable[..., Ran], pack_of: Callable[..., Path], command: tuple[str, str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pack").symlink_to(pack_of("nl4"))
    _, out, err = run(*shlex.split(command[0]))
    assert out + err == command[1]


def test_the_code_of_the_page_runs(capsys: pytest.CaptureFixture[str]):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), {})
    assert "cuda:1" in capsys.readouterr().out
