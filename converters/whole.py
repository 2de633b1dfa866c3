"""From the tensors that a reader found to a whole checkpoint: nothing missing, nothing left over,
each of its shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bloomq.config import BloomConfig
from bloomq.errors import CheckpointError
from bloomq.files import exists, shown

from .names import PREFIX, expected_tensors, huggingface_name
from .source import SourceTensor

_READABLE = ("F32", "F16", "BF16")
_COMPARE_BYTES = 16 << 20


def whole(
    path: Path, config: BloomConfig, found: Mapping[str, SourceTensor], *, bare: bool = False
) -> tuple[BloomConfig, dict[str, SourceTensor], tuple[str, ...]]:
    """The config with the tie that the weights really have, the tensors by our names, and notes.

    found: by Hugging Face's names, with `transformer.` before them or without. bare: a BloomModel,
    which has no head. Reads nothing but a head that may be tied. Raises: CheckpointError, naming
    `path` and the tensor.
    """
    left = _unprefixed(found)
    notes: tuple[str, ...] = ()
    if config.architecture == "BloomForCausalLM":
        config, notes = _settle_tie(path, config, left, bare=bare)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        foreign = huggingface_name(name)
        tensor = left.pop(foreign, None)
        if tensor is None:
            raise CheckpointError(f"{path}: no tensor {foreign}: the checkpoint is incomplete")
        tensors[name] = _checked(path, tensor, shape)
    if left:
        extra = sorted(left)
        others = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{path}: unexpected tensor {shown(extra[0])}{others}: "
            f"not part of a {config.architecture} (merge adapters first)"
        )
    return config, tensors, notes


def _unprefixed(found: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    tensors: dict[str, SourceTensor] = {}
    for foreign, tensor in found.items():
        name = foreign.removeprefix(PREFIX)
        if name in tensors:
            raise CheckpointError(f"{tensor.name}: stored twice, also as {tensors[name].name}")
        tensors[name] = tensor
    return tensors


def _checked(path: Path, tensor: SourceTensor, shape: tuple[int, ...]) -> SourceTensor:
    if tensor.dtype not in _READABLE:
        raise CheckpointError(
            f"{tensor.name} is {tensor.dtype}, expected one of {', '.join(_READABLE)}: save the "
            "model in one of them"
        )
    if tensor.shape != shape:
        by = "config.json" if exists(path / "config.json") else "the sizes it states"
        raise CheckpointError(
            f"{tensor.name} is {list(tensor.shape)}, expected {list(shape)} by {by}"
        )
    return tensor


def _settle_tie(
    path: Path, config: BloomConfig, found: dict[str, SourceTensor], *, bare: bool
) -> tuple[BloomConfig, tuple[str, ...]]:
    """The config with the tie that the weights really have; drops a head that repeats the
    embedding.

    As transformers: a head that is stored and differs stays a head of its own, whatever the config
    says. A bare model has none, and none is missing.
    """
    head, table = found.get("lm_head.weight"), found.get("word_embeddings.weight")
    if head is None:
        return (replace(config, tie_word_embeddings=True) if bare else config), ()
    for tensor in filter(None, (head, table)):
        _checked(path, tensor, (config.vocab_size, config.hidden_size))
    if table is not None and _equal(head, table):
        del found["lm_head.weight"]
        head.release()
        return replace(config, tie_word_embeddings=True), ()
    if config.tie_word_embeddings:
        note = f"{path}: lm_head.weight differs from the embedding: kept as a head of its own"
        return replace(config, tie_word_embeddings=False), (note,)
    return config, ()


def _equal(a: SourceTensor, b: SourceTensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    rows = max(1, _COMPARE_BYTES * a.shape[0] // max(a.nbytes, 1))
    for start in range(0, a.shape[0], rows):
        stop = min(start + rows, a.shape[0])
        if a.rows(start, stop).tobytes() != b.rows(start, stop).tobytes():
            return False
    return True
