"""Writing a pack so that it is either whole or not there, and need not be begun twice.

Everything goes into a hidden folder beside the target, `.NAME.partial`, under a lock; the manifest
comes last, files and folders are flushed to disk, and one rename makes the pack visible. A run that
is killed leaves that hidden folder without a manifest; the same job goes on from its journal, any
other takes the folder over.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from bloomq.config import BloomConfig
from bloomq.errors import OutputError
from bloomq.journal import read_journal
from bloomq.pack import MANIFEST
from bloomq.schemes import Scheme
from bloomq.taken_folder import BusyError, empty, flush_folder, os_errors, size_text, take_folder
from bloomq.weight_files import PackWriter, Progress


@contextmanager
def writing_pack(
    target: Path, config: BloomConfig, schemes: Mapping[str, Scheme], *, force: bool = False,
    job: str | None = None, fresh: bool = False, check: Progress = lambda done: None,
) -> Iterator[PackWriter]:  # fmt: skip
    """A `PackWriter` whose pack appears at `target` when the block ends well, and never otherwise.

    `force` replaces a pack that is already there. job: a digest of what is written, of what and by
    what; what an interrupted run of the same job has written is kept and continued, but for
    `fresh`, after its bytes were compared with its journal (`check` hears of each). Without a job
    nothing is kept.

    Raises: OutputError where the target exists, the disk is too small or full, rights are missing
    or another run is writing it.
    """
    with os_errors(target):
        target = Path(os.path.realpath(target))  # a link's pack is written where the link points
        check_target(target, force)
    folder = partial_folder(target)
    made = [parent for parent in folder.parents if not parent.exists()]
    lock: int | None = None
    writer: PackWriter | None = None
    kept = False
    try:
        with os_errors(target, lambda: 0 if writer is None else writer.missing_bytes()):
            lock = take_folder(folder, target)
            check_target(target, force)  # another run may have ended since
            writer = PackWriter(folder, config, schemes)
            kept = job is not None and not fresh and read_journal(folder)[0] == job
            try:
                if job is None or fresh:
                    empty(folder)
                if job is not None:
                    writer.go_on(job, check)
                _check_space(writer, folder, target)
                yield writer
                _replace(folder, target, writer)
            except BaseException as error:
                kept = writer.is_kept_after(error)  # a second Ctrl-C may end what follows
                writer.abandon(keep=kept)
                kept = kept and bool(writer.done)
                raise
            writer.abandon(keep=False)
    except BusyError:
        raise  # the folder is another run's
    except BaseException:
        with suppress(OSError):  # what is not ours or not empty stays
            if not kept:
                folder.rmdir() if lock is None else shutil.rmtree(folder)
                for parent in made:
                    parent.rmdir()
        raise
    finally:
        if lock is not None:
            os.close(lock)


def partial_folder(target: Path) -> Path:
    """Where a pack is written until it is whole."""
    target = Path(os.path.realpath(target))
    return target.with_name(f".{target.name}.partial")


def kept_work(target: Path) -> bool:
    """Has an interrupted run left work for a pack at `target`?"""
    return bool(read_journal(partial_folder(target))[1])


def _check_space(writer: PackWriter, folder: Path, target: Path) -> None:
    missing = writer.missing_bytes()
    if missing:
        free = shutil.disk_usage(folder).free
        raise OutputError(
            f"{target}: needs {size_text(free + missing)}, {size_text(free)} are free: free some "
            "space or choose another disk"
        )


def check_target(target: Path, force: bool) -> None:
    """Raises: OutputError where something is there that is not to be replaced, or no such name can
    be."""
    with os_errors(target):
        if not target.exists():
            return
        is_pack = (target / MANIFEST).is_file()
        if force and is_pack:
            return
        if target.is_dir() and not any(target.iterdir()):
            return
    remedy = "--force replaces a pack" if is_pack else "choose another name"
    raise OutputError(f"{target}: already exists: {remedy}")


def _replace(folder: Path, target: Path, writer: PackWriter) -> None:
    """Make the finished folder visible as `target`; what was there goes last."""
    old = target.with_name(f".{target.name}.old")
    _remove_pack(old, target)
    replaced = target.exists()
    if replaced:
        target.rename(old)
    try:
        writer.forget_journal()
        folder.rename(target)
    except OSError:
        if replaced:
            old.rename(target)
        writer.restore_journal()
        raise
    flush_folder(target.parent)
    _remove_pack(old, target)


def _remove_pack(folder: Path, target: Path) -> None:
    """Delete a pack that an earlier run put aside; anything else of that name is not ours."""
    if not folder.exists() and not folder.is_symlink():
        return
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.is_symlink() or not (is_empty or (folder / MANIFEST).is_file()):
        raise OutputError(f"{target}: {folder} is in the way: move it elsewhere")
    for path in folder.iterdir():  # the manifest last: a run killed here is known as ours by it
        if path.name != MANIFEST:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(folder)
