"""Opens a checkpoint of any form that bloomq reads, recognised by what is there."""

from __future__ import annotations

from pathlib import Path

from bloomq.errors import CheckpointError, InputNotFound
from bloomq.files import exists
from bloomq.pack import MANIFEST

from . import hf, megatron
from .packed import read_pack
from .source import Checkpoint


def read_checkpoint(source: str | Path) -> Checkpoint:
    """The checkpoint at `source`; no tensor is read yet (but for a head that may be tied).

    Raises: InputNotFound, ConfigError, CheckpointError; TokenizerError for settings beside the
    tokenizer that are not supported; PackError for a damaged pack.
    """
    path = Path(source)
    if not exists(path):
        raise InputNotFound(f"{path}: no such folder")
    if not path.is_dir():
        raise CheckpointError(f"{path}: is a file, expected the folder of a checkpoint")
    if exists(path / MANIFEST):
        return read_pack(path)
    if megatron.is_checkpoint(path) and not hf.holds_weights(path):
        return megatron.read_folder(path)
    return hf.read_folder(path)
