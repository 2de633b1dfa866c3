"""score and perplexity as people call them: input, output, mistakes, interruptions."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import warm
from adapters import written
from models import Tiny, pack
from test_cli import Terminal
from test_tasks import Call, Done, Pipe

import bloomq
from bloomq import cli, scoring
from bloomq.perplexity import perplexity

TEXT = "The old man sat by the window and watched the rain fall over the quiet street. " * 30


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call("score", "a text", stdin=b"...", code=0)` in this process."""

    def run(*args: object, stdin: bytes | None = None, code: int = 0) -> Done:
        monkeypatch.setattr(sys, "stdin", None if stdin is None else Pipe(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(arg) for arg in args])
        done = Done(int(caught.value.code or 0), *capsys.readouterr())
        assert done.code == code, done.stderr
        return done

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


# -- score -----------------------------------------------------------------------------------------


def test_score_prints_the_sum_the_tokens_and_the_perplexity(call: Call) -> None:
    text = "Once upon a time there was a king."
    done = call("score", text)
    model = bloomq.load()
    (scores,) = scoring.score(model.head, [model.prompt_ids(text)])
    expected = f"{scores.total:.4f}  9 tokens  perplexity {scores.perplexity:.4g}\n"
    assert done.stdout == expected
    assert "1 text in" in done.stderr and "embedded demo on" in done.stderr


def test_score_shows_each_token_and_what_the_model_likes_better(call: Call) -> None:
    total, *rows = call("score", "Once upon a\n", "--top", 2, "-q").stdout.splitlines()
    assert "4 tokens" in total
    fields = [row.split() for row in rows]
    assert [row[2] for row in fields] == ['"ce"', '"', '"', '"\\n"']  # '" upon"' has a space
    assert sum(float(row[0]) for row in fields) == pytest.approx(float(total.split()[0]), abs=1e-3)
    assert rows[0].split()[3:] == ['"ly"', rows[0].split()[4], '"', 'a"', rows[0].split()[7]]


def test_parts_of_a_character_are_shown_by_their_bytes(call: Call) -> None:
    rows = call("score", "日本\\xe6", "--tokens", "-q").stdout.splitlines()[1:]
    shown = "".join(row.split()[2].strip('"') for row in rows)
    assert shown.startswith(r"\x97\xa5\xe6\x9c\xac") and "\ufffd" not in shown
    assert '"\\\\' in "".join(rows)  # text with a backslash looks otherwise


def test_a_file_named_by_a_dash_is_standard_input(call: Call) -> None:
    (one, two) = call("score", "-f", "-", "--json", "-q", stdin=b"a king\n\n").rows
    assert one == call("score", "a king", "--json", "-q").rows[0] and two["tokens"] == 0


def test_a_context_is_read_and_not_scored(call: Call) -> None:
    texts = [" time", " king", "   ", "s"]
    options = ("--context", "Once upon a", "--json", "-q")
    rows = call("score", *options, stdin="\n".join(texts).encode()).rows
    assert [row["text"] for row in rows] == texts and [row["line"] for row in rows] == [1, 2, 3, 4]
    assert [row["tokens"] for row in rows] == [1, 1, 0, 1]
    assert rows[2]["logprob"] is None and rows[2]["perplexity"] is None
    assert rows[0]["logprob"] > rows[1]["logprob"]
    alone = call("score", " time", *options).rows[0]
    assert alone["logprob"] == rows[0]["logprob"]


def test_json_has_every_token_on_request(call: Call) -> None:
    (row,) = call("score", "a king", "--json", "--top", 1, "-q").rows
    assert [one["token"] for one in row["each"]] == [" king"]
    assert row["each"][0]["rank"] > 0
    best = row["each"][0]["top"][0]
    assert best["logprob"] > row["each"][0]["logprob"] and set(best) == {"token", "id", "logprob"}
    (plain,) = call("score", "a king", "--json", "-q").rows
    assert plain == {key: row[key] for key in ("line", "text", "logprob", "tokens", "perplexity")}


def test_several_texts_stand_beside_their_scores(call: Call, tmp_path: Path) -> None:
    source = tmp_path / "texts.csv"
    source.write_text("id,body\n1,a king\n2,\n3,x\n")
    first, second, third = call("score", "-f", source, "--column", "body").stdout.splitlines()
    assert first.endswith("1 token  perplexity " + first.split()[4] + "  a king")
    assert second.strip() == "nothing to score" and third == "nothing to score  x"


def test_an_interrupted_file_of_scores_goes_on(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    source.write_text("".join(f"the king number {i} and his horse\n" for i in range(40)))
    arguments = ("score", "-f", source, "-o", out, "--batch-tokens", 16)
    score, calls = scoring.score, []

    def stop(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score", stop)
        assert "the same command goes on" in call(*arguments, code=130).stderr
    call(*arguments)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["line"] for row in rows] == list(range(1, 41))
    whole = call("score", "-f", source, "--json", "-q").rows
    assert rows == whole
    assert call(*arguments).stderr.endswith(f"{out}: is complete: all 40 results are there\n")
    assert [json.loads(line) for line in out.read_text().splitlines()] == whole
    other = call(*arguments, "--context", "Now", code=1).error
    assert other.startswith(f"{out}: was begun by a job with another options")


def test_an_adapter_changes_the_scores(call: Call, tmp_path: Path) -> None:
    folder = written(tmp_path / "lora", hidden_size=256, layers=4)
    plain = call("score", "a king", "--json", "-q").rows
    adapted = call("score", "a king", "--json", "-q", "--lora", folder).rows
    assert plain[0]["logprob"] != adapted[0]["logprob"]
    none = call("score", "a king", "--json", "-q", "--lora", f"{folder}=0").rows
    assert plain == none


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["score", "x", "--top", "9999"], 2, "top is 9999, expected 0 to 8192 alternatives"),
        (["score", "x", "--context", "word " * 2100], 2,
         "--context has 2101 tokens, expected less than the 2048 that the model was trained on"),
        (["score", TEXT, "--max-tokens", "5"], 2, "text 1: has"),
        (["score"], 2, "no texts: give some"),
        (["score", "x", "-m", "nowhere"], 1, "nowhere: no such pack"),
        (["perplexity", "nowhere.txt"], 1, "nowhere.txt: no such file"),
        (["perplexity", "{file}", "--base", "nowhere"], 1, "nowhere: no such pack"),
        (["perplexity", "{file}", "--stride", "4"], 2, "stride is 4 with fixed windows, w"),
        (["perplexity", "{file}", "--protocol", "sliding", "--stride", "0"], 2, "stride is 0, exp"),
        (["perplexity", "{file}", "--tokens", "0"], 2, "--tokens is 0, expected 1 or more of the"),
        (["score", "x", "--max-tokens", "0"], 2, "--max-tokens is 0, expected 1 or more"),
        (["perplexity", "{file}", "--window", "4096"], 2, "window is 4096, expected 2 to 2048 tok"),
        (["perplexity", "{file}", "--protocol", "gptq"], 2, "the text has 510 tokens, expected"),
        (["perplexity", "{folder}"], 2, "cannot be read: Is a directory"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_mistake_is_one_line_with_its_remedy(
    call: Call, file: Path, arguments: list[str], code: int, says: str
) -> None:
    filled = [one.format(file=file, folder=file.parent) for one in arguments]
    assert says in call(*filled, code=code).error


# -- perplexity ------------------------------------------------------------------------------------


def test_perplexity_prints_what_it_measured(
    call: Call, file: Path, pack_of: Callable[..., Path]
) -> None:
    f32, int4 = pack_of("f32"), pack_of("int4")
    options = ("-m", int4, "--base", f32, "--window", 100)
    done = call("perplexity", file, *options)
    found = perplexity(bloomq.load(int4), TEXT, window=100, base=bloomq.load(f32))
    assert found.comparison is not None
    first, loss, _, tokens, base, change, kl, *_ = done.stdout.splitlines()
    low, high = found.interval
    assert first == f"perplexity     {found.perplexity:.4f}  ({low:.4f} to {high:.4f})"
    assert loss == f"loss           {found.nll:.4f} ± {found.standard_error:.4f} nats a token"
    assert tokens == "tokens         504 in 6 windows of 100 (fixed)"
    assert base == f"base           {found.comparison.base_perplexity:.4f}"
    assert change.startswith(f"change         {100 * found.comparison.change:+.3f} %  (")
    assert kl.startswith(f"KL             {found.comparison.kl:.6f} ± ")
    (row,) = call("perplexity", file, *options, "--json", "-q").rows
    assert row["perplexity"] == found.perplexity and row["model"] == str(int4)
    assert row["comparison"]["kl"] == found.comparison.kl and row["base"] == str(f32)


def test_standard_input_is_measured_too(call: Call, file: Path) -> None:
    of_file = call("perplexity", file, "--json", "-q", "--tokens", 50).rows[0]
    piped = call("perplexity", "-", "--json", "-q", "--tokens", 50, stdin=TEXT.encode()).rows[0]
    assert piped["perplexity"] == of_file["perplexity"] and piped["tokens"] == 49
    assert piped["interval"] == [None, None] and piped["standard_error"] is None


def test_one_window_is_shown_without_an_interval(call: Call, file: Path) -> None:
    lines = call("perplexity", file, "-q").stdout.splitlines()
    assert "(" not in lines[0] and "±" not in lines[1]
    assert lines[3] == "tokens         509 in 1 window of 2048 (fixed)"
    sliding = call("perplexity", file, "-q", "--protocol", "sliding", "--window", 300).stdout
    assert "in 3 windows of 300, 150 apart (sliding)" in sliding


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the text has 0 tokens, expected 2 or more"),
        (b"\xff\xfe\x00", "byte 0 is no UTF-8: convert the file"),
        (b"text\0more", "has NUL bytes: it is no text file"),
    ],
    ids=["empty", "binary", "NUL"],
)
def test_a_file_that_is_no_text_is_refused(
    call: Call, tmp_path: Path, data: bytes, says: str
) -> None:
    path = tmp_path / "odd.txt"
    path.write_bytes(data)
    assert says in call("perplexity", path, code=2).error


def test_packs_of_different_models_are_not_compared(
    call: Call, file: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = pack(tmp_path_factory.getbasetemp(), Tiny(vocab_size=211), "f32")
    assert "the base has 211 tokens, the model 8192" in call(
        "perplexity", file, "--base", other, code=2
    ).error  # fmt: skip
    assert "has no tokenizer" in call("perplexity", file, "-m", other, code=1).error
    assert "has no tokenizer" in call("score", "x", "-m", other, code=1).error


def test_ctrl_c_prints_the_estimate_so_far(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 400)
    done = warm.python("-c", INTERRUPTING, "perplexity", path, "--window", 64)
    assert done.returncode == 130
    assert done.stdout.startswith("perplexity     ")
    assert "in 3 windows of 64 (fixed)" in done.stdout
    assert re.search(r"^interrupted: 3 of \d{4} windows are done$", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


INTERRUPTING = f"""
import os, sys
from bloomq import cli, perplexity
inner = perplexity.mean_of_windows
def counted(sums, counts):
    if len(sums) == 3:
        perplexity.mean_of_windows = inner
        os.kill(os.getpid(), {int(signal.SIGINT)})
    return inner(sums, counts)
perplexity.mean_of_windows = counted
cli.main(sys.argv[1:])
"""


def test_a_person_sees_a_bar_with_the_estimate(file: Path) -> None:
    file.write_text(TEXT * 10)
    terminal = Terminal("perplexity", str(file), "--window", "256", streams="2")
    assert terminal.close() == 0
    assert b"perplexity" in terminal.shown and b"0:00:0" in terminal.shown
