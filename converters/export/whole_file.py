"""One file that is either whole or not there.

It is written as `.NAME.partial` beside its place, under a lock, flushed to disk and renamed. A run
that is killed leaves that hidden file; the next one writes over it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from bloomq.errors import OutputError
from bloomq.taken_folder import os_errors, size_text


@contextmanager
def whole_file(target: Path, nbytes: int, magic: bytes) -> Iterator[BinaryIO]:
    """A file that becomes `target` when the block ends well, and is gone otherwise.

    nbytes: that it will take; magic: how a file begins that may be replaced. Raises: OutputError.
    """
    if "\0" in str(target):
        raise OutputError(f"{str(target)!r} is no name that a file can have")
    with os_errors(target):
        if target.exists() or target.is_symlink():
            _check_replaceable(target, magic)
        check_room(target, target.parent, nbytes)
        partial = target.with_name(f".{target.name}.partial")
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


def check_room(target: Path, folder: Path, nbytes: int) -> None:
    """Raises: OutputError where the disk of `folder` has not so many bytes left."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OutputError(
            f"{target}: the export takes {size_text(nbytes)}, {size_text(free)} are free: choose "
            "another disk or a smaller dtype"
        )


def _check_replaceable(target: Path, magic: bytes) -> None:
    if target.is_file() and not target.is_symlink():  # a FIFO would be waited for in vain
        with target.open("rb") as file:
            if file.read(len(magic)) == magic:
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
