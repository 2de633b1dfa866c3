"""Which file of a pack holds which array, and where: known before the first weight is read.

A small pack is one file. A larger one has a file for what comes before the layers, one for each
layer, and one for what comes behind them, so that whoever runs some layers reads their files alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bloomq.config import WeightSpec
from bloomq.pack import ALIGNMENT, stored_arrays
from bloomq.schemes import Part, Scheme
from bloomq.tensorfile import DTYPES


@dataclass(frozen=True, slots=True)
class Shard:
    """One weights file. places: key -> (array, its first byte in the file); weights: name -> the
    keys of its arrays."""

    name: str
    places: Mapping[str, tuple[Part, int]]
    weights: Mapping[str, tuple[str, ...]]
    header: bytes
    nbytes: int


def lay_out(
    specs: Sequence[WeightSpec], schemes: Mapping[str, Scheme], one_file_bytes: int
) -> list[Shard]:
    """The files of a pack; arrays of up to `one_file_bytes` together make a single one."""
    arrays = {spec.name: stored_arrays(spec, schemes.get(spec.name)) for spec in specs}
    total = sum(array_bytes(part) for parts in arrays.values() for part in parts.values())
    cuts: dict[str, list[str]] = {}  # in the order of the weights
    for name in arrays:
        is_layer = name.startswith("h.")
        place = "before" if not cuts or (len(cuts) == 1 and not is_layer) else "behind"
        group = ".".join(name.split(".")[:2]) if is_layer else place
        cuts.setdefault(group if total > one_file_bytes else "all", []).append(name)
    return [
        _shard(f"weights-{i:05d}-of-{len(cuts):05d}.safetensors", {n: arrays[n] for n in names})
        for i, names in enumerate(cuts.values(), 1)
    ]


def _shard(name: str, weights: Mapping[str, Mapping[str, Part]]) -> Shard:
    arrays = {key: part for parts in weights.values() for key, part in parts.items()}
    header, places = _header(arrays), {}
    at = len(header)
    for key, part in arrays.items():
        places[key] = (part, at)
        at += array_bytes(part)
    return Shard(name, places, {w: tuple(parts) for w, parts in weights.items()}, header, at)


def _header(arrays: Mapping[str, Part]) -> bytes:
    """The safetensors header, padded with spaces so that the data starts 64-byte aligned."""
    entries, offset = {}, 0
    for key, part in arrays.items():
        end = offset + array_bytes(part)
        entries[key] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def array_bytes(part: Part) -> int:
    """Bytes of a stored array."""
    size = np.dtype(DTYPES[part.dtype]).itemsize
    for extent in part.shape:
        size *= extent
    return size
