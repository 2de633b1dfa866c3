"""A pack as a source: to be stored in another scheme, or to be exported.

Restored weights come a few tiles of rows at a time, read by system calls as of any checkpoint.
Where a matrix keeps its scheme, its codes are copied: nothing is lost twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bloomq.config import weight_specs
from bloomq.errors import CheckpointError, NumericError, UsageError
from bloomq.pack import Pack
from bloomq.schemes import ROW_MULTIPLE, TILE, Array, Scheme, round_up, untile_rows
from bloomq.tensorfile import DTYPES

from .in_file import read_into
from .source import Checkpoint, SourceTensor, Stored

# What four bits have lost is not to be lost again; int6 and int8 keep enough to start from.
_FINAL = ("nl4", "int4", "nf4")
_MOST_ANCESTORS, _MOST_PROVENANCE_BYTES = 8, 1 << 16


def read_pack(path: Path) -> Checkpoint:
    """The pack in folder `path` as a checkpoint. Raises: PackError."""
    pack = Pack.open(path)
    origin = pack.manifest.get("provenance")
    provenance = {
        "format": "pack",
        "name": path.resolve().name,
        "dtype": _dtype(pack.schemes["h.0.attn.qkv"]),
        **_ancestors(origin),
    }
    tokenizer = pack.tokenizer_bytes()
    tensors = pack_tensors(pack)
    return Checkpoint(pack.config, tensors, tokenizer, provenance, settings=pack.tokenizer_settings)


def pack_tensors(pack: Pack) -> dict[str, SourceTensor]:
    """Every weight and bias of a pack by our names, as a checkpoint has them: restored, without
    padding."""
    tensors: dict[str, SourceTensor] = {}
    for spec in weight_specs(pack.config):
        if spec.is_matrix:
            n, k = spec.shape
            tensors[f"{spec.name}.weight"] = _matrix(pack, spec.name, (n, k))
        leaves = ("weight", "bias") if not spec.is_matrix else ("bias",)
        for leaf in leaves if spec.has_bias else ():
            key = f"{spec.name}.{leaf}"
            rows = partial(_vector_rows, pack, key)
            tensors[key] = SourceTensor(f"{pack.path}: {key}", "F32", spec.shape[:1], rows)
    return tensors


def check_pack(
    checkpoint: Checkpoint, source: str | Path, target: str | Path, schemes: Mapping[str, Scheme]
) -> None:
    """Where the source is a pack: refuses itself as the target, and to quantize weights that have
    lost too much already.

    Raises: UsageError, CheckpointError.
    """
    if checkpoint.provenance.get("format") != "pack":
        return
    if os.path.realpath(source) == os.path.realpath(target):
        raise UsageError(f"{target}: is the source itself: choose another name for the target")
    for name, scheme in schemes.items():
        tensor = checkpoint.tensors[f"{name}.weight"]
        if tensor.stored is None or tensor.stored.scheme == scheme or scheme.is_float:
            continue
        if tensor.stored.scheme.name in _FINAL:
            raise CheckpointError(
                f"{tensor.name} is {tensor.stored.scheme.label}, which has lost too much for "
                f"{scheme.label}: convert the original checkpoint, or export this"
            )


def _dtype(scheme: Scheme) -> str:
    """That of the restored weights, in which they are exact."""
    return scheme.name.upper() if scheme.is_float else "F32"


def _ancestors(origin: Any) -> dict[str, Any]:
    """What a pack was made from, and that from what, as far as it is of a bearable size."""
    kept: list[dict[str, Any]] = []
    while isinstance(origin, dict) and len(kept) < _MOST_ANCESTORS:
        kept.append({key: value for key, value in origin.items() if key != "from"})
        origin = origin.get("from")
    if not kept or len(json.dumps(kept)) > _MOST_PROVENANCE_BYTES:
        return {}
    nested: dict[str, Any] = {}
    for one in reversed(kept):
        nested = {"from": {**one, **nested}}
    return nested


def _matrix(pack: Pack, name: str, shape: tuple[int, int]) -> SourceTensor:
    scheme = pack.schemes[name]
    rows = partial(_restored_rows, pack, name, shape)
    stored = None if scheme.is_float else Stored(scheme, partial(_stored_parts, pack, name, shape))
    return SourceTensor(f"{pack.path}: {name}", _dtype(scheme), shape, rows, stored=stored)


def _restored_rows(pack: Pack, name: str, shape: tuple[int, int], start: int, stop: int) -> Array:
    """Rows of a matrix, [stop - start, K], in the dtype of its SourceTensor."""
    scheme, first, last = pack.schemes[name], start // TILE, -(-stop // TILE)
    parts = _tiles(pack, name, shape, first, last)
    if scheme.is_float:
        values: Array = untile_rows(parts["values"])
    else:
        values = scheme.dequantize(parts, ((last - first) * TILE, shape[1]))
    return np.ascontiguousarray(values[start - first * TILE : stop - first * TILE, : shape[1]])


def _stored_parts(
    pack: Pack, name: str, shape: tuple[int, int], start: int, stop: int
) -> dict[str, Array]:
    """Rows of a quantized matrix as they are stored; start a multiple of 32. Raises:
    NumericError."""
    parts = _tiles(pack, name, shape, start // TILE, round_up(stop, ROW_MULTIPLE) // TILE)
    if not np.isfinite(parts["scales"].astype(np.float32)).all():
        raise NumericError(f"{pack.path}: {name} has a scale that is no number: damaged")
    return parts


def _tiles(
    pack: Pack, name: str, shape: tuple[int, int], first: int, last: int
) -> dict[str, Array]:
    """The arrays of some tiles of a matrix."""
    scheme = pack.schemes[name]
    tiles = scheme.padded(shape)[0] // TILE
    return {
        part: _slice(pack, f"{name}.{part}", tiles, first, last) for part in scheme.parts(shape)
    }


def _slice(pack: Pack, key: str, whole: int, first: int, last: int) -> Array:
    """Of an array that divides into `whole` equal slices along its first axis, some."""
    file, entry = pack.place(key)
    buffer = np.empty(entry.nbytes // whole * (last - first), np.uint8)
    read_into(file.path, file.size, entry.start + entry.nbytes // whole * first, buffer)
    each = entry.shape[0] // whole
    return buffer.view(DTYPES[entry.dtype]).reshape(each * (last - first), *entry.shape[1:])


def _vector_rows(pack: Pack, key: str, start: int, stop: int) -> Array:
    return _slice(pack, key, pack.place(key)[1].shape[0], start, stop)
