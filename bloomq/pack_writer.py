"""Writing a pack so that it is either whole or not there.

Everything goes into a hidden folder beside the target, `.NAME.partial`, under a lock; the manifest
comes last, files and folders are flushed to disk, and one rename makes the pack visible. A run
that is killed leaves that hidden folder without a manifest; the next run takes it over.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from bloomq.config import BloomConfig, WeightSpec, weight_specs
from bloomq.errors import BloomqError, OutputError
from bloomq.pack import (
    ALIGNMENT,
    FORMAT,
    MANIFEST,
    TOKENIZER,
    VERSION,
    manifest_checksum,
    stored_arrays,
)
from bloomq.schemes import Array, Part, Scheme
from bloomq.tensorfile import DTYPES
from bloomq.tokenizer_config import Settings

SHARD_BYTES = 1 << 30  # a shard is closed at the first layer boundary after this


@dataclass(slots=True)
class _Shard:
    """One weights file under way: its arrays' places, and a running digest of each."""

    name: str
    places: dict[str, tuple[Part, int]]  # key -> (array, start in the file)
    header: bytes
    nbytes: int
    digests: dict[str, Any] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)


class PackWriter:
    """Receives a pack's arrays in `weight_specs` order, each in one or more pieces."""

    def __init__(self, folder: Path, config: BloomConfig, schemes: Mapping[str, Scheme]) -> None:
        self._folder = folder
        self._config = config
        self._schemes = schemes
        self._shards = _plan(weight_specs(config), schemes)
        self._of = {key: shard for shard in self._shards for key in shard.places}
        self._open: tuple[_Shard, IO[bytes]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.nbytes for shard in self._shards)

    def write(self, key: str, data: Array) -> None:
        """Append `data` to array `key`."""
        shard = self._of[key]
        if self._open is None or self._open[0] is not shard:
            self._close_shard()
            file: IO[bytes] = (self._folder / shard.name).open("wb")
            file.write(shard.header)
            self._open = (shard, file)
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        done = shard.written.get(key, 0)
        file = self._open[1]
        file.seek(shard.places[key][1] + done)
        file.write(view)
        shard.digests.setdefault(key, hashlib.sha256()).update(view)
        shard.written[key] = done + len(view)

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
            for key, (part, _) in shard.places.items():
                assert shard.written.get(key) == _nbytes(part), f"{key} was not written whole"
            digests = {key: shard.digests[key].hexdigest() for key in shard.places}
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

    def _close_shard(self) -> None:
        if self._open is not None:
            file = self._open[1]
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self._open = None

    def abandon(self) -> None:
        """Close what is open; the caller removes the folder."""
        if self._open is not None:
            with suppress(OSError):  # a full disk is being reported already
                self._open[1].close()
            self._open = None


@contextmanager
def writing_pack(
    target: Path, config: BloomConfig, schemes: Mapping[str, Scheme], *, force: bool = False
) -> Iterator[PackWriter]:
    """A `PackWriter` whose pack appears at `target` when the block ends well, and never otherwise.

    `force` replaces a pack that is already there. Raises: OutputError where the target exists, the
    disk is too small or full, rights are missing or another run is writing it.
    """
    with _os_errors(target):
        target = Path(os.path.realpath(target))  # a link's pack is written where the link points
        _check_target(target, force)
    folder = target.with_name(f".{target.name}.partial")
    made = [parent for parent in folder.parents if not parent.exists()]
    lock: int | None = None
    try:
        with _os_errors(target):
            lock = _take_folder(folder, target)
            _check_target(target, force)  # another run may have ended since
            _empty(folder)  # left by a run that was killed
            writer = PackWriter(folder, config, schemes)
            free = shutil.disk_usage(folder).free
            if free < writer.nbytes:
                raise OutputError(
                    f"{target}: needs {_size(writer.nbytes)}, {_size(free)} are free: "
                    "free some space or choose another disk"
                )
            try:
                yield writer
                _replace(folder, target)
            finally:
                writer.abandon()
    except _BusyError:
        raise  # the folder is another run's
    except BaseException:
        with suppress(OSError):  # what is not ours or not empty stays
            folder.rmdir() if lock is None else shutil.rmtree(folder)
            for parent in made:
                parent.rmdir()
        raise
    finally:
        if lock is not None:
            os.close(lock)


class _BusyError(OutputError):
    """Another run holds the folder's lock."""


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _plan(specs: list[WeightSpec], schemes: Mapping[str, Scheme]) -> list[_Shard]:
    """Cut the arrays into shards at layer boundaries, and lay out each shard."""
    cuts: list[dict[str, Part]] = [{}]
    layer = ""
    for spec in specs:
        now = ".".join(spec.name.split(".")[:2])
        if now != layer and sum(map(_nbytes, cuts[-1].values())) >= SHARD_BYTES:
            cuts.append({})
        layer = now
        cuts[-1].update(stored_arrays(spec, schemes.get(spec.name)))
    shards = []
    for i, arrays in enumerate(cuts, 1):
        header, offset, places = _header(arrays), 0, {}
        for key, part in arrays.items():
            places[key] = (part, len(header) + offset)
            offset += _nbytes(part)
        name = f"weights-{i:05d}-of-{len(cuts):05d}.safetensors"
        shards.append(_Shard(name, places, header, len(header) + offset))
    return shards


def _header(arrays: Mapping[str, Part]) -> bytes:
    """The safetensors header, padded with spaces so that the data starts 64-byte aligned."""
    entries, offset = {}, 0
    for key, part in arrays.items():
        end = offset + _nbytes(part)
        entries[key] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _nbytes(part: Part) -> int:
    size = np.dtype(DTYPES[part.dtype]).itemsize
    for extent in part.shape:
        size *= extent
    return size


def _check_target(target: Path, force: bool) -> None:
    if not target.exists():
        return
    is_pack = (target / MANIFEST).is_file()
    if force and is_pack:
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    remedy = "--force replaces a pack" if is_pack else "choose another name"
    raise OutputError(f"{target}: already exists: {remedy}")


def _replace(folder: Path, target: Path) -> None:
    """Make the finished folder visible as `target`; what was there goes last."""
    old = target.with_name(f".{target.name}.old")
    _remove_pack(old, target)
    replaced = target.exists()
    if replaced:
        target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if replaced:
            old.rename(target)
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
def _os_errors(target: Path) -> Iterator[None]:
    """The system's refusals as OutputError."""
    try:
        yield
    except BloomqError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{target}: disk full: free some space, then run it again") from None
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from None
