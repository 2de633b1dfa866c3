"""Opens a checkpoint of any form that bloomq reads, recognised by what is there."""

from __future__ import annotations

from pathlib import Path

from bloomq.errors import CheckpointError, InputNotFound
from bloomq.files import exists
from bloomq.pack import MANIFEST

from . import gguf_file, hf
from .source import Checkpoint


def read_checkpoint(source: str | Path) -> Checkpoint:
    """The checkpoint at `source`; no tensor is read yet (but for a head that may be tied).

    Raises: InputNotFound, ConfigError, CheckpointError; TokenizerError for settings beside the
    tokenizer that are not supported.
    """
    path = Path(source)
    if not exists(path):
        raise InputNotFound(f"{path}: no such folder")
    if gguf := gguf_file.find_gguf(path):
        return gguf_file.read_gguf(gguf)
    if not path.is_dir():
        raise CheckpointError(f"{path}: is a file, expected the folder of a checkpoint")
    if exists(path / MANIFEST):
        raise CheckpointError(f"{path}: is a bloomq pack already, expected a checkpoint")
    return hf.read_folder(path)
