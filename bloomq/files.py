"""Reading files that may be anything: bounded, regular, named safely in errors."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from bloomq.errors import BloomqError, InputNotFound


def exists(path: Path) -> bool:
    """Is there something of that name? Also for names that no file can have; what may not be looked
    at counts as there, and fails when it is opened."""
    try:
        return path.exists()
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False


def shown(name: str) -> str:
    """A name from a file as an error may show it: it could hold line breaks or control codes."""
    return name if name.isprintable() else repr(name)


def read_bounded(path: Path, limit_bytes: int, error: type[BloomqError]) -> bytes:
    """The content of a regular file of at most `limit_bytes`.

    Raises: InputNotFound; `error` for anything else that is no such file.
    """
    try:
        # Not to wait for a FIFO's other end; and not `open`, which would not close what it refuses.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, ValueError):  # ValueError: a NUL in the name
        raise InputNotFound(f"{path}: no such file") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from None
    try:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise error(f"{path}: cannot be read: {os.strerror(errno.EISDIR)}")
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise error(f"{path}: is not a regular file: replace it")
        with open(handle, "rb", closefd=False) as file:
            data = file.read(limit_bytes + 1)
    except BloomqError:
        raise
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from None
    finally:
        os.close(handle)
    if len(data) > limit_bytes:
        raise error(f"{path}: over {limit_bytes} bytes: too large for what it should be")
    return data
