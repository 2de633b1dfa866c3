"""The tensors of pytorch_model.bin files, one or sharded by an index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bloomq.errors import CheckpointError, InputNotFound

from .source import SourceTensor
from .torch_file import torch_tensors


def bin_tensors(paths: Sequence[Path]) -> dict[str, SourceTensor]:
    """Every tensor of these files, by its name there.

    Raises: CheckpointError, for a name that is there twice too.
    """
    tensors: dict[str, SourceTensor] = {}
    for path in paths:
        try:
            found = torch_tensors(path)
        except InputNotFound:
            raise CheckpointError(f"{path}: missing shard: download it again") from None
        for name, tensor in found.items():
            if name in tensors:
                raise CheckpointError(f"{tensor.name}: stored twice, also as {tensors[name].name}")
            tensors[name] = tensor
    return tensors
