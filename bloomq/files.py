"""Reading files that may be anything: bounded, regular, named safely in errors."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bloomq.errors import BloomqError, InputNotFound, OutputError, UsageError


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


def as_path(name: object) -> Path:
    """The name of a file as a caller gave it. Raises: UsageError for what is none."""
    if not isinstance(name, str | os.PathLike):
        raise UsageError(f"the name of a file is {name!r:.40}, expected text or a path")
    return Path(name)


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


def check_replaceable(
    path: Path, limit_bytes: int, is_ours: Callable[[bytes], bool], kind: str
) -> None:
    """What lies there is nothing, or a file of at most `limit_bytes` that we wrote, of the kind
    that an error names. What is no file is left to `write_whole`. Raises: OutputError."""
    if not exists(path) or not path.is_file():
        return
    try:
        ours = is_ours(read_bounded(path, limit_bytes, OutputError))
    except OutputError:
        ours = False
    if not ours:
        raise OutputError(f"{path}: is there, and no {kind}: choose another name")


def write_whole(path: Path, data: bytes) -> None:
    """A file that holds all of `data`; after any error what was there is as it was.

    Raises: OutputError.
    """
    try:
        if exists(path) and not path.is_file():
            raise OutputError(f"{path}: is not a regular file: choose another name")
        target = path.resolve()  # a link's own target is replaced, not the link
        name = target.with_name(f".{target.name[:60]}.{secrets.token_hex(4)}")
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(handle)
            if exists(target):
                os.chmod(name, stat.S_IMODE(target.stat().st_mode))
            os.replace(name, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
    except OutputError:
        raise
    except ValueError:  # a NUL in the name
        raise OutputError(f"{path}: is no name of a file") from None
    except OSError as problem:
        raise OutputError(f"{path}: cannot be written: {problem.strerror}") from None
