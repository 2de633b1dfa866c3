"""A stretch of a file, read forward by system calls.

Invariant: no memory is taken for bytes that are not there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bloomq.errors import CheckpointError

from .in_file import read_into

_CHUNK_BYTES = 1 << 16
_LINE_BYTES = 256  # the longest name of torch's has 31


class Stream:
    """Bytes [at, stop) of a file of `size` bytes; `at` moves forward. where: how errors name it."""

    def __init__(self, path: Path, size: int, start: int, stop: int, *, where: str) -> None:
        self.where, self.at, self.stop = where, start, stop
        self._path, self._size = path, size
        self._chunk, self._base = b"", start

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises: CheckpointError where fewer are left."""
        if count > self.stop - self.at:
            raise CheckpointError(
                f"{self.where}: ends at byte {self.stop}, within a value: truncated, download it "
                "again"
            )
        begin = self.at - self._base
        if begin + count > len(self._chunk):
            self._fill(count)
            begin = 0
        self.at += count
        return self._chunk[begin : begin + count]

    def line(self) -> bytes:
        """The bytes before the next line break, which is skipped. Raises: CheckpointError."""
        most = min(_LINE_BYTES, self.stop - self.at)
        if self.at - self._base + most > len(self._chunk):
            self._fill(most)
        begin = self.at - self._base
        end = self._chunk.find(b"\n", begin, begin + most)
        if end < 0:
            raise CheckpointError(f"{self.where}: a name without an end at byte {self.at}: damaged")
        self.at += end + 1 - begin
        return self._chunk[begin:end]

    def _fill(self, count: int) -> None:
        """Make the chunk begin here and hold at least `count` bytes, which are there."""
        buffer = np.empty(max(count, min(_CHUNK_BYTES, self.stop - self.at)), np.uint8)
        read_into(self._path, self._size, self.at, buffer)
        self._chunk, self._base = buffer.tobytes(), self.at
