"""Which texts run together, and which take their beginning from another one's keys and values.

Texts that begin alike are a family: in the order of their tokens each, from the second on, begins
as the one before it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
_ROUNDED_TO = 64  # tokens: a backend's cache has so many, or a multiple, for each row
_WORTH_SHARING = 16  # tokens: fewer are run again in the time that a step of their own takes


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A text to score. index: its number in the call; ids: [T]; first: of the tokens that are
    scored, from 1; gates: of its adapters, which those that share a beginning must have too."""

    index: int
    ids: I64
    first: int
    gates: bytes = b""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Texts for the rows 0, 1, ... of a cache. rows, longest: of the cache; continued: it is the
    last batch's, and the first text is in it already."""

    texts: list[Text]
    rows: int
    longest: int
    continued: bool = False

    def parents(self) -> list[tuple[int, int]]:
        """(row to begin with, how many of its tokens) of each text, -1 for none. Of several rows
        that would do it is the first: so texts of one beginning run side by side behind it."""
        found = []
        for row, text in enumerate(self.texts):
            shared = _shared(self.texts[row - 1], text) if row else 0
            parent = row - 1 if shared else -1
            while parent > 0 and _shared(self.texts[parent - 1], text) >= shared:
                parent -= 1
            found.append((parent, shared))
        return found


def batches(texts: Sequence[Text], most: int) -> Iterator[Batch]:
    """Families from short to long, as many as `most` tokens of cache have room for. One that is
    larger is cut, and its first text stays in the cache, for the others to begin with."""
    batch: list[Text] = []
    longest = 0
    for family in sorted(_families(texts), key=_length):
        size = -(-_length(family) // _ROUNDED_TO) * _ROUNDED_TO
        if batch and (len(batch) + len(family)) * size > most:
            yield Batch(batch, len(batch), longest)
            batch = []
        room, longest = max(2, most // size), _length(family)
        if len(family) <= room:
            batch = batch + family
            continue
        yield Batch(family[:room], room, longest)
        for start in range(room, len(family), room - 1):
            part = [family[0], *family[start : start + room - 1]]
            yield Batch(part, room, longest, continued=True)
    if batch:
        yield Batch(batch, len(batch), longest)


def _length(family: list[Text]) -> int:
    return max(len(text.ids) for text in family)


def _families(texts: Sequence[Text]) -> list[list[Text]]:
    families: list[list[Text]] = []
    for text in sorted(texts, key=lambda text: (text.gates, text.ids.tolist())):
        if families and _shared(families[-1][-1], text):
            families[-1].append(text)
        else:
            families.append([text])
    return families


def _shared(before: Text, text: Text) -> int:
    """How many tokens of `before` the cache will hold that `text` begins with and does not score; 0
    where they are not worth it."""
    most = min(len(before.ids) - 1, text.first - 1)
    if most < _WORTH_SHARING or before.gates != text.gates:
        return 0
    differ = np.flatnonzero(before.ids[:most] != text.ids[:most])
    shared = int(differ[0]) if len(differ) else most
    return shared if shared >= _WORTH_SHARING else 0
