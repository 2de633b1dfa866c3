"""The files of a source, and whether they are still what they were when the conversion began.

Invariant: a pack becomes visible only if no file of its source was edited or replaced meanwhile, as
far as the file system tells; `Checkpoint.fingerprint`, taken again at the end, is the second look.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bloomq.errors import CheckpointError
from bloomq.files import exists

from .gguf_parts import parts_beside

# What a form of checkpoint may consist of; logs and the like beside it may change.
_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".msgpack", ".gguf", ".json", ".jinja"})
_READ_BYTES = 8 << 20
_Facts = tuple[int, int, int, int]  # size, time of last change, inode, device


@dataclass(frozen=True, slots=True)
class Watch:
    """Files by their paths, with what the system said of each when the watch began."""

    files: Mapping[Path, _Facts]

    @classmethod
    def of(cls, source: Path) -> Watch:
        """The file `source`, with the other parts of a split GGUF, or those directly in a folder
        that a checkpoint may consist of."""
        if not (exists(source) and source.is_dir()):
            return cls(_facts(parts_beside(source)))
        try:
            found = [path for path in source.iterdir() if path.suffix in _SUFFIXES]
        except OSError:  # its files may be readable all the same
            found = []
        return cls(_facts(found))

    @property
    def key(self) -> list[list[Any]]:
        """Name, size and time of each: what tells whether a later run sees the same files."""
        return sorted([path.name, facts[0], facts[1]] for path, facts in self.files.items())

    @property
    def is_undisturbed(self) -> bool:
        return all(_facts([path]).get(path) == facts for path, facts in self.files.items())

    def check(self) -> None:
        """Raises: CheckpointError, naming the first file that changed."""
        for path, facts in self.files.items():
            if _facts([path]).get(path) != facts:
                raise CheckpointError(
                    f"{path}: changed while it was converted: convert again when nothing writes it"
                )

    def digests(self, threads: int) -> dict[str, dict[str, Any]]:
        """Bytes and SHA-256 of every file, by its name. Raises: CheckpointError."""
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(_sha256, sorted(self.files))
            return {
                path.name: {"bytes": self.files[path][0], "sha256": digest}
                for path, digest in zip(sorted(self.files), found, strict=True)
            }


def _facts(paths: Iterable[Path]) -> dict[Path, _Facts]:
    found = {}
    for path in paths:
        try:
            status = path.stat()
        except (OSError, ValueError):  # gone, or no name of a file
            continue
        found[path] = (status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()
