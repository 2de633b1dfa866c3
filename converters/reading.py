"""Opens a checkpoint of any form that bloomq reads, recognised by what is there."""

from __future__ import annotations

import os
from pathlib import Path

from bloomq.errors import CheckpointError, InputNotFound, UsageError
from bloomq.files import exists
from bloomq.pack import MANIFEST

from . import gguf_file, gguf_parts, hf, hub, megatron
from .packed import read_pack
from .source import Checkpoint


def read_checkpoint(
    source: str | Path, *, revision: str | None = None, stream: bool = False
) -> Checkpoint:
    """The checkpoint at `source`; no tensor is read yet (but for a head that may be tied).

    source: a path; or, where there is none, the id OWNER/NAME of a checkpoint at the hub, which is
    downloaded as far as it is needed. revision: of a hub id; stream: its files of weights are
    downloaded one by one when they are wanted, and deleted once they are converted.

    Raises: UsageError, InputNotFound, ConfigError, CheckpointError; TokenizerError for settings
    beside the tokenizer that are not supported; PackError for a damaged pack.
    """
    path = Path(source)
    if not exists(path):
        if hub.is_id(os.fspath(source)):
            return hub.read_repository(os.fspath(source), revision=revision, stream=stream)
        raise InputNotFound(f"{path}: no such file or folder")
    if revision is not None or stream:
        raise UsageError(f"{path}: is a path: a revision and --stream are for a hub id")
    if gguf := gguf_parts.find_gguf(path):
        return gguf_file.read_gguf(gguf)
    if not path.is_dir():
        raise CheckpointError(f"{path}: is a file, expected the folder of a checkpoint, or a GGUF")
    if exists(path / MANIFEST):
        return read_pack(path)
    if not hf.holds_weights(path):
        if megatron.is_checkpoint(path):
            return megatron.read_folder(path)
        gguf_parts.refuse_choice(path)
    return hf.read_folder(path)
