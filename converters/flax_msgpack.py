"""Where the arrays of a Flax file lie: its msgpack is walked, and no array's bytes are read.

    {"transformer": {"ln_f": {"scale": ext 1 of [shape, dtype name, bytes]}}}

Arrays over 1 GiB are maps of flat pieces: `__msgpack_chunked_array__`, `shape`, `chunks`.
Invariant: every piece found lies inside the file, and an array's pieces are as long as its shape
and dtype say.

Source: github.com/msgpack/msgpack, spec.md; flax.serialization.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from bloomq.errors import CheckpointError
from bloomq.files import shown

FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_CHUNKED = "__msgpack_chunked_array__"
_NDARRAY = 1  # flax's extension type
# FlaxBloom's tree is 7 deep with 12 arrays a layer; the largest config allowed has 4,096 layers.
_DEEPEST, _MOST_ENTRIES, _LONGEST_NAME, _MOST_AXES = 16, 1 << 18, 256, 8
_WINDOW_BYTES = 1 << 12  # what stands before an array's bytes is some 100 bytes

# The byte that a value begins with -> what it is, and how many bytes of length (or value) follow.
_FIELDS = {
    0xC0: ("nil", 0), 0xC2: ("false", 0), 0xC3: ("true", 0),
    0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4),
    0xC7: ("extension", 1), 0xC8: ("extension", 2), 0xC9: ("extension", 4),
    0xCA: ("float", 4), 0xCB: ("float", 8),
    0xCC: ("number", 1), 0xCD: ("number", 2), 0xCE: ("number", 4), 0xCF: ("number", 8),
    0xD0: ("signed", 1), 0xD1: ("signed", 2), 0xD2: ("signed", 4), 0xD3: ("signed", 8),
    0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4),
    0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


@dataclass(frozen=True, slots=True)
class StoredArray:
    """A row-major array of a file. dtype: F32, F16 or BF16; pieces: (start, bytes) of each, in
    order; all but giant arrays have one."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]


def find_arrays(file: BinaryIO, name: str) -> dict[str, StoredArray]:
    """Every array of an open msgpack file, by its path in the tree, `transformer/ln_f/scale`.

    name: what errors call the file. Raises: CheckpointError for anything that is not a whole tree
    of arrays.
    """
    return _Walk(file, name).tree()


class _Walk:
    """One pass over a file. `_end`: where the value that is being read must end at the latest."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._size = self._end = file.seek(0, 2)
        self._at = 0
        self._window, self._window_start = b"", 0
        self._entries = 0
        self._path: list[str] = []
        self._found: dict[str, StoredArray] = {}

    def tree(self) -> dict[str, StoredArray]:
        self._branch(self._head("map", "a map of arrays by name"))
        if self._at != self._size:
            self._fail(f"{self._size - self._at} bytes behind the end of the tree, expected none")
        return self._found

    # -- the tree ----------------------------------------------------------------------------------

    def _branch(self, count: int) -> None:
        """The entries of a map: arrays and maps."""
        self._check_count(count)
        seen: set[str] = set()
        for i in range(count):
            key = self._text("the name of an entry", _LONGEST_NAME)
            if key in seen:
                self._fail(f"{shown(key)} is there twice in one map")
            seen.add(key)
            if i == 0 and key == _CHUNKED:
                return self._add(self._chunked(count))
            self._path.append(key)
            self._node()
            self._path.pop()

    def _node(self) -> None:
        if len(self._path) > _DEEPEST:
            self._fail(f"maps nested over {_DEEPEST} deep: not a model")
        kind, count = self._any_head()
        if kind == "map":
            self._branch(count)
        elif kind == "extension":
            self._add(self._ndarray(count))
        else:
            self._wrong(kind, "an array or a map")

    def _add(self, array: StoredArray) -> None:
        path = "/".join(self._path)
        if path in self._found:
            self._fail("is there twice, nested and by its whole path")
        self._found[path] = array

    def _chunked(self, count: int) -> StoredArray:
        """The rest of a giant array's map, behind its first key."""
        self._head("true", "true, which marks an array in pieces")
        parts: dict[str, Mapping[int, int] | Mapping[int, StoredArray]] = {}
        shape: dict[int, int] = {}
        chunks: dict[int, StoredArray] = {}
        for _ in range(count - 1):
            key = self._text("shape or chunks", _LONGEST_NAME)
            if key in parts or key not in ("shape", "chunks"):
                self._fail(f"{shown(key)} in an array in pieces, expected shape and chunks")
            parts[key] = shape if key == "shape" else chunks
            entries = self._head("map", f"a map, the {key} of an array in pieces")
            self._check_count(entries)
            for _ in range(entries):
                index = self._index(entries, parts[key])
                if key == "shape":
                    shape[index] = self._head("number", "an extent")
                else:
                    chunks[index] = self._ndarray(self._head("extension", "a piece of an array"))
        if len(parts) != 2 or not chunks:
            self._fail("an array in pieces without its shape or its chunks")
        return self._joined([shape[i] for i in sorted(shape)], [chunks[i] for i in sorted(chunks)])

    def _joined(self, shape: list[int], chunks: list[StoredArray]) -> StoredArray:
        dtypes = {chunk.dtype for chunk in chunks}
        flat = all(len(chunk.shape) == 1 for chunk in chunks)
        count = sum(math.prod(chunk.shape) for chunk in chunks)
        if len(shape) > _MOST_AXES or len(dtypes) > 1 or not flat or count != math.prod(shape):
            self._fail(f"pieces of {count} values do not make an array {shape[:_MOST_AXES]}")
        pieces = tuple(chunk.pieces[0] for chunk in chunks)
        return StoredArray(chunks[0].dtype, tuple(shape), pieces)

    def _ndarray(self, length: int) -> StoredArray:
        """The array of an extension of `length` bytes; its values are passed over."""
        code = self._take(1, "the type of an extension")[0]
        if code != _NDARRAY:
            self._fail(f"extension type {code}, expected {_NDARRAY}, an array")
        end = self._at + length
        if end > self._end:
            self._fail(f"an array of {length} bytes, only {self._end - self._at} are left")
        outer, self._end = self._end, end
        fields = self._head("list", "shape, dtype and values")
        axes = self._head("list", "a shape") if fields == 3 else 0
        if fields != 3 or axes > _MOST_AXES:
            self._fail(f"an array of {fields} fields and {axes} axes, expected 3 and up to 8")
        shape = tuple(self._head("number", "an extent") for _ in range(axes))
        dtype = self._text("the name of a dtype", _LONGEST_NAME)
        if dtype not in FLOATS:
            self._fail(f"holds {shown(dtype):.40}, expected {', '.join(FLOATS)}")
        nbytes = self._head("bytes", "values")
        expected = math.prod(shape) * (4 if dtype == "float32" else 2)
        if nbytes != expected or self._at + nbytes != end:
            self._fail(
                f"{nbytes} bytes of values and {end - self._at} to the end of the array, "
                f"{list(shape)} of {dtype} has {expected}"
            )
        piece = (self._at, nbytes)
        self._at, self._end = end, outer
        return StoredArray(FLOATS[dtype], shape, (piece,))

    # -- values of msgpack -------------------------------------------------------------------------

    def _head(self, wanted: str, what: str) -> int:
        """The length (or the value) of a value that must be of the kind `wanted`."""
        kind, count = self._any_head()
        if kind != wanted:
            self._wrong(kind, what)
        return count

    def _any_head(self) -> tuple[str, int]:
        """What begins here, and its length: bytes, entries, or a number's own value."""
        first = self._take(1, "a value")[0]
        if first < 0x80:
            return "number", first
        if first < 0xC0:  # maps and lists of up to 15, texts of up to 31
            if first >= 0xA0:
                return "text", first - 0xA0
            return ("map" if first < 0x90 else "list"), first & 15
        if first in _FIXED_EXTENSIONS:
            return "extension", _FIXED_EXTENSIONS[first]
        kind, width = _FIELDS.get(first, ("signed" if first >= 0xE0 else "reserved byte", 0))
        return kind, int.from_bytes(self._take(width, f"the length of a {kind}"), "big")

    def _text(self, what: str, longest: int) -> str:
        length = self._head("text", what)
        if length > longest:
            self._fail(f"{what} is {length} bytes long, expected at most {longest}")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            self._fail(f"{what} is no UTF-8")

    def _index(self, count: int, seen: Mapping[int, object]) -> int:
        """A key that flax counts with: "0", "1", ..., in any order."""
        key = self._text("a count", _LONGEST_NAME)
        whole = key.isascii() and key.isdigit() and len(key) < 10 and str(int(key)) == key
        if not whole or int(key) >= count or int(key) in seen:
            self._fail(f"{shown(key):.40} counts the pieces of an array, expected 0 to {count - 1}")
        return int(key)

    def _check_count(self, count: int) -> None:
        self._entries += count
        if 2 * count > self._end - self._at:  # a name and a value are a byte each at least
            self._fail(f"a map of {count} entries, more than {self._end - self._at} bytes hold")
        if self._entries > _MOST_ENTRIES:
            self._fail(f"over {_MOST_ENTRIES} entries in all: not a BLOOM")

    def _take(self, count: int, what: str) -> bytes:
        """The next bytes, at most 256."""
        start, self._at = self._at, self._at + count
        if self._at > self._end:
            self._at = start
            self._fail(f"ends inside {what}: cut short or damaged, download it again")
        at = start - self._window_start
        if at < 0 or at + count > len(self._window):
            self._file.seek(start)
            self._window, self._window_start, at = self._file.read(_WINDOW_BYTES), start, 0
            if len(self._window) < count:
                self._fail(f"has grown shorter than its {self._size} bytes: it changed")
        return self._window[at : at + count]

    def _wrong(self, kind: str, what: str) -> NoReturn:
        self._fail(f"a msgpack {kind} where {what} belongs")

    def _fail(self, problem: str) -> NoReturn:
        path = f" {shown('/'.join(self._path)):.200}" if self._path else ""
        raise CheckpointError(f"{self._name}:{path} (at byte {self._at}) {problem}")
