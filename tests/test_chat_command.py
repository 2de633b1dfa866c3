"""`bloomq chat` as people use it, on a terminal and in a pipe, and colours by probability."""

from __future__ import annotations

import json
import math
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from test_cli import Terminal
from warm import LONG_S

import bloomq
from bloomq import console
from bloomq.chat.conversation import Conversation
from bloomq.cli import chat, colours, commands
from bloomq.cli.chat_commands import Session, run_command
from bloomq.cli.colours import SCALE, Painter, bracketed, coloured, legend
from bloomq.cli.generation_options import BREAKERS, bad_words, ids_with
from bloomq.cli.lines import Lines, as_entry, history, history_file
from bloomq.errors import BloomqError, InputNotFound, UsageError
from bloomq.language_model import Piece
from bloomq.sampling import Sampling

SHORT = ("chat", "-n", "6")


@pytest.fixture(autouse=True)
def _own_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def piped(*args: str, lines: tuple[str, ...] = ()) -> Result:
    """The command with lines as standard input, in this process."""
    return CliRunner().invoke(commands, args, input="".join(line + "\n" for line in lines))


def talk(*lines: str, options: tuple[str, ...] = ()) -> tuple[list[str], str]:
    """Answers, a line each, and what stderr says, of lines through a pipe."""
    done = piped(*SHORT, *options, lines=lines)
    assert done.exception is None, done.exception
    return done.stdout.splitlines(), done.stderr


# -- in a pipe -------------------------------------------------------------------------------------


def test_commands_work_in_a_pipe_and_say_nothing_on_stdout(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    answers, notes = talk(
        "Once upon a time", "/show", "/tokens", f"/save {file}", "/undo", "/show",
        f"/load {file}", "/help", "/set", "/quit", "never said",
    )  # fmt: skip
    assert len(answers) == 1
    assert f"user:\nOnce upon a time\nassistant:\n{answers[0]}\n" in notes
    assert " of 2048 tokens, and up to 6 for an answer" in notes
    assert f"saved: {file}" in notes
    assert "forgotten: Once upon a time" in notes
    assert "2 messages" in notes
    assert re.search(r"/regenerate +answer the last message again", notes)
    assert re.search(r"temperature +0.0\n", notes)
    assert re.search(r"max_new_tokens +6\nstop +\['\\n'\]", notes)
    assert [one["role"] for one in json.loads(file.read_text())["messages"]] == [
        "user",
        "assistant",
    ]
    assert "> " not in notes.replace("<", "")


def test_settings_change_what_follows() -> None:
    answers, notes = talk(
        "The sea", "/set temperature 1.5", "/set seed 3", "/set max-new-tokens 3", "/regenerate",
        "/regenerate", "/set seed off", "/set stop none", "/set",
    )  # fmt: skip
    assert len(set(answers)) == 3
    assert re.search(r"temperature +1.5\n", notes)
    assert re.search(r"seed +None\n", notes)
    assert re.search(r"max_new_tokens +3\n", notes)


def test_settings_may_be_parted_by_tabs_and_equal_signs() -> None:
    _, notes = talk("/set\ttop_k 3", "/set temperature=0.3", "/set\tseed = 5", "/set")
    assert re.search(r"temperature +0.3\n", notes)
    assert re.search(r"top_k +3\n", notes)
    assert re.search(r"seed +5\n", notes)


def test_off_gives_a_setting_its_usual_value() -> None:
    _, notes = talk(
        "/set top_k 3", "/set stop x", "/set top_k off", "/set max_new_tokens off", "/set stop off",
        "/set",
    )  # fmt: skip
    assert "error" not in notes
    assert re.search(r"top_k +0\n", notes)
    assert re.search(r"max_new_tokens +256\nstop +\['\\n'\]", notes)


@pytest.fixture
def session() -> Session:
    return Session(Conversation(bloomq.load()))


def settings(session: Session, *commands: str) -> Sampling:
    for command in commands:
        assert run_command(session, f"/set {command}") is None
    return session.talk.sampling


def test_dry_has_the_breakers_of_the_command_line(session: Session) -> None:
    usual = set(ids_with(BREAKERS, session.talk.model))
    assert settings(session, "dry_multiplier 0.8").dry_sequence_breakers == usual
    assert settings(session, "dry_sequence_breakers []").dry_sequence_breakers == set()
    assert settings(session, "dry_multiplier 0.9").dry_sequence_breakers == set()
    commas = set(ids_with([","], session.talk.model))
    assert settings(session, "dry_sequence_breakers ,").dry_sequence_breakers == commas
    found = settings(session, 'dry_sequence_breakers [7, ","]').dry_sequence_breakers
    assert found == {7, *commas}
    assert settings(session, "dry_multiplier off").dry_multiplier == 0


def test_settings_of_token_ids_take_texts(session: Session) -> None:
    model = session.talk.model
    words = bad_words(["sea", "5"], model)
    assert settings(session, 'bad_words ["sea", "5"]').bad_words == words
    assert settings(session, "bad_words sea").bad_words == bad_words(["sea"], model)
    assert settings(session, "bad_words [[3, 4]]").bad_words == ((3, 4),)
    assert settings(session, "bad_words off").bad_words == ()
    assert settings(session, "forced_prefix The").forced_prefix == tuple(model.prompt_ids("The"))
    assert settings(session, "forced_prefix [5, 6]").forced_prefix == (5, 6)
    order = "top_k,temperature,top_n_sigma,top_p,min_p,typical,xtc"
    assert settings(session, f"order {order}").order == tuple(order.split(","))


def test_a_list_of_settings_has_short_lines() -> None:
    _, notes = talk("/set dry_multiplier 0.8", "/set")
    line = next(line for line in notes.splitlines() if line.startswith("dry_sequence_breakers"))
    assert line.startswith("dry_sequence_breakers  frozenset({")
    assert line.endswith("...")
    assert len(line) < 100


def test_a_temperature_of_0_regenerates_the_same_and_says_so() -> None:
    answers, notes = talk("The sea", "/regenerate")
    assert answers[0] == answers[1]
    assert "temperature 0 gives the same answer: /set temperature 0.7" in notes


def test_edit_replaces_the_last_message() -> None:
    answers, notes = talk("The sea", "/edit Once upon a time", "/show")
    assert "The sea" not in notes
    assert answers[1] == talk("Once upon a time")[0][0]


def test_edit_alone_takes_the_next_line_and_changes_nothing_before() -> None:
    answers, notes = talk("The sea", "/edit", "/show", "/edit", "", "/show", "/edit", "A man")
    assert notes.count("user:\nThe sea\n") == 2
    assert answers[1:] == talk("A man")[0]
    assert "nothing to undo" not in notes


@pytest.mark.parametrize("text", ["a\nb", "a\\", '"""a', "/a", "/a\nb", "a", '"quoted"', 'a\n"""'])
def test_a_message_is_entered_again_as_it_was(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines()
    monkeypatch.setattr(lines, "_line", lambda prompt, start="": start)
    entry = lines.entry(as_entry(text))
    assert entry is not None
    assert entry == (f"/{text}" if text.startswith("/") else text)


def test_a_system_stands_before_the_turns() -> None:
    _, notes = talk("Hello", "/system Be brief.", "/show", "/system", "/show")
    assert notes.count("system:\nBe brief.") == 1
    _, notes = talk("Hello", "/show", options=("--system", "Be \x1b[2J kind"))
    assert "system:\nBe \\x1b[2J kind" in notes


def test_a_fork_is_left_with_back() -> None:
    _, notes = talk("One", "/fork", "Two", "/back", "/show", "/back")
    assert "Two" not in notes
    assert "this conversation was not forked: there is nothing to go back to" in notes


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/nope", "no command /nope: /help lists them, and // begins a message with /"),
        ("/etc/passwd is a file", "no command /etc/passwd"),
        ("/clear now", "/clear takes nothing, found 'now'"),
        ("/save", "/save lacks its FILE"),
        ("/save /no/such/folder/x", "/no/such/folder/x: cannot be written"),
        ("/load /no/such", "/no/such: no such file"),
        ("/load /etc/hostname", "/etc/hostname: is no "),
        ("/undo", "there is nothing to undo: nothing was said yet"),
        ("/edit x", "there is nothing to edit"),
        ("/set temperature", "/set temperature lacks a value"),
        ("/set temperature warm", "temperature is 'warm'"),
        ("/set temperature -1", "temperature is -1"),
        ("/set heat 1", "there is no setting heat: /set lists them"),
        ("/set max_new_token 3", "no setting max_new_token: /set lists them, such as max_new_tok"),
        ('/set bad_words [""]', "/set bad_words has an empty text, expected some characters"),
        ("/edit", "there is nothing to edit: nothing was said yet"),
        ("/save ~no-such-user-here/x/y", "cannot be written"),
        ("/set max_new_tokens 0", "max_new_tokens is 0"),
        ("/set stop [3]", "expected strings of at least one character"),
        ("/set seed [[[[", "seed is '[[[['"),
    ],
)
def test_a_wrong_command_is_one_line_and_ends_nothing(command: str, message: str) -> None:
    answers, notes = talk(command, "Hello")
    errors = [line for line in notes.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert len(errors[0]) < 150
    assert message in errors[0]
    assert len(answers) == 1


@pytest.mark.parametrize("stdin", ["/nope\nHello\n", "Hello\n/load /no/such", "/nope\n/quit\n"])
def test_in_a_pipe_a_line_that_failed_makes_the_exit_code_1(stdin: str) -> None:
    assert code_of(stdin) == 1


def test_in_a_pipe_the_exit_code_is_0_where_all_went_well() -> None:
    assert code_of("Hello\n\n/undo\n") == 0


def code_of(stdin: str, *options: str) -> object:
    """What the command returns, which `main` exits with."""
    found: list[object] = []
    runner = click.Command(
        "run",
        callback=lambda: found.append(chat.main([*SHORT[1:], *options], standalone_mode=False)),
    )
    done = CliRunner().invoke(runner, [], input=stdin)
    assert done.exception is None, done.exception
    return found[0]


def test_quiet_leaves_errors_and_what_commands_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        console, "is_terminal", lambda stream: getattr(stream, "name", "") == "<stderr>"
    )
    assert "tokens, " in piped(*SHORT, lines=("Hello",)).stderr
    assert piped(*SHORT, "-q", lines=("Hello", "/nope")).stderr.splitlines() == [
        "error: no command /nope: /help lists them, and // begins a message with /"
    ]


def test_two_slashes_begin_a_message_with_one() -> None:
    answers, notes = talk("//etc", "/show")
    assert len(answers) == 1
    assert "user:\n/etc\n" in notes


def test_lines_go_on_behind_a_backslash_and_in_blocks() -> None:
    answers, notes = talk("One\\", "two", '"""three', "", 'four"""', "/show", '"""five"""', "/show")
    assert len(answers) == 3
    assert "user:\nOne\ntwo\n" in notes
    assert "user:\nthree\n\nfour\n" in notes
    assert "user:\nfive\n" in notes
    assert len(talk('"""a block without an end', "still")[0]) == 1
    assert len(talk("a line that goes on\\")[0]) == 1


def test_a_saved_conversation_goes_on_with_its_settings(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    talk("Hello", "/set top_k 7", "/set temperature 0.5", f"/save {file}")
    _, notes = talk("And?", "/show", "/set", options=("--load", str(file), "--temperature", "0.9"))
    assert "Hello" in notes
    assert re.search(r"top_k +7\n", notes)
    assert re.search(r"temperature +0.9\n", notes)
    assert re.search(r"max_new_tokens +6\n", notes)


def test_options_count_with_their_usual_values_too(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    talk(
        "Hello", "/system Be brief.", "/set temperature 0.5", "/set top_k 7", "/set seed 3",
        "/set max_new_tokens 9", "/set stop x", "/set dry_multiplier 0.8",
        "/set dry_sequence_breakers [5]", f"/save {file}",
    )  # fmt: skip
    options = ("--load", str(file), "--temperature", "0", "--dry-multiplier", "0.5", "--system", "")
    done = piped("chat", *options, "-n", "256", lines=("/set", "/show"))
    assert re.search(r"temperature +0.0\n", done.stderr)
    assert re.search(r"top_k +7\n", done.stderr)
    assert re.search(r"seed +3\n", done.stderr)
    assert re.search(r"max_new_tokens +256\nstop +\['x'\]", done.stderr)
    assert re.search(r"dry_multiplier +0.5\n", done.stderr)
    assert "frozenset({5})" in done.stderr
    assert "system:" not in done.stderr
    options = ("--load", str(file), "--dry-breaker", ",", "--stop", "y")
    done = piped("chat", *options, lines=("/set",))
    assert re.search(r"max_new_tokens +9\nstop +\['y'\]", done.stderr)
    assert re.search(r"dry_sequence_breakers +frozenset\(\{\d", done.stderr)
    assert "frozenset({5})" not in done.stderr


def test_dry_begun_by_an_option_has_its_breakers(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    talk("Hello", f"/save {file}")
    options = ("--load", str(file), "--dry-multiplier", "0.5")
    again = tmp_path / "again.json"
    talk(f"/save {again}", options=options)
    saved = json.loads(again.read_text())["settings"]["sampling"]
    model = bloomq.load()
    assert saved == {"dry_multiplier": 0.5, "dry_sequence_breakers": [*ids_with(BREAKERS, model)]}


def test_file_names_may_be_quoted(tmp_path: Path) -> None:
    for quote in ("'", '"'):
        file = tmp_path / f"my chat{ord(quote)}.json"
        _, notes = talk("Hello", f"/save {quote}{file}{quote}", f"/load\t{quote}{file}{quote}")
        assert f"saved: {file}\n" in notes
        assert "2 messages" in notes


def test_a_template_that_is_not_kept_or_another_is_said(tmp_path: Path) -> None:
    file, template = tmp_path / "talk.json", tmp_path / "t.jinja"
    template.write_text("{{ messages[-1].content }} ")
    _, notes = talk(f"/save {file}", options=("--template", str(template)))
    assert f"without its template: --template {template} has it again" in notes
    _, notes = talk(f"/save {file}", options=("--template", "belle"))
    assert "without its template" not in notes
    expected = f"warning: {file}: was saved with the template belle, and goes on with bloomz"
    assert expected in talk(f"/load {file}")[1]
    assert expected in talk(options=("--load", str(file)))[1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--load", "/no/such"), InputNotFound, "/no/such: no such file"),
        (("--load", "/etc/hostname"), UsageError, "/etc/hostname: is no "),
        (("--template", "/no/such"), UsageError, "template '/no/such' is no file, and none of blo"),
        (("--temperature", "-1"), UsageError, "temperature is -1.0"),
        (("-n", "0"), UsageError, "max_new_tokens is 0"),
        (("--stop", ""), UsageError, "at least one character"),
    ],
)
def test_wrong_options_end_the_command_before_it_begins(
    options: tuple[str, ...], error: type[BloomqError], message: str
) -> None:
    done = piped("chat", *options, lines=("Hello",))
    assert isinstance(done.exception, error)
    assert message in str(done.exception)
    assert done.stdout == ""


def test_a_template_file_is_used(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    plain = piped("generate", "Once upon a time ", "-n", "6", "-q").stdout
    options = ("--template", str(tmp_path / "t.jinja"))
    assert talk("Once upon a time", options=options)[0] == [plain.strip()]
    (tmp_path / "t.jinja").write_text("{{ raise_exception('only in Latin') }}")
    assert talk("Once", "Twice", options=options)[1].count("cannot write this: only in Latin") == 2


def test_ctrl_c_in_a_pipe_ends_the_command_and_keeps_the_text() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "bloomq", "chat", "-n", "1500", "--stop", "zzz"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"Once upon a time\nAgain\n")
    process.stdin.flush()
    first = process.stdout.read(200)  # text is flowing
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LONG_S)
    assert process.returncode == 130
    assert (first + out).endswith(b"\n")
    assert b"Traceback" not in err


# -- on a terminal ---------------------------------------------------------------------------------


class Chat(Terminal):
    """`bloomq chat` on a terminal."""

    def say(self, line: str) -> None:
        """Type a line, and wait for the prompt behind what it gives."""
        self.type(line.encode() + b"\n")
        self.read_until_prompt()

    def read_until_prompt(self) -> None:
        self.shown += b"|"  # not the prompt that is there already
        self.wait_for_a_prompt()

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    @property
    def plain(self) -> bytes:
        """What was shown, without what makes it dim or bold."""
        return re.sub(rb"\x1b\[[\d;]*m", b"", self.shown)

    def take_away(self, typed: bytes) -> None:
        """Type this, and Ctrl-C; wait for the next prompt."""
        self.type(typed)
        self.wait_for(typed)
        self.shown = b""
        self.wait_until_it_waits()
        self.interrupt()
        self.wait_for(b"Ctrl-C again, or Ctrl-D, leaves")
        self.wait_for_a_prompt()


def test_on_a_terminal_answers_have_their_rate_and_messages_can_be_edited() -> None:
    chat = Chat(*SHORT)
    chat.wait_for(b"template bloomz; /help lists commands, Ctrl-D leaves")
    chat.wait_for_a_prompt()
    chat.say("Once upon")
    assert b"6 tokens, " in chat.shown
    assert b"ended by length" in chat.shown
    chat.type(b"/edit\n")
    chat.wait_for(b"> Once upon")
    chat.say(" a time")
    chat.say("/show")
    assert b"Once upon a time\r\n" in chat.shown
    chat.type(b"/quit\n")
    assert chat.close() == 0


def test_ctrl_c_ends_an_answer_and_then_the_conversation() -> None:
    chat = Chat("chat", "-n", "1900", "--stop", "zzz")
    chat.wait_for_a_prompt()
    chat.type(b"Once upon a time\n")
    chat.wait_for(b"Once upon a time\r\n")
    while len(chat.shown) < 600:  # text is flowing
        assert chat.read()
    chat.interrupt()
    chat.wait_for(b"ended by interrupted")
    chat.wait_for_a_prompt()
    chat.say("/show")
    assert b"assistant:" in chat.shown
    chat.interrupt()
    assert chat.close() == 130


def test_ctrl_c_with_something_typed_takes_that_away_first() -> None:
    chat = Chat(*SHORT)
    chat.wait_for_a_prompt()
    for number in (b"one", b"two"):
        chat.take_away(b"half a line " + number)
    chat.interrupt()
    assert chat.close() == 130


def test_ctrl_c_takes_a_block_and_a_line_that_goes_on_away() -> None:
    chat = Chat(*SHORT)
    chat.wait_for_a_prompt()
    for begun in (b'"""', b"a line\\"):
        chat.type(begun + b"\n")
        chat.wait_for(b"\n. ")
        chat.wait_until_it_waits()
        chat.take_away(b"")
    chat.say("/show")
    assert b"user:" not in chat.shown
    chat.interrupt()
    assert chat.close() == 130


def test_editing_keeps_lines_and_ctrl_c_leaves_all_as_it_was() -> None:
    chat = Chat(*SHORT)
    chat.wait_for_a_prompt()
    chat.say('"""one\ntwo"""')
    chat.type(b"/edit\n")
    chat.wait_for(b'> """one')
    chat.wait_for(b'two"""')
    chat.take_away(b"")
    chat.say("/show")
    assert b"user:\r\none\r\ntwo\r\nassistant:" in chat.plain
    chat.shown = b""  # what is waited for has been there before
    chat.type(b"/edit\n")
    chat.wait_for(b"leaves it\x1b[0m")
    chat.wait_for(b'two"""')
    chat.wait_until_it_waits()  # behind what readline has filled in
    chat.type(b"\x7f\x7f\x7f and more\n")  # without the quotes at the end: the block goes on
    chat.wait_for(b"\n. ")
    chat.say('three"""')
    chat.say("/show")
    assert b"user:\r\none\r\ntwo and more\r\nthree\r\nassistant:" in chat.plain
    chat.type(b"\x04")
    assert chat.close() == 0


def test_without_colours_a_terminal_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    chat = Chat(*SHORT)
    chat.wait_for_a_prompt()
    chat.say("Hello")
    chat.say("/show")
    chat.type(b"\x04")
    assert chat.close() == 0
    assert b"user:\r\n" in chat.shown
    styled = rb"\x1b\[[1-9]"  # at its end numba's colorama resets what may be set
    assert not re.search(styled, chat.shown)
    assert not re.search(styled, shown_by("info"))
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not re.search(styled, shown_by("info"))
    monkeypatch.setenv("TERM", "xterm")
    assert b"\x1b[1m" in shown_by("info")


def shown_by(*args: str) -> bytes:
    terminal = Terminal(*args)
    assert terminal.close() == 0
    return terminal.shown


def test_lines_are_remembered_for_the_user_alone() -> None:
    file = history_file()
    file.parent.mkdir(parents=True)
    file.write_text("said last week\n")
    chat = Chat(*SHORT)
    chat.wait_for_a_prompt()
    chat.say("a line to remember")
    chat.type(b"\x1b[A\x1b[A")  # two lines up
    chat.wait_for(b"said last week")
    chat.type(b"\x15\x04")
    assert chat.close() == 0
    assert file.read_text().splitlines()[-2:] == ["said last week", "a line to remember"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_without_a_place_for_the_history_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(console, "is_terminal", lambda stream: True)
    for place in (tmp_path / "file", tmp_path / "a\0b", Path("/proc/none")):
        monkeypatch.setattr("bloomq.cli.lines.history_file", lambda place=place: place / "history")
        with history(Lines()):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_with_stdout_in_a_file_the_prompt_goes_to_stderr() -> None:
    chat = Chat(*SHORT, streams="02")
    chat.wait_for(b"> ")
    time.sleep(0.5)
    chat.type(b"Once upon a time\n")
    chat.wait_for(b"6 tokens, ")
    chat.type(b"\x04")
    assert chat.process.stdout is not None
    text = chat.process.stdout.read().decode()
    assert chat.close() == 0
    assert text.count("\n") == 1
    assert "> " not in text


def test_input_that_is_no_text_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "is_terminal", lambda stream: True)
    lines = Lines()

    def entered(prompt: str) -> str:
        return b"ab\xff".decode()

    monkeypatch.setattr("builtins.input", entered)
    with pytest.raises(UsageError, match=r"the terminal's input is no UTF-8 \(byte 2\)"):
        lines.entry()


# -- colours ---------------------------------------------------------------------------------------


def luminance(colour: int) -> float:
    """Of one of the 216 colours of a terminal's cube. Source: WCAG 2.1, relative luminance."""
    steps = (0, 95, 135, 175, 215, 255)
    at = colour - 16
    parts = [steps[i] / 255 for i in (at // 36, at // 6 % 6, at % 6)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_colour_reads_on_black_and_on_white() -> None:
    for _, colour, _ in SCALE:
        light = luminance(colour) + 0.05
        assert light / 0.05 >= 3
        assert 1.05 / light >= 3


def test_a_colour_says_how_likely_a_token_was() -> None:
    assert coloured("a", 0.95) == "\x1b[38;5;33ma\x1b[0m"
    assert coloured("a", 0.0) == "\x1b[38;5;166m\x1b[4ma\x1b[0m"
    assert coloured("a", math.nan) == coloured("a", 0.0)
    assert coloured("", 0.5) == ""
    assert len({coloured("a", p) for p in (1, 0.89, 0.49, 0.19, 0.04)}) == 5
    assert re.sub(r"\x1b\[[\d;]*m", "", legend()) == "probability: 90% and more  50%  20%  5%  less"
    assert bracketed(" upon\n", 0.987) == " upon[0.99]\n"
    assert bracketed("\n", 0.5) == "[0.50]\n"


def test_text_that_waited_has_the_product_of_its_tokens() -> None:
    painter = Painter(colours=False)
    half = math.log(0.5)
    assert painter.paint(Piece("a", 1, half)) == "a[0.50]"
    assert painter.paint(Piece("", 2, half)) == ""
    assert painter.paint(Piece("é", 3, half)) == "é[0.25]"
    assert painter.paint(Piece("", 4, half)) == ""
    assert painter.rest("held") == "held[0.50]"
    assert Painter(colours=False).rest("") == ""
    assert Painter(colours=True).paint(Piece("a", 1, 1e-9)) == coloured("a", 1.0)


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "is_terminal", lambda stream: True)
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert colours.colours_shown()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours.colours_shown()
    monkeypatch.setenv("NO_COLOR", "")
    assert colours.colours_shown()
    monkeypatch.setenv("TERM", "dumb")
    assert not colours.colours_shown()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "is_terminal", lambda stream: False)
    assert not colours.colours_shown()


def test_show_probs_in_a_pipe_puts_them_in_brackets() -> None:
    plain = talk("Once upon a time")[0][0]
    shown = talk("Once upon a time", options=("--show-probs",))[0][0]
    assert "\x1b" not in shown
    assert re.sub(r"\[[01]\.\d\d\]", "", shown) == plain
    assert len(re.findall(r"\[[01]\.\d\d\]", shown)) >= 6
