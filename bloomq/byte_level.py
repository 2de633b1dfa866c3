"""The byte alphabet of a byte-level BPE, and its tokens' bytes as text while they come."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from bloomq.encoding import Ids, as_ids


class TextStream:
    """Ids to text, O(1) each; the pieces, joined, are `decode(ids, skip_special_tokens=True)`."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of  # below: over 720,874 byte sequences the same U+FFFDs as Rust's
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Ids) -> str:
        """The text that became certain with this id (or these), maybe ""."""
        return self._decoder.decode(b"".join(map(self._bytes_of, as_ids(ids))))

    def finish(self) -> str:
        """What was left: U+FFFD for a character cut short, else ""; the stream is as new."""
        return self._decoder.decode(b"", final=True)


def byte_alphabet() -> dict[str, int]:
    """The byte behind each of the 256 characters. Source: GPT-2, encoder.py, bytes_to_unicode."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return dict(zip(map(chr, [*printable, *range(0x100, 0x144)]), printable + others, strict=True))
