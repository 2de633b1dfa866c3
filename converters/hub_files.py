"""Files of a repository at the hub: found, downloaded so that a cut connection is gone on with, and
checked against the digests that the hub states. All talk with it is huggingface_hub's.

Invariant: a file that bears its name is whole and has the digest it should have; what is under way
ends in `.incomplete`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bloomq.errors import BloomqError, CheckpointError, InputNotFound, OutputError
from bloomq.files import shown

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HASH_BYTES = 1 << 20
_AGAIN = "run it again: it goes on where it stopped"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository as the hub describes it. sha256: of large files; blob: Git's id, of
    the others' content."""

    name: str
    nbytes: int
    sha256: str | None
    blob: str | None

    @property
    def digest(self) -> str:
        return self.sha256 or self.blob or ""


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit. revision: as the user called it."""

    id: str
    revision: str
    commit: str
    endpoint: str
    files: dict[str, RemoteFile]


def describe(repo_id: str, revision: str | None) -> Repository:
    """What the hub has under this id now.

    Raises: InputNotFound, CheckpointError.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import validate_repo_id

    endpoint, wanted = constants.ENDPOINT, revision or "main"
    with hub_errors(repo_id, wanted):
        validate_repo_id(repo_id)
        api = HfApi(endpoint=endpoint, library_name="bloomq")
        try:
            info = api.model_info(repo_id, revision=wanted, files_metadata=True)
            files = {file.rfilename: _remote_file(file) for file in info.siblings or ()}
            commit = info.sha
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{repo_id}: {endpoint} says nothing that describes a repository ({error!r:.80})"
            ) from None
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise CheckpointError(f"{repo_id}: {endpoint} names the commit {commit!r:.60}, not a SHA-1")
    return Repository(repo_id, wanted, commit, endpoint, files)


def _remote_file(file: Any) -> RemoteFile:
    sha256 = None if file.lfs is None else file.lfs.sha256
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise ValueError(f"the digest {sha256!r:.70}")
    return RemoteFile(str(file.rfilename), int(file.size or 0), sha256, file.blob_id)


def in_cache(repo: Repository, file: RemoteFile) -> Path:
    """The file in huggingface_hub's cache, downloaded where it is not there.

    Raises: CheckpointError, OutputError.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    cache = Path(constants.HF_HUB_CACHE)
    found = try_to_load_from_cache(repo.id, file.name, cache_dir=cache, revision=repo.commit)
    if isinstance(found, str):
        return Path(found)
    with hub_errors(repo.id, repo.revision):
        if file.sha256 is not None:
            # The cache's documented layout: its own download would begin anew after a cut.
            folder = f"models--{repo.id.replace('/', '--')}"
            lock = cache / ".locks" / folder / f"{file.sha256}.lock"
            download(repo, file, cache / folder / "blobs" / file.sha256, lock)
        path = Path(
            hf_hub_download(
                repo.id, file.name, revision=repo.commit, cache_dir=cache, endpoint=repo.endpoint
            )
        )
        if file.sha256 is None:
            _check(repo, file, path, path.resolve())
    return path


def download(repo: Repository, file: RemoteFile, target: Path, lock: Path) -> None:
    """The file at `target`, unless it is there; what an earlier run got of it is used.

    Raises: CheckpointError, OutputError.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    with hub_errors(repo.id, repo.revision):
        for folder in (target.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if target.exists():
                return
            partial = target.with_name(f"{target.name}.incomplete")
            with partial.open("ab") as out:
                if out.tell() > file.nbytes:
                    out.truncate(0)
                    out.seek(0)
                _check_space(target.parent, file.nbytes - out.tell())
                if out.tell() < file.nbytes:
                    url = hf_hub_url(
                        repo.id, file.name, revision=repo.commit, endpoint=repo.endpoint
                    )
                    headers = build_hf_headers(library_name="bloomq")
                    name = file.name[-40:]
                    http_get(
                        url, out, resume_size=out.tell(), headers=headers, displayed_filename=name
                    )
            _check(repo, file, partial, partial)
            os.replace(partial, target)


def _check(repo: Repository, file: RemoteFile, path: Path, content: Path) -> None:
    """A file that is not what the hub says is deleted, so that the next run gets it anew."""
    size = content.stat().st_size
    if file.sha256 is not None:
        digest, wanted = hashlib.sha256(), file.sha256
    else:
        digest, wanted = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), file.blob or ""
    with content.open("rb") as data:
        while block := data.read(_HASH_BYTES):
            digest.update(block)
    if digest.hexdigest() != wanted:
        for wrong in {path, content}:
            wrong.unlink(missing_ok=True)
        raise CheckpointError(
            f"{repo.id}: {shown(file.name)} has the digest {digest.hexdigest()}, expected "
            f"{wanted:.64}: changed on the way: run it again"
        )


def _check_space(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OutputError(
            f"{folder}: the download needs {need / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free: "
            "free some space, or use --stream"
        )


@contextmanager
def hub_errors(repo_id: str, revision: str) -> Iterator[None]:
    """What huggingface_hub, the network and the disk raise, as one line each."""
    from huggingface_hub import constants, errors

    # requests' errors are OSErrors; httpx's, in later versions, have a base of their own.
    network = cast(type[Exception], errors.HfHubHTTPError.__bases__[0])
    try:
        yield
    except BloomqError:
        raise
    except errors.RevisionNotFoundError:
        raise InputNotFound(
            f"{repo_id}: no revision {shown(revision)} at {constants.ENDPOINT}"
        ) from None
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repo_id}: its owners want their terms accepted: do so on its page at "
            f"{constants.ENDPOINT}, then log in: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputNotFound(
            f"{repo_id}: no such folder, and no such repository at {constants.ENDPOINT}, or a "
            "private one: hf auth login"
        ) from None
    except errors.HFValidationError:
        raise InputNotFound(f"{repo_id}: no such folder, and no id of a repository") from None
    except errors.RemoteEntryNotFoundError as error:
        name = str(error.response.url).rpartition("/")[2]
        raise CheckpointError(f"{repo_id}: {shown(name)} is listed there, and missing") from None
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise CheckpointError(
                f"{repo_id}: {constants.ENDPOINT} refuses access: log in: hf auth login"
            ) from None
        raise CheckpointError(
            f"{repo_id}: {constants.ENDPOINT} answers {error.response.status_code}: {_AGAIN}"
        ) from None
    except OSError as error:
        raise _of_system(error, repo_id, constants.ENDPOINT) from None
    except network as error:
        raise _cut(error, repo_id, constants.ENDPOINT) from None


def _of_system(error: OSError, repo_id: str, endpoint: str) -> BloomqError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{repo_id}: disk full: free some space, then {_AGAIN}")
    if error.filename is not None:
        return OutputError(f"{error.filename}: cannot be written: {error.strerror}")
    return _cut(error, repo_id, endpoint)


def _cut(error: Exception, repo_id: str, endpoint: str) -> BloomqError:
    kind = type(error).__name__
    return CheckpointError(f"{repo_id}: no connection to {endpoint} ({kind}): {_AGAIN}")


def remove_quietly(path: Path) -> None:
    """Delete a file or an empty folder, if that can be."""
    with suppress(OSError):
        path.rmdir() if path.is_dir() else path.unlink()
