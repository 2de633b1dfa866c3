"""A conversion that is killed, interrupted or out of disk leaves no plausible pack, and the next
one completes. (How much it saves the next one is for test_resume.)

Conversions run in forks of one warm process, so that each costs a tenth of a second. In a fork, a
"step" is anything the converter does to the file system (Python's audit events, fsync, each write
of a piece): killing at step n, for n spread over the run, hits between files and inside them.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from bloomq.converters.convert import convert
from conftest import write_checkpoint

from bloomq import pack_writer, taken_folder
from bloomq.errors import OutputError, PackError
from bloomq.journal import JOURNAL
from bloomq.pack import Pack

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and POSIX signals")
KILLED, INTERRUPTED = -signal.SIGKILL, 130

SERVER = """
import json, os, signal, sys, threading, time
from pathlib import Path
from bloomq import pack_writer, weight_files, taken_folder
from bloomq.converters.convert import convert
from bloomq.errors import BloomqError

weight_files.SHARD_BYTES = 60_000  # several files even of a tiny model
steps, lock = 0, threading.Lock()

def step(kill_at, signal_number):
    global steps
    with lock:
        steps += 1
        now = steps
    if now == kill_at:
        os.kill(os.getpid(), signal_number)

def watch(kill_at, signal_number):
    def hook(event, args):
        if event == "open" or event.startswith(("os.", "shutil.")):
            step(kill_at, signal_number)
    def counted(function):
        def wrapper(*args):
            step(kill_at, signal_number)
            result = function(*args)
            step(kill_at, signal_number)
            return result
        return wrapper
    weight_files.PackWriter.write = counted(weight_files.PackWriter.write)
    os.fsync = counted(os.fsync)
    sys.addaudithook(hook)

def child(job):
    def progress(done, total):
        if job.get("wait_for"):
            Path(job["started"]).touch()
            while not Path(job["wait_for"]).exists():
                time.sleep(0.005)
    weight_files._COMMIT_BYTES = job.get("commit_bytes", weight_files._COMMIT_BYTES)
    if "kill_at" in job:
        watch(job["kill_at"], job["signal"])
    convert(job["source"], job["target"], force=job.get("force", False), progress=progress)
    if "report" in job:
        Path(job["report"]).write_text(str(steps))

def run(job):
    code = 1
    try:
        child(job)
        code = 0
    except BloomqError as error:
        Path(job["message"]).write_text(str(error))
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        Path(job["message"]).write_text(repr(error))
        code = 99
    finally:
        os._exit(code)

convert(*sys.argv[1:])  # compiles, here and not in every fork
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        run(job)
    if "after_s" in job:
        time.sleep(job["after_s"])
        os.kill(pid, job["signal"])
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Converter:
    """Runs conversions of one checkpoint in forks of a warm process."""

    def __init__(self, source: Path, scratch: Path) -> None:
        self.source = source
        self.message = scratch / "message"
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER, source, scratch / "warm"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"

    def start(self, target: Path, **job: Any) -> None:
        job |= {"source": str(self.source), "target": str(target), "message": str(self.message)}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()

    def exit_code(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())

    def run(self, target: Path, **job: Any) -> int:
        self.start(target, **job)
        return self.exit_code()

    def close(self) -> None:
        self._server.communicate()


@pytest.fixture(scope="module")
def converter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Converter]:
    folder = tmp_path_factory.mktemp("durability")
    source = write_checkpoint(folder / "checkpoint", n_layer=4, vocab_size=1000)
    (source / "tokenizer.json").write_bytes(b'{"sham": true}')
    running = Converter(source, folder)
    yield running
    running.close()


@pytest.fixture(scope="module")
def undisturbed(
    converter: Converter, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], int, float]:
    """What an undisturbed run writes, how many steps it takes, and how many seconds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    steps = folder / "steps"
    started = time.perf_counter()
    assert converter.run(folder / "pack", kill_at=-1, signal=0, report=str(steps)) == 0
    return contents(folder / "pack"), int(steps.read_text()), time.perf_counter() - started


def contents(pack: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in pack.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_whole_or_absent(folder: Path, expected: dict[str, bytes]) -> None:
    """No pack, or the whole pack; and what a kill left beside it passes for no other."""
    assert set(names(folder)) <= {"pack", ".pack.partial"}
    if (folder / "pack").exists():
        assert contents(folder / "pack") == expected
    partial = folder / ".pack.partial"
    if not partial.exists():
        return
    found = contents(partial)
    found.pop(JOURNAL, None)
    if found != expected:
        with pytest.raises(PackError):
            Pack.open(partial)


# -- SIGKILL ---------------------------------------------------------------------------------------


def test_undisturbed_run_has_several_files_and_many_steps(undisturbed):
    expected, steps, _ = undisturbed
    shards = [name for name in expected if name.endswith(".safetensors")]
    assert len(shards) >= 3
    assert {"manifest.json", "tokenizer.json"} < set(expected)
    assert steps > 150


def test_kill_at_any_step_leaves_a_whole_pack_or_none(converter, undisturbed, tmp_path):
    """20 kills over the run, and each of the last 12 steps, where the pack becomes visible."""
    expected, steps, _ = undisturbed
    killed = 0
    for kill_at in [*range(1, steps - 12, steps // 20), *range(steps - 12, steps + 1)]:
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        killed += converter.run(folder / "pack", kill_at=kill_at, signal=signal.SIGKILL) == KILLED
        assert_whole_or_absent(folder, expected)
        if not (folder / "pack").exists():
            assert converter.run(folder / "pack") == 0
        assert names(folder) == ["pack"]
        assert contents(folder / "pack") == expected
    assert killed >= 28


def test_kill_at_any_moment_leaves_a_whole_pack_or_none(converter, undisturbed, tmp_path):
    """12 kills by the clock, each upon what the last one left."""
    expected, _, seconds = undisturbed
    killed = 0
    for i in range(12):
        after = seconds * (i + 0.5) / 12
        code = converter.run(tmp_path / "pack", after_s=after, signal=signal.SIGKILL)
        killed += code == KILLED
        assert code in (0, KILLED)
        assert_whole_or_absent(tmp_path, expected)
        if (tmp_path / "pack").exists():  # it was done before, or at the last moment
            shutil.rmtree(tmp_path / "pack")
    assert converter.run(tmp_path / "pack") == 0
    Pack.open(tmp_path / "pack").verify()
    assert names(tmp_path) == ["pack"]
    assert contents(tmp_path / "pack") == expected
    assert killed >= 1


def test_kill_while_replacing_a_pack_never_leaves_half_of_one(converter, undisturbed, tmp_path):
    """--force, each of the last 20 steps: old or new, at its place or just moved aside."""
    expected, _, _ = undisturbed
    old = tmp_path / "old"
    convert(converter.source, old, scheme="int8")
    shutil.copytree(old, tmp_path / "count")
    job = {"force": True, "signal": signal.SIGKILL}
    report = tmp_path / "steps"
    assert converter.run(tmp_path / "count", kill_at=-1, report=str(report), **job) == 0
    last = int(report.read_text())
    for kill_at in range(last - 20, last + 1):
        folder = tmp_path / str(kill_at)
        shutil.copytree(old, folder / "pack")
        assert converter.run(folder / "pack", kill_at=kill_at, **job) in (KILLED, 0)
        assert set(names(folder)) <= {"pack", ".pack.partial", ".pack.old"}
        visible = folder / "pack"
        found = contents(visible if visible.exists() else folder / ".pack.old")
        assert found in (contents(old), expected)
        assert converter.run(folder / "pack", force=True) == 0
        assert names(folder) == ["pack"]
        assert contents(folder / "pack") == expected


# -- Ctrl-C ----------------------------------------------------------------------------------------


def test_interrupt_keeps_its_work_and_shows_no_pack(converter, undisturbed, tmp_path):
    """Each upon what the last one left."""
    expected, steps, _ = undisturbed
    interrupted = 0
    for at in range(steps // 5, steps - 20, steps // 12):
        code = converter.run(tmp_path / "pack", kill_at=at, signal=signal.SIGINT)
        if code == 0:  # the work of the others left fewer steps
            shutil.rmtree(tmp_path / "pack")
            continue
        assert code == INTERRUPTED
        assert_whole_or_absent(tmp_path, expected)
        interrupted += 1
    assert interrupted >= 2
    assert converter.run(tmp_path / "pack") == 0
    assert names(tmp_path) == ["pack"]
    assert contents(tmp_path / "pack") == expected


def test_interrupt_while_replacing_keeps_the_old_pack(converter, undisturbed, tmp_path):
    expected, steps, _ = undisturbed
    convert(converter.source, tmp_path / "pack", scheme="int8")
    old = contents(tmp_path / "pack")
    job = {"force": True, "kill_at": steps // 2, "signal": signal.SIGINT}
    assert converter.run(tmp_path / "pack", **job) == INTERRUPTED
    assert names(tmp_path) == [".pack.partial", "pack"]
    assert contents(tmp_path / "pack") == old
    assert converter.run(tmp_path / "pack", force=True) == 0
    assert names(tmp_path) == ["pack"]
    assert contents(tmp_path / "pack") == expected


def test_interrupt_before_the_lock_is_held_leaves_nothing(converter, tmp_path, monkeypatch):
    def interrupted(*args: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(taken_folder, "_lock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(converter.source, tmp_path / "pack")
    assert names(tmp_path) == []


# -- two at once -----------------------------------------------------------------------------------


def test_second_conversion_to_one_target_is_told_to_wait(converter, undisturbed, tmp_path):
    expected, _, _ = undisturbed
    started, go = tmp_path / "started", tmp_path / "go"
    target = tmp_path / "out" / "pack"
    converter.start(target, started=str(started), wait_for=str(go))
    deadline = time.monotonic() + 30
    while not started.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for force in (False, True):
        with pytest.raises(OutputError) as caught:
            convert(converter.source, target, force=force)
        assert str(caught.value) == f"{target}: another conversion is writing it: wait for it"
    go.touch()
    assert converter.exit_code() == 0
    assert names(target.parent) == ["pack"]
    assert contents(target) == expected


def test_lock_of_a_killed_conversion_is_gone(converter, undisturbed, tmp_path):
    expected, steps, _ = undisturbed
    job = {"kill_at": steps // 2, "signal": signal.SIGKILL}
    assert converter.run(tmp_path / "pack", **job) == KILLED
    assert names(tmp_path) == [".pack.partial"]
    assert converter.run(tmp_path / "pack") == 0
    assert contents(tmp_path / "pack") == expected


# -- full disk -------------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system in memory at `folder`; skips where mounting is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"cannot mount a tmpfs: {error}")
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_that_is_too_small_is_refused_up_front(converter, tmp_path):
    with mounted(tmp_path / "disk", "size=100k") as disk:
        with pytest.raises(OutputError) as caught:
            convert(converter.source, disk / "pack", scheme="f32")
        assert str(caught.value) == (
            f"{disk / 'pack'}: needs 1.1 MB, 0.1 MB are free: free some space or choose another "
            "disk"
        )
        assert names(disk) == []


def test_disk_that_fills_up_meanwhile_leaves_no_pack(converter, undisturbed, tmp_path, monkeypatch):
    """The check up front is made to pass, as when someone else fills the disk during the run."""
    plenty = type("Usage", (), {"free": 1 << 40})
    monkeypatch.setattr(pack_writer.shutil, "disk_usage", lambda path: plenty)
    expected, _, _ = undisturbed
    sizes = ("4k", "40k", "160k")  # the last one lacks room for the manifest alone
    for size in sizes:
        with mounted(tmp_path / size, f"size={size}") as disk:
            with pytest.raises(OutputError) as caught:
                convert(converter.source, disk / "pack")
            message = f"{disk / 'pack'}: disk full: free some space, then run it again"
            assert str(caught.value) == message
            assert_whole_or_absent(disk, expected)
            subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
            assert converter.run(disk / "pack") == 0
            assert contents(disk / "pack") == expected


def test_full_disk_keeps_the_pack_it_was_to_replace(converter, tmp_path, monkeypatch):
    plenty = type("Usage", (), {"free": 1 << 40})
    monkeypatch.setattr(pack_writer.shutil, "disk_usage", lambda path: plenty)
    with mounted(tmp_path / "disk", "size=600k") as disk:
        convert(converter.source, disk / "pack", scheme="int4")
        with pytest.raises(OutputError, match="disk full"):
            convert(converter.source, disk / "pack", scheme="f32", force=True)
        assert ".pack.old" not in names(disk)
        Pack.open(disk / "pack").verify()


def test_disk_that_cannot_be_written_is_refused(converter, tmp_path):
    with mounted(tmp_path / "disk", "size=1m,ro") as disk:
        with pytest.raises(OutputError) as caught:
            convert(converter.source, disk / "pack")
        expected = f"{disk / 'pack'}: cannot be written: Read-only file system"
        assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "disk full: free some space, then run it again"),
        (errno.EDQUOT, "disk full: free some space, then run it again"),
        (errno.EIO, "cannot be written: Input/output error"),
    ],
)
def test_error_of_the_disk_itself_leaves_nothing(converter, tmp_path, monkeypatch, number, message):
    """Where mounting is not allowed, this is all that is tested: the flush fails."""

    def fsync(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError) as caught:
        convert(converter.source, tmp_path / "pack")
    assert str(caught.value) == f"{tmp_path / 'pack'}: {message}"
    assert names(tmp_path) == []


def test_closing_a_file_on_a_full_disk_does_not_hide_the_first_error(
    converter, tmp_path, monkeypatch
):
    """What a file still holds in memory cannot be written at its close either."""

    class Stubborn:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "full")

        def close(self) -> None:
            self._file.close()
            raise OSError(errno.EIO, "worse")

    really_open = Path.open

    def open_file(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = really_open(path, mode, *args, **options)
        return Stubborn(file) if path.name.startswith("weights-") else file

    monkeypatch.setattr(Path, "open", open_file)
    with pytest.raises(OutputError) as caught:
        convert(converter.source, tmp_path / "pack")
    expected = f"{tmp_path / 'pack'}: disk full: free some space, then run it again"
    assert str(caught.value) == expected
    assert names(tmp_path) == []
