"""The command as people call it: exit codes, streams, pipes, Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import warm
from conftest import edit_manifest
from warm import LONG_S

from bloomq.cli import commands

COMMANDS = tuple(commands.commands)


def run(*args: str, stdin: str | bytes = "", check: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `bloomq ARGS`; stdin is a pipe."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = warm.python("-m", "bloomq", *args, stdin=data)
    assert done.returncode == check, done.stderr
    return done


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line that begins with `error:`, which must be the last and the only one of its
    kind.
    """
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert lines[-1].startswith("error: ")
    return lines[-1]


def test_generate_streams_text_to_stdout_and_notes_to_stderr() -> None:
    done = run("generate", "Once upon a time", "-n", "12")
    assert done.stdout.strip()
    assert "bloomq" not in done.stdout
    assert "numba" in done.stderr
    assert "output 12" in done.stderr


def test_quiet_says_nothing_on_stderr() -> None:
    assert run("generate", "Once", "-n", "3", "-q").stderr == ""


def test_a_piped_prompt_equals_the_same_prompt_as_argument() -> None:
    by_argument = run("generate", "def main(", "-n", "8").stdout
    assert run("generate", "-n", "8", stdin="def main(\n").stdout == by_argument
    assert run("generate", "-", "-n", "8", stdin="def main(").stdout == by_argument


def test_json_holds_the_whole_generation() -> None:
    result = json.loads(run("generate", "Il était", "-n", "5", "--json").stdout)
    assert result["prompt"] == "Il était"
    assert len(result["ids"]) == len(result["logprobs"]) == 5
    assert result["finish_reason"] == "length"
    assert result["stats"]["generated_tokens"] == 5


def test_the_same_seed_gives_the_same_text() -> None:
    options = ("generate", "She", "-n", "10", "--temperature", "0.9", "--top-p", "0.9", "--seed")
    assert run(*options, "3").stdout == run(*options, "3").stdout
    assert run(*options, "3").stdout != run(*options, "4").stdout


def test_a_stop_string_ends_the_text_before_it() -> None:
    free = run("generate", "Once upon a time", "-n", "20").stdout.rstrip("\n")
    word = free.split()[2]
    assert (
        run("generate", "Once upon a time", "-n", "20", "--stop", word).stdout.rstrip("\n")
        == free[: free.index(word)]
    )


def test_reference_and_numba_write_the_same_text() -> None:
    options = ("generate", "The sea", "-n", "10", "--backend")
    assert run(*options, "reference").stdout == run(*options, "numba").stdout


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("generate", "a", "-m", "/no/such pack"), 1, "/no/such pack: no such pack"),
        (("generate", "a", "-m", "/etc/hostname"), 1, "is a file, expected the folder"),
        (("generate", "a", "-m", "/etc"), 1, "no manifest.json"),
        (("generate", ""), 2, "the prompt is empty"),
        (("generate", "a", "--temperature", "-1"), 2, "temperature is -1.0"),
        (("generate", "a", "--temperature", "nan"), 2, "temperature is nan"),
        (("generate", "a", "--top-p", "0"), 2, "top_p is 0.0"),
        (("generate", "a", "--top-k", "-1"), 2, "top_k is -1"),
        (("generate", "a", "--repetition-penalty", "0"), 2, "repetition_penalty is 0.0"),
        (("generate", "a", "-n", "0"), 2, "max_new_tokens is 0"),
        (("generate", "a", "--seed", "-1"), 2, "seed is -1"),
        (("generate", "a", "--stop", ""), 2, "at least one character"),
        (("generate", "a", "-t", "0"), 2, "threads is 0"),
        (("generate", "a", "-t", "9999"), 2, "threads is 9999"),
        (("generate", "a", "-c", "1"), 2, "context is 1"),
        (("generate", "a", "-n", "50", "-c", "20"), 1, "exceed the context of 20"),
        (("generate", "a", "--backend", "tpu"), 1, "unknown backend 'tpu'"),
        (("generate", "a", "--backend", "cuda"), 1, "backend cuda is not available"),
        (("convert", "/no/such", "/tmp/out"), 1, "/no/such: no such file or folder"),
        (("verify", "/no/such"), 1, "no such pack"),
        (("info", "/no/such"), 1, "no such pack"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_its_remedy(args: tuple[str, ...], code: int, says: str) -> None:
    done = run(*args, check=code)
    assert says in error_line(done)
    assert done.stdout == ""


@pytest.mark.parametrize("args", [("nonsense",), ("generate", "a", "--nope"), ("convert", "x")])
def test_wrong_usage_exits_with_2_and_says_how(args: tuple[str, ...]) -> None:
    done = run(*args, check=2)
    assert "Usage: bloomq" in done.stderr
    assert "Traceback" not in done.stderr


def test_stdin_that_is_no_text_is_refused() -> None:
    assert "not UTF-8 (byte 2)" in error_line(run("generate", stdin=b"ab\xff", check=2))


def test_a_terminal_without_a_prompt_is_told_to_give_one() -> None:
    parent, child = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "bloomq", "generate"], stdin=child, capture_output=True,
        timeout=LONG_S,
    )  # fmt: skip
    os.close(parent)
    os.close(child)
    assert done.returncode == 2
    assert b"no prompt" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_every_option(command: str) -> None:
    text = run(command, "--help").stdout
    assert text.startswith(f"Usage: bloomq {command}")
    for option in commands.commands[command].params:
        if isinstance(option, click.Option):
            assert option.help and option.help.split()[0] in text, option.name
            assert max(option.opts, key=len) in text


def test_convert_verify_info_and_generate_with_spaces_in_every_path(
    tmp_path: Path, demo_checkpoint: Path
) -> None:
    source, target = tmp_path / "a model", tmp_path / "my packs" / "a pack"
    shutil.copytree(demo_checkpoint, source)
    target.parent.mkdir()
    done = run("convert", str(source), str(target), "--scheme", "int8", "--json")
    assert json.loads(done.stdout)["pack"] == str(target)
    assert "match their checksums" in run("verify", str(target)).stdout
    facts = json.loads(run("info", str(target), "--json").stdout)
    assert facts["pack"]["schemes"] == "int8, embedding int8"
    assert facts["backends"]["numba"] == "available"
    assert facts["backends"]["cuda"].startswith("not available: ")
    assert run("generate", "Once", "-m", str(target), "-n", "4").stdout.strip()
    assert "already exists" in error_line(run("convert", str(source), str(target), check=1))
    run("convert", str(source), str(target), "--force")


def test_info_on_a_pipe_is_plain_text() -> None:
    text = run("info").stdout
    assert "bits per weight" in text
    assert "\x1b" not in text


def test_verify_finds_a_flipped_byte_and_names_the_array(
    tmp_path: Path, demo_checkpoint: Path
) -> None:
    run("convert", str(demo_checkpoint), str(tmp_path / "p"))
    shard = next((tmp_path / "p").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    line = error_line(run("verify", str(tmp_path / "p"), check=1))
    assert shard.name in line
    assert "does not match its checksum" in line


def test_the_converter_runs_as_a_script(tmp_path: Path, demo_checkpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bloomq.converters.hf", str(demo_checkpoint), str(tmp_path / "p")],
        capture_output=True, text=True, timeout=LONG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p" / "manifest.json").exists()


def test_warmup_says_that_it_is_ready() -> None:
    assert shell("BLOOMQ warmup").stdout.startswith("ready: numba")


def test_chat_answers_each_line_and_ends_with_its_input() -> None:
    done = run("chat", "-n", "6", stdin="Hello there\n\nAnd then?\n")
    assert done.stdout.count("\n") == 2
    assert "error" not in done.stderr


def test_chat_forgets_the_oldest_lines_when_the_context_is_full() -> None:
    lines = "".join(f"line number {i} of a long talk\n" for i in range(8))
    done = run("chat", "-n", "4", "-c", "40", stdin=lines)
    assert done.stdout.count("\n") == 8


def test_ctrl_c_keeps_the_text_and_exits_with_130() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "bloomq", "generate", "Once upon a time", "-n", "2000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    first = process.stdout.read(1)  # text is flowing
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LONG_S)
    assert process.returncode == 130
    assert (first + out).strip()
    assert b"ended by interrupted" in err
    assert b"Traceback" not in err


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -m bloomq generate 'Once upon a time' -n 500 | head -c 5",
        shell=True, capture_output=True, timeout=LONG_S,
    )  # fmt: skip
    assert len(done.stdout) == 5
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


# -- streams that are closed or full ---------------------------------------------------------------


def shell(command: str, stdin: bytes = b"") -> subprocess.CompletedProcess:
    """Run a shell command in which BLOOMQ is the command."""
    done = subprocess.run(
        ["sh", "-c", command.replace("BLOOMQ", f"{shlex.quote(sys.executable)} -m bloomq")],
        input=stdin, capture_output=True, timeout=LONG_S,
    )  # fmt: skip
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "lost sys.std" not in done.stderr
    return done


def test_a_closed_stdin_is_no_prompt_and_no_conversation() -> None:
    done = shell("BLOOMQ generate <&-")
    assert done.returncode == 2
    assert error_line(done) == "error: no prompt: give one as argument or on standard input"
    assert shell("BLOOMQ generate - -n 2 <&-").returncode == 2  # an empty prompt
    assert shell("BLOOMQ chat -n 2 <&-").returncode == 0


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
def test_text_comes_out_with_other_streams_closed(closed: str) -> None:
    expected = run("generate", "The sea", "-n", "4").stdout
    done = shell(f"BLOOMQ generate 'The sea' -n 4 {closed}")
    assert (done.returncode, done.stdout) == (0, expected)


@pytest.mark.parametrize(
    "command", ["generate a -n 2", "generate a -n 2 --json", "info", "info --json", "--help"]
)
@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_a_closed_stdout_is_no_traceback(command: str, closed: str) -> None:
    assert shell(f"BLOOMQ {command} {closed}").returncode == 0


def test_an_error_with_stderr_closed_still_has_its_exit_code() -> None:
    assert shell("BLOOMQ generate a -m /no/such 2>&-").returncode == 1
    assert shell("BLOOMQ generate '' 2>&-").returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("command", ["generate a -n 2 -q", "generate a -n 2 -q --json", "info"])
def test_a_full_disk_behind_stdout_is_one_line_and_exit_1(command: str) -> None:
    done = shell(f"BLOOMQ {command} > /dev/full")
    assert done.returncode == 1
    expected = "error: standard output cannot be written: No space left on device\n"
    assert done.stderr == expected


# -- chat ------------------------------------------------------------------------------------------


def test_chat_goes_on_after_a_line_that_is_too_long() -> None:
    done = run(
        "chat", "-n", "4", "-c", "40", stdin="Hello\n" + "too long " * 100 + "\nAgain\n", check=1
    )
    assert done.stdout.count("\n") == 2
    assert "new ones exceed the context of 40: shorten it" in done.stderr


def test_chat_that_is_no_text_is_an_error_of_ours() -> None:
    done = run("chat", "-n", "3", stdin=b"Hello\nab\xff\n", check=2)
    assert "standard input is not UTF-8 (byte 2): convert it" in error_line(done)
    assert done.stdout.count("\n") == 1  # the first line was answered


def test_a_last_line_without_its_end_is_answered_too() -> None:
    assert run("chat", "-n", "3", stdin="Hello").stdout.count("\n") == 1


class Terminal:
    """A terminal on which a command runs."""

    def __init__(self, *args: str, streams: str = "012") -> None:
        self._parent, child = pty.openpty()
        given = {name: child for at, name in zip("012", STREAMS, strict=True) if at in streams}
        pipes = {name: subprocess.PIPE for name in STREAMS if name not in given}
        self.process = subprocess.Popen([sys.executable, "-m", "bloomq", *args], **given, **pipes)
        os.close(child)
        self.shown = b""

    def wait_for(self, text: bytes) -> None:
        while text not in self.shown:
            assert self.read(), self.shown

    def wait_for_a_prompt(self) -> None:
        while not self.shown.endswith(b"> "):
            assert self.read(), self.shown
        self.wait_until_it_waits()

    def wait_until_it_waits(self) -> None:
        """Until its main thread has slept for a while, as it does while it waits for keys: input()
        misses a signal between its prompt and its waiting."""
        status, looks = Path(f"/proc/{self.process.pid}/stat"), 0
        if not status.exists():
            time.sleep(0.5)
        while looks < 5 and status.exists():
            time.sleep(0.01)
            asleep = status.read_text().rpartition(")")[2].split()[0] == "S"
            looks = looks + 1 if asleep else 0

    def read(self) -> bool:
        """Take what comes next; False at the end."""
        if not select.select([self._parent], [], [], LONG_S)[0]:
            self.process.kill()
            raise AssertionError(f"nothing more comes: {self.shown!r}")
        try:
            data = os.read(self._parent, 4096)
        except OSError:  # as Linux says that nobody has the terminal open any more
            data = b""
        self.shown += data
        return bool(data)

    def type(self, data: bytes) -> None:
        os.write(self._parent, data)

    def close(self) -> int:
        """Everything that comes until the command ends; its exit code."""
        while self.read():
            pass
        code = self.process.wait(timeout=LONG_S)
        os.close(self._parent)
        assert b"Traceback" not in self.shown
        return code


STREAMS = ("stdin", "stdout", "stderr")


def test_a_conversation_on_a_terminal_ends_with_ctrl_d(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    terminal = Terminal("chat", "-n", "5")
    terminal.wait_for_a_prompt()
    terminal.type(b"Hello\n")
    terminal.wait_for(b"Hello")
    terminal.wait_for_a_prompt()
    terminal.type(b"\x04")
    assert terminal.close() == 0


def test_a_path_that_looks_like_markup_is_a_path() -> None:
    done = run("info", "/tmp/a[/b]", check=1)
    assert error_line(done) == "error: /tmp/a[/b]: no such pack: make one with 'bloomq convert'"


@pytest.mark.parametrize("field", ["name", "format", "dtype"])
def test_control_codes_in_a_packs_provenance_are_shown_escaped(
    tmp_path: Path, field: str, pack_of: Callable[..., Path]
) -> None:
    pack = shutil.copytree(pack_of("int4"), tmp_path / "pack")
    evil = "a\x1b[2J\x9b31m\n[bold]b"
    edit_manifest(pack, lambda manifest: manifest["provenance"].update({field: evil}))
    done = run("info", str(pack))
    assert not {"\x1b", "\x9b"} & set(done.stdout)
    assert r"a\x1b[2J\x9b31m\n[bold]b" in done.stdout
    assert "Traceback" not in done.stderr
    assert evil in json.loads(run("info", str(pack), "--json").stdout)["pack"]["made from"]


@pytest.mark.parametrize("provenance", [None, [], "x", {}])
def test_a_provenance_of_another_kind_is_no_obstacle(
    tmp_path: Path, provenance: object, pack_of: Callable[..., Path]
) -> None:
    pack = shutil.copytree(pack_of("int4"), tmp_path / "pack")
    edit_manifest(pack, lambda manifest: manifest.update(provenance=provenance))
    expected = "None (None, None)" if provenance == {} else "not stated"
    assert json.loads(run("info", str(pack), "--json").stdout)["pack"]["made from"] == expected


# -- long prompts ----------------------------------------------------------------------------------

LONG_PROMPT = "The old man sat by the window. " * 200  # 8 tokens each


def test_a_prompt_of_1500_tokens_works_as_argument_and_on_stdin() -> None:
    by_argument = run("generate", LONG_PROMPT, "-n", "4", "--json")
    result = json.loads(by_argument.stdout)
    assert 1500 < result["stats"]["prompt_tokens"] < 2000
    assert len(result["ids"]) == 4
    assert f"prompt {result['stats']['prompt_tokens']} tokens" in by_argument.stderr
    piped = run("generate", "-n", "4", "--json", stdin=LONG_PROMPT)
    assert json.loads(piped.stdout)["ids"] == result["ids"]


def test_a_long_prompt_shows_a_bar_to_a_person() -> None:
    terminal = Terminal("generate", LONG_PROMPT, "-n", "2", streams="2")
    assert terminal.close() == 0
    assert b"reading the prompt" in terminal.shown
    assert b"output 2" in terminal.shown
    terminal = Terminal("generate", "short", "-n", "2", streams="2")
    assert terminal.close() == 0
    assert b"reading the prompt" not in terminal.shown
