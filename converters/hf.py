"""Reads Hugging Face checkpoints: a folder with config.json and safetensors, in one file or
sharded.

    python -m bloomq.converters.hf CHECKPOINT PACK --scheme int4

Nothing is unpickled: pytorch_model.bin files are refused by name.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bloomq.converters.names import PREFIX, expected_tensors, huggingface_name
from bloomq.converters.source import Checkpoint, SourceTensor

from bloomq.config import BloomConfig, read_json
from bloomq.errors import CheckpointError, ConfigError, InputNotFound
from bloomq.files import exists, read_bounded, shown
from bloomq.pack import MANIFEST, TOKENIZER
from bloomq.schemes import Array
from bloomq.tensorfile import DTYPES, Entry, TensorFile
from bloomq.tokenizer_config import Settings, read_settings

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_READABLE = ("F32", "F16", "BF16")
_COMPARE_BYTES = 16 << 20
_TOKENIZER_LIMIT_BYTES = 256 << 20


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open the checkpoint in folder `path`; no tensor is read yet (but for a head that may be
    tied).

    Raises: InputNotFound, ConfigError, CheckpointError; TokenizerError for settings beside the
    tokenizer that are not supported.
    """
    path = Path(path)
    raw = _read_config(path)
    config = BloomConfig.from_dict(raw, str(path / "config.json"))
    found = _find_tensors(path)
    notes: tuple[str, ...] = ()
    if config.architecture == "BloomForCausalLM":
        bare = raw.get("architectures") == ["BloomModel"]
        config, notes = _settle_tie(path, config, found, bare=bare)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        foreign = huggingface_name(name)
        tensor = found.pop(foreign, None)
        if tensor is None:
            raise CheckpointError(f"{path}: no tensor {foreign}: the checkpoint is incomplete")
        tensors[name] = _checked(tensor, shape)
    if found:
        extra = sorted(found)
        others = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{path}: unexpected tensor {shown(extra[0])}{others}: "
            f"not part of a {config.architecture} (merge adapters first)"
        )
    tokenizer = _read_tokenizer(path / TOKENIZER)
    settings = Settings() if tokenizer is None else read_settings(path)
    if tokenizer is None:
        notes += (f"{path}: no {TOKENIZER}: the pack will take token ids only, not text",)
    provenance = {
        "format": "huggingface",
        "name": path.resolve().name,
        "architectures": raw.get("architectures"),
        "dtype": tensors["wte.weight"].dtype,
    }
    return Checkpoint(config, tensors, tokenizer, provenance, notes, settings)


def _read_config(path: Path) -> dict[str, Any]:
    if not exists(path):
        raise InputNotFound(f"{path}: no such folder")
    if not path.is_dir():
        raise CheckpointError(f"{path}: is a file, expected the folder of a checkpoint")
    if exists(path / MANIFEST):
        raise CheckpointError(f"{path}: is a bloomq pack already, expected a checkpoint")
    try:
        raw = read_json(path / "config.json")
    except InputNotFound:
        raise CheckpointError(f"{path}: no config.json: not a Hugging Face checkpoint") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path / 'config.json'}: expected a JSON object")
    if "quantization_config" in raw:
        raise CheckpointError(
            f"{path}: is quantized already (quantization_config): convert the original checkpoint"
        )
    return raw


def _find_tensors(path: Path) -> dict[str, SourceTensor]:
    """Every tensor of the checkpoint's files, by its name without the `transformer.` prefix."""
    if exists(path / _SINGLE):
        names = [_SINGLE]
    elif exists(path / _INDEX):
        names = _shard_names(path / _INDEX)
    elif pickles := sorted(p.name for p in path.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{path / pickles[0]}: is a pickle, which bloomq never opens (it can run code): save "
            "the model as safetensors"
        )
    else:
        raise CheckpointError(f"{path}: no {_SINGLE} and no {_INDEX}: not a checkpoint")
    tensors: dict[str, SourceTensor] = {}
    for shard in names:
        try:
            file = TensorFile.open(path / shard)
        except InputNotFound:
            raise CheckpointError(f"{path / shard}: missing shard: download it again") from None
        for foreign, entry in file.entries.items():
            rows = partial(_read_rows, file.path, file.size, entry)
            label = f"{file.path}: {shown(foreign)}"
            tensor = SourceTensor(label, entry.dtype, entry.shape, rows)
            name = foreign.removeprefix(PREFIX)
            if name in tensors:
                raise CheckpointError(f"{tensor.name}: stored twice, also as {tensors[name].name}")
            tensors[name] = tensor
    return tensors


def _shard_names(index: Path) -> list[str]:
    raw = read_json(index)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map: damaged, download it again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: shard {name!r} lies outside the checkpoint's folder")
    return names


def _read_rows(path: Path, size: int, entry: Entry, start: int, stop: int) -> Array:
    """Read by system calls, not through a mapping: pages of a 14 GB file stay out of our memory,
    and a file cut short meanwhile is an error, not a crash."""
    row_bytes = entry.nbytes // max(entry.shape[0], 1)
    buffer = np.empty((stop - start) * row_bytes, np.uint8)
    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(entry.start + start * row_bytes)
            while done < len(buffer):
                count = file.readinto(buffer.data[done:])
                if not count:
                    raise CheckpointError(
                        f"{path}: shorter than the {size} bytes it had: it changed"
                    )
                done += count
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return buffer.view(DTYPES[entry.dtype]).reshape(stop - start, *entry.shape[1:])


def _checked(tensor: SourceTensor, shape: tuple[int, ...]) -> SourceTensor:
    if tensor.dtype not in _READABLE:
        raise CheckpointError(
            f"{tensor.name} is {tensor.dtype}, expected one of {', '.join(_READABLE)}"
        )
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.name} is {list(tensor.shape)}, expected {list(shape)} by config.json"
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
        _checked(tensor, (config.vocab_size, config.hidden_size))
    if table is not None and _equal(head, table):
        del found["lm_head.weight"]
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


def _read_tokenizer(path: Path) -> bytes | None:
    try:
        return read_bounded(path, _TOKENIZER_LIMIT_BYTES, CheckpointError)
    except InputNotFound:
        return None


if __name__ == "__main__":
    from bloomq.cli import main

    main(["convert", *sys.argv[1:]])
