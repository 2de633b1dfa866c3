"""The tensors of safetensors files, one or sharded by an index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bloomq.errors import CheckpointError, InputNotFound
from bloomq.files import shown
from bloomq.tensorfile import TensorFile

from .in_file import tensor_in_file
from .source import SourceTensor


def safetensors_tensors(paths: Sequence[Path]) -> dict[str, SourceTensor]:
    """Every tensor of these files, by its name there.

    Raises: CheckpointError, for a name that is there twice too.
    """
    tensors: dict[str, SourceTensor] = {}
    for path in paths:
        try:
            file = TensorFile.open(path)
        except InputNotFound:
            raise CheckpointError(f"{path}: missing shard: download it again") from None
        for name, entry in file.entries.items():
            label = f"{file.path}: {shown(name)}"
            if name in tensors:
                raise CheckpointError(f"{label}: stored twice, also as {tensors[name].name}")
            tensors[name] = tensor_in_file(
                file.path, file.size, label, entry.dtype, entry.shape, entry.start
            )
    return tensors
