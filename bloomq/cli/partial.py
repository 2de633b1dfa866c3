"""An output file that a later run of the same job continues.

Beside FILE lies FILE.job, which says what job it is of. It stays when FILE is whole: the same job
again finds that nothing is left to do, so a command can be run until it is done. Nothing else needs
it.
Invariant: a file is continued by the job that began it and by no other, and what lies in it are
that job's whole units (lines, rows of an array), in order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from bloomq.errors import OutputError, UsageError
from bloomq.files import write_whole

_BLOCK_BYTES = 1 << 20
_FINISHED = "finished_bytes"  # in FILE.job: how long FILE was when it was whole


class Layout(Protocol):
    """How units lie in a file."""

    def begin(self) -> bytes:
        """What comes before the first unit."""
        ...

    def whole(self, file: IO[bytes]) -> tuple[int, int]:
        """How many whole units a file has, and how many bytes with what comes before them."""
        ...


class Lines:
    """A unit is a line."""

    def begin(self) -> bytes:
        return b""

    def whole(self, file: IO[bytes]) -> tuple[int, int]:
        count, end, at = 0, 0, 0
        while block := file.read(_BLOCK_BYTES):
            found = block.count(b"\n")
            if found:
                count, end = count + found, at + block.rindex(b"\n") + 1
            at += len(block)
        return count, end


@dataclass(frozen=True, slots=True)
class Rows:
    """A unit is a row of float32 [N, C] in NumPy's .npy format, whose header counts all rows."""

    count: int
    columns: int

    def begin(self) -> bytes:
        from io import BytesIO

        header = BytesIO()
        shape = {"shape": (self.count, self.columns), "fortran_order": False, "descr": "<f4"}
        np.lib.format.write_array_header_1_0(header, shape)
        return header.getvalue()

    def whole(self, file: IO[bytes]) -> tuple[int, int]:
        size, first = file.seek(0, os.SEEK_END), len(self.begin())
        rows = max(0, size - first) // (4 * self.columns)
        return rows, first + rows * 4 * self.columns


@dataclass(slots=True)
class Partial:
    """done: of so many units, those that are in the file."""

    path: Path
    file: IO[bytes]
    units: int
    done: int

    @property
    def is_whole(self) -> bool:
        return self.done == self.units

    def append(self, data: bytes, units: int) -> None:
        """Whole units, which a run that is killed now has kept. Raises: OutputError."""
        with _errors(self.path):
            left = memoryview(data)
            while left:  # the system may take a part at a time
                left = left[self.file.write(left) :]
        self.done += units


@contextmanager
def continued(path: Path, job: Mapping[str, Any], units: int, layout: Layout) -> Iterator[Partial]:
    """The file of a job of so many units, begun, continued or whole; after an exception it stays as
    far as it came, if anything is in it.

    Raises: OutputError where the file is not of this job, was changed since it was whole, or cannot
    be written; UsageError for a path without a name.
    """
    if not path.name:  # of "", ".", or the root
        raise UsageError(f"{path}: is no name of a file: choose another with --out")
    sidecar = path.with_name(f"{path.name}.job")
    with _errors(path):
        new = not path.exists()
        if not new:
            _check_job(path, sidecar, job)  # before the file is touched
        file = path.open("x+b" if new else "r+b", buffering=0)  # nothing waits for `close`
    with file:
        with _errors(path):
            _lock(file, path)
            if new:
                write_whole(sidecar, json.dumps(job).encode())
            partial = Partial(path, file, units, _continue(file, layout))
        if partial.done > units:
            raise OutputError(f"{path}: has {partial.done} of {units} results: remove it")
        try:
            yield partial
        finally:
            with _errors(path):
                if partial.is_whole:
                    finished = {**job, _FINISHED: file.seek(0, os.SEEK_END)}
                    write_whole(sidecar, json.dumps(finished).encode())
                elif partial.done == 0:  # nothing to continue: leave nothing behind
                    path.unlink(missing_ok=True)
                    sidecar.unlink(missing_ok=True)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None


def _check_job(path: Path, sidecar: Path, job: Mapping[str, Any]) -> None:
    try:
        begun = json.loads(sidecar.read_text())
    except FileNotFoundError:
        raise OutputError(f"{path}: already exists: choose another name") from None
    except ValueError:
        begun = {}
    begun = begun if isinstance(begun, dict) else {}
    differs = [key for key in job if begun.get(key) != job[key]]
    if differs:
        raise OutputError(
            f"{path}: was begun by a job with another {' and '.join(differs)}: remove it, or "
            "choose another name"
        )
    if begun.get(_FINISHED, size := path.stat().st_size) != size:  # what is cut off may be dear
        raise OutputError(
            f"{path}: has changed since it was whole: remove it, or choose another name"
        )


def _continue(file: IO[bytes], layout: Layout) -> int:
    """Cut off what is not whole; how many units are."""
    done, size = layout.whole(file)
    if file.seek(0, os.SEEK_END) != size or not done:
        file.truncate(size if done else 0)
    file.seek(0, os.SEEK_END)
    if not done:
        file.write(layout.begin())
    return done


def _lock(file: IO[bytes], path: Path) -> None:
    """Keep other runs away for as long as the file is open, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"{path}: another run is writing it: wait for it") from None
