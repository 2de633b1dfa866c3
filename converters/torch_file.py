"""Reads files of PyTorch's `save` without unpickling: their tensors, where they lie.

Two forms: a zip archive (torch 1.6 and newer) with the pickle in data.pkl and a file for each
storage; and the older one, five pickles in a row (a magic number, a version, facts about the
machine, the object, the keys of its storages), then every storage behind its number of elements.

Invariant: a tensor that is handed out lies inside its storage, and that inside the file.

Source: torch.serialization, `_save` and `_legacy_save`.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bloomq.errors import CheckpointError, InputNotFound
from bloomq.files import exists
from bloomq.schemes import Array
from bloomq.tensorfile import DTYPES

from .in_file import read_into, read_pieces, tensor_in_file
from .pickled import MOST_BYTES, Unknown, read_pickle
from .source import SourceTensor
from .stored_zip import Place, stored_entries
from .stream import Stream
from .torch_values import Storage, StoredTensor, brief, described

_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_PICKLE = "data.pkl"


@dataclass(frozen=True, slots=True, eq=False)
class TorchFile:
    """An open file of torch's: its object, as `pickled` reads it, and the places of its storages,
    by their keys."""

    path: Path
    size: int
    content: object
    places: Mapping[str, Place]

    def tensor(self, name: str, stored: StoredTensor) -> SourceTensor:
        """One of the object's tensors, to be called `name`. Raises: CheckpointError."""
        label = f"{self.path}: {brief(name)}"
        at = _checked_start(label, stored, self.places[stored.storage.key])
        if _is_contiguous(stored):
            return tensor_in_file(self.path, self.size, label, stored.dtype, stored.shape, at)
        rows = partial(_strided_rows, self.path, self.size, stored, at)
        return SourceTensor(label, stored.dtype, stored.shape, rows)


def torch_tensors(path: Path) -> dict[str, SourceTensor]:
    """Every tensor of the state dict in a file, by its name there; none is read yet.

    Raises: InputNotFound; CheckpointError for anything else than a state dict.
    """
    file = open_torch(path)
    if not isinstance(file.content, dict):
        raise CheckpointError(f"{path}: holds {described(file.content)}, expected a state dict")
    tensors = {}
    for name, value in file.content.items():
        if type(name) is not str:
            raise CheckpointError(f"{path}: a tensor called {name}, a number, expected a text")
        if type(value) is not StoredTensor:
            raise CheckpointError(
                f"{path}: {brief(name)} is {described(value)}, expected a tensor: save the "
                "model's state_dict() alone"
            )
        tensors[name] = file.tensor(name, value)
    return tensors


def open_torch(path: Path, *, unknown: Unknown = "refuse") -> TorchFile:
    """Read what a file says, but no tensor.

    unknown: what becomes of names that no state dict needs: an error, or placeholders. Raises:
    InputNotFound, CheckpointError.
    """
    if not exists(path):
        raise InputNotFound(f"{path}: no such file")
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: is not a regular file")
    start = np.empty(min(4, status.st_size), np.uint8)
    read_into(path, status.st_size, 0, start)
    if start.tobytes() == b"PK\3\4":
        return _open_archive(path, status.st_size, unknown)
    if start.tobytes()[:1] == b"\x80":
        return _open_legacy(path, status.st_size, unknown)
    raise CheckpointError(f"{path}: neither a zip archive nor a pickle: not a file of torch's")


def _open_archive(path: Path, size: int, unknown: Unknown) -> TorchFile:
    entries = stored_entries(path, size)
    pickles = [name for name in entries if name.endswith(f"/{_PICKLE}") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: {len(pickles)} entries {_PICKLE}, expected one: damaged")
    root = pickles[0].removesuffix(_PICKLE)
    _check_byteorder(path, size, entries.get(f"{root}byteorder"))
    place = entries[pickles[0]]
    if place.nbytes > MOST_BYTES:
        raise CheckpointError(
            f"{path}: {_PICKLE} of {place.nbytes} bytes, expected at most {MOST_BYTES}"
        )
    stop = place.start + place.nbytes
    stream = Stream(path, size, place.start, stop, where=f"{path}: {_PICKLE}")
    content, storages = read_pickle(stream, unknown=unknown)
    if stream.at != stop:
        raise CheckpointError(f"{path}: {_PICKLE} goes on behind its end: damaged")
    places = {}
    for key, storage in storages.items():
        found = entries.get(f"{root}data/{key}")
        if found is None:
            raise CheckpointError(f"{path}: no storage {brief(key)}: damaged, download it again")
        _check_size(path, storage, found.nbytes)
        places[key] = found
    return TorchFile(path, size, content, places)


def _check_byteorder(path: Path, size: int, place: Place | None) -> None:
    """Archives of torch before 2.1 do not say; they come from little-endian machines."""
    if place is None:
        return
    order = np.empty(min(place.nbytes, 16), np.uint8)
    read_into(path, size, place.start, order)
    if order.tobytes() != b"little":
        raise CheckpointError(
            f"{path}: byte order {brief(order.tobytes().decode(errors='replace'))}, expected "
            "little: save the model on a little-endian machine"
        )


def _check_size(path: Path, storage: Storage, nbytes: int) -> None:
    if storage.nbytes != nbytes:
        raise CheckpointError(
            f"{path}: storage {brief(storage.key)} takes {nbytes} bytes of the archive, expected "
            f"{storage.nbytes} for {storage.count} of {storage.dtype}: damaged, download it again"
        )


def _open_legacy(path: Path, size: int, unknown: Unknown) -> TorchFile:
    stream = Stream(path, size, 0, min(size, MOST_BYTES), where=str(path))
    magic, _ = read_pickle(stream)
    if magic != _MAGIC:
        raise CheckpointError(f"{path}: a pickle, but not of torch's: not a state dict")
    version, _ = read_pickle(stream)
    machine, _ = read_pickle(stream)
    if version != _LEGACY_VERSION or not isinstance(machine, dict):
        raise CheckpointError(f"{path}: another version than {_LEGACY_VERSION} of torch's format")
    if machine.get("little_endian") is not True:
        raise CheckpointError(f"{path}: not of a little-endian machine: save the model on one")
    content, storages = read_pickle(stream, unknown=unknown)
    keys, _ = read_pickle(stream)
    stored = keys if isinstance(keys, list) and all(type(key) is str for key in keys) else None
    if stored is None or sorted(stored) != sorted(storages):
        raise CheckpointError(f"{path}: its storages are others than its tensors name: damaged")
    return TorchFile(path, size, content, _legacy_places(path, size, stream.at, stored, storages))


def _legacy_places(
    path: Path, size: int, at: int, keys: list[str], storages: Mapping[str, Storage]
) -> dict[str, Place]:
    """Where each storage lies, one behind the other to the file's end."""
    places = {}
    for key in keys:
        place = places[key] = Place(at + 8, storages[key].nbytes)
        at = place.start + place.nbytes
        if at > size:
            raise CheckpointError(
                f"{path}: ends within storage {brief(key)}: truncated, download it again"
            )
    counts = np.zeros((len(keys), 8), np.uint8)
    before = (place.start - 8 for place in places.values())
    read_pieces(path, size, zip(before, counts, strict=True))
    for key, count in zip(keys, counts, strict=True):
        if int.from_bytes(count.tobytes(), "little") != storages[key].count:
            raise CheckpointError(
                f"{path}: storage {brief(key)} is not as long as its tensors say: damaged"
            )
    if at != size:
        raise CheckpointError(f"{path}: {size - at} bytes behind the last storage: damaged")
    return places


def _checked_start(label: str, stored: StoredTensor, place: Place) -> int:
    """Where the tensor's first element lies in the file; its last one lies in the storage."""
    itemsize = np.dtype(DTYPES[stored.dtype]).itemsize
    last = stored.offset + sum(
        (extent - 1) * stride for extent, stride in zip(stored.shape, stored.strides, strict=True)
    )
    empty = 0 in stored.shape
    if (stored.offset if empty else last + 1) * itemsize > place.nbytes:
        raise CheckpointError(
            f"{label} reaches beyond its storage of {place.nbytes} bytes: damaged"
        )
    if not (empty or _is_contiguous(stored) or _is_matrix_of_lines(stored)):
        raise CheckpointError(
            f"{label} has shape {list(stored.shape)} with strides {list(stored.strides)}, expected "
            "rows or columns in one piece: call .contiguous() on it before saving"
        )
    return place.start + stored.offset * itemsize


def _is_contiguous(stored: StoredTensor) -> bool:
    """Does each row follow the one before? Strides of extents of 1 are never used."""
    if 0 in stored.shape:
        return True
    dims = [(n, s) for n, s in zip(stored.shape, stored.strides, strict=True) if n != 1]
    inner = [math.prod(n for n, _ in dims[i + 1 :]) for i in range(len(dims))]
    return [stride for _, stride in dims] == inner


def _is_matrix_of_lines(stored: StoredTensor) -> bool:
    """Are its rows, or its columns, in one piece each, and apart from each other?"""
    if len(stored.shape) != 2:
        return False
    (n, k), (down, right) = stored.shape, stored.strides
    return (right == 1 and down >= k) or (down == 1 and right >= n)


def _strided_rows(
    path: Path, size: int, stored: StoredTensor, at: int, start: int, stop: int
) -> Array:
    """Rows of a matrix that is not contiguous: row by row, or, where it is transposed, a piece of
    every column."""
    dtype = np.dtype(DTYPES[stored.dtype])
    (_, k), (down, right) = stored.shape, stored.strides
    by_rows = right == 1
    lines = np.empty((stop - start, k) if by_rows else (k, stop - start), dtype)
    first, step = (start * down, down) if by_rows else (start, right)
    places = (at + (first + i * step) * dtype.itemsize for i in range(len(lines)))
    read_pieces(path, size, zip(places, lines.view(np.uint8), strict=True))
    return lines if by_rows else np.ascontiguousarray(lines.T)
