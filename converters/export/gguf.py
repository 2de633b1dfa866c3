"""Writes a pack as a GGUF file that llama.cpp runs: same grid, same rows, a few of them in memory.

`auto` stores every matrix in the smallest type of ggml that holds its scheme's grid:

    pack            GGUF    what is lost
    f32, f16, bf16  same    nothing
    int4, any G     Q4_0    nothing: (code - 8) * float16 scale, a scale for each 32 columns
    int6, nl4       Q8_0    nothing: their numbers, -32..31 and -68..56, are int8, scales float16
    int8            Q8_0    the float32 scale of a row becomes float16: up to 0.05 % of each weight
    nf4             F16     no type of ggml has its code book; rounding: up to 0.05 % of each weight

`q8_0` and `q4_0` keep those grids where they can and round where they cannot; q4_0 leaves the
embedding and the head, which suffer most, in Q8_0 unless they are int4. f32, f16 and bf16 hold the
restored weights. A matrix whose rows are no whole blocks of 32 is F16; vectors are F32. A tied head
is left out: llama.cpp takes the embedding.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bloomq import __version__
from bloomq.config import WeightSpec, weight_specs
from bloomq.errors import UsageError
from bloomq.pack import TOKENIZER, Pack
from bloomq.schemes import F32, TILE, Array, Scheme
from bloomq.weights import Matrix

from ..gguf_blocks import BY_NAME, BlockType
from ..gguf_file import ARCHITECTURE, WRITTEN_BY
from ..gguf_header import (
    ARRAY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    NUMBERS,
    STRING,
    VERSIONS,
    Numbers,
    Value,
)
from ..gguf_names import bloom_rows, gguf_name
from ..gguf_tokenizer import write_tokenizer
from .gguf_rows import encoded_rows
from .whole_file import whole_file

DTYPES = ("auto", "f32", "f16", "bf16", "q8_0", "q4_0")
Progress = Callable[[int, int], None]  # (bytes written, bytes in all)
_OF_SCHEME = {
    "f32": "F32", "f16": "F16", "bf16": "BF16", "int4": "Q4_0", "int6": "Q8_0", "int8": "Q8_0",
    "nl4": "Q8_0", "nf4": "F16",
}  # fmt: skip
# llama.cpp's number of a file that is mostly of one type. Source: llama.h, enum llama_ftype.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
_QUANTIZATION_VERSION = 2  # of ggml's blocks
_BLOCK_BYTES = 8 << 20  # of float32 that a block of rows becomes on its way
_U32, _F32, _I32, _BOOL = 4, 6, 5, 7  # numbers of value types


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor to write: a matrix of the pack, or a vector in whole."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    matrix: Matrix | None
    vector: F32 | None
    order: NDArray[np.int64] | None  # rows of the pack, for a fused q, k and v

    @property
    def nbytes(self) -> int:
        return self.type.nbytes_of(math.prod(self.shape))


def notes(pack: Pack, dtype: str) -> tuple[str, ...]:
    """That matrices grow, or were rounded a second time, which int4's would not."""
    grown, again = set(), set()
    for spec in weight_specs(pack.config):
        if not spec.is_matrix or spec.shape[1] % BY_NAME["Q4_0"].block:
            continue
        scheme = pack.schemes[spec.name]
        kind = _type_of(spec, scheme, dtype).name
        if dtype == "auto" and scheme.name in ("nl4", "nf4"):
            grown.add(f"{scheme.name} as {kind}")
        if kind == "Q4_0" and scheme.name != "int4" and not scheme.is_float:
            again.add(scheme.name)
    instead = "convert its source with --scheme int4, which goes out in Q4_0 as it is"
    found = []
    if grown:
        kinds = " and ".join(sorted(grown))
        found.append(f"GGUF holds {kinds}, in more bits: for a small file {instead}")
    if again:
        names = " and ".join(sorted(again))
        found.append(f"{names} weights were rounded a second time: {instead}")
    return tuple(found)


def write(
    pack: Pack, target: Path, *, dtype: str = "auto", progress: Progress | None = None
) -> None:
    """The GGUF file `target` of an open pack, whole or not there; a GGUF that is there is replaced.

    dtype: one of DTYPES, for the matrices.

    Raises: UsageError for a pack that no GGUF can hold, TokenizerError for its tokenizer,
    NumericError for weights too large for the type, OutputError.
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r} for a GGUF, expected one of {', '.join(DTYPES)}")
    _check(pack)
    tensors = _tensors(pack, dtype)
    header = _header(_metadata(pack, tensors), tensors)
    total = len(header) + sum(_aligned(tensor.nbytes) for tensor in tensors)
    with whole_file(target, total, MAGIC) as file:
        file.write(header)
        done = len(header)
        for tensor in tensors:
            for block in _blocks(tensor):
                file.write(block.reshape(-1).view(np.uint8).data)
                done += block.nbytes
                if progress is not None:
                    progress(done, total)
            padding = _aligned(tensor.nbytes) - tensor.nbytes
            file.write(bytes(padding))
            done += padding
        if progress is not None:
            progress(done, total)


def _check(pack: Pack) -> None:
    """Raises: UsageError for a model that llama.cpp would compute otherwise, or not at all."""
    config = pack.config
    if config.architecture != "BloomForCausalLM":
        raise UsageError(
            f"{pack.path}: is a {config.architecture}, a GGUF of BLOOM holds language models only"
        )
    if config.apply_residual_connection_post_layernorm:
        raise UsageError(
            f"{pack.path}: its residuals start behind the norms: llama.cpp computes no such BLOOM"
        )


# -- what goes in ----------------------------------------------------------------------------------


def _tensors(pack: Pack, dtype: str) -> list[_Tensor]:
    """Every tensor of the file, in the pack's order."""
    config, tensors = pack.config, []
    order = bloom_rows(config.n_head, config.head_dim)
    for spec in weight_specs(config):
        fused = order if spec.name.endswith(".attn.qkv") else None
        if spec.is_matrix:
            matrix = pack.matrix(spec.name)
            name = gguf_name(f"{spec.name}.weight")
            kind = _type_of(spec, matrix.scheme, dtype)
            tensors.append(_Tensor(name, kind, spec.shape, matrix, None, fused))
        for leaf in ("bias",) if spec.is_matrix else ("weight", "bias"):
            if spec.has_bias:
                vector = pack.vector(f"{spec.name}.{leaf}", spec.shape[0])
                vector = vector if fused is None else vector[fused]
                name = gguf_name(f"{spec.name}.{leaf}")
                shape = spec.shape[:1]
                tensors.append(_Tensor(name, BY_NAME["F32"], shape, None, vector, None))
    return tensors


def _type_of(spec: WeightSpec, scheme: Scheme, dtype: str) -> BlockType:
    name = _OF_SCHEME[scheme.name] if dtype == "auto" else dtype.upper()
    if dtype == "q4_0" and spec.kind != "linear" and scheme.name != "int4":
        name = "Q8_0"
    if spec.shape[1] % BY_NAME[name].block:
        name = "F16"
    return BY_NAME[name]


def _metadata(pack: Pack, tensors: list[_Tensor]) -> dict[str, Value]:
    """As llama.cpp's converter writes it, and who wrote it."""
    config = pack.config
    bulk = next(tensor.type.name for tensor in tensors if tensor.name.endswith("ffn_up.weight"))
    given = pack.manifest["provenance"].get("name")
    name = given if isinstance(given, str) and given else pack.path.resolve().name
    return {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": name.encode(errors="replace").decode(),  # a folder's may be no text
        "general.file_type": _FILE_TYPES[bulk],
        "general.quantization_version": _QUANTIZATION_VERSION,
        WRITTEN_BY: __version__,
        "bloom.context_length": config.seq_length,
        "bloom.embedding_length": config.hidden_size,
        "bloom.feed_forward_length": 4 * config.hidden_size,
        "bloom.block_count": config.n_layer,
        "bloom.attention.head_count": config.n_head,
        "bloom.attention.head_count_kv": config.n_head,
        "bloom.attention.layer_norm_epsilon": config.layer_norm_epsilon,
        **write_tokenizer(
            pack.tokenizer_bytes(), config, pack.tokenizer_settings, pack.path / TOKENIZER
        ),
    }


def _header(metadata: Mapping[str, Value], tensors: list[_Tensor]) -> bytes:
    """Everything before the first tensor's bytes, padded."""
    counts = struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))
    pieces = [MAGIC, counts]
    for key, value in metadata.items():
        pieces += [_text(key), _value(value)]
    offset = 0
    for tensor in tensors:
        shape = tensor.shape[::-1]  # columns come first
        pieces.append(_text(tensor.name))
        pieces.append(struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        pieces.append(struct.pack("<IQ", tensor.type.number, offset))
        offset += _aligned(tensor.nbytes)
    header = b"".join(pieces)
    return header + bytes(_aligned(len(header)) - len(header))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, Numbers):
        numbers = np.ascontiguousarray(value.values, NUMBERS[_I32])
        return struct.pack("<IIQ", ARRAY, _I32, len(numbers)) + numbers.tobytes()
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _blocks(tensor: _Tensor) -> Iterator[Array]:
    """The tensor's bytes, a block of rows at a time."""
    if tensor.matrix is None:
        yield np.ascontiguousarray(tensor.vector, "<f4")
        return
    n, k = tensor.shape
    order = np.arange(n) if tensor.order is None else tensor.order
    rows = max(TILE, _BLOCK_BYTES // (4 * k) // TILE * TILE)
    for start in range(0, n, rows):
        ids = order[start : start + rows]
        yield encoded_rows(tensor.matrix, ids, tensor.type, tensor.name)
