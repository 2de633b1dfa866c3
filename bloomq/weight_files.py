"""The files of a pack while they are written: arrays into their shards, digests, the journal of
what is whole, and at last the manifest.

Invariant: the journal names a weight only after its bytes were flushed to disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import IO, Any

import numpy as np

from bloomq.config import BloomConfig, WeightSpec, weight_specs
from bloomq.journal import Digests, Journal, read_journal
from bloomq.pack import FORMAT, MANIFEST, TOKENIZER, VERSION, manifest_checksum
from bloomq.schemes import DEFAULT_GROUP, Array, Scheme
from bloomq.shards import Shard, array_bytes, lay_out
from bloomq.taken_folder import empty, flush_folder
from bloomq.tokenizer_config import Settings

SHARD_BYTES = 1 << 30  # a pack of up to this is one file
# Work is flushed and named in the journal after so much of it: a kill costs no more than that. Less
# at a time would wait for the disk more often.
_COMMIT_BYTES, _COMMIT_S = 64 << 20, 5.0
_HASH_BLOCK_BYTES = 8 << 20
Progress = Callable[[int], None]  # called with the bytes done since the last call


def layout(config: BloomConfig, schemes: Mapping[str, Scheme]) -> list[Shard]:
    """The weights files of a pack."""
    return lay_out(weight_specs(config), schemes, SHARD_BYTES)


class PackWriter:
    """Receives a pack's arrays, each in one or more pieces, in any order that does not go back to a
    file it has left. `done`: the weights that an interrupted run of the same job has written."""

    def __init__(self, folder: Path, config: BloomConfig, schemes: Mapping[str, Scheme]) -> None:
        self._folder = folder
        self._config = config
        self._schemes = schemes
        self._shards = layout(config, schemes)
        self._of = {key: shard for shard in self._shards for key in shard.places}
        self._weight_of = {
            key: name for shard in self._shards for name, keys in shard.weights.items()
            for key in keys
        }  # fmt: skip
        self._open: tuple[Shard, IO[bytes]] | None = None
        self._hashes: dict[str, Any] = {}  # of arrays under way
        self._written: dict[str, int] = {}
        self._digests: Digests = {}  # of whole arrays
        self._whole: dict[str, Digests] = {}  # weights whose bytes may not be on disk yet
        self._named: dict[str, Digests] = {}  # weights whose bytes are
        self._journal: Journal | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._commit: Future[None] | None = None
        self._uncommitted_bytes, self._committed_at = 0, monotonic()
        self._keep = False
        self._job = ""
        self.dropped = False  # work of another job, or damaged

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.nbytes for shard in self._shards)

    @property
    def done(self) -> frozenset[str]:
        """The weights that are whole on disk."""
        return frozenset(self._named)

    def keep_work(self) -> None:
        """Whatever ends this run leaves what is whole for the next one."""
        self._keep = True

    def go_on(self, job: str, check: Progress = lambda done: None) -> None:
        """Keep a journal for `job`; take over what the folder's own says of the same job, as far as
        the bytes are what it says."""
        left, weights = read_journal(self._folder)
        with suppress(FileNotFoundError):  # not to speak of bytes that may be written anew
            (self._folder / MANIFEST).unlink()
        whole = self._still_whole(weights, check) if left == job else {}
        self.dropped = bool(weights) and not whole
        if not whole:
            empty(self._folder)
        self._named = whole
        for digests in whole.values():
            self._digests |= digests
            self._written |= {key: array_bytes(self._of[key].places[key][0]) for key in digests}
        self._job, self._journal = job, Journal(self._folder, job, whole)
        self._pool = ThreadPoolExecutor(1, "flush")

    def _still_whole(self, weights: Mapping[str, Digests], check: Progress) -> dict[str, Digests]:
        """The weights up to the first whose bytes are not what the journal says."""
        whole: dict[str, Digests] = {}
        for name, digests in weights.items():
            keys = {key for key, weight in self._weight_of.items() if weight == name}
            if not keys or keys != set(digests):
                break
            found = {key: _digest(self._folder, self._of[key], key, check) for key in keys}
            if found != digests:
                break
            whole[name] = digests
        return whole

    def write(self, key: str, data: Array) -> None:
        """Append `data` to array `key`."""
        shard = self._of[key]
        size = array_bytes(shard.places[key][0])
        file = self._file(shard)
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        done = self._written.get(key, 0)
        assert done + len(view) <= size, f"{key} is {size} bytes, and more was written"
        file.seek(shard.places[key][1] + done)
        _write_all(file, view)
        self._hashes.setdefault(key, hashlib.sha256()).update(view)
        self._written[key] = done + len(view)
        self._uncommitted_bytes += len(view)
        if self._written[key] == size:
            self._end_array(key, shard)

    def _end_array(self, key: str, shard: Shard) -> None:
        self._digests[key] = self._hashes.pop(key).hexdigest()
        name = self._weight_of[key]
        keys = shard.weights[name]
        if any(other not in self._digests for other in keys):
            return
        self._whole[name] = {other: self._digests[other] for other in keys}
        late = monotonic() - self._committed_at > _COMMIT_S
        if self._journal is not None and (late or self._uncommitted_bytes >= _COMMIT_BYTES):
            self._begin_commit()

    def _file(self, shard: Shard) -> IO[bytes]:
        """The open file of a shard, with its header."""
        if self._open is not None and self._open[0] is shard:
            return self._open[1]
        self._close_shard()
        path = self._folder / shard.name
        # Unbuffered: pieces are megabytes, and what a buffer holds no flush of the disk sees.
        file = path.open("r+b" if path.exists() else "wb", buffering=0)
        self._open = (shard, file)
        _write_all(file, memoryview(shard.header))
        return file

    def _begin_commit(self) -> None:
        """Flush to disk and name what is whole, while the next pieces are made."""
        assert self._open is not None
        assert self._pool is not None
        self._end_commit()
        whole, self._whole = self._whole, {}
        self._uncommitted_bytes, self._committed_at = 0, monotonic()
        self._commit = self._pool.submit(self._flush, self._open[1], whole)

    def _flush(self, file: IO[bytes], whole: Mapping[str, Digests]) -> None:
        os.fsync(file.fileno())
        self._name(whole)

    def _name(self, whole: Mapping[str, Digests]) -> None:
        """Put weights whose bytes are on disk into the journal."""
        assert self._journal is not None
        flush_folder(self._folder)  # that the files are there, too
        self._journal.add(whole)
        self._named |= whole

    def _end_commit(self) -> None:
        """Wait for the flush that is under way; what went wrong there is raised here."""
        commit, self._commit = self._commit, None
        if commit is not None:
            commit.result()

    def _close_shard(self) -> None:
        """Flush and close the open file; the next commit names what it holds."""
        if self._open is not None:
            self._end_commit()
            os.fsync(self._open[1].fileno())
            self._open[1].close()
            self._open = None

    def finish(
        self,
        tokenizer: bytes | None,
        provenance: Mapping[str, Any],
        *,
        settings: Settings | None = None,
    ) -> None:
        """Write the tokenizer and, last, the manifest; flush everything to disk.

        settings: of the tokenizer; None: BLOOM's.
        """
        self._close_shard()
        files: dict[str, Any] = {}
        for shard in self._shards:
            for key in shard.places:
                assert key in self._digests, f"{key} was not written whole"
            digests = {key: self._digests[key] for key in shard.places}
            files[shard.name] = {"bytes": shard.nbytes, "arrays": digests}
        if tokenizer is not None:
            digest = hashlib.sha256(tokenizer).hexdigest()
            files[TOKENIZER] = {"bytes": len(tokenizer), "sha256": digest}
            _write_file(self._folder / TOKENIZER, tokenizer)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "config": self._config.to_dict(),
            "weights": {spec.name: self._describe(spec) for spec in weight_specs(self._config)},
            "files": files,
            "provenance": dict(provenance),
        }
        if settings is not None and settings.to_dict():
            manifest["tokenizer"] = settings.to_dict()
        if settings is not None and settings.chat_templates:
            manifest["chat_template"] = settings.chat_templates
        manifest["checksum"] = manifest_checksum(manifest)
        _write_file(self._folder / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
        flush_folder(self._folder)

    def _describe(self, spec: WeightSpec) -> dict[str, Any]:
        entry: dict[str, Any] = {"shape": list(spec.shape)}
        if spec.is_matrix:
            scheme = self._schemes[spec.name]
            entry["scheme"] = scheme.name
            if scheme.name in DEFAULT_GROUP:
                entry["group_size"] = scheme.group_size
        return entry

    def forget_journal(self) -> None:
        """The pack is whole: it needs no journal, and is not to hold one."""
        if self._journal is not None:
            self._journal.remove()
            self._journal = None

    def restore_journal(self) -> None:
        """The pack could not become visible: let the next run try that again."""
        if self._job:
            self._journal = Journal(self._folder, self._job, self._named)

    def missing_bytes(self) -> int:
        """What the pack still takes of the disk, beyond what is free."""
        taken = sum(path.stat().st_size for path in self._folder.glob("*.safetensors"))
        return max(self.nbytes - taken - shutil.disk_usage(self._folder).free, 0)

    def is_kept_after(self, error: BaseException) -> bool:
        """May the same job go on after this? After an error of the source it would meet it again,
        and one of ours is a bug."""
        may = self._keep or isinstance(error, KeyboardInterrupt | MemoryError | OSError)
        return self._journal is not None and may

    def abandon(self, *, keep: bool) -> None:
        """Close what is open; to keep the work, flush and name what is whole first."""
        with suppress(OSError):  # a full disk is being reported already
            if keep:
                self._close_shard()
                self._name(self._whole)
        with suppress(OSError):
            self._end_commit()
        if self._open is not None:
            with suppress(OSError):
                self._open[1].close()
            self._open = None
        if self._pool is not None:
            self._pool.shutdown()


def _write_all(file: IO[bytes], view: memoryview) -> None:
    """All of it: a write to an unbuffered file may take less."""
    while view:
        view = view[file.write(view) :]


def _digest(folder: Path, shard: Shard, key: str, check: Progress) -> str:
    """SHA-256 of an array's bytes as they are on disk, empty where they are not all there."""
    part, start = shard.places[key]
    left, digest = array_bytes(part), hashlib.sha256()
    try:
        with (folder / shard.name).open("rb") as file:
            file.seek(start)
            while left:
                block = file.read(min(left, _HASH_BLOCK_BYTES))
                if not block:
                    return ""
                digest.update(block)
                left -= len(block)
                check(len(block))
    except FileNotFoundError:
        return ""
    return digest.hexdigest()


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
