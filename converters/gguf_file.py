"""Reads GGUF files of architecture `bloom`, single or split, of every type that ggml dequantizes.

llama.cpp's converter puts the rows of the fused q, k and v as [3, H, D]; they are read back in
BLOOM's order, [H, 3, D], a run at a time. No tensor is ever whole in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bloomq.config import BloomConfig
from bloomq.errors import CheckpointError, NumericError
from bloomq.files import shown
from bloomq.schemes import Array, get_scheme
from bloomq.tensorfile import DTYPES

from .gguf_blocks import AS_IT_LIES, BLOCK, check_readable, dequantize, q4_0_parts
from .gguf_header import Entry, Header, Value, read_header
from .gguf_names import gguf_name, gguf_runs, our_name
from .gguf_parts import PART
from .gguf_tokenizer import IDS, read_tokenizer
from .in_file import read_into
from .names import expected_tensors, huggingface_name
from .source import Checkpoint, SourceTensor, Stored
from .whole import whole

ARCHITECTURE = "bloom"
_BLOOM_CONTEXT = 2048  # tokens, on which every published BLOOM was trained
WRITTEN_BY = "bloomq.version"  # metadata of the files that bloomq writes


@dataclass(frozen=True, slots=True)
class _Rows:
    """How the rows of one tensor are read: their place, and BLOOM's order of them."""

    path: Path
    size: int
    label: str
    entry: Entry
    heads: tuple[int, int] | None  # (H, D) of a fused q, k and v

    def raw(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop as they lie in the file, [n, bytes] uint8."""
        width = self.entry.row_bytes
        buffer = np.empty((stop - start, width), np.uint8)
        runs = [(start, stop)] if self.heads is None else gguf_runs(start, stop, *self.heads)
        done = 0
        for first, last in runs:
            part = buffer[done : done + last - first].reshape(-1)
            read_into(self.path, self.size, self.entry.start + first * width, part)
            done += last - first
        return buffer

    def values(self, start: int, stop: int) -> Array:
        """Rows start..stop: float32, or as the file has them where NumPy (or BF16) does too."""
        raw, kind = self.raw(start, stop), self.entry.type
        if kind.name not in AS_IT_LIES:
            return dequantize(raw, kind, self.label)
        return raw.reshape(-1).view(DTYPES[kind.name]).reshape(len(raw), *self.entry.shape[1:])


def read_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file, or the first part of a split one; no tensor is read yet (but for a head
    that may be tied).

    Raises: CheckpointError, ConfigError; TokenizerError for settings that the tokenizer has not.
    """
    headers = _headers(path)
    metadata = headers[0].metadata
    entries = _entries(headers)
    config = _config(metadata, entries, path)
    found = {}
    for name, (header, entry) in entries.items():
        ours, label = our_name(name), f"{header.path}: {shown(name)}"
        if ours is None:
            raise CheckpointError(f"{label}: no tensor of a BLOOM as llama.cpp names them")
        found[huggingface_name(ours)] = _source_tensor(header, label, entry, ours, config)
    for name in map(gguf_name, expected_tensors(config)):
        if name not in entries:
            raise CheckpointError(f"{path}: no tensor {name}: the checkpoint is incomplete")
    config, tensors, notes = whole(path, config, found)
    tokenizer, settings, more = read_tokenizer(metadata, config.vocab_size, path)
    types = Counter(entry.type.name for _, entry in entries.values())
    provenance = {
        "format": "gguf",
        "name": path.resolve().name,
        "dtype": entries["token_embd.weight"][1].type.name,
        "types": dict(sorted(types.items())),
    }
    notes = (*notes, *_context_notes(metadata, path), *more)
    return Checkpoint(config, tensors, tokenizer, provenance, notes, settings)


def _source_tensor(
    header: Header, label: str, entry: Entry, ours: str, config: BloomConfig
) -> SourceTensor:
    check_readable(entry.type, label)
    if len(entry.shape) == 1 and entry.type.block > 1:
        raise CheckpointError(f"{label}: a vector in blocks of {entry.type.name}, expected F32")
    heads = (config.n_head, config.head_dim) if ".attn.qkv." in ours else None
    reader = _Rows(header.path, header.size, label, entry, heads)
    dtype = entry.type.name if entry.type.name in AS_IT_LIES else "F32"
    stored = None
    if entry.type.name == "Q4_0" and len(entry.shape) == 2:
        stored = Stored(get_scheme("int4", BLOCK), partial(_q4_0_rows, reader, label))
    return SourceTensor(label, dtype, entry.shape, reader.values, stored=stored)


def _q4_0_rows(reader: _Rows, label: str, start: int, stop: int) -> dict[str, Array]:
    """Q4_0 is int4 in groups of 32 under another name: codes and scales are taken over."""
    parts = q4_0_parts(reader.raw(start, stop))
    if not np.isfinite(parts["scales"].astype(np.float32)).all():
        raise NumericError(f"{label} has a scale that is no number: the file is damaged")
    return parts


# -- the files -------------------------------------------------------------------------------------


def _headers(path: Path) -> list[Header]:
    """The header of the file, or of each part of it, checked to belong together."""
    first = read_header(path)
    _check_architecture(first)
    count = _whole(first, "split.count", 1)
    if count <= 1:
        return [first]
    match = PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{path}: is a part of {count}, expected a name that ends in -00001-of-{count:05}.gguf"
        )
    if _whole(first, "split.no") != 0 or int(match[2]) != 1:
        raise CheckpointError(f"{path}: is not the first of {count} parts: give that one")
    headers = [first]
    for i in range(1, count):
        part = path.with_name(f"{match[1]}-{i + 1:05}-of-{count:05}.gguf")
        if not part.is_file():
            raise CheckpointError(f"{part}: missing part of a split GGUF: download it again")
        header = read_header(part)
        if _whole(header, "split.count") != count or _whole(header, "split.no") != i:
            raise CheckpointError(f"{part}: does not call itself part {i + 1} of {count}")
        headers.append(header)
    tensors = sum(len(header.tensors) for header in headers)
    if tensors != _whole(first, "split.tensors.count", tensors):
        raise CheckpointError(
            f"{path}: its parts hold {tensors} tensors, which is not what it says it is split into"
        )
    return headers


def _check_architecture(header: Header) -> None:
    name = header.metadata.get("general.architecture")
    if name is None and "split.no" in header.metadata:
        raise CheckpointError(f"{header.path}: a later part of a split GGUF: give the first one")
    if name != ARCHITECTURE:
        raise CheckpointError(
            f"{header.path}: its architecture is {name!r:.40}, expected {ARCHITECTURE!r}: bloomq "
            "runs BLOOM, BLOOMZ and their fine-tunes only"
        )
    if header.metadata.get("general.type", "model") != "model":
        raise CheckpointError(
            f"{header.path}: holds a {header.metadata['general.type']!r:.40}, expected a model"
        )


def _entries(headers: list[Header]) -> dict[str, tuple[Header, Entry]]:
    entries: dict[str, tuple[Header, Entry]] = {}
    for header in headers:
        for name, entry in header.tensors.items():
            if name in entries:
                raise CheckpointError(
                    f"{header.path}: {shown(name)}: another part, {entries[name][0].path}, has it"
                )
            entries[name] = header, entry
    return entries


# -- the config ------------------------------------------------------------------------------------


def _config(
    metadata: Mapping[str, Value], entries: Mapping[str, tuple[Header, Entry]], path: Path
) -> BloomConfig:
    if "token_embd.weight" not in entries:
        raise CheckpointError(f"{path}: no tensor token_embd.weight: not a whole model")
    header = Header(path, 0, 0, metadata, {})
    hidden_size = _whole(header, "bloom.embedding_length")
    n_head = _whole(header, "bloom.attention.head_count")
    for key, expected in (
        ("bloom.feed_forward_length", 4 * hidden_size), ("bloom.attention.head_count_kv", n_head),
    ):  # fmt: skip
        if _whole(header, key, expected) != expected:
            raise CheckpointError(
                f"{path}: {key} is {metadata[key]}, expected {expected}: no BLOOM has another"
            )
    ids = {f"{token}_id": metadata.get(key) for token, key in IDS.items()}
    given = {key: i for key, i in ids.items() if i is not None}
    raw = {
        "model_type": "bloom", "hidden_size": hidden_size, "n_head": n_head,
        "n_layer": _whole(header, "bloom.block_count"),
        "vocab_size": entries["token_embd.weight"][1].shape[0],
        "layer_norm_epsilon": _epsilon(metadata, path), "seq_length": _context(header),
    }  # fmt: skip
    return BloomConfig.from_dict({**raw, **given}, str(path))


def _whole(header: Header, key: str, default: int | None = None) -> int:
    """A whole number of the metadata. Raises: CheckpointError."""
    value = header.metadata.get(key, default)
    if value is None:
        raise CheckpointError(
            f"{header.path}: metadata has no {key}: damaged, or no language model"
        )
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"{header.path}: {key} is {value!r:.40}, expected a whole number")
    return value


def _epsilon(metadata: Mapping[str, Value], path: Path) -> float:
    key = "bloom.attention.layer_norm_epsilon"
    value = metadata.get(key)
    if not isinstance(value, float):
        raise CheckpointError(f"{path}: {key} is {value!r:.40}, expected a number such as 1e-05")
    return float(str(np.float32(value)))  # as it was written before it became a float32


def _context(header: Header) -> int:
    """The trained length; BLOOM's where the converter did not know it."""
    if _context_notes(header.metadata, header.path):
        return _BLOOM_CONTEXT
    return _whole(header, "bloom.context_length", _BLOOM_CONTEXT)


def _context_notes(metadata: Mapping[str, Value], path: Path) -> tuple[str, ...]:
    """llama.cpp's converter takes the hidden size for a length that config.json does not say."""
    length = metadata.get("bloom.context_length")
    if WRITTEN_BY in metadata or length == _BLOOM_CONTEXT:
        return ()
    if length != metadata.get("bloom.embedding_length"):
        return ()
    return (
        f"{path}: its context length, {length}, is the hidden size, as of a "
        f"converter that knew none: {_BLOOM_CONTEXT} is taken",
    )
