"""The tensors of Flax checkpoints: `flax_model.msgpack`, one or sharded by an index.

Kernels are stored as [in, out], so a row of ours is a column there: columns are read a panel of
many at a time, and the last panels are kept for the blocks of rows that follow. Of each array every
byte is read once for each pass over its rows, by system calls.

Source: transformers 4, modeling_flax_utils.py and modeling_flax_bloom.py.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np

from bloomq.errors import CheckpointError
from bloomq.files import exists, shown
from bloomq.schemes import ROW_MULTIPLE, Array
from bloomq.tensorfile import DTYPES

from .flax_msgpack import StoredArray, find_arrays
from .source import SourceTensor

FLAX_SINGLE, FLAX_INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"
# A panel: of the order of 64 MB, but pieces of rows of 4 KiB where that is not over 256 MB, since a
# shorter piece costs a system call, and a page of the disk, all the same.
_PANEL_BYTES, _MOST_PANEL_BYTES, _PIECE_BYTES = 64 << 20, 256 << 20, 4096
_KEPT_PANELS = 2  # a block of rows may lie across two
_TILE = 64  # 64 x 64 values of source and of target fit the caches
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
_STACKED = "FlaxBloomBlockLayers"  # what `use_scan` calls all layers together


def flax_tensors(paths: Sequence[Path]) -> dict[str, SourceTensor]:
    """Every tensor of these files, by its name in a Hugging Face checkpoint, kernels transposed.

    Raises: CheckpointError, for a name that is there twice too.
    """
    tensors: dict[str, SourceTensor] = {}
    panels = _Panels()
    for path in paths:
        size, arrays = _open(path)
        for key, array in arrays.items():
            label = f"{path}: {shown(key)}"
            name = _huggingface(label, key)
            if name in tensors:
                raise CheckpointError(f"{label}: is {tensors[name].name} too: stored twice")
            stored = _Stored(path, size, array)
            if key.endswith("/kernel"):
                tensors[name] = _transposed(label, stored, panels)
            else:
                tensors[name] = SourceTensor(label, array.dtype, array.shape, stored.rows)
    return tensors


def _open(path: Path) -> tuple[int, dict[str, StoredArray]]:
    """The size of a file, and where its arrays lie."""
    if not exists(path):
        raise CheckpointError(f"{path}: missing shard: download it again")
    if not path.is_file():
        raise CheckpointError(f"{path}: is no regular file, expected msgpack")
    try:
        with path.open("rb", buffering=0) as file:
            return file.seek(0, 2), find_arrays(file, str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _huggingface(label: str, key: str) -> str:
    """`params/transformer/h/3/mlp/dense_h_to_4h/kernel` ->
    `transformer.h.3.mlp.dense_h_to_4h.weight`."""
    parts = key.split("/")
    if _STACKED in parts:
        raise CheckpointError(
            f"{label}: layers in one array (use_scan), expected h/0, h/1 and so on"
        )
    parts = parts[1:] if parts[0] == "params" else parts
    return ".".join([*parts[:-1], _LEAVES.get(parts[-1], parts[-1])])


@dataclass(frozen=True, slots=True)
class _Stored:
    """An array in its file of `size` bytes."""

    path: Path
    size: int
    array: StoredArray

    @property
    def dtype(self) -> type[np.generic]:
        return DTYPES[self.array.dtype]

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop), as they are stored."""
        out = np.empty((stop - start, *self.array.shape[1:]), self.dtype)
        row_bytes = out.nbytes // max(1, stop - start)
        with self._file() as file:
            self._fill(file, start * row_bytes, out.reshape(-1).view(np.uint8).data)
        return out

    def columns(self, start: int, stop: int) -> Array:
        """Columns [start, stop) of a matrix: [rows, stop - start]."""
        n, width = self.array.shape
        if stop - start == width:
            return self.rows(0, n)
        out = np.empty((n, stop - start), self.dtype)
        values, piece = out.reshape(-1).view(np.uint8).data, out[0].nbytes
        with self._file() as file:
            for i in range(n):
                begin = (i * width + start) * out.itemsize
                self._fill(file, begin, values[i * piece : (i + 1) * piece])
        return out

    @contextmanager
    def _file(self) -> Iterator[io.FileIO]:
        """The open file; the system's refusals as CheckpointError."""
        try:
            with self.path.open("rb", buffering=0) as file:
                yield file
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from None

    def _fill(self, file: io.FileIO, begin: int, out: memoryview) -> None:
        """The array's bytes from `begin` on, wherever its pieces lie."""
        done = 0
        for at, nbytes in self.array.pieces:
            while begin < nbytes and done < len(out):
                file.seek(at + begin)
                count = file.readinto(out[done : done + nbytes - begin])
                if not count:
                    raise CheckpointError(
                        f"{self.path}: shorter than the {self.size} bytes it had: it changed"
                    )
                done, begin = done + count, begin + count
            begin -= nbytes
            if done == len(out):
                return


class _Panels:
    """The columns of kernels that were read last, for all threads that want them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: dict[tuple[str, int], Future[Array]] = {}

    def get(self, key: tuple[str, int], read: Callable[[], Array]) -> Array:
        """The panel `key`; the first thread to ask reads it, and the others wait."""
        with self._lock:
            panel = self._kept.get(key)
            mine = panel is None
            if panel is None:
                panel = self._kept[key] = Future()
                while len(self._kept) > _KEPT_PANELS:
                    del self._kept[next(iter(self._kept))]
        if mine:
            try:
                panel.set_result(read())
            except BaseException as error:  # Ctrl-C too: nobody may wait for ever
                with self._lock:
                    self._kept.pop(key, None)
                panel.set_exception(error)
                raise
        return panel.result()


def _transposed(label: str, stored: _Stored, panels: _Panels) -> SourceTensor:
    """The tensor [out, in] of a kernel that is stored as [in, out]."""
    shape = stored.array.shape
    if len(shape) != 2:
        raise CheckpointError(f"{label}: a kernel of shape {list(shape)}, expected two axes")
    n, width = shape
    column = max(1, n * np.dtype(stored.dtype).itemsize)
    wanted = max(_PANEL_BYTES, min(n * _PIECE_BYTES, _MOST_PANEL_BYTES))
    panel = max(ROW_MULTIPLE, wanted // column // ROW_MULTIPLE * ROW_MULTIPLE)

    def rows(start: int, stop: int) -> Array:
        out = np.empty((stop - start, n), stored.dtype)
        for first in range(start // panel * panel, stop, panel):
            last = min(first + panel, width)
            values = panels.get((label, first), partial(stored.columns, first, last))  # [in, panel]
            a, b = max(start, first), min(stop, last)
            _transpose(values[:, a - first : b - first], out[a - start : b - start])
        return out

    def columns(start: int, stop: int) -> Array:
        return stored.rows(start, stop).T

    return SourceTensor(label, stored.array.dtype, (width, n), rows, columns, transposed=True)


def _transpose(source: Array, target: Array) -> None:
    """[n, m] -> [m, n], five times as fast as NumPy's own copy."""
    for i in range(0, target.shape[0], _TILE):
        for j in range(0, target.shape[1], _TILE):
            target[i : i + _TILE, j : j + _TILE] = source[j : j + _TILE, i : i + _TILE].T
