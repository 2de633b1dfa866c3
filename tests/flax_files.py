"""Flax checkpoints written as flax.serialization writes them, and msgpack by hand to damage it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from bloomq.converters.flax_msgpack import find_arrays
from conftest import Tensors, write_checkpoint

from bloomq.errors import CheckpointError

NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
Tree = dict[str, Any]


def extension(code: int, payload: bytes) -> bytes:
    """An extension of up to 255 bytes, of any type."""
    return bytes([0xC7, len(payload), code]) + payload


def array(values: np.ndarray, dtype: str = "F32") -> msgpack.ExtType:
    """An array as flax packs it; bf16 comes as its bits."""
    fields = (values.shape, NAMES[dtype], values.tobytes("C"))
    return msgpack.ExtType(1, msgpack.packb(fields, use_bin_type=True))


def packed(tree: Tree) -> bytes:
    return bytes(msgpack.packb(tree, strict_types=True, default=list))


def in_pieces(values: np.ndarray, dtype: str, most: int) -> Tree:
    """An array over flax's limit, cut into pieces of `most` values."""
    flat = values.reshape(-1)
    pieces = [flat[i : i + most] for i in range(0, flat.size, most)]
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): n for i, n in enumerate(values.shape)},
        "chunks": {str(i): array(piece, dtype) for i, piece in enumerate(pieces)},
    }


def flax_leaves(tensors: Tensors) -> dict[str, tuple[str, np.ndarray]]:
    """Hugging Face's tensors as FlaxBloom has them, by path: `transformer/h/0/.../kernel`."""
    leaves = {}
    for name, (dtype, values) in tensors.items():
        *parts, leaf = name.split(".")
        kernel = values.ndim == 2 and parts[-1] != "word_embeddings"
        if kernel:
            leaf = "kernel"
        elif leaf == "weight":
            leaf = "embedding" if values.ndim == 2 else "scale"
        leaves["/".join([*parts, leaf])] = (dtype, values.T.copy() if kernel else values)
    return leaves


def nested(leaves: Mapping[str, Any]) -> Tree:
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parts, last = path.split("/")
        here = tree
        for part in parts:
            here = here.setdefault(part, {})
        here[last] = leaf
    return tree


def write_flax(
    folder: Path, *, shards: int = 0, level: str = "", most: int = 0, **options: Any
) -> tuple[Path, Path]:
    """The same random model as Hugging Face and as Flax checkpoints, `folder`/hf/checkpoint and
    `folder`/flax/checkpoint.

    level: a level above the tree ("params"); most: larger arrays go in pieces of so many values.
    """
    kept: Tensors = {}
    change = options.pop("edit", lambda tensors: None)

    def edit(tensors: Tensors) -> None:
        change(tensors)
        kept.update(tensors)

    source = write_checkpoint(folder / "hf" / "checkpoint", edit=edit, **options)
    target = folder / "flax" / "checkpoint"
    target.mkdir(parents=True)
    shutil.copy(source / "config.json", target)
    leaves = {
        "/".join(filter(None, [level, path])): (
            in_pieces(values, dtype, most) if 0 < most < values.size else array(values, dtype)
        )
        for path, (dtype, values) in flax_leaves(kept).items()
    }
    write_leaves(target, leaves, shards)
    return source, target


def write_leaves(folder: Path, leaves: Mapping[str, Any], shards: int = 0) -> None:
    if not shards:
        (folder / "flax_model.msgpack").write_bytes(packed(nested(leaves)))
        return
    weight_map = {}
    for i in range(shards):
        name = f"flax_model-{i + 1:05d}-of-{shards:05d}.msgpack"
        part = dict(list(leaves.items())[i::shards])
        (folder / name).write_bytes(packed(nested(part)))
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "flax_model.msgpack.index.json").write_text(json.dumps(index))


def fuzz_one(data: bytes) -> bool:
    """Is this a tree of arrays? For a fuzzer: an error that is not ours is a finding, and so is an
    array that lies outside the file."""
    try:
        arrays = find_arrays(io.BytesIO(data), "file")
    except CheckpointError:
        return False
    for found in arrays.values():
        nbytes = sum(count for _, count in found.pieces)
        assert nbytes == int(
            np.prod([4 if found.dtype == "F32" else 2, *found.shape], dtype=object)
        )
        assert all(count >= 0 <= at <= len(data) - count for at, count in found.pieces)
    return True
