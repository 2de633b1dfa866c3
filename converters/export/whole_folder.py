"""A folder of files that is either whole or not there: written beside its place, renamed at the
end, as a pack is (`bloomq.pack_writer`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from bloomq.errors import OutputError
from bloomq.taken_folder import BusyError, empty, flush_folder, os_errors, take_folder

from .whole_file import check_room


@contextmanager
def whole_folder(target: Path, nbytes: int, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends well and is gone
    otherwise.

    nbytes: that it will take; is_ours: may this folder be replaced (or, put aside by a run that was
    killed, removed)? Raises: OutputError.
    """
    with os_errors(target):
        target = Path(os.path.realpath(target))
        _check_replaceable(target, is_ours)
    folder = target.with_name(f".{target.name}.partial")
    made = [parent for parent in folder.parents if not parent.exists()]
    lock: int | None = None
    try:
        with os_errors(target):
            lock = take_folder(folder, target)
            _check_replaceable(target, is_ours)  # another run may have ended since
            empty(folder)
            check_room(target, folder, nbytes)
            yield folder
            flush_folder(folder)
            _replace(folder, target, is_ours)
    except BusyError:
        raise  # the folder is another run's
    except BaseException:
        with suppress(OSError):  # what is not ours or not empty stays
            folder.rmdir() if lock is None else shutil.rmtree(folder)
            for parent in made:
                parent.rmdir()
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _check_replaceable(target: Path, is_ours: Callable[[Path], bool]) -> None:
    if not target.exists() or _is_empty(target) or is_ours(target):
        return
    raise OutputError(f"{target}: is there, and is not just an export: choose another name")


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _replace(folder: Path, target: Path, is_ours: Callable[[Path], bool]) -> None:
    """Make the finished folder visible; what was there goes last."""
    old = target.with_name(f".{target.name}.old")
    _remove(old, target, is_ours)
    replaced = target.exists()
    if replaced:
        target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if replaced:
            old.rename(target)
        raise
    flush_folder(target.parent)
    _remove(old, target, is_ours)


def _remove(folder: Path, target: Path, is_ours: Callable[[Path], bool]) -> None:
    """Delete what was put aside; anything else of that name is not ours."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not (_is_empty(folder) or is_ours(folder)):
        raise OutputError(f"{target}: {folder} lies in the way: rename or remove it")
    # Weights last: by them the next run knows as ours what a killed one leaves.
    for path in sorted(folder.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        path.unlink()
    folder.rmdir()


@contextmanager
def write_flushed(path: Path) -> Iterator[IO[bytes]]:
    """A new file, on disk when the block has ended."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
