"""What of a half-written pack is on disk: JSON lines, appended after the bytes they speak of.

The first line names the job; each further one a weight with the SHA-256 of its arrays. A line that
a kill cut short ends the journal. Invariant: a weight is named after its bytes were flushed;
whoever goes on compares the bytes with the digests all the same: disks lie, and files get changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bloomq.errors import BloomqError, OutputError
from bloomq.files import read_bounded

JOURNAL = "journal.jsonl"
_LIMIT_BYTES = 64 << 20  # a line is about 250 bytes; the largest BLOOM has 422 weights
Digests = dict[str, str]  # array -> SHA-256


class Journal:
    """The open journal of a folder; `add` appends to it."""

    def __init__(self, folder: Path, job: str, weights: Mapping[str, Digests]) -> None:
        """Begin the folder's journal anew, with the weights that were found whole."""
        self._path = folder / JOURNAL
        fresh = folder / f"{JOURNAL}.new"
        with fresh.open("wb") as file:
            file.write(_line({"job": job}) + _lines(weights))
            if weights:  # a journal that names nothing may be lost
                file.flush()
                os.fsync(file.fileno())
        fresh.replace(self._path)

    def add(self, weights: Mapping[str, Digests]) -> None:
        """Name weights whose bytes are on disk."""
        with self._path.open("ab") as file:
            file.write(_lines(weights))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self._path.unlink()


def read_journal(folder: Path) -> tuple[str | None, dict[str, Digests]]:
    """The job that a folder's journal is of, None where there is none, and what it names."""
    try:
        data = read_bounded(folder / JOURNAL, _LIMIT_BYTES, OutputError)
    except BloomqError:
        return None, {}
    job: str | None = None
    weights: dict[str, Digests] = {}
    for line in data.splitlines(keepends=True):
        entry = _parsed(line)
        if job is None:
            job = entry.get("job")
            if not isinstance(job, str):
                return None, {}
            continue
        name, arrays = entry.get("weight"), entry.get("arrays")
        if not isinstance(name, str) or not isinstance(arrays, dict):
            break
        weights[name] = arrays
    return job, weights


def _lines(weights: Mapping[str, Digests]) -> bytes:
    return b"".join(_line({"weight": w, "arrays": a}) for w, a in weights.items())


def _line(entry: Mapping[str, object]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any]:
    """A whole line's object, an empty one for anything else."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else {}
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}
