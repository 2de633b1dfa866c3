"""Where the entries of a zip archive lie, of the kind that torch writes: stored, never compressed.

Stricter than zip: the directory ends the file, every entry is stored as it is, no two overlap or
share a name. So an archive says one thing to every reader, and its bytes are read where they lie.

Source: APPNOTE.TXT 6.3.10, 4.3 and 4.5.3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from bloomq.errors import CheckpointError

from .in_file import read_into, read_pieces
from .torch_values import brief

_END = struct.Struct("<4s4H2IH")  # of the directory: 22 bytes, and a comment that torch leaves out
_END_64 = struct.Struct("<4sQ2H2I4Q")  # 56 bytes
_LOCATOR_64 = struct.Struct("<4sIQI")  # 20 bytes, between those two
_ENTRY = struct.Struct("<4s6H3I5H2I")  # in the directory: 46 bytes, then name, extra and comment
_LOCAL = struct.Struct("<4s5H3I2H")  # before an entry's bytes: 30 bytes, then name and extra
_IN_EXTRA = 0xFFFFFFFF  # a size or offset of 64 bits, which stands in the extra field
_SIZES_BEHIND, _UTF_8 = 0x0008, 0x0800  # flags that torch sets
_FLAGS = _SIZES_BEHIND | _UTF_8
# A storage each: the 176B has 846 in all. More would be slow to check.
_MOST_ENTRIES, _MOST_DIRECTORY_BYTES = 1 << 16, 16 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes [start, start + nbytes) of a file."""

    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    header: int  # where its local header begins
    nbytes: int


def stored_entries(path: Path, size: int) -> dict[str, Place]:
    """Every entry of the archive of `size` bytes at `path`, by its name.

    Raises: CheckpointError.
    """
    start, stop, count = _directory(path, size)
    data = np.empty(stop - start, np.uint8)
    read_into(path, size, start, data)
    entries = _entries(path, data.tobytes(), count)
    places: dict[str, Place] = {}
    end = 0
    for entry, begin in zip(entries, _starts(path, size, entries, start), strict=True):
        name = _checked_name(path, entry.name)
        if name in places:
            raise CheckpointError(f"{path}: two entries are called {brief(name)}: damaged")
        if entry.header < end or begin + entry.nbytes > start:
            raise CheckpointError(f"{path}: entry {brief(name)} overlaps another: damaged")
        end = begin + entry.nbytes
        places[name] = Place(begin, entry.nbytes)
    return places


def _directory(path: Path, size: int) -> tuple[int, int, int]:
    """Where the directory begins and ends, and how many entries it has."""
    tail = np.empty(min(size, _END_64.size + _LOCATOR_64.size + _END.size), np.uint8)
    read_into(path, size, size - len(tail), tail)
    data, at = tail.tobytes(), len(tail) - _END.size
    if at < 0 or data[at : at + 4] != b"PK\5\6":
        _damaged(path, "no end of an archive's directory")
    _, disk, first, here, count, nbytes, start, comment = _END.unpack_from(data, at)
    stop = size - _END.size
    if data[max(0, at - _LOCATOR_64.size) :][:4] == b"PK\6\7":
        if at != _END_64.size + _LOCATOR_64.size:
            _damaged(path, "no place for the archive's long directory")
        stop = size - len(tail)
        signature, _, _, _, disk, first, here, count, nbytes, start = _END_64.unpack_from(data)
        _, _, place, _ = _LOCATOR_64.unpack_from(data, _END_64.size)
        if signature != b"PK\6\6" or place != stop:
            _damaged(path, "no long directory where the archive says")
    if disk or first or here != count or comment:
        _damaged(path, "an archive of several parts, or with a comment")
    if start + nbytes != stop:
        _damaged(path, f"the directory of {nbytes} bytes from {start} does not end at {stop}")
    if nbytes > _MOST_DIRECTORY_BYTES or count > _MOST_ENTRIES:
        raise CheckpointError(
            f"{path}: an archive of {count} entries, expected at most {_MOST_ENTRIES}: not a model"
        )
    return start, stop, count


def _entries(path: Path, data: bytes, count: int) -> list[_Entry]:
    """What the directory says, in the order in which the entries lie."""
    entries, at = [], 0
    for i in range(count):
        if at + _ENTRY.size > len(data) or data[at : at + 4] != b"PK\1\2":
            _damaged(path, f"no entry {i} in the archive's directory")
        fields = _ENTRY.unpack_from(data, at)
        _, _, _, flags, method, _, _, _, packed, nbytes, names, extras, comments = fields[:13]
        header = fields[-1]
        at += _ENTRY.size
        name, extra = data[at : at + names], data[at + names : at + names + extras]
        at += names + extras + comments
        if at > len(data):
            _damaged(path, f"entry {i} runs out of the archive's directory")
        shown = brief(name.decode(errors="replace"))
        if method:
            raise CheckpointError(
                f"{path}: entry {shown} is compressed (method {method}), as torch never writes: "
                "save the model again"
            )
        if flags & ~_FLAGS:
            _damaged(path, f"entry {shown} has flags {flags:#06x}, encrypted or unknown")
        nbytes, packed, header = _long_fields(path, shown, extra, (nbytes, packed, header))
        if packed != nbytes:
            _damaged(path, f"entry {shown} has {packed} bytes for {nbytes}")
        entries.append(_Entry(name, header, nbytes))
    if at != len(data):
        _damaged(path, "the archive's directory has more than its entries")
    return sorted(entries, key=lambda entry: entry.header)


def _long_fields(path: Path, name: str, extra: bytes, fields: tuple[int, ...]) -> tuple[int, ...]:
    """The fields, each of which may stand in the extra field with the id 1, in their order."""
    if _IN_EXTRA not in fields:
        return fields
    long = b""
    while len(extra) >= 4:
        kind, nbytes = struct.unpack_from("<2H", extra)
        if kind == 1:
            long = extra[4 : 4 + nbytes]
            break
        extra = extra[4 + nbytes :]
    in_extra = fields.count(_IN_EXTRA)
    if len(long) < 8 * in_extra:
        _damaged(path, f"entry {name} lacks its long sizes")
    values = iter(struct.unpack_from(f"<{in_extra}Q", long))
    return tuple(next(values) if field == _IN_EXTRA else field for field in fields)


def _starts(path: Path, size: int, entries: list[_Entry], end: int) -> list[int]:
    """Where each entry's bytes begin: behind a header of its own, which must name it too."""
    for entry in entries:
        if entry.header + _LOCAL.size + len(entry.name) > end:
            _damaged(path, f"entry {_shown(entry)} lies behind the archive's end")
    headers = [np.empty(_LOCAL.size + len(entry.name), np.uint8) for entry in entries]
    spans = [(entry.header, header) for entry, header in zip(entries, headers, strict=True)]
    read_pieces(path, size, spans)
    starts = []
    for entry, header in zip(entries, headers, strict=True):
        data = header.tobytes()
        signature, _, flags, method, _, _, _, _, nbytes, names, extras = _LOCAL.unpack_from(data)
        if signature != b"PK\3\4" or names != len(entry.name) or data[_LOCAL.size :] != entry.name:
            _damaged(path, f"entry {_shown(entry)} is not where the directory says")
        sized = flags & _SIZES_BEHIND or nbytes in (entry.nbytes, _IN_EXTRA)
        if method or flags & ~_FLAGS or not sized:
            _damaged(path, f"entry {_shown(entry)} is stored in two ways")
        starts.append(entry.header + len(data) + extras)
    return starts


def _checked_name(path: Path, raw: bytes) -> str:
    """A name as torch writes them, without ways out of a folder: other readers may unpack it."""
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        name = ""
    odd = "\\" in name or "\0" in name or len(name) > 1024
    if odd or any(part in ("", ".", "..") for part in name.split("/")):
        raise CheckpointError(
            f"{path}: an entry is called {brief(raw.decode(errors='replace'))}, expected names as "
            "torch writes them"
        )
    return name


def _shown(entry: _Entry) -> str:
    return brief(entry.name.decode(errors="replace"))


def _damaged(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{path}: {what}: damaged or truncated, download it again")
