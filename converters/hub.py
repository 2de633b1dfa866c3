"""Checkpoints by their id at the hub, OWNER/NAME: only what a conversion needs is downloaded.

Names that the hub or an index states are used only where they are plain names of files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bloomq.errors import CheckpointError, InputNotFound, UsageError
from bloomq.files import shown

from .hf import read_folder, shards_of
from .hub_files import RemoteFile, Repository, describe, in_cache
from .source import Checkpoint
from .streaming import streamed

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,200}")
_BESIDE = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "quantize_config.json", "quant_config.json",
)  # fmt: skip
# In this order: the first that is there is taken, and nothing else.
_SINGLE_OR_INDEX = ("model.safetensors", "model.safetensors.index.json")
_PACKED = re.compile(r"gptq_model-[A-Za-z0-9_.-]{1,80}\.safetensors")  # AutoGPTQ's own names
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def is_id(source: str) -> bool:
    """Has the text the form of an id, OWNER/NAME?"""
    return _ID.fullmatch(source) is not None


def read_repository(repo_id: str, *, revision: str | None, stream: bool) -> Checkpoint:
    """The checkpoint of that id, by way of huggingface_hub's cache; stream: its weights not.

    revision: a branch, a tag or a commit. Where HF_HUB_OFFLINE is set, what is in the cache.

    Raises: as `read_checkpoint`; OutputError where what is downloaded cannot be stored.
    """
    try:
        from huggingface_hub import constants
    except ImportError:
        raise InputNotFound(
            f"{repo_id}: no such folder; as an id at the hub it needs huggingface_hub: "
            "pip install 'bloomq[hub]'"
        ) from None
    if revision is not None and (not revision or not revision.isprintable()):
        raise UsageError(f"the revision is {revision!r:.80}, expected a branch, a tag or a commit")
    if constants.HF_HUB_OFFLINE:
        folder = _snapshot(repo_id, revision)
        return _named(read_folder(folder), repo_id, folder.name)
    repo = describe(repo_id, revision)
    config = repo.files.get("config.json")
    if config is None:
        raise CheckpointError(f"{repo_id}: has no config.json: not a Hugging Face checkpoint")
    folder = in_cache(repo, config).parent
    for name in _BESIDE:
        if name in repo.files:
            in_cache(repo, repo.files[name])
    files = _weights(repo)
    if not stream:
        for file in files:
            in_cache(repo, file)
        return _named(read_folder(folder), repo_id, repo.commit)
    if not all(file.name.endswith(".safetensors") for file in files):
        raise UsageError(f"{repo_id}: {files[0].name} cannot be read by parts: leave out --stream")
    work = Path(constants.HF_HOME) / "bloomq" / repo_id.replace("/", "--") / repo.commit
    checkpoint = read_folder(folder, streamed(repo, files, work))
    return replace(_named(checkpoint, repo_id, repo.commit), origin=_origin(files))


def _weights(repo: Repository) -> list[RemoteFile]:
    """The files of weights: of one form alone. An index is downloaded.

    Raises: CheckpointError.
    """
    packed = [file for name, file in repo.files.items() if _PACKED.fullmatch(name)]
    for single, index in (_SINGLE_OR_INDEX, _PICKLED):
        if single in repo.files:
            return [repo.files[single]]
        if index in repo.files:
            names = [path.name for path in shards_of(in_cache(repo, repo.files[index]))]
            return [_listed(repo.files, name, repo.id) for name in names]
        if packed:
            return packed
    raise CheckpointError(
        f"{repo.id}: neither model.safetensors nor pytorch_model.bin, in one file or sharded"
    )


def _listed(files: Mapping[str, RemoteFile], name: str, repo_id: str) -> RemoteFile:
    if name not in files or not _PLAIN.fullmatch(name):
        raise CheckpointError(f"{repo_id}: its index names {shown(name)}, which is not there")
    return files[name]


def _snapshot(repo_id: str, revision: str | None) -> Path:
    """The folder in the cache, without a word to the hub."""
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(
        repo_id, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=revision
    )
    if not isinstance(found, str):
        raise InputNotFound(
            f"{repo_id}: no such folder, and not in the hub's cache, which is all there is: "
            "HF_HUB_OFFLINE is set"
        )
    return Path(found).parent


def _named(checkpoint: Checkpoint, repo_id: str, commit: str) -> Checkpoint:
    """With the id and the commit in the provenance."""
    origin = {"name": repo_id, "revision": commit}
    return replace(checkpoint, provenance={**checkpoint.provenance, **origin})


def _origin(files: list[RemoteFile]) -> str:
    text = json.dumps([[file.name, file.nbytes, file.digest] for file in files])
    return hashlib.sha256(text.encode()).hexdigest()
