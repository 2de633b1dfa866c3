"""A folder in which one run writes what becomes visible when it is whole: taken under a lock that
the system drops when the process dies, with the system's refusals as errors of ours.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bloomq.errors import BloomqError, OutputError


class BusyError(OutputError):
    """Another run holds the folder's lock."""


def size_text(nbytes: int) -> str:
    """Bytes as a person reads them."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def take_folder(folder: Path, target: Path) -> int:
    """Make the folder and lock it: an open handle that holds the lock until it is closed (or the
    process dies)."""
    while True:
        if folder.is_symlink():
            raise OutputError(f"{target}: {folder} is a link: remove it")
        folder.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":  # no flock there: two runs at once are the user's to avoid
            return os.open(os.devnull, os.O_RDONLY)
        handle = _lock(folder, target)
        if _same_file(handle, folder):
            return handle
        os.close(handle)  # its owner renamed or removed the folder before we had the lock


def _lock(folder: Path, target: Path) -> int:
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise BusyError(f"{target}: another conversion is writing it: wait for it") from None
    return handle


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def os_errors(target: Path, missing_bytes: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """The system's refusals as OutputError."""
    try:
        yield
    except BloomqError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            missing = missing_bytes()
            how_much = f"{size_text(missing)} more are needed: " if missing else ""
            raise OutputError(
                f"{target}: disk full: {how_much}free some space, then run it again"
            ) from None
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from None


def empty(folder: Path) -> None:
    """Delete all that is in a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def flush_folder(folder: Path) -> None:
    """That the names in it are on disk too."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
