"""Reads Hugging Face checkpoints: a folder with config.json and the weights beside it.

    python -m bloomq.converters.hf CHECKPOINT PACK --scheme nl4

Weights are model.safetensors, pytorch_model.bin or flax_model.msgpack, in one file or sharded by an
index; where several are there, the first of these. Nothing is unpickled: `torch_file` reads what a
state dict needs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bloomq.config import BloomConfig, read_json
from bloomq.errors import CheckpointError, ConfigError, InputNotFound
from bloomq.files import exists, read_bounded
from bloomq.pack import TOKENIZER
from bloomq.tokenizer_config import Settings, read_settings

from .flax import FLAX_INDEX, FLAX_SINGLE, flax_tensors
from .prequantized import read_packing, unpacked
from .safetensors_files import safetensors_tensors
from .source import Checkpoint, SourceTensor
from .torch_bin import bin_tensors
from .whole import whole

_BIN_INDEX = "pytorch_model.bin.index.json"
# One file, an index of several, and their reader: the first that is there, as in transformers.
_FORMS: tuple[tuple[str, str, Callable[[Sequence[Path]], dict[str, SourceTensor]]], ...] = (
    ("model.safetensors", "model.safetensors.index.json", safetensors_tensors),
    ("pytorch_model.bin", _BIN_INDEX, bin_tensors),
    (FLAX_SINGLE, FLAX_INDEX, flax_tensors),
)
_PACKED = "gptq_model-*.safetensors"  # AutoGPTQ's own names
_TOKENIZER_LIMIT_BYTES = 256 << 20


def read_folder(
    path: Path,
    found: Mapping[str, SourceTensor] | None = None,
    *,
    raw: dict[str, Any] | None = None,
    form: str = "huggingface",
) -> Checkpoint:
    """Open the checkpoint in folder `path`; no tensor is read yet (but for a head that may be
    tied).

    found: its tensors by their names there, where they lie elsewhere; raw: what config.json says,
    or would; form: what provenance calls it.

    Raises: ConfigError, CheckpointError; TokenizerError for settings beside the tokenizer that are
    not supported.
    """
    raw = _read_config(path) if raw is None else raw
    config = BloomConfig.from_dict(raw, str(path / "config.json"))
    bare = raw.get("architectures") == ["BloomModel"]
    found = _find_tensors(path) if found is None else found
    packing = read_packing(path, raw, found)
    packed_notes: tuple[str, ...] = ()
    if packing is not None:
        found, packed_notes = unpacked(path, found, packing, config.hidden_size)
    config, tensors, notes = whole(path, config, found, bare=bare)
    notes += packed_notes
    tokenizer = _read_tokenizer(path / TOKENIZER)
    settings = Settings() if tokenizer is None else read_settings(path)
    if tokenizer is None:
        notes += (f"{path}: no {TOKENIZER}: the pack will take token ids only, not text",)
    provenance = {
        "format": form,
        "name": path.resolve().name,
        "architectures": raw.get("architectures"),
        "dtype": tensors["wte.weight"].dtype,
        **({} if packing is None else {"quantization": packing.to_dict()}),
    }
    return Checkpoint(config, tensors, tokenizer, provenance, notes, settings)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        raw = read_json(path / "config.json")
    except InputNotFound:
        raise CheckpointError(f"{path}: no config.json: not a Hugging Face checkpoint") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path / 'config.json'}: expected a JSON object")
    return raw


def holds_weights(path: Path) -> bool:
    """Is there a file of weights, or an index of them, by Hugging Face's names?"""
    known = any(exists(path / name) for *names, _ in _FORMS for name in names)
    return known or any(path.glob(_PACKED))


def _find_tensors(path: Path) -> dict[str, SourceTensor]:
    """Every tensor of the checkpoint's files, by its name there."""
    for single, index, tensors_of in _FORMS:
        if exists(path / single):
            return tensors_of([path / single])
        if exists(path / index):
            return tensors_of(shards_of(path / index))
    if packed := sorted(path.glob(_PACKED)):
        return safetensors_tensors(packed)
    single, index, _ = _FORMS[0]
    if shards := sorted(p.name for p in path.glob("pytorch_model-*.bin")):
        raise CheckpointError(f"{path}: {shards[0]} without {_BIN_INDEX}: download that too")
    raise CheckpointError(f"{path}: no {single} and no {index}: not a checkpoint")


def shards_of(index: Path) -> list[Path]:
    """The files that an index names, in the order of their names; they may be missing.

    Raises: InputNotFound, CheckpointError.
    """
    raw = read_json(index)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map: damaged, download it again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: shard {name!r} lies outside the checkpoint's folder")
    return [index.parent / name for name in names]


def _read_tokenizer(path: Path) -> bytes | None:
    try:
        return read_bounded(path, _TOKENIZER_LIMIT_BYTES, CheckpointError)
    except InputNotFound:
        return None


if __name__ == "__main__":
    from bloomq.cli import main

    main(["convert", *sys.argv[1:]])
