"""Reading files that may be anything: what is no plain file of a bearable size is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_checkpoint

from bloomq.config import BloomConfig, read_json
from bloomq.errors import BloomqError, CheckpointError, ConfigError, InputNotFound, PackError
from bloomq.files import exists, read_bounded, shown
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


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_a_refusal_leaves_nothing_open(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(bytes(9))
    before = open_files()
    for path in (tmp_path / "fifo", tmp_path / "file", tmp_path / "none"):
        with pytest.raises(BloomqError):
            read_bounded(path, 8, PackError)
    assert open_files() == before


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_a_folder_that_is_refused_is_closed(tmp_path: Path):
    before = open_files()
    refusal(tmp_path)
    assert open_files() == before


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
    from bloomq.converters.hf import read_checkpoint

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
