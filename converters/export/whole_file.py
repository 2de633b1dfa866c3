"""One file that is either whole or not there.

It is written as `.NAME.partial` beside its place, under a lock, flushed to disk and renamed. A run
that is killed leaves that hidden file; the next one writes over it.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from bloomq.errors import OutputError


@contextmanager
def whole_file(target: Path, nbytes: int, magic: bytes) -> Iterator[BinaryIO]:
    """A file that becomes `target` when the block ends well, and is gone otherwise.

    nbytes: that it will take; magic: how a file begins that may be replaced. Raises: OutputError.
    """
    if "\0" in str(target):
        raise OutputError(f"{str(target)!r} is no name that a file can have")
    try:
        if target.exists() or target.is_symlink():
            _check_replaceable(target, magic)
        partial = target.with_name(f".{target.name}.partial")
        free = shutil.disk_usage(target.parent).free
        if free < nbytes:
            raise OutputError(
                f"{target}: takes {nbytes / 1e6:.1f} MB, there is room for {free / 1e6:.1f} MB: "
                "free some or choose another disk"
            )
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        with open(handle, "wb") as file:
            _lock(handle, partial, target)
            try:
                file.truncate(0)
                yield file
                file.flush()
                os.fsync(handle)
                os.replace(partial, target)
            except BaseException:
                with suppress(OSError):
                    partial.unlink()
                raise
    except OutputError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{target}: the disk is full: free some space and try again"
            ) from None
        raise OutputError(f"{target}: no file can be written there: {error.strerror}") from None


def _check_replaceable(target: Path, magic: bytes) -> None:
    with target.open("rb") as file:
        if target.is_file() and not target.is_symlink() and file.read(len(magic)) == magic:
            return
    raise OutputError(f"{target}: is there, and is no such file to replace: choose another name")


def _lock(handle: int, partial: Path, target: Path) -> None:
    """Two exports at once would write one file. The lock goes with the handle."""
    if sys.platform == "win32":  # no flock there
        return
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), partial.stat()):
            return  # otherwise its owner has renamed it since
    except OSError:
        pass
    raise OutputError(f"{target}: another export is writing it: wait until it ends")
