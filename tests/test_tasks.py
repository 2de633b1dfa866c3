"""classify, tag, answer and embed as people call them: input, output, mistakes, interruptions."""

from __future__ import annotations

import csv
import io
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import written
from conftest import write_checkpoint
from heads import assemble, heldout
from test_cli import Terminal
from warm import LONG_S

import bloomq
from bloomq import cli
from bloomq.cli import running
from bloomq.cli.partial import Lines, Rows, continued
from bloomq.errors import OutputError
from bloomq.pipelines import Classifier

Pack = Callable[[str], Path]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """`pack("token")`: of a fine-tuned checkpoint, converted once."""
    made: dict[str, Path] = {}

    def convert(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("heads")
            bloomq.convert(assemble(name, folder / "source"), folder / name, scheme="int8")
            made[name] = folder / name
        return made[name]

    return convert


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned checkpoint's folder."""
    return assemble("sequence", tmp_path_factory.mktemp("source") / "sequence")


@dataclass(frozen=True)
class Done:
    code: int
    stdout: str
    stderr: str

    @property
    def rows(self) -> list[Any]:
        return [json.loads(line) for line in self.stdout.split("\n") if line]

    @property
    def error(self) -> str:
        (line,) = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        return line.removeprefix("error: ")


Call = Callable[..., Done]


class Pipe(io.TextIOWrapper):
    """Standard input with this in it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call("classify", "a text", stdin=b"...", code=0)` in this process."""

    def run(*args: object, stdin: bytes | None = None, code: int = 0) -> Done:
        monkeypatch.setattr(sys, "stdin", None if stdin is None else Pipe(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(arg) for arg in args])
        done = Done(int(caught.value.code or 0), *capsys.readouterr())
        assert done.code == code, done.stderr
        return done

    return run


# -- the commands ----------------------------------------------------------------------------------


def test_classify_prints_a_label_for_a_person(call: Call, pack: Pack) -> None:
    text = "She had never been so happy in all her life before that day."
    done = call("classify", text, "-m", pack("sequence"), "--top-k", 2)
    first, second = done.stdout.splitlines()
    assert first.startswith("en 0.") or first == "en 1.0000"
    assert float(second.split()[1]) < 0.5
    assert "sequence on numba" in done.stderr and "1 text in" in done.stderr


def test_several_texts_are_shown_beside_their_labels(call: Call, pack: Pack) -> None:
    texts = ["Il était une fois\nune " + "très " * 30, "¿Quién lo vio? Nadie, dijo el niño \x1b[2J"]
    lines = call("classify", *texts, "-m", pack("sequence"), "-q").stdout.splitlines()
    assert lines[0].startswith("fr ") and lines[0].endswith("tr…")
    assert lines[1].startswith("es ") and r"\x1b[2J" in lines[1]
    assert "-  " in call("classify", *texts, "-m", pack("sequence"), "--threshold", 2).stdout


def test_quiet_says_nothing_but_the_result(call: Call, pack: Pack) -> None:
    assert call("classify", "a text", "-m", pack("sequence"), "-q").stderr == ""


def test_json_lines_hold_text_and_labels_in_order(call: Call, pack: Pack) -> None:
    records = heldout("sequence")[::40]
    lines = "\n".join(r["text"] for r in records).encode()
    options = ("-m", pack("sequence"), "--json", "--top-k", 3)
    rows = call("classify", *options, stdin=lines).rows
    assert [row["line"] for row in rows] == [*range(1, len(records) + 1)]
    assert [row["text"] for row in rows] == [r["text"] for r in records]
    found = Classifier.load(pack("sequence")).classify([r["text"] for r in records], top_k=3)
    for row, labels in zip(rows, found, strict=True):
        assert row["labels"] == [{"label": o.label, "score": o.score} for o in labels]
    assert call("classify", *(r["text"] for r in records), *options).rows == rows


def test_tag_shows_spans_and_gives_them_as_json(call: Call, pack: Pack) -> None:
    text = heldout("token")[0]["text"]
    tags = call("tag", text, "-m", pack("token"), "--json").rows[0]["tags"]
    assert all(tag["text"] == text[tag["start"] : tag["end"]] for tag in tags)
    lines = call("tag", text, "-m", pack("token")).stdout.splitlines()
    first = tags[0]
    assert lines[0] == (
        f"{first['label']} {first['score']:.4f}  {first['start']}-{first['end']}  {first['text']}"
    )
    assert len(lines) == len(tags)
    each = call("tag", text, "-m", pack("token"), "--json", "--each-token").rows[0]["tags"]
    assert len(each) > len(tags)
    options = ("-m", pack("token"), "--outside", first["label"], "--threshold", "0.5")
    rest = call("tag", text, *options, "--json").rows[0]["tags"]
    assert rest == [t for t in tags if t["label"] != first["label"] and t["score"] >= 0.5]
    both = call("tag", text, text, "-m", pack("token")).stdout
    assert both.count("\n    ") == 2 * len(tags)


def test_answer_takes_its_context_as_option_or_from_a_pipe(call: Call, pack: Pack) -> None:
    record = heldout("question")[1]
    options = ("answer", "--question", record["question"], "-m", pack("question"))
    given = call(*options, "--context", record["context"], "--json", "--top-k", 2).rows[0]
    assert given["question"] == record["question"] and len(given["answers"]) == 2
    piped = call(*options, "--json", "--top-k", 2, stdin=record["context"].encode()).rows[0]
    assert piped == given
    best = given["answers"][0]
    assert best["text"] == record["context"][best["start"] : best["end"]]
    shown = call(*options, "--context", record["context"]).stdout
    assert shown == f"{best['score']:.4f}  {best['start']}-{best['end']}  {best['text']}\n"


def test_answer_reads_both_or_either_from_a_file(call: Call, pack: Pack, tmp_path: Path) -> None:
    records = heldout("question")[:4]
    path, options = tmp_path / "qa.jsonl", ("-m", pack("question"), "--json")
    path.write_text("".join(json.dumps({**r, "q": r["question"]}) + "\n" for r in records))
    rows = call("answer", "-f", path, *options).rows
    assert [row["question"] for row in rows] == [r["question"] for r in records]
    assert call("answer", "-f", path, "--question-field", "q", *options).rows == rows
    same = call("answer", "-f", path, "--question", "en?", *options).rows
    assert [row["question"] for row in same] == ["en?"] * 4
    lines = tmp_path / "questions.txt"
    lines.write_text("en?\nfr?\n")
    two = call("answer", "-f", lines, "--context", records[0]["context"], *options).rows
    assert [row["question"] for row in two] == ["en?", "fr?"]
    (tmp_path / "c.txt").write_text("fr: Il y avait une fois un roi.\n")
    (one,) = call("answer", "-f", tmp_path / "c.txt", "--question", "fr?", *options).rows
    assert one["question"] == "fr?" and len(one["answers"]) == 1
    shown = call("answer", "-f", path, "-m", pack("question"), "--separator", "\n", "--overlap", 8,
                 "--window-tokens", 64, "--max-answer-tokens", 9).stdout  # fmt: skip
    assert shown.count("\n    ") == 4


def test_embed_prints_vectors_or_writes_an_array(call: Call, tmp_path: Path) -> None:
    texts = ("Once upon a time", "two")
    rows = call("embed", *texts, "--normalize").rows
    vectors = np.array([row["embedding"] for row in rows], np.float32)
    assert vectors.shape == (2, 256) and [row["text"] for row in rows] == list(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    call("embed", *texts, "--normalize", "-o", tmp_path / "x.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), vectors)
    call("embed", *texts, "--normalize", "-o", tmp_path / "x.jsonl")
    assert [json.loads(line) for line in (tmp_path / "x.jsonl").open()] == rows
    last = call("embed", *texts, "--pooling", "last").rows
    assert last != rows
    files = ["x.jsonl", "x.jsonl.job", "x.npy", "x.npy.job"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    whole = (tmp_path / "x.npy").read_bytes()
    again = call("embed", *texts, "--normalize", "-o", tmp_path / "x.npy").stderr
    assert "x.npy: is complete: all 2 results are there" in again
    assert (tmp_path / "x.npy").read_bytes() == whole


@pytest.mark.parametrize("command", ["classify", "tag", "answer", "embed"])
def test_help_describes_every_option(call: Call, command: str) -> None:
    text = call(command, "--help").stdout
    assert text.startswith(f"Usage: bloomq {command}")
    options = [line for line in text.splitlines() if line.startswith("  -")]
    assert len(options) > 10
    assert "--out" in text and "--batch-tokens" in text


# -- input -----------------------------------------------------------------------------------------

GOOD = {
    "a.txt": "\ufefffirst line\r\n\n  second \u2028 line\nlast",
    "a.jsonl": '{"text": "first line"}\n\n{"text": "  second \\u2028 line"}\n{"text": "last"}',
    "a.csv": '\ufeffid,text\r\n1,first line\r\n2,"  second \u2028 line"\r\n3,last\r\n',
    "A.CSV": "text\nfirst line\n  second \u2028 line\nlast\n",
}


@pytest.mark.parametrize("name", GOOD)
def test_each_kind_of_file_gives_its_texts(
    call: Call, pack: Pack, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(GOOD[name].encode())
    rows = call("classify", "-f", tmp_path / name, "-m", pack("sequence"), "--json").rows
    found = [(row["line"], row["text"]) for row in rows if row["text"]]
    lines = (1, 2, 3) if name.lower() == "a.csv" else (1, 3, 4)
    assert found == list(zip(lines, ["first line", "  second \u2028 line", "last"], strict=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\n \n\nfour\n"),
        ("a.csv", 'id,text\n7,one\n8," "\n9,\n10,four\n'),
        ("a.jsonl", '{"text": "one"}\n{"text": " "}\n{"text": ""}\n{"text": "four"}'),
    ],
)
def test_an_empty_text_has_an_empty_result_on_its_line(
    call: Call, pack: Pack, tmp_path: Path, name: str, content: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    rows = call("classify", "-f", path, "-m", pack("sequence"), "--json").rows
    assert [(row["line"], len(row["labels"])) for row in rows] == [(1, 1), (2, 0), (3, 0), (4, 1)]
    assert "\n-  \n" in call("classify", "-f", path, "-m", pack("sequence")).stdout
    rows = call("embed", "-f", path, "-o", tmp_path / "x.jsonl") and [
        json.loads(line) for line in (tmp_path / "x.jsonl").open()
    ]
    assert [row["embedding"] is None for row in rows] == [False, True, True, False]
    rows = call("tag", "-f", path, "-m", pack("token"), "--json").rows
    assert rows[1]["tags"] == rows[2]["tags"] == []
    options = ("--question", "why?", "--context-field", "text", "-m", pack("question"), "--json")
    rows = call("answer", "-f", path, *options).rows
    assert [(row["line"], len(row["answers"])) for row in rows] == [(1, 1), (2, 0), (3, 0), (4, 1)]
    done = call("embed", "-f", path, "-o", tmp_path / "x.npy", code=2)
    at = 3 if name == "a.csv" else 2
    assert done.error == (
        f"{path}:{at}: is empty, which no row of an array can say: leave it out, or write JSON "
        "lines"
    )
    assert not (tmp_path / "x.npy").exists()


def test_a_cell_of_a_csv_may_be_long(call: Call, pack: Pack, tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"text\n{'word ' * 30_000}\n")
    options = ("-f", tmp_path / "a.csv", "-m", pack("sequence"), "--truncate", "--json")
    (row,) = call("classify", *options).rows
    assert len(row["text"]) > limit == csv.field_size_limit()


def test_a_checkpoint_is_quantized_and_its_pack_is_kept(
    call: Call, tmp_path: Path, source: Path
) -> None:
    saved = tmp_path / "pack"
    options = ("classify", "a text", "-m", source, "--json")
    exact = call(*options).rows
    found = call(*options, "--scheme", "int8", "--save-pack", saved).rows
    assert found != exact
    assert call(*options[:2], "-m", saved, "--json").rows == found
    assert call(*options, "--scheme", "int8", "--save-pack", saved).rows == found


def test_adapters_change_results_and_are_part_of_the_job(
    call: Call, tmp_path: Path, source: Path
) -> None:
    config = json.loads((source / "config.json").read_text())
    folder, size = tmp_path / "lora", config["hidden_size"]
    written(folder, hidden_size=size, layers=config["n_layer"])
    options = ("classify", "a text", "b", "-m", source, "-q")
    base = call(*options, "--json").rows
    adapted = call(*options, "--json", "--lora", folder).rows
    assert adapted != base
    assert call(*options, "--json", "--lora", f"{folder}=0").rows == base
    out = tmp_path / "out.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        call(*options, "--lora", folder, "-o", out)
    assert [json.loads(line) for line in out.open()] == adapted
    for change in ((), ("--lora", f"{folder}=0.5")):
        done = call(*options, *change, "-o", out, code=1)
        assert "was begun by a job with another options" in done.error
    call(*options, "--lora", folder, "-o", out)


def test_what_is_tokenized_at_once_changes_no_result(
    call: Call, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text(TEXTS.replace("number 7 ", "\n"))
    options = ("classify", "-f", tmp_path / "a.txt", "-m", pack("sequence"), "--json")
    whole = call(*options).stdout
    for records, chars in ((1, 1 << 20), (7, 1 << 20), (1000, 100), (1000, 1)):
        monkeypatch.setattr(running, "_READ_RECORDS", records)
        monkeypatch.setattr(running, "_READ_CHARS", chars)
        assert call(*options).stdout == whole


def test_a_text_that_is_too_long_leaves_what_was_done_before_it(
    call: Call, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_READ_RECORDS", 2)
    path, out = tmp_path / "a.txt", tmp_path / "out.jsonl"
    path.write_text("a\nb\nc\n" + "word " * 30)
    options = ("classify", "-f", path, "-m", pack("sequence"), "-o", out, "--max-tokens", 9)
    assert call(*options, code=2).error.startswith(f"{path}:4: has ")
    assert out.read_bytes().count(b"\n") == 2 and (tmp_path / "out.jsonl.job").exists()


def test_another_field_or_column_can_be_named(call: Call, pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,body\nx,"over\ntwo ""lines"""\n')
    (tmp_path / "a.jsonl").write_text('{"text": 5, "body": "over\\ntwo \\"lines\\""}')
    options = ("-m", pack("sequence"), "--json")
    for name, option in (("a.csv", "--column"), ("a.jsonl", "--field")):
        (row,) = call("classify", "-f", tmp_path / name, option, "body", *options).rows
        assert row["text"] == 'over\ntwo "lines"'


BAD: list[tuple[str, bytes | None, str]] = [
    ("no.txt", None, "{path}: no such file"),
    ("folder.txt", b"folder", "{path}: cannot be read: Is a directory"),
    ("a.parquet", b"x", "{path}: ends in '.parquet', expected .txt, .jsonl, .csv"),
    ("a.txt", b"", "{path}: has no texts: every line is empty"),
    ("a.txt", b"\n \r\n", "{path}: has no texts: every line is empty"),
    ("a.csv", b"text\n", "{path}: has no texts: every line is empty"),
    ("a.txt", b"ab\xff", "{path}: byte 2 is no UTF-8: convert the file"),
    ("a.txt", b"\x7fELF\x00\x01", "{path}: has NUL bytes: it is no text file"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "{path}:2: is no JSON: Expecting value: line 1 "
                                                "column 10 (char 9)"),
    ("a.jsonl", b'\n["text"]\n', "{path}:2: is a list, expected an object"),
    ("a.jsonl", b'{"a": "x", "b\\n": "y"}', r"{path}:1: no field text, found a, 'b\n': name it "
                                            "with --field"),
    ("a.jsonl", b"{}", "{path}:1: no field text, found none: name it with --field"),
    ("a.jsonl", b'{"text": 5}', "{path}:1: text is 5, expected a text"),
    ("a.jsonl", b'{"text": ""}', "{path}: has no texts: every line is empty"),
    ("a.jsonl", b'{"text": "\\ud800"}', "{path}:1: holds half a character (a lone surrogate)"),
    ("a.csv", b"id,body\n1,x\n", "{path}: no column text, found id, body: name it with --field"),
    ("a.csv", b"", "{path}: no column text, found none: name it with --field"),
    ("a.csv", b"id,text\n1,x\n2\n", "{path}:3: the row ends before text: complete it"),
    ("a.csv", b'id,text\n1,"x\n', "{path}:2: is no CSV: unexpected end of data"),
    ("a.txt", b"a\n" + b"word " * 3000, "{path}:2: has "),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_a_file_that_is_not_right_is_named_with_its_line(
    call: Call, pack: Pack, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path, out = tmp_path / name, tmp_path / "out.jsonl"
    if content == b"folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    options = ("-f", path, "-m", pack("sequence"), "-o", out, "-q")
    done = call("classify", *options, code=1 if content is None else 2)
    assert done.error.startswith(" ".join(message.format(path=path).split()))
    assert done.stdout == "" and not list(tmp_path.glob("out*"))


def test_a_long_text_can_be_cut(call: Call, pack: Pack) -> None:
    options = ("classify", "word " * 50, "-m", pack("sequence"), "--max-tokens", 7)
    assert "text 1: has 5" in call(*options, code=2).error
    assert call(*options, "--truncate").stdout


MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("classify",), "no texts: give some as arguments, with --file or on standard input"),
    (("classify", "a"), "no model: name the pack of a BloomForSequenceClassification with -m"),
    (("tag", "a"), "no model: name the pack of a BloomForTokenClassification with -m"),
    (("embed", "a", "-f", "a.txt"), "found texts and --file a.txt, expected one of them"),
    (("embed", ""), "the command line: has no texts: every line is empty"),
    (("embed", "a", "-o", ""), ".: is no name of a file: choose another with --out"),
    (("embed", "a", "-o", "/"), "/: is no name of a file: choose another with --out"),
    (("embed", "a", "--batch-tokens", "0"), "batch_tokens is 0, expected 1 or more"),
    (("embed", "a", "--max-tokens", "0"), "--max-tokens is 0, expected 1 or more"),
    (("answer",), "no question: give it with --question, or a file of them with --file"),
    (("answer", "--question", "a"), "no context: give it with --context or on standard input"),
    (
        ("answer", "--question", "a", "--context", "b", "-f", "c.csv"),
        "found --question, --context and --file c.csv, expected two at most",
    ),
    (
        ("answer", "--question", "a", "--context", "b"),
        "no model: name the pack of a BloomForQuestionAnswering with -m",
    ),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES)
def test_a_mistake_is_one_line_with_its_remedy(
    call: Call, args: tuple[str, ...], message: str
) -> None:
    assert call(*args, code=2).error == message


def test_a_text_file_holds_no_pairs(call: Call, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n")
    done = call("answer", "-f", tmp_path / "a.txt", code=2)
    assert done.error == (
        f"{tmp_path / 'a.txt'}: has one text a line, expected question and context: "
        "use a .jsonl or a .csv"
    )


def test_a_pair_that_cannot_be_is_named_with_its_line(
    call: Call, pack: Pack, tmp_path: Path
) -> None:
    path, good = tmp_path / "qa.csv", 'why?,"be,\ncause"\n'
    for option, at in (("--question-field", 0), ("--context-field", 1)):
        path.write_text(f"{'a,context' if at == 0 else 'question,a'}\nx,y\n")
        done = call("answer", "-f", path, "-m", pack("question"), code=2)
        assert done.error.endswith(f"name it with {option}")
    path.write_text(f"question,context\n{good}{'why ' * 400},b\n")
    done = call("answer", "-f", path, "-m", pack("question"), code=2)
    assert done.error.startswith(f"{path}:4: a question of ")


def test_the_wrong_head_says_which_command_takes_it(call: Call, pack: Pack) -> None:
    done = call("tag", "a", "-m", pack("sequence"), code=2)
    assert done.error == (
        f"{pack('sequence')}: has the head of a BloomForSequenceClassification: use bloomq classify"
    )
    from bloomq.loading import demo_pack

    done = call("answer", "--question", "a", "--context", "b", "-m", demo_pack(), code=2)
    assert done.error.endswith("has the head of a BloomForCausalLM: use bloomq generate")


def test_warmup_takes_a_pack_of_any_head(call: Call, pack: Pack) -> None:
    assert call("warmup", "-m", pack("token")).stdout.startswith("ready: numba")


def test_a_threshold_that_is_no_number_is_refused(call: Call, pack: Pack) -> None:
    done = call("classify", "a", "-m", pack("sequence"), "--threshold", "nan", code=2)
    assert done.error == "threshold is nan, expected None or a number"


def test_a_pack_without_a_tokenizer_is_named(call: Call, tmp_path: Path) -> None:
    bloomq.convert(write_checkpoint(tmp_path / "model"), tmp_path / "pack")
    done = call("embed", "a", "-m", tmp_path / "pack", code=1)
    assert "has no tokenizer: convert a checkpoint that has a tokenizer.json" in done.error


# -- interruptions ---------------------------------------------------------------------------------

TEXTS = "".join(f"text number {i} of a long list\n" for i in range(60))


def interrupt_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ctrl-C when the classifier is called once more than this; texts of each call, for the test to
    look at."""
    whole, sizes = Classifier.classify, []

    def classify(self: Classifier, texts: list[str], **options: Any) -> Any:
        if len(sizes) == calls:
            raise KeyboardInterrupt
        sizes.append(len(texts))
        return whole(self, texts, **options)

    monkeypatch.setattr(Classifier, "classify", classify)
    return sizes


def test_an_interrupted_job_goes_on_behind_its_last_line(
    call: Call, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, whole = tmp_path / "a.txt", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    source.write_text(TEXTS)
    job = ("classify", "-f", source, "-m", pack("sequence"), "--batch-tokens", 16, "-o")
    call(*job, whole)
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        stopped = call(*job, out, code=130)
    done = out.read_bytes().count(b"\n")
    assert 0 < done < 60
    assert (
        f"interrupted: {done} of 60 are done in {out}, the same command goes on" in stopped.stderr
    )
    with out.open("ab") as file:
        file.write(b'{"text": "cut o')  # as a run that is killed leaves it
    sizes = interrupt_after(1000, monkeypatch)
    # How texts run together, and by how many threads, changes no result.
    goes_on = call(*job[:-2], 128, "-t", 1, "-o", out)
    assert sum(sizes) == 60 - done
    assert f"{60 - done} texts behind {done} of before in" in goes_on.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.txt", "out.jsonl", "out.jsonl.job", "whole.jsonl", "whole.jsonl.job",
    ]  # fmt: skip


def test_a_job_that_is_whole_only_says_it(call: Call, pack: Pack, tmp_path: Path) -> None:
    out, sidecar = tmp_path / "out.jsonl", tmp_path / "out.jsonl.job"
    job = ("classify", "a", "b", "-m", pack("sequence"), "-o", out)
    call(*job)
    before, written = out.read_bytes(), out.stat().st_mtime_ns
    assert call(*job).stderr.endswith(f"{out}: is complete: all 2 results are there\n")
    assert call(*job, "-q").stderr == ""
    assert (out.read_bytes(), out.stat().st_mtime_ns) == (before, written)
    told = json.loads(sidecar.read_text())
    assert told.pop("finished_bytes") == len(before)
    sidecar.write_text(json.dumps(told))  # as a run that is killed behind the last result leaves it
    assert "is complete" in call(*job).stderr
    assert json.loads(sidecar.read_text())["finished_bytes"] == len(before)


def test_a_file_that_was_changed_since_it_was_whole_is_left_alone(
    call: Call, pack: Pack, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    job = ("classify", "a", "b", "-m", pack("sequence"), "-o", out)
    call(*job)
    for change in (b"", out.read_bytes()[:-1], out.read_bytes() + b"my note"):
        out.write_bytes(change)
        expected = f"{out}: has changed since it was whole: remove it, or choose another name"
        assert call(*job, code=1).error == expected
        assert out.read_bytes() == change
    out.unlink()
    call(*job)
    assert out.read_bytes().count(b"\n") == 2


def test_an_interruption_before_the_first_result_leaves_nothing(
    call: Call, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(0, monkeypatch)
    done = call("classify", "a", "-m", pack("sequence"), "-o", tmp_path / "o.jsonl", code=130)
    assert "interrupted: 0 of 1 are done" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (("--top-k", "2"), "options"),
        (("--max-tokens", "99"), "options"),
        (("--backend", "reference"), "backend"),
        (("--cache-dtype", "f32"), "backend"),
        (("another text",), "input"),
    ],
)
def test_another_job_does_not_go_on_with_a_file(
    call: Call, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: tuple[str, ...], differs: str,
) -> None:  # fmt: skip
    out, texts = tmp_path / "out.jsonl", TEXTS.splitlines()[:20]
    job = ("classify", *texts, "-m", pack("sequence"), "--batch-tokens", 16, "-o", out)
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        call(*job, code=130)
    before = out.read_bytes()
    done = call(*job, *change, code=1)
    assert done.error == (
        f"{out}: was begun by a job with another {differs}: remove it, or choose another name"
    )
    assert out.read_bytes() == before
    (tmp_path / "out.jsonl.job").write_text("{damaged")
    assert "was begun by a job with another command and" in call(*job, code=1).error
    out.unlink()
    call(*job, *change)  # a new file may be begun whatever lies beside it
    assert call(*job, code=1).error.startswith(f"{out}: was begun by a job with another {differs}")


def test_a_file_that_is_there_is_not_replaced(call: Call, pack: Pack, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious\n")
    job = ("classify", "a", "-m", pack("sequence"), "-o")
    assert call(*job, out, code=1).error == f"{out}: already exists: choose another name"
    assert out.read_text() == "precious\n"
    assert "already exists" in call(*job, tmp_path, code=1).error
    missing = tmp_path / "no" / "out.jsonl"
    assert call(*job, missing, code=1).error == (
        f"{missing}: cannot be written: No such file or directory"
    )


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with continued(path, {"input": 1}, 2, Lines()) as partial:
        partial.append(b"a\n", 1)
        message = f"{path}: another run is writing it: wait for it"
        with pytest.raises(OutputError, match=message), continued(path, {"input": 1}, 2, Lines()):
            pass
    assert path.read_bytes() == b"a\n"


def test_a_file_with_more_results_than_the_job_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"a\nb\nc\n")
    (tmp_path / "out.jsonl.job").write_text('{"input": 1}')
    with (
        pytest.raises(OutputError, match=r"has 3 of 2 results: remove it"),
        continued(path, {"input": 1}, 2, Lines()),
    ):
        pass


@pytest.mark.parametrize("cut", [0, 50, 128, 130, 128 + 12, 128 + 12 * 3 - 1, 128 + 12 * 3])
def test_an_array_goes_on_behind_its_last_whole_row(tmp_path: Path, cut: int) -> None:
    path, array = tmp_path / "x.npy", np.arange(15, dtype=np.float32).reshape(5, 3)
    with continued(path, {}, 5, Rows(5, 3)) as partial:
        for row in array[:3]:
            partial.append(row.tobytes(), 1)
    with pytest.raises(ValueError, match="not fully written"):
        np.load(path)  # what is not whole is no array
    with path.open("r+b") as file:
        file.truncate(cut)
    with continued(path, {}, 5, Rows(5, 3)) as partial:
        assert partial.done == max(0, cut - 128) // 12
        partial.append(array[partial.done :].tobytes(), 5 - partial.done)
    np.testing.assert_array_equal(np.load(path), array)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npy", "x.npy.job"]


def test_a_full_disk_is_one_line(
    call: Call, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(signal, "SIGXFSZ", signal.SIGXFSZ)
    before, limits = signal.getsignal(signal.SIGXFSZ), resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        done = call("embed", "a", "-o", tmp_path / "out.jsonl", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert done.error == f"{tmp_path / 'out.jsonl'}: cannot be written: File too large"


# -- processes and terminals -----------------------------------------------------------------------


def test_ctrl_c_keeps_what_is_done_and_the_command_goes_on(pack: Pack, tmp_path: Path) -> None:
    source, out = tmp_path / "a.txt", tmp_path / "out.jsonl"
    source.write_text(TEXTS * 40)
    command = [sys.executable, "-m", "bloomq", "classify", "-f", source, "-o", out]
    command += ["-m", pack("sequence"), "--batch-tokens", "64"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    started = time.monotonic()
    while not (out.exists() and out.stat().st_size) and time.monotonic() < started + LONG_S:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LONG_S)
    assert process.returncode == 130, err
    assert b"Traceback" not in err and b"the same command goes on" in err
    before = out.read_bytes()
    assert 0 < before.count(b"\n") < 2400 and before.endswith(b"\n")
    subprocess.run([*command[:-1], "2048"], check=True, capture_output=True, timeout=LONG_S)
    after = out.read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 2400


def test_a_reader_that_leaves_ends_the_command_quietly(pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS * 10)
    command = [sys.executable, "-m", "bloomq", "classify", "-f", str(tmp_path / "a.txt")]
    options = ["-m", str(pack("sequence")), "--json", "--batch-tokens", "64"]
    done = subprocess.run(
        f"{shlex.join([*command, *options])} | head -c 5",
        shell=True, capture_output=True, timeout=LONG_S,
    )  # fmt: skip
    assert len(done.stdout) == 5
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


def test_a_bar_shows_a_person_how_many_texts_a_second(pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS)
    options = ("-m", str(pack("sequence")), "--batch-tokens", "64")
    terminal = Terminal(
        "classify", "-f", str(tmp_path / "a.txt"), *options, "-o", str(tmp_path / "out.jsonl"),
        streams="2",
    )  # fmt: skip
    assert terminal.close() == 0
    assert b"texts/s" in terminal.shown and b"60/60" in terminal.shown
    terminal = Terminal("classify", "-f", str(tmp_path / "a.txt"), *options, streams="12")
    assert terminal.close() == 0
    assert b"texts/s" not in terminal.shown  # it would spoil the results
    assert b"text number 59" in terminal.shown


def test_a_terminal_without_texts_is_told_to_give_some() -> None:
    terminal = Terminal("embed", streams="02")
    assert terminal.close() == 2
    assert b"no texts: give some" in terminal.shown
