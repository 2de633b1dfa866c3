"""Writing a pack so that it is either whole or not there, and need not be begun twice.

Everything goes into a hidden folder beside the target, `.NAME.partial`, under a lock; the manifest
comes last, files and folders are flushed to disk, and one rename makes the pack visible. A run that
is killed leaves that hidden folder without a manifest; the same job goes on from its journal, any
other takes the folder over.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import IO, Any

import numpy as np

from bloomq.config import BloomConfig, WeightSpec, weight_specs
from bloomq.errors import BloomqError, OutputError
from bloomq.journal import Digests, Journal, read_journal
from bloomq.pack import FORMAT, MANIFEST, TOKENIZER, VERSION, manifest_checksum
from bloomq.schemes import Array, Scheme
from bloomq.shards import Shard, array_bytes, lay_out
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
            _empty(self._folder)
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
        _flush_folder(self._folder)  # that the files are there, too
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
        _flush_folder(self._folder)

    def _describe(self, spec: WeightSpec) -> dict[str, Any]:
        entry: dict[str, Any] = {"shape": list(spec.shape)}
        if spec.is_matrix:
            scheme = self._schemes[spec.name]
            entry["scheme"] = scheme.name
            if scheme.name == "int4":
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
    with _os_errors(target):
        target = Path(os.path.realpath(target))  # a link's pack is written where the link points
        check_target(target, force)
    folder = partial_folder(target)
    made = [parent for parent in folder.parents if not parent.exists()]
    lock: int | None = None
    writer: PackWriter | None = None
    kept = False
    try:
        with _os_errors(target, lambda: 0 if writer is None else writer.missing_bytes()):
            lock = _take_folder(folder, target)
            check_target(target, force)  # another run may have ended since
            writer = PackWriter(folder, config, schemes)
            kept = job is not None and not fresh and read_journal(folder)[0] == job
            try:
                if job is None or fresh:
                    _empty(folder)
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
    except _BusyError:
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


class _BusyError(OutputError):
    """Another run holds the folder's lock."""


def size_text(nbytes: int) -> str:
    """Bytes as a person reads them."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def check_target(target: Path, force: bool) -> None:
    """Raises: OutputError where something is there that is not to be replaced."""
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
    _flush_folder(target.parent)
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


def _take_folder(folder: Path, target: Path) -> int:
    """Make the folder and lock it: an open handle that holds the lock until it is closed (or the
    process dies)."""
    while True:
        if folder.is_symlink():
            raise OutputError(f"{target}: {folder} is a link: remove it")
        folder.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":  # no flock there: two runs at once are the user's to avoid
            return os.open(os.devnull, os.O_RDONLY)
        handle = _lock(folder, target)
        if _same_file(handle, folder):
            return handle
        os.close(handle)  # its owner renamed or removed the folder before we had the lock


def _lock(folder: Path, target: Path) -> int:
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise _BusyError(f"{target}: another conversion is writing it: wait for it") from None
    return handle


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


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


def _flush_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _os_errors(target: Path, missing_bytes: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """The system's refusals as OutputError."""
    try:
        yield
    except BloomqError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            missing = missing_bytes()
            how_much = f"{size_text(missing)} more are needed: " if missing else ""
            raise OutputError(
                f"{target}: disk full: {how_much}free some space, then run it again"
            ) from None
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from None
