"""Reading files that may be anything: what is no plain file of a bearable size is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import NEEDS_PROC, open_below, write_checkpoint

from bloomq.config import BloomConfig, read_json
from bloomq.errors import (
    BloomqError,
    CheckpointError,
    ConfigError,
    InputNotFound,
    OutputError,
    PackError,
    UsageError,
)
from bloomq.files import as_path, check_replaceable, exists, read_bounded, shown, write_whole
from bloomq.pack import Pack
from bloomq.tensorfile import TensorFile

NEEDS_FIFO = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
NO_FILE = "is not a regular file: replace it"


def refusal(
    path: Path, limit_bytes: int = 8, kind: type[BloomqError] = PackError, error: type | None = None
) -> str:
    """The message with which reading is refused, without the path it must begin with."""
    with pytest.raises(BloomqError) as caught:
        read_bounded(path, limit_bytes, kind)
    assert type(caught.value) is (error or kind)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


# -- read_bounded ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7, 8])
def test_a_file_of_up_to_the_limit_is_read_whole(tmp_path: Path, size: int):
    (tmp_path / "file").write_bytes(bytes(range(size)))
    assert read_bounded(tmp_path / "file", 8, PackError) == bytes(range(size))


def test_a_file_over_the_limit_is_refused(tmp_path: Path):
    (tmp_path / "file").write_bytes(bytes(9))
    expected = "over 8 bytes: too large for what it should be"
    assert refusal(tmp_path / "file") == expected
    with (tmp_path / "file").open("r+b") as file:
        file.truncate(1 << 40)  # sparse; not read either
    assert refusal(tmp_path / "file") == expected


@pytest.mark.parametrize("kind", [PackError, ConfigError, CheckpointError])
def test_the_error_is_of_the_kind_asked_for(tmp_path: Path, kind: type[BloomqError]):
    (tmp_path / "file").write_bytes(bytes(9))
    refusal(tmp_path / "file", kind=kind)


def test_a_link_to_a_file_is_that_file(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    assert read_bounded(tmp_path / "link", 8, PackError) == b"x"


@NEEDS_FIFO
def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    assert refusal(tmp_path / "fifo") == NO_FILE


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_device_is_refused(device: str):
    if not Path(device).exists():
        pytest.skip(f"no {device} on this system")
    assert refusal(Path(device)) == NO_FILE


@NEEDS_PROC
def test_a_refusal_leaves_nothing_open(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(bytes(9))
    for path in (tmp_path / "fifo", tmp_path / "file", tmp_path / "none", tmp_path):
        with pytest.raises(BloomqError):
            read_bounded(path, 8, PackError)
    assert open_below(tmp_path) == []


@NEEDS_PROC
def test_open_files_are_found(tmp_path: Path):
    with (tmp_path / "file").open("w"):
        assert open_below(tmp_path) == [str(tmp_path / "file")]


def test_a_folder_is_refused(tmp_path: Path):
    assert refusal(tmp_path) == "cannot be read: Is a directory"


def test_what_is_not_there_is_not_found(tmp_path: Path):
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("none", "dangling", "a\0b"):
        assert refusal(tmp_path / name, error=InputNotFound) == "no such file"


def test_what_the_system_refuses_says_why(tmp_path: Path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_bytes(b"x")
    assert refusal(tmp_path / "loop") == "cannot be read: Too many levels of symbolic links"
    assert refusal(tmp_path / ("x" * 300)) == "cannot be read: File name too long"
    assert refusal(tmp_path / "file" / "x") == "cannot be read: Not a directory"


def forbidden(*args: object, **options: object) -> int:
    raise PermissionError(13, "Permission denied")


def test_a_file_without_the_right_to_read_it_says_so(tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(os, "open", forbidden)
    assert refusal(tmp_path / "file") == "cannot be read: Permission denied"


# -- exists, shown ---------------------------------------------------------------------------------


def test_existence_is_told_of_any_name(tmp_path: Path):
    (tmp_path / "dangling").symlink_to("nowhere")
    assert exists(tmp_path)
    for name in ("none", "dangling", "a\0b", "x" * 300):
        assert not exists(tmp_path / name), name


def test_what_may_not_be_looked_at_counts_as_there(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Path, "exists", forbidden)
    assert exists(tmp_path / "secret")


def test_what_cannot_be_looked_at_counts_as_absent(tmp_path: Path, monkeypatch):
    def broken(path: Path) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "exists", broken)
    assert not exists(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h.0.mlp", "h.0.mlp"),
        ("modèle 7b", "modèle 7b"),
        ("", ""),
        ("a\nb", "'a\\nb'"),
        ("\x1b[2J", "'\\x1b[2J'"),
        ("\x9b2J", "'\\x9b2J'"),
        ("\u202eevil", "'\\u202eevil'"),
    ],
)
def test_a_name_is_shown_so_that_it_cannot_draw(name: str, expected: str):
    assert shown(name) == expected


# -- whoever reads through it ----------------------------------------------------------------------


@NEEDS_FIFO
@pytest.mark.parametrize(
    ("read", "error", "message"),
    [
        pytest.param(read_json, ConfigError, NO_FILE),
        pytest.param(BloomConfig.from_file, ConfigError, NO_FILE),
        (TensorFile.open, CheckpointError, "is not a regular file"),
    ],
    ids=["JSON", "config", "tensors"],
)
def test_no_reader_waits_for_a_fifo(
    tmp_path: Path, read: Callable[[Path], object], error: type, message: str
):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(error) as caught:
        read(tmp_path / "fifo")
    assert str(caught.value) == f"{tmp_path / 'fifo'}: {message}"


@NEEDS_FIFO
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("config.json"),
        "model.safetensors",
        pytest.param("tokenizer.json"),
    ],
)
def test_a_fifo_in_a_checkpoint_is_named(tmp_path: Path, name: str):
    from bloomq.converters.reading import read_checkpoint

    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    with pytest.raises(BloomqError) as caught:
        read_checkpoint(checkpoint)
    assert str(caught.value).startswith(f"{checkpoint / name}: is not a regular file")


@NEEDS_FIFO
def test_a_fifo_in_place_of_a_manifest_is_named(tmp_path: Path):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(PackError) as caught:
        Pack.open(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'manifest.json'}: {NO_FILE}: convert again"


# -- write_whole -----------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_with_its_rights_and_through_its_links(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(0o640)
    (tmp_path / "link").symlink_to("file")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "made", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o640
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link", "made"}


def test_what_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        write_whole(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"
    monkeypatch.undo()
    for name, message in (("a\0b", "is no name of a file"), ("x" * 300, "File name too long")):
        with pytest.raises(OutputError, match=message):
            write_whole(tmp_path / name, b"")
    with pytest.raises(OutputError, match="is not a regular file: choose another name"):
        write_whole(tmp_path, b"")


# -- check_replaceable, as_path --------------------------------------------------------------------


def test_nothing_but_files_of_ours_is_replaced(tmp_path: Path):
    def check(name: str) -> None:
        check_replaceable(tmp_path / name, 8, lambda data: data == b"ours", "page of ours")

    (tmp_path / "ours").write_bytes(b"ours")
    for name in ("ours", "none", ".", "a\0b"):  # what is no file is left to `write_whole`
        check(name)
    for name, data in (("theirs", b"theirs"), ("long", b"ours and more")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(OutputError, match="is there, and no page of ours: choose another nam"):
            check(name)


def test_a_name_that_is_none_is_refused():
    assert as_path("a/b") == as_path(Path("a/b")) == Path("a/b")
    with pytest.raises(UsageError, match=r"the name of a file is \[\], expected text or a path"):
        as_path([])
