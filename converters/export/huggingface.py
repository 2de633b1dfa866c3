"""Writes a pack as a Hugging Face checkpoint: config.json, tokenizer and safetensors, which
`transformers.AutoModel...from_pretrained` and `bloomq convert` read.

Weights are what the pack computes with, restored a block of rows at a time: of a quantized pack
that is the quantized model, in a format that takes more room.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bloomq import __version__
from bloomq.config import BloomConfig
from bloomq.errors import BloomqError, NumericError, UsageError
from bloomq.pack import TOKENIZER, Pack
from bloomq.schemes import Array, bf16_to_f32, f32_to_bf16, to_half
from bloomq.tensorfile import TensorFile
from bloomq.tokenizer_config import FILE as TOKENIZER_CONFIG
from bloomq.tokenizer_config import Settings

from ..names import PREFIX, huggingface_name
from ..packed import pack_tensors
from ..source import SourceTensor
from . import Progress
from .whole_folder import whole_folder, write_flushed

DTYPES = ("auto", "f32", "bf16", "f16")
SHARD_BYTES = 5_000_000_000  # of tensors in a file, as transformers 4 writes them
_TORCH = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
_BLOCK_BYTES = 4 << 20  # of float32; restoring takes some ten times that
_INDEX = "model.safetensors.index.json"
_FILES = re.compile(
    r"(generation_|tokenizer_)?config\.json|tokenizer\.json|"
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)
_MARK = "bloomq"  # in the metadata of our files; who writes the model anew leaves it out
_WITHOUT_PREFIX = ("lm_head.", "score.", "classifier.", "qa_outputs.")


@dataclass(frozen=True, slots=True)
class _Shard:
    """One file: its header, and the tensors in it by foreign name."""

    name: str
    header: bytes
    tensors: Mapping[str, SourceTensor]


def write(
    pack: Pack,
    target: Path,
    *,
    dtype: str = "auto",
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """The folder `target` of an open pack, whole or not there; an earlier export is replaced.

    dtype: of all weights, one of DTYPES; auto: that of a pack whose matrices are all of one float
    scheme, otherwise f32, so that every matrix is exact. shard_bytes: of tensors in a file, unless
    one of them is larger.

    Raises: UsageError, PackError, OutputError, NumericError for weights that the dtype cannot hold.
    """
    if dtype not in DTYPES:
        raise UsageError(f"no checkpoint is of dtype {dtype!r}, expected {', '.join(DTYPES)}")
    if shard_bytes < 1:
        raise UsageError(f"files of {shard_bytes} bytes of tensors, expected at least 1")
    chosen = _exact_dtype(pack) if dtype == "auto" else dtype
    shards = _plan(pack, chosen, shard_bytes)
    texts = _texts(pack, chosen, shards)
    total = sum(_nbytes(t, chosen) for shard in shards for t in shard.tensors.values())
    room = total + sum(len(s.header) for s in shards) + sum(map(len, texts.values()))
    done = 0
    with whole_folder(target, room, is_export) as folder:
        for shard in shards:
            with write_flushed(folder / shard.name) as file:
                file.write(shard.header)
                for block in _blocks(shard, chosen):
                    file.write(block.reshape(-1).view(np.uint8).data)
                    done += block.nbytes
                    if progress is not None:
                        progress(done, total)
        for name, content in texts.items():
            with write_flushed(folder / name) as file:
                file.write(content)


def notes(pack: Pack, dtype: str) -> tuple[str, ...]:
    """None: restored weights are as large as everybody's."""
    return ()


def is_export(folder: Path) -> bool:
    """Is all that lies in a folder what `write` wrote?"""
    paths = list(folder.iterdir()) if folder.is_dir() else []
    weights = [path for path in paths if path.suffix == ".safetensors"]
    if not weights or not all(_FILES.fullmatch(p.name) and p.is_file() for p in paths):
        return False
    try:
        return all(_MARK in TensorFile.open(path).metadata for path in weights)
    except BloomqError:
        return False


# -- tensors ---------------------------------------------------------------------------------------


def _exact_dtype(pack: Pack) -> str:
    schemes = {scheme.name for scheme in pack.schemes.values()}
    return next(iter(schemes)) if len(schemes) == 1 and schemes <= set(_TORCH) else "f32"


def _plan(pack: Pack, dtype: str, shard_bytes: int) -> list[_Shard]:
    """The tensors in the pack's order, cut into files."""
    cuts: list[dict[str, SourceTensor]] = [{}]
    filled = 0
    for name, tensor in pack_tensors(pack).items():
        nbytes = _nbytes(tensor, dtype)
        if cuts[-1] and filled + nbytes > shard_bytes:
            cuts.append({})
            filled = 0
        prefix = "" if name.startswith(_WITHOUT_PREFIX) else PREFIX
        cuts[-1][prefix + huggingface_name(name)] = tensor
        filled += nbytes
    return [
        _Shard(
            "model.safetensors" if len(cuts) == 1
            else f"model-{i:05d}-of-{len(cuts):05d}.safetensors", _header(cut, dtype), cut,
        )
        for i, cut in enumerate(cuts, 1)
    ]  # fmt: skip


def _header(tensors: Mapping[str, SourceTensor], dtype: str) -> bytes:
    """The safetensors header of tensors that lie one behind the other."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", _MARK: __version__}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + _nbytes(tensor, dtype)
        entries[name] = {
            "dtype": dtype.upper(), "shape": tensor.shape, "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as the library pads, so that float32 is aligned
    return len(text).to_bytes(8, "little") + text


def _nbytes(tensor: SourceTensor, dtype: str) -> int:
    return tensor.nbytes // tensor.itemsize * (4 if dtype == "f32" else 2)


def _blocks(shard: _Shard, dtype: str) -> Iterator[Array]:
    """The file's values, some rows at a time. Raises: NumericError."""
    for tensor in shard.tensors.values():
        count = tensor.shape[0]
        rows = max(1, _BLOCK_BYTES * count // (4 * tensor.nbytes // tensor.itemsize))
        for start in range(0, count, rows):
            yield _block(tensor, start, min(start + rows, count), dtype)


def _block(tensor: SourceTensor, start: int, stop: int, dtype: str) -> Array:
    from ..quantize import all_finite

    raw = tensor.rows(start, stop)
    out: Array = raw
    if tensor.dtype.lower() != dtype:
        wide = bf16_to_f32(raw.view(np.uint16)) if tensor.dtype == "BF16" else raw
        values = wide.astype(np.float32, copy=False)
        narrow = {"f32": lambda x: x, "bf16": f32_to_bf16, "f16": to_half}[dtype]
        out = np.ascontiguousarray(narrow(values))
    if not all_finite(out, dtype.upper()):
        raise NumericError(f"{tensor.name} holds NaN, or values that {dtype} cannot: choose f32")
    return out


# -- the files beside them -------------------------------------------------------------------------


def _texts(pack: Pack, dtype: str, shards: list[_Shard]) -> dict[str, bytes]:
    """The other files, by name."""
    texts = {"config.json": _json(_config(pack.config, dtype))}
    if pack.config.architecture == "BloomForCausalLM":
        texts["generation_config.json"] = _json(_generation(pack.config))
    tokenizer = pack.tokenizer_bytes()
    if tokenizer is not None:
        texts[TOKENIZER] = tokenizer
        texts[TOKENIZER_CONFIG] = _json(_tokenizer_config(pack.tokenizer_settings))
    if len(shards) > 1:
        total = sum(_nbytes(t, dtype) for shard in shards for t in shard.tensors.values())
        weight_map = {name: shard.name for shard in shards for name in shard.tensors}
        texts[_INDEX] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    return texts


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _config(config: BloomConfig, dtype: str) -> dict[str, Any]:
    """config.json as transformers writes it: labels by id, the dtype by torch's name."""
    raw = config.to_dict()
    labels = raw.pop("labels")
    architectures, problem = raw.pop("architectures"), raw.pop("problem_type")
    head = {"architectures": architectures, "model_type": "bloom", "torch_dtype": _TORCH[dtype]}
    if config.architecture != "BloomForCausalLM" or config.labels != BloomConfig().labels:
        head["id2label"] = {str(i): label for i, label in enumerate(labels)}
        head["label2id"] = {label: i for i, label in enumerate(labels)}
    if problem is not None:
        head["problem_type"] = problem
    return {**head, **raw}


def _generation(config: BloomConfig) -> dict[str, Any]:
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: getattr(config, name) for name in ids}
    return {"_from_model_config": True, **{k: v for k, v in found.items() if v is not None}}


def _tokenizer_config(settings: Settings) -> dict[str, Any]:
    """What tokenizer.json does not say, as `read_settings` reads it again."""
    templates = settings.chat_templates
    raw: dict[str, Any] = {
        "tokenizer_class": "BloomTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": settings.padding_side,
        **settings.special,
    }
    if set(templates) == {"default"}:
        raw["chat_template"] = templates["default"]
    elif templates:
        named = [{"name": name, "template": text} for name, text in templates.items()]
        raw["chat_template"] = named
    return raw
