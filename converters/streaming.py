"""Shards that are on the disk only while they are needed: downloaded when a tensor is first read,
deleted when all of their tensors have been converted.

What the tensors are is known before, from the shards' headers, which are read alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bloomq.errors import BloomqError, CheckpointError
from bloomq.files import shown
from bloomq.schemes import Array

from .hub_files import RemoteFile, Repository, download, hub_errors, remove_quietly
from .safetensors_files import safetensors_tensors
from .source import SourceTensor

Shape = tuple[int, ...]


@dataclass(slots=True)
class _Shard:
    """A file of weights, on the disk or not. left: tensors that are not converted yet."""

    repo: Repository
    file: RemoteFile
    folder: Path
    promised: dict[str, tuple[str, Shape]]  # name -> dtype, shape
    left: set[str]
    opened: dict[str, SourceTensor] | None = None

    def rows(self, name: str, start: int, stop: int) -> Array:
        return self._tensor(name).rows(start, stop)

    def columns(self, name: str, start: int, stop: int) -> Array:
        columns = self._tensor(name).columns
        assert columns is not None, "of a matrix"
        return columns(start, stop)

    def release(self, name: str) -> None:
        """The tensor is converted; the last one takes the file with it, and the folder if it is
        the last."""
        self.left.discard(name)
        if self.left:
            return
        self.opened = None
        for path in (self._path, self._lock, self.folder, *list(self.folder.parents)[:2]):
            remove_quietly(path)

    @property
    def _path(self) -> Path:
        return self.folder / self.file.name

    @property
    def _lock(self) -> Path:
        return self.folder / f"{self.file.name}.lock"

    def _tensor(self, name: str) -> SourceTensor:
        opened = self.opened
        if opened is None or not self._path.exists():
            download(self.repo, self.file, self._path, self._lock)
            opened = safetensors_tensors([self._path])
            if {n: (t.dtype, t.shape) for n, t in opened.items()} != self.promised:
                raise CheckpointError(
                    f"{self._path}: other tensors than its header said before the download: "
                    "changed at the hub"
                )
            self.opened = opened
        return opened[name]


def streamed(
    repo: Repository, files: Sequence[RemoteFile], folder: Path
) -> dict[str, SourceTensor]:
    """Every tensor of these safetensors files, by its name there. folder: for shards on the disk.

    Reads the files' headers. Raises: CheckpointError, OutputError.
    """
    tensors: dict[str, SourceTensor] = {}
    for file in files:
        label = f"{repo.id}/{file.name}"
        promised = _header(repo, file, label)
        shard = _Shard(repo, file, folder, promised, set(promised))
        for name, (dtype, shape) in promised.items():
            where = f"{label}: {shown(name)}"
            if name in tensors:
                raise CheckpointError(f"{where}: stored twice, also as {tensors[name].name}")
            tensors[name] = SourceTensor(
                where, dtype, shape, partial(shard.rows, name),
                partial(shard.columns, name) if len(shape) == 2 else None,
                release=partial(shard.release, name),
            )  # fmt: skip
    return tensors


def _header(repo: Repository, file: RemoteFile, label: str) -> dict[str, tuple[str, Shape]]:
    """Type and shape of every tensor of a file that is not here, by its name."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    api = HfApi(endpoint=repo.endpoint, library_name="bloomq")
    try:
        with hub_errors(repo.id, repo.revision):
            header = api.parse_safetensors_file_metadata(repo.id, file.name, revision=repo.commit)
        return {
            name: (str(entry.dtype), tuple(int(extent) for extent in entry.shape))
            for name, entry in header.tensors.items()
        }
    except BloomqError:
        raise
    except (SafetensorsParsingError, AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{label}: its header is no safetensors header") from None
