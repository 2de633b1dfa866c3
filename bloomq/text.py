"""Tokens as text: what is certain so far, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from bloomq.errors import UsageError


class Decoder(Protocol):
    """Incremental text of a tokenizer: `BloomTokenizer.stream()`."""

    def push(self, ids: int) -> str: ...
    def finish(self) -> str: ...


class TextAssembler:
    """Tokens of one sequence -> text that will not be taken back, ending before a stop string."""

    def __init__(self, decoder: Decoder, stop: Sequence[str]) -> None:
        self._decoder, self._stop = decoder, tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        return self._release(self._decoder.push(token))

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        text = self._release(self._decoder.finish())
        rest, self._held = ("" if self.stopped else self._held), ""
        return text + rest

    @property
    def held(self) -> str:
        """Text that waits because a stop string may have begun."""
        return "" if self.stopped else self._held

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            return self._take(min(found))
        return self._take(len(self._held) - self._open_prefix())

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def _open_prefix(self) -> int:
        """Length of the longest end of the held text that could be the start of a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-size:]) for s in self._stop):
                return size
        return 0


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One stop string or several, as several. Raises: UsageError."""
    if not isinstance(stop, str | list | tuple):
        raise UsageError(f"stop is {stop!r}, expected a string or a list of them")
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in strings):
        raise UsageError(f"stop is {stop!r}, expected strings of at least one character")
    return strings
