"""A writer of GGUF files for tests, which knows the format by itself and can damage it."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from conftest import random_tensors, to_dtype

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {
    U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q",
    I64: "q", F64: "d",
}  # fmt: skip
STEMS = {
    "word_embeddings": "token_embd", "word_embeddings_layernorm": "token_embd_norm",
    "ln_f": "output_norm", "input_layernorm": "attn_norm",
    "self_attention.query_key_value": "attn_qkv", "self_attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down", "lm_head": "output",
}  # fmt: skip
NUMBERS = {"F32": 0, "F16": 1, "BF16": 30}


@dataclass
class Tensor:
    """dims: as in the file, columns first; offset: None: behind the one before, aligned."""

    name: str
    dims: tuple[int, ...]
    kind: int
    data: bytes
    offset: int | None = None


@dataclass
class Gguf:
    """A file; every field may be damaged. metadata: key -> (value type, value); an array's value
    is (element type, elements)."""

    metadata: dict[str, tuple[int, Any]]
    tensors: list[Tensor]
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    n_tensors: int | None = None
    n_entries: int | None = None
    more_entries: list[bytes] = field(default_factory=list)
    order: str = "<"

    def to_bytes(self) -> bytes:
        entries = [
            text(key) + struct.pack("<I", kind) + packed(kind, value)
            for key, (kind, value) in self.metadata.items()
        ] + self.more_entries
        count = len(self.tensors) if self.n_tensors is None else self.n_tensors
        filled = len(entries) if self.n_entries is None else self.n_entries
        header = self.magic + struct.pack(f"{self.order}IQQ", self.version, count, filled)
        header += b"".join(entries)
        data = b""
        for tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            header += text(tensor.name) + struct.pack("<I", len(tensor.dims))
            header += struct.pack(f"<{len(tensor.dims)}QIQ", *tensor.dims, tensor.kind, offset)
            data += tensor.data + bytes(-len(tensor.data) % self.alignment)
        return header + bytes(-len(header) % self.alignment) + data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.to_bytes())
        return path


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def packed(kind: int, value: Any) -> bytes:
    if isinstance(value, bytes):  # as it is, however damaged
        return value
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        element, items = value
        body = b"".join(packed(element, item) for item in items)
        return struct.pack("<IQ", element, len(items)) + body
    return struct.pack(f"<{FORMATS[kind]}", value)


def bloom_metadata(
    hidden_size: int = 64, n_layer: int = 1, n_head: int = 4, context: int = 512
) -> dict[str, tuple[int, Any]]:
    return {
        "general.architecture": (STRING, "bloom"),
        "bloom.context_length": (U32, context),
        "bloom.embedding_length": (U32, hidden_size),
        "bloom.feed_forward_length": (U32, 4 * hidden_size),
        "bloom.block_count": (U32, n_layer),
        "bloom.attention.head_count": (U32, n_head),
        "bloom.attention.head_count_kv": (U32, n_head),
        "bloom.attention.layer_norm_epsilon": (F32, 1e-5),
    }


def gguf_name(name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    if not stem.startswith("h."):
        return f"{STEMS[stem]}.{leaf}"
    _, layer, inner = stem.split(".", 2)
    return f"blk.{layer}.{STEMS[inner]}.{leaf}"


def reordered(array: np.ndarray, n_head: int) -> np.ndarray:
    """[H, 3, D, ...] -> [3, H, D, ...]: llama.cpp's order of q, k and v."""
    heads = array.reshape(n_head, 3, -1, *array.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(0, 1)).reshape(array.shape)


def tiny(
    hidden_size: int = 64, n_layer: int = 1, n_head: int = 4, vocab_size: int = 96,
    dtype: str = "F32",
) -> Gguf:  # fmt: skip
    """A random BLOOM: that of `write_checkpoint` of the same sizes. Vectors are F32."""
    found = random_tensors(hidden_size, n_layer, vocab_size, "F32")
    tensors = []
    for name, (_, array) in found.items():
        kind = dtype if array.ndim == 2 else "F32"
        stored = reordered(array, n_head) if "query_key_value" in name else array
        data = to_dtype(stored, kind).tobytes()
        tensors.append(Tensor(gguf_name(name), array.shape[::-1], NUMBERS[kind], data))
    return Gguf(bloom_metadata(hidden_size, n_layer, n_head), tensors)


def vocabulary(tokenizer: dict[str, Any], rows: int) -> dict[str, tuple[int, Any]]:
    """A tokenizer.json's vocabulary as llama.cpp's converter writes it."""
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [5] * rows
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i], types[i] = token, 1
    for one in tokenizer["added_tokens"]:
        tokens[one["id"]], types[one["id"]] = one["content"], 3 if one["special"] else 4
    return {
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "bloom"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.token_type": (ARRAY, (I32, types)),
        "tokenizer.ggml.merges": (
            ARRAY, (STRING, [" ".join(m) for m in tokenizer["model"]["merges"]]),
        ),
        "tokenizer.ggml.unknown_token_id": (U32, 0),
        "tokenizer.ggml.bos_token_id": (U32, 1),
        "tokenizer.ggml.eos_token_id": (U32, 2),
        "tokenizer.ggml.padding_token_id": (U32, 3),
    }  # fmt: skip
