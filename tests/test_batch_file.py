"""`bloomq generate --batch-file`: a text for each line, in order, interrupted and resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import warm
from test_cli import error_line, run

PROMPTS = ["Once upon a time", "def f(x):\n    return", "El rey", "Il était une fois", "The sea"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "my prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(line: dict) -> dict:
    return {name: value for name, value in line.items() if name != "stats"}


def test_each_line_is_what_the_prompt_alone_gives(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out file.jsonl"
    options = ("-n", "12", "--top-logprobs", "2", "--parallel", "2")
    done = run("generate", "--batch-file", str(prompts), "-o", str(out), *options)
    assert "5 texts, 60 tokens" in done.stderr
    found = lines(out)
    assert [line["line"] for line in found] == [1, 2, 3, 4, 5]
    assert [line["prompt"] for line in found] == PROMPTS
    alone = json.loads(run("generate", PROMPTS[2], "-n", "12", "--json").stdout)
    assert found[2]["ids"] == alone["ids"]
    assert found[2]["text"] == alone["text"]
    assert len(found[2]["top_logprobs"]) == 12
    assert found[2]["top_logprobs"][0][0] == [alone["ids"][0], alone["logprobs"][0]]
    again = run("generate", "--batch-file", str(prompts), "-o", str(out), *options)
    assert "is complete: all 5 results are there" in again.stderr
    assert lines(out) == found


def test_without_out_the_lines_are_printed(prompts: Path) -> None:
    done = run("generate", "--batch-file", str(prompts), "-n", "3", "-q")
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == PROMPTS
    assert done.stderr == ""


# The command, which sends itself a signal (argv[1]) behind its so manieth line (argv[2]).
ENDED = """
import os, sys
from bloomq.cli import main, partial
number, left = int(sys.argv[1]), int(sys.argv[2])
append = partial.Partial.append
def counted(self, data, units):
    global left
    append(self, data, units)
    left -= 1
    if not left:
        os.kill(os.getpid(), number)
partial.Partial.append = counted
main(sys.argv[3:])
"""


def ended(number: int, count: int, *args: str) -> str:
    """What `bloomq ARGS` said until a signal ended it behind its so manieth line."""
    done = warm.python("-c", ENDED, int(number), count, *args)
    assert done.returncode == (130 if number == signal.SIGINT else -number), done.stderr
    return done.stderr


def test_a_run_that_was_killed_goes_on_with_the_same_draws(tmp_path: Path) -> None:
    path, whole, out = (tmp_path / name for name in ("in.txt", "whole.jsonl", "out.jsonl"))
    path.write_text("".join(f"Chapter {i} of the book\n" for i in range(24)))
    options = ("-n", "20", "--temperature", "0.9", "--seed", "3", "--parallel", "3")
    run("generate", "--batch-file", str(path), "-o", str(whole), *options)
    expected = [untimed(line) for line in lines(whole)]
    command = ("generate", "--batch-file", str(path), "-o", str(out), *options)
    ended(signal.SIGKILL, 5, *command)
    assert len(lines(out)) == 5
    assert "the same command goes on" in ended(signal.SIGINT, 7, *command)
    assert len(lines(out)) == 12
    run(*command)
    assert [untimed(line) for line in lines(out)] == expected


@pytest.mark.parametrize(
    "changed",
    [("-n", "5"), ("--temperature", "0.5"), ("--stop", "x"), ("--window", "128"),
     ("--regex", "a+"), ("--top-logprobs", "1"), ("--seed", "9"), ("--field", "other")],
    ids=str,
)  # fmt: skip
def test_a_job_with_another_option_does_not_go_on_with_it(half_done: Path, changed) -> None:
    prompts, out = half_done / "in.jsonl", half_done / "out.jsonl"
    before = out.read_bytes()
    done = run("generate", "--batch-file", str(prompts), "-o", str(out), *changed, check=1)
    assert "was begun by a job with another options" in error_line(done)
    assert out.read_bytes() == before


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of which the first two lines are done, with the usual options."""
    folder = tmp_path_factory.mktemp("half")
    rows = [{"prompt": p, "other": p[::-1]} for p in PROMPTS]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "out.jsonl"
    ended(signal.SIGINT, 2, "generate", "--batch-file", str(folder / "in.jsonl"), "-o", str(out))
    assert len(lines(out)) == 2
    return folder


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("a prompt", "--batch-file", "x.txt"), "--batch-file has the prompts"),
        (("--batch-file", "x.txt", "--prompt-cache", "c"), "--batch-file has the prompts"),
        (("a prompt", "-o", "x.jsonl"), "--out belongs to a --batch-file"),
        (("a prompt", "--parallel", "8"), "--parallel belongs to a --batch-file"),
        (("a prompt", "--top-logprobs", "2"), "--top-logprobs are shown by --json alone"),
        (("a prompt", "--show-probs", "--json"), "--show-probs colours one text as it comes"),
        (("a prompt", "--prompt-cache", "c", "--window", "128"), "--prompt-cache is of the model"),
        (("a prompt", "--sinks", "64"), "--sinks belong to a --window"),
        (("a prompt", "--logit-bias", "7"), "expected TOKEN=BIAS"),
        (("a prompt", "--logit-bias", "two words=1"), "expected one"),
        (("a prompt", "--json", "--top-logprobs", "-1"), "top_logprobs is -1, expected 0 to "),
    ],
)
def test_options_that_do_not_go_together_are_refused(args, says) -> None:
    assert says in error_line(run("generate", *args, check=2))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"prompt": "a"}\n{"text": "b"}\n', "in.jsonl:2: no field prompt"),
        (
            json.dumps({"prompt": "word " * 3000}),
            " new ones exceed the context of 2048: shorten it, or load with a larger --context",
        ),
    ],
)
def test_a_line_that_cannot_be_is_named_before_anything_runs(tmp_path, content, says) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text(content)
    done = run("generate", "--batch-file", str(path), "-o", str(out), check=2)
    assert says in error_line(done)
    assert not out.exists()


def test_a_line_without_text_has_an_empty_result(tmp_path: Path) -> None:
    """And the others draw as if it were not there."""
    options = ("-n", "5", "--temperature", "1", "-q")
    (tmp_path / "p.txt").write_text("The sea\n\nEl rey\n")
    (tmp_path / "q.txt").write_text("The sea\nEl rey\n")
    found, plain = (
        [json.loads(line) for line in run("generate", "--batch-file", str(tmp_path / name),
                                          *options).stdout.splitlines()]
        for name in ("p.txt", "q.txt")
    )  # fmt: skip
    assert (found[1]["line"], found[1]["text"], found[1]["ids"]) == (2, "", [])
    assert [found[0]["ids"], found[2]["ids"]] == [line["ids"] for line in plain]


def test_a_prompt_cache_is_written_and_taken(tmp_path: Path) -> None:
    cache, text = tmp_path / "the cache", "Once upon a time there was a king " * 20
    first = run("generate", text, "-n", "8", "--prompt-cache", str(cache))
    assert "of the prompt kept" in first.stderr
    again = run("generate", text, "-n", "8", "--prompt-cache", str(cache), "--json")
    assert "need no reading" in again.stderr
    result = json.loads(again.stdout)
    assert result["text"] == first.stdout.removesuffix("\n")
    assert result["stats"]["reused_tokens"] == result["stats"]["prompt_tokens"] - 1


def test_a_prompt_cache_in_no_folder_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "no folder" / "c"
    done = run("generate", "a", "--prompt-cache", str(path), check=1)
    assert "cannot be written: there is no such folder" in error_line(done)
    assert done.stdout == ""


def test_a_damaged_prompt_cache_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"{}" * 100)
    done = run("generate", "a", "--prompt-cache", str(tmp_path / "c"), check=1)
    assert "damaged or truncated" in error_line(done)
