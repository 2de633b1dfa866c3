"""Reads BigScience's Megatron-DeepSpeed checkpoints: a folder of layer files.

`layer_XX-model_YY-model_states.pt`: XX = 01 is the embedding, 03 and on are the blocks, the last,
with one number left out before it, is the final norm; YY is the tensor-parallel part. Matrices are
cut by rows (qkv, h_to_4h and the vocabulary) or by columns (dense, 4h_to_h), other tensors repeated
in every part. Parts are joined a block of rows at a time.

Nothing is unpickled. Names that no state dict needs become placeholders here (see `pickled`): of a
layer file no value but a tensor is used, and of the run's arguments plain numbers alone.

Source: convert_bloom_original_checkpoint_to_pytorch.py of transformers 4; Megatron-LM (arXiv
1909.08053, section 3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bloomq.config import BloomConfig, read_json
from bloomq.errors import CheckpointError
from bloomq.files import exists
from bloomq.schemes import Array, bf16_to_f32

from .hf import read_folder as read_huggingface
from .source import Checkpoint, SourceTensor
from .torch_file import open_torch
from .torch_values import Placeholder, StoredTensor, brief, described

_FILE = re.compile(r"layer_([0-9]{1,5})-model_([0-9]{1,5})-model_states\.pt")
_RUN = "mp_rank_00_model_states.pt"
# Foreign name -> Hugging Face's, of each kind of layer.
_EMBEDDING = {
    "word_embeddings.weight": "word_embeddings.weight",
    "word_embeddings.norm.weight": "word_embeddings_layernorm.weight",
    "word_embeddings.norm.bias": "word_embeddings_layernorm.bias",
}
_BLOCK = {
    f"{module}.{leaf}": f"{module}.{leaf}"
    for module in (
        "input_layernorm", "self_attention.query_key_value", "self_attention.dense",
        "post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",
    )
    for leaf in ("weight", "bias")
}  # fmt: skip
_FINAL = {"weight": "ln_f.weight", "bias": "ln_f.bias"}
_FIRST_BLOCK = 3
_BY_ROWS = (
    "word_embeddings.weight", "self_attention.query_key_value.weight",
    "self_attention.query_key_value.bias", "mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias",
)  # fmt: skip
_BY_COLUMNS = ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")
_READABLE = ("F32", "F16", "BF16")
_MOST_REPEATED = 1 << 17  # elements of a repeated vector: the largest hidden_size of a config
# What a run's arguments call fields of config.json.
_ARGUMENTS = {
    "num_attention_heads": "n_head", "layernorm_epsilon": "layer_norm_epsilon",
    "seq_length": "seq_length",
    "apply_residual_connection_post_layernorm": "apply_residual_connection_post_layernorm",
}  # fmt: skip


def is_checkpoint(path: Path) -> bool:
    """Does folder `path` hold layer files?"""
    return bool(_layer_files(path))


def read_folder(path: Path) -> Checkpoint:
    """Open the layer files in folder `path`, with config.json beside them or the run's arguments;
    no tensor is read yet but the repeated ones, which are compared.

    Raises: ConfigError, CheckpointError; TokenizerError for settings beside the tokenizer that are
    not supported.
    """
    layers = _checked_layers(path, _layer_files(path))
    found: dict[str, SourceTensor] = {}
    averaged: list[str] = []
    others: set[str] = set()
    for number, files in layers.items():
        names, prefix = _names_of(number, max(layers))
        parts = [_tensors(file, names, others) for file in files]
        for name, foreign in names.items():
            label = f"{path}: layer {number:02d}: {name}"
            merged, differ = _merged(label, name, [part[name] for part in parts])
            found[prefix + foreign] = merged
            averaged += [prefix + foreign] if differ else []
    raw, notes = _config(path, found, len(layers) - 2, len(layers[1]))
    config = BloomConfig.from_dict(raw, str(path / "config.json"))
    if len(layers) - 2 != config.n_layer:
        raise CheckpointError(
            f"{path}: layer files of {len(layers) - 2} blocks, expected {config.n_layer} by "
            "config.json"
        )
    notes += _unpadded(path, config, found)
    notes += _remarks(path, averaged, others)
    checkpoint = read_huggingface(path, found, raw=raw, form="megatron")
    return replace(checkpoint, notes=(*notes, *checkpoint.notes))


def _layer_files(path: Path) -> dict[int, dict[int, Path]]:
    """Layer -> part -> its file."""
    layers: dict[int, dict[int, Path]] = {}
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be listed: {error.strerror}") from None
    for name in names:
        if match := _FILE.fullmatch(name):
            parts = layers.setdefault(int(match[1]), {})
            if int(match[2]) in parts:
                raise CheckpointError(f"{path}: {name} is there twice, in two spellings")
            parts[int(match[2])] = path / name
    return layers


def _checked_layers(path: Path, layers: dict[int, dict[int, Path]]) -> dict[int, list[Path]]:
    """Layer -> its files, part by part; none missing, none too many."""
    last = max(layers)
    if last < _FIRST_BLOCK + 2:
        raise CheckpointError(
            f"{path}: layer files end with {last:02d}, expected 01, blocks from 03 and a final norm"
        )
    expected = [1, *range(_FIRST_BLOCK, last - 1), last]
    for number in expected:
        if number not in layers:
            raise CheckpointError(f"{path}: no files of layer {number:02d}: download them again")
    for number in sorted(layers):
        if number not in expected:
            raise CheckpointError(
                f"{path}: unexpected files of layer {number:02d}, expected none of it in a model "
                f"that ends with {last:02d}: the last layer may be missing"
            )
    count = 1 + max(max(parts) for parts in layers.values())
    for number in expected:
        for part in range(count):
            if part not in layers[number]:
                raise CheckpointError(
                    f"{path}: no part {part:02d} of layer {number:02d}, which others have: "
                    "download it again"
                )
    return {number: [layers[number][part] for part in range(count)] for number in expected}


def _names_of(number: int, last: int) -> tuple[Mapping[str, str], str]:
    """What a layer must hold, and what stands before its names at Hugging Face."""
    if number in (1, last):
        return (_EMBEDDING if number == 1 else _FINAL), ""
    return _BLOCK, f"h.{number - _FIRST_BLOCK}."


def _tensors(path: Path, names: Mapping[str, str], others: set[str]) -> dict[str, SourceTensor]:
    """The tensors of one file: just these. What is no tensor goes into `others`, by its name."""
    file = open_torch(path, unknown="keep")
    if not isinstance(file.content, dict):
        raise CheckpointError(f"{path}: holds {described(file.content)}, expected a layer")
    tensors = {}
    for name, value in file.content.items():
        known = type(name) is str and name in names
        if type(value) is not StoredTensor and not known:
            others.add(brief(str(name)))
            continue
        if not known:
            raise CheckpointError(f"{path}: unexpected tensor {brief(str(name))} in this layer")
        if type(value) is not StoredTensor:
            raise CheckpointError(f"{path}: {name} is {described(value)}, no weight: damaged")
        tensors[name] = file.tensor(name, value)
    for name in names:
        if name not in tensors:
            raise CheckpointError(f"{path}: no {name}, which this layer must have: damaged")
    return tensors


def _merged(label: str, name: str, parts: Sequence[SourceTensor]) -> tuple[SourceTensor, bool]:
    """One tensor of all parts, and whether repeated ones differ, so that it is their average."""
    first = parts[0]
    for part in parts:
        if part.dtype not in _READABLE:
            raise CheckpointError(
                f"{part.name} is {part.dtype}, expected a weight of {', '.join(_READABLE)}"
            )
        if (part.dtype, part.shape) != (first.dtype, first.shape):
            raise CheckpointError(
                f"{part.name} is {part.dtype} {list(part.shape)}, but {first.dtype} "
                f"{list(first.shape)} in part 00"
            )
    dims = 2 if name in _BY_COLUMNS or name == "word_embeddings.weight" else len(first.shape)
    if len(first.shape) != dims or len(first.shape) not in (1, 2) or 0 in first.shape:
        raise CheckpointError(f"{first.name} has shape {list(first.shape)}, which no weight has")
    if len(parts) == 1:
        return first, False
    if name in _BY_ROWS:
        shape = (first.shape[0] * len(parts), *first.shape[1:])
        return SourceTensor(label, first.dtype, shape, partial(_joined_rows, parts)), False
    if name in _BY_COLUMNS:
        shape = (first.shape[0], first.shape[1] * len(parts))
        return SourceTensor(label, first.dtype, shape, partial(_joined_columns, parts)), False
    if len(first.shape) != 1 or first.shape[0] > _MOST_REPEATED:
        raise CheckpointError(f"{first.name} has shape {list(first.shape)}, expected a vector")
    values = [part.rows(0, part.shape[0]).tobytes() for part in parts]
    if all(value == values[0] for value in values):
        return first, False
    return SourceTensor(label, "F32", first.shape, partial(_averaged, parts)), True


def _joined_rows(parts: Sequence[SourceTensor], start: int, stop: int) -> Array:
    """Rows of the parts one below the other."""
    each = parts[0].shape[0]
    pieces = []
    for i in range(start // each, -(-stop // each)):
        pieces.append(parts[i].rows(max(start - i * each, 0), min(stop - i * each, each)))
    return np.concatenate(pieces)


def _joined_columns(parts: Sequence[SourceTensor], start: int, stop: int) -> Array:
    return np.concatenate([part.rows(start, stop) for part in parts], axis=1)


def _averaged(parts: Sequence[SourceTensor], start: int, stop: int) -> Array:
    """The mean in float32, summed in the parts' order: what transformers' script takes, there in
    the parts' own dtype."""
    total = np.zeros(stop - start, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # the converter names what is not finite
        for part in parts:
            rows = part.rows(start, stop)
            wide = bf16_to_f32(rows.view(np.uint16)) if part.dtype == "BF16" else rows
            total += wide.astype(np.float32)
        return total / np.float32(len(parts))


def _config(
    path: Path, found: Mapping[str, SourceTensor], n_layer: int, parts: int
) -> tuple[dict[str, Any], list[str]]:
    """What config.json says or, without one, what the tensors and the run's arguments do."""
    if exists(path / "config.json"):
        return read_json(path / "config.json"), []
    arguments = _arguments(path / _RUN)
    known = {ours: arguments.get(theirs) for theirs, ours in _ARGUMENTS.items()}
    raw = {key: value for key, value in known.items() if type(value) in (int, float, bool)}
    if "n_head" not in raw:
        raise CheckpointError(
            f"{path}: no config.json, and no num_attention_heads in {_RUN}: put the model's "
            "config.json beside the layer files"
        )
    vocab_size, hidden_size = found["word_embeddings.weight"].shape
    raw |= {
        "model_type": "bloom", "architectures": ["BloomForCausalLM"], "n_layer": n_layer,
        "hidden_size": hidden_size, "vocab_size": vocab_size, "pretraining_tp": parts,
    }  # fmt: skip
    note = f"{path}: no config.json: sizes are the layer files', padding of the vocabulary included"
    return raw, [note]


def _arguments(path: Path) -> Mapping[object, object]:
    """The arguments of the training run: what argparse kept, by name; empty where they are not."""
    if not exists(path):
        return {}
    content = open_torch(path, unknown="keep").content
    arguments = content.get("args") if isinstance(content, dict) else None
    if type(arguments) is Placeholder:
        arguments = arguments.state
    return arguments if isinstance(arguments, dict) else {}


def _unpadded(path: Path, config: BloomConfig, found: dict[str, SourceTensor]) -> list[str]:
    """Cut the rows that pad the vocabulary off the embedding; say so."""
    table = found["word_embeddings.weight"]
    extra = table.shape[0] - config.vocab_size
    if extra <= 0:  # a table too short is refused with the other shapes
        return []
    found["word_embeddings.weight"] = replace(table, shape=(config.vocab_size, *table.shape[1:]))
    return [f"{path}: {extra} rows that pad the vocabulary of {config.vocab_size} are left out"]


def _remarks(path: Path, averaged: Sequence[str], others: set[str]) -> list[str]:
    notes = []
    if averaged:
        more = f" and {len(averaged) - 1} more differ" if len(averaged) > 1 else " differs"
        notes.append(f"{path}: {averaged[0]}{more} between parts: averaged in float32")
    if others:
        notes.append(f"{path}: no tensors, left out: {', '.join(sorted(others)[:8])}")
    return notes
