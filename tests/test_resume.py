"""An interrupted conversion goes on where it was, and ends in the same bytes.

Runs are killed in forks of a warm process (test_durability's), at instants drawn from a seed;
BLOOMQ_KILLS asks for more of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm
from bloomq.converters.convert import convert, run
from bloomq.converters.pieces import Piece, round_to_nearest
from bloomq.converters.plan import make_plan
from bloomq.converters.source import Checkpoint, SourceTensor
from conftest import write_checkpoint
from test_durability import KILLED, Converter, contents, names

from bloomq import pack_writer, weight_files
from bloomq.config import weight_specs
from bloomq.errors import CheckpointError, NumericError, OutputError
from bloomq.journal import JOURNAL, Journal, read_journal
from bloomq.pack import MANIFEST, Pack
from bloomq.pack_writer import kept_work, partial_folder
from bloomq.schemes import Scheme

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and POSIX signals")
KILLS = int(os.environ.get("BLOOMQ_KILLS", "8"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", n_layer=3, vocab_size=300)


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight is flushed and named by itself."""
    monkeypatch.setattr(weight_files, "_COMMIT_BYTES", 1)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run writes of `source`, wherever it lies."""
    folder = tmp_path_factory.mktemp("undisturbed")
    convert(write_checkpoint(folder / "checkpoint", n_layer=3, vocab_size=300), folder / "pack")
    return contents(folder / "pack")


class Stop:
    """A progress callback that raises behind so much of the source, and counts its calls."""

    def __init__(self, share: float = 2.0, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.share, self.error, self.seen = share, error, [0]

    def __call__(self, done: int, total: int) -> None:
        self.seen.append(done)
        if done >= self.share * total:
            raise self.error


def stopped(source: Path, target: Path, share: float = 0.5, **options: Any) -> None:
    """A run that Ctrl-C ends there."""
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, progress=Stop(share), **options)


# -- kill -9 ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Converter]:
    folder = tmp_path_factory.mktemp("resume")
    source = write_checkpoint(folder / "checkpoint", n_layer=6, vocab_size=4000)
    (source / "tokenizer.json").write_bytes(b'{"sham": true}')
    running = Converter(source, folder)
    yield running
    running.close()


def test_kills_at_random_instants_cost_no_byte(converter, tmp_path):
    """Each upon what the ones before left, until a run gets through; then from the start."""
    rng = random.Random(1)
    started = time.perf_counter()
    assert converter.run(tmp_path / "undisturbed", commit_bytes=1) == 0
    seconds = time.perf_counter() - started
    expected = contents(tmp_path / "undisturbed")
    target, killed, went_on = tmp_path / "out" / "pack", 0, 0
    while killed < KILLS:
        left = len(read_journal(partial_folder(target))[1])
        after = rng.uniform(0, seconds)
        code = converter.run(target, after_s=after, signal=signal.SIGKILL, commit_bytes=1)
        killed += code == KILLED
        went_on += bool(left)
        assert code in (0, KILLED)
        if target.exists():
            assert contents(target) == expected
            shutil.rmtree(target)
        if partial_folder(target).exists() and rng.random() < 0.3:
            assert converter.run(target) == 0
            assert contents(target) == expected
            shutil.rmtree(target)
    assert converter.run(target) == 0
    assert names(target.parent) == ["pack"]
    assert contents(target) == expected
    assert went_on
    print(f"{killed} kills, {went_on} runs that went on from another's work")


# -- Ctrl-C ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("commits")
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 1.0])
def test_interrupted_run_is_continued_and_gives_the_same_bytes(source, expected, tmp_path, share):
    target = tmp_path / "out" / "pack"
    stopped(source, target, share)
    assert names(target.parent) == [".pack.partial"]
    assert kept_work(target)
    seen = Stop()
    done = convert(source, target, progress=seen)
    assert done.resumed_bytes > 0
    assert seen.seen[1] == done.resumed_bytes  # the bar begins there
    assert seen.seen[-1] == done.source_bytes
    assert "an interrupted run had done " in done.notes[-1]
    assert names(target.parent) == ["pack"]
    assert contents(target) == expected


def test_interrupt_names_what_is_whole_even_where_no_commit_was_due(source, expected, tmp_path):
    stopped(source, tmp_path / "pack")
    done = convert(source, tmp_path / "pack")
    assert done.resumed_bytes > 0.3 * done.source_bytes
    assert contents(tmp_path / "pack") == expected


@pytest.mark.usefixtures("commits")
def test_second_interrupt_keeps_the_work_too(source, expected, tmp_path, monkeypatch):
    def again(self: Any) -> None:
        if self._open is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(weight_files.PackWriter, "_close_shard", again)
    stopped(source, tmp_path / "pack", 0.9)
    monkeypatch.undo()
    assert kept_work(tmp_path / "pack")
    assert convert(source, tmp_path / "pack").resumed_bytes > 0
    assert contents(tmp_path / "pack") == expected


def test_interrupt_before_anything_is_whole_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr("bloomq.converters.pieces._BLOCK_BYTES", 1)
    target = tmp_path / "a" / "b" / "pack"
    stopped(source, target, 0.0)
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("commits")
def test_fresh_run_begins_anew(source, expected, tmp_path):
    stopped(source, tmp_path / "pack")
    done = convert(source, tmp_path / "pack", fresh=True)
    assert done.resumed_bytes == 0
    assert not any("interrupted run" in note for note in done.notes)
    assert contents(tmp_path / "pack") == expected


COMMAND = """
import os, signal, sys
from bloomq import console
from bloomq.cli import main
from contextlib import contextmanager

@contextmanager
def progress(label):
    def show(done, total):
        if done > 0.5 * total:
            os.kill(os.getpid(), signal.SIGINT)
    yield show

if sys.argv[1] == "stop":
    console.byte_progress = progress
main(["convert", *sys.argv[2:]])
"""


def command(*args: object) -> subprocess.CompletedProcess[str]:
    return warm.python("-c", COMMAND, *args)


def test_command_says_in_a_line_how_to_go_on_and_how_to_drop_the_work(source, expected, tmp_path):
    target = tmp_path / "pack"
    ended = command("stop", source, target)
    assert ended.returncode == 130
    assert ended.stderr.strip() == (
        "interrupted: the same command goes on from here; with --fresh it begins anew; to drop the "
        f"work, delete {tmp_path / '.pack.partial'}"
    )
    ended = command("go", source, target)
    assert ended.returncode == 0
    assert "note: " in ended.stderr
    assert "went on from there" in ended.stderr
    assert contents(target) == expected


# -- another plan ----------------------------------------------------------------------------------


def other_scheme(source: Path) -> dict[str, Any]:
    return {"scheme": "int8"}


def other_head(source: Path) -> dict[str, Any]:
    return {"head_scheme": "int4"}


def other_digests(source: Path) -> dict[str, Any]:
    return {"checksum_source": True}


def other_weights(source: Path) -> dict[str, Any]:
    write_checkpoint(source, n_layer=3, vocab_size=300, seed=1)
    return {}


def touched_source(source: Path) -> dict[str, Any]:
    os.utime(source / "model.safetensors", ns=(1, 1))
    return {}


@pytest.mark.usefixtures("commits")
@pytest.mark.parametrize(
    "change", [other_scheme, other_head, other_digests, other_weights, touched_source]
)
def test_other_plan_does_not_continue_and_says_so(source, tmp_path, change):
    stopped(source, tmp_path / "pack")
    options = change(source)
    done = convert(source, tmp_path / "pack", **options)
    assert done.resumed_bytes == 0
    assert done.notes[-1] == (
        f"{tmp_path / '.pack.partial'}: what an interrupted run had left was of another source, "
        "other options or another version, or damaged: began anew"
    )
    convert(source, tmp_path / "other", **options)
    assert contents(tmp_path / "pack") == contents(tmp_path / "other")


@pytest.mark.usefixtures("commits")
def test_other_version_of_the_converter_does_not_continue(source, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("bloomq.converters.plan.CONVERTER_VERSION", 0)
    stopped(source, tmp_path / "pack")
    monkeypatch.undo()
    assert convert(source, tmp_path / "pack").resumed_bytes == 0
    assert contents(tmp_path / "pack") == expected


# -- what is damaged meanwhile ---------------------------------------------------------------------


@pytest.mark.usefixtures("commits")
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_damaged_work_is_done_again(source, expected, tmp_path, share):
    """A bit of what the journal names: what lies before it is kept, it and all behind are not."""
    stopped(source, tmp_path / "pack", 0.9)
    (shard,) = partial_folder(tmp_path / "pack").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin + int(share * (len(data) - begin))] ^= 1
    shard.write_bytes(data)
    convert(source, tmp_path / "pack")
    assert contents(tmp_path / "pack") == expected


def torn_line(journal: bytes) -> bytes:
    return journal[:-20]


def torn_early(journal: bytes) -> bytes:
    return journal[:30]


def no_json(journal: bytes) -> bytes:
    lines = journal.splitlines(keepends=True)
    return b"".join([*lines[:2], b"\xff\n", *lines[2:]])


def unknown_weight(journal: bytes) -> bytes:
    return journal + b'{"weight": "h.9.nonsense", "arrays": {}}\n'


def wrong_arrays(journal: bytes) -> bytes:
    lines = journal.splitlines(keepends=True)
    return lines[0] + b'{"weight": "wte", "arrays": {"ln_f.bias": "0"}}\n' + b"".join(lines[1:])


def no_list(journal: bytes) -> bytes:
    return journal.splitlines(keepends=True)[0] + b'{"weight": "wte", "arrays": []}\n[]\n'


def nothing(journal: bytes) -> bytes:
    return b""


def no_job(journal: bytes) -> bytes:
    return b'{"job": 7}\n'


@pytest.mark.usefixtures("commits")
@pytest.mark.parametrize(
    "damage",
    [torn_line, torn_early, no_json, unknown_weight, wrong_arrays, no_list, nothing, no_job],
)
def test_damaged_journal_costs_no_byte(source, expected, tmp_path, damage):
    stopped(source, tmp_path / "pack", 0.9)
    journal = partial_folder(tmp_path / "pack") / JOURNAL
    journal.write_bytes(damage(journal.read_bytes()))
    convert(source, tmp_path / "pack")
    assert names(tmp_path / "pack") == sorted(expected)
    assert contents(tmp_path / "pack") == expected


@pytest.mark.usefixtures("commits")
def test_shard_that_is_gone_or_short_is_written_again(source, expected, tmp_path):
    for short in (False, True):
        stopped(source, tmp_path / "pack", 0.9)
        (shard,) = partial_folder(tmp_path / "pack").glob("*.safetensors")
        os.truncate(shard, 5000) if short else shard.unlink()
        convert(source, tmp_path / "pack")
        assert contents(tmp_path / "pack") == expected
        shutil.rmtree(tmp_path / "pack")


@pytest.mark.usefixtures("commits")
def test_pack_that_could_not_become_visible_needs_no_second_conversion(
    source, expected, tmp_path, monkeypatch
):
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == ".pack.partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="Input/output error"):
        convert(source, tmp_path / "pack")
    monkeypatch.undo()
    done = convert(source, tmp_path / "pack")
    assert done.resumed_bytes == done.source_bytes
    assert contents(tmp_path / "pack") == expected


@pytest.mark.usefixtures("commits")
def test_manifest_of_a_run_that_was_killed_at_the_end_speaks_for_no_new_bytes(source, tmp_path):
    stopped(source, tmp_path / "pack", 0.9)
    manifest = partial_folder(tmp_path / "pack") / MANIFEST
    manifest.write_text("{}")
    stopped(source, tmp_path / "pack", 0.95)
    assert not manifest.exists()


# -- errors of the source and of ours --------------------------------------------------------------


@pytest.mark.usefixtures("commits")
def test_bad_source_leaves_nothing_of_the_work_before_it(tmp_path):
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", edit=lambda t: t["transformer.ln_f.bias"][1].fill(np.nan)
    )
    with pytest.raises(NumericError):
        convert(checkpoint, tmp_path / "pack")
    assert names(tmp_path) == ["checkpoint"]


@pytest.mark.usefixtures("commits")
def test_source_that_cannot_be_read_for_a_while_keeps_the_work(
    source, expected, tmp_path, monkeypatch
):
    real, calls = Path.open, []

    def failing(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "model.safetensors" and options.get("buffering") == 0:
            calls.append(path)
            if len(calls) > 60:
                raise OSError(errno.EIO, "Input/output error")
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        convert(source, tmp_path / "pack")
    monkeypatch.undo()
    assert kept_work(tmp_path / "pack")
    assert convert(source, tmp_path / "pack").resumed_bytes > 0
    assert contents(tmp_path / "pack") == expected


def edited(source: Path) -> None:
    file = source / "model.safetensors"
    with file.open("r+b") as handle:
        handle.seek(-1000, os.SEEK_END)
        handle.write(b"\1\2\3")


def replaced(source: Path) -> None:
    file = source / "model.safetensors"
    status = file.stat()
    shutil.copy(file, source / "new")
    (source / "new").replace(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # another inode is all there is


def config_edited(source: Path) -> None:
    with (source / "config.json").open("a") as file:
        file.write("\n")


def index_gone(source: Path) -> None:
    (source / "config.json").unlink()


@pytest.mark.usefixtures("commits")
@pytest.mark.parametrize("change", [edited, replaced, config_edited, index_gone])
def test_source_that_changes_underneath_is_an_error_and_leaves_nothing(source, tmp_path, change):
    done: list[int] = []

    def at_half(now: int, total: int) -> None:
        if not done and 2 * now > total:
            done.append(now)
            change(source)

    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out" / "pack", progress=at_half)
    assert re.fullmatch(
        r"[^ ]+: changed while it was converted: convert again when nothing writes it",
        str(caught.value),
    )
    assert not (tmp_path / "out").exists()


def test_edit_that_the_file_system_does_not_tell_is_seen_in_the_values(source, tmp_path):
    file = source / "model.safetensors"
    status = file.stat()

    def at_half(now: int, total: int) -> None:
        if 2 * now > total:
            edited(source)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    with pytest.raises(CheckpointError, match="its weights changed while they were converted"):
        convert(source, tmp_path / "pack", progress=at_half)
    assert names(tmp_path) == ["checkpoint"]


def test_log_beside_the_checkpoint_may_grow(source, tmp_path):
    with (source / "train.log").open("a") as log:
        convert(source, tmp_path / "pack", progress=lambda *now: print(*now, file=log, flush=True))
    assert (source / "train.log").stat().st_size
    Pack.open(tmp_path / "pack").verify()


def test_folder_that_cannot_be_listed_converts_all_the_same(
    source, expected, tmp_path, monkeypatch
):
    def refuse(path: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "iterdir", refuse)
        plan = make_plan(source, tmp_path / "pack")
    assert not plan.watch.files
    run(plan)
    assert contents(tmp_path / "pack") == expected


# -- full disks and missing rights -----------------------------------------------------------------

LIMITED = """
import resource, signal, sys
from bloomq.converters.convert import convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    convert(sys.argv[1], sys.argv[2])
except OSError as error:
    print(error)
"""


def test_file_that_may_not_grow_is_named_and_the_work_is_kept(source, expected, tmp_path):
    done = warm.python("-c", LIMITED, source, tmp_path / "pack", 60_000)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'pack'}: cannot be written: File too large\n"
    assert names(tmp_path) == [".pack.partial", "checkpoint"]
    assert convert(source, tmp_path / "pack").resumed_bytes > 0
    assert contents(tmp_path / "pack") == expected


@pytest.mark.usefixtures("commits")
def test_full_disk_says_how_much_more_is_needed_and_keeps_the_work(
    source, expected, tmp_path, monkeypatch
):
    real, written = weight_files._write_all, [0]

    def full(file: Any, view: memoryview) -> None:
        written[0] += len(view)
        if written[0] > 60_000:
            none = type("Usage", (), {"free": 0})
            monkeypatch.setattr(pack_writer.shutil, "disk_usage", lambda path: none)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, view)

    monkeypatch.setattr(weight_files, "_write_all", full)
    with pytest.raises(OutputError) as caught:
        convert(source, tmp_path / "pack")
    monkeypatch.undo()
    assert re.fullmatch(
        f"{tmp_path}/pack: disk full: 0.1 MB more are needed: free some space, then run it again",
        str(caught.value),
    )
    assert kept_work(tmp_path / "pack")
    assert convert(source, tmp_path / "pack").resumed_bytes > 0
    assert contents(tmp_path / "pack") == expected


def test_work_that_is_kept_counts_as_space_that_is_there(source, expected, tmp_path, monkeypatch):
    stopped(source, tmp_path / "pack", 0.9)
    free = type("Usage", (), {"free": 60_000})  # not enough for all of it
    monkeypatch.setattr(pack_writer.shutil, "disk_usage", lambda path: free)
    with pytest.raises(OutputError, match="are free: free some space"):
        convert(source, tmp_path / "elsewhere")
    convert(source, tmp_path / "pack")
    assert contents(tmp_path / "pack") == expected


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_folder_without_rights_is_refused(source, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot be written: Permission denied"):
        convert(source, tmp_path / "locked" / "pack")


# -- producers -------------------------------------------------------------------------------------


def tripled(
    checkpoint: Checkpoint, schemes: Mapping[str, Scheme], done: Collection[str]
) -> Iterator[Piece]:
    """Rounds three times the weights: a producer that is no round to nearest."""
    tensors = {
        name: SourceTensor(t.name, t.dtype, t.shape, lambda a, b, t=t: t.rows(a, b) * 3)
        for name, t in checkpoint.tensors.items()
    }
    changed = Checkpoint(checkpoint.config, tensors, checkpoint.tokenizer, checkpoint.provenance)
    yield from round_to_nearest(1)(changed, schemes, done)


@pytest.mark.usefixtures("commits")
def test_other_producer_plugs_in_and_goes_on_too(source, tmp_path):
    plain = make_plan(source, tmp_path / "plain", scheme="f32")
    plan = make_plan(source, tmp_path / "pack", scheme="f32")
    run(plain)
    asked: list[Collection[str]] = []

    def producer(checkpoint: Any, schemes: Any, done: Collection[str]) -> Iterator[Piece]:
        asked.append(done)
        return tripled(checkpoint, schemes, done)

    with pytest.raises(KeyboardInterrupt):
        run(plan, producer=producer, method={"method": "tripled"}, progress=Stop(0.5))
    done = run(plan, producer=producer, method={"method": "tripled"})
    assert done.resumed_bytes > 0
    assert not asked[0]
    assert set(asked[1]) < {spec.name for spec in weight_specs(plan.checkpoint.config)}
    ours, theirs = Pack.open(tmp_path / "pack"), Pack.open(tmp_path / "plain")
    assert ours.manifest["provenance"]["method"] == "tripled"
    w, three = theirs.matrix("h.2.mlp.up").dequantize(), ours.matrix("h.2.mlp.up").dequantize()
    assert three.tobytes() == (w * 3).tobytes()


@pytest.mark.usefixtures("commits")
def test_work_of_another_method_is_not_continued(source, expected, tmp_path):
    plan = make_plan(source, tmp_path / "pack")
    with pytest.raises(KeyboardInterrupt):
        run(plan, producer=tripled, method={"method": "tripled"}, progress=Stop(0.5))
    assert run(plan).resumed_bytes == 0
    assert contents(tmp_path / "pack") == expected


def test_too_many_rows_never_become_a_pack(source, tmp_path):
    def twice(checkpoint: Any, schemes: Any, done: Collection[str]) -> Iterator[Piece]:
        for piece in round_to_nearest(1)(checkpoint, schemes, done):
            yield piece
            yield piece

    with pytest.raises(AssertionError, match="and more was written"):
        run(make_plan(source, tmp_path / "pack"), producer=twice)
    assert names(tmp_path) == ["checkpoint"]


# -- the journal -----------------------------------------------------------------------------------


def test_journal_holds_its_job_and_what_was_added(tmp_path):
    Journal(tmp_path, "job", {"a": {"a.codes": "1"}}).add({"b": {"b.weight": "2"}, "c": {}})
    assert read_journal(tmp_path) == (
        "job", {"a": {"a.codes": "1"}, "b": {"b.weight": "2"}, "c": {}}
    )  # fmt: skip
    lines = (tmp_path / JOURNAL).read_text().splitlines()
    assert json.loads(lines[0]) == {"job": "job"}
    assert names(tmp_path) == [JOURNAL]


def test_folder_without_a_journal_names_nothing(tmp_path):
    assert read_journal(tmp_path) == (None, {})
    assert read_journal(tmp_path / "nowhere") == (None, {})


# -- provenance ------------------------------------------------------------------------------------


def test_digests_of_the_sources_files_are_noted_where_they_are_asked_for(tmp_path):
    source = write_checkpoint(tmp_path / "checkpoint", shards=3)
    convert(source, tmp_path / "pack", checksum_source=True)
    found = Pack.open(tmp_path / "pack").manifest["provenance"]["source_files"]
    assert sorted(found) == names(source)
    for name, entry in found.items():
        data = (source / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_source_file_that_cannot_be_read_for_its_digest_is_named(source, tmp_path, monkeypatch):
    real = Path.open

    def failing(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "config.json" and options.get("buffering") == 0:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: Input/output error"):
        convert(source, tmp_path / "pack", checksum_source=True)
