"""Texts as rows of ids, and rows as a batch: cut, filled up, with a mask and offsets.

Invariant: an offset belongs to the token at its place: both are cut and filled together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import UsageError

Item = TypeVar("Item")
Ids: TypeAlias = int | np.integer[Any] | Sequence[int | np.integer[Any]] | NDArray[np.integer[Any]]
Side: TypeAlias = Literal["left", "right"]
Offsets: TypeAlias = list[tuple[int, int]]
Rows: TypeAlias = list[int] | list[list[int]] | NDArray[np.int64]
OffsetRows: TypeAlias = Offsets | list[Offsets] | NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text's ids and, where they were asked for, the characters (start, end) of each.

    The tokens of one character have its span each.
    """

    ids: list[int]
    offsets: Offsets

    def cut(self, most: int) -> Tokens:
        """The first `most` tokens."""
        return Tokens(self.ids[:most], self.offsets[:most])

    def followed_by(self, other: Tokens) -> Tokens:
        """This text, then the other; offsets count in the text they are of."""
        return Tokens(self.ids + other.ids, self.offsets + other.offsets)


def cut_pair(first: Tokens, second: Tokens, most: int) -> Tokens:
    """Two texts in `most` tokens: the longer loses its end, then both, until they have half each.

    Source: "longest_first" of the tokenizers library, utils/truncation.rs.
    """
    short = min(len(first.ids), len(second.ids))
    long = max(short, most - short)
    if short + long > most:
        short, long = most // 2, most - most // 2
    if len(first.ids) <= len(second.ids):
        return first.cut(short).followed_by(second.cut(long))
    return first.cut(long).followed_by(second.cut(short))


def paired(
    rows: list[Tokens], text: object, pairs: list[Tokens], text_pair: object, most: int | None
) -> list[Tokens]:
    """Each row with its pair behind it, of `most` tokens together; None: of any number."""
    if isinstance(text, str) != isinstance(text_pair, str) or len(rows) != len(pairs):
        raise UsageError(
            f"text_pair: expected one for each text, found {len(pairs)} for {len(rows)}"
        )
    both = zip(rows, pairs, strict=True)
    if most is None:
        return [row.followed_by(pair) for row, pair in both]
    return [cut_pair(row, pair, most) for row, pair in both]


@dataclass(frozen=True, slots=True, eq=False)
class Encoding(Mapping[str, Rows | OffsetRows]):
    """Ids and mask (1 text, 0 padding) of a text or a batch, made for `model(**encoding)`.

    offset_mapping: the characters of each token, (0, 0) for padding. It is there if it was asked
    for, and the mask unless it was not.
    """

    input_ids: Rows
    attention_mask: Rows | None = None
    offset_mapping: OffsetRows | None = None

    def _present(self) -> dict[str, Rows | OffsetRows]:
        found: dict[str, Rows | OffsetRows] = {"input_ids": self.input_ids}
        if self.attention_mask is not None:
            found["attention_mask"] = self.attention_mask
        if self.offset_mapping is not None:
            found["offset_mapping"] = self.offset_mapping
        return found

    def __getitem__(self, key: str) -> Rows | OffsetRows:
        return self._present()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())


def batched(
    rows: list[Tokens],
    pad_id: int,
    side: Side,
    *,
    width: int | None,
    mask: bool,
    offsets: bool,
    arrays: bool,
) -> Encoding:
    """Rows as an `Encoding`: lists of lists, or int64 arrays [B, T] and [B, T, 2].

    width: tokens that shorter rows are filled up to; None: the longest row's. mask, offsets: are
    they in it?
    """
    longest = max((len(row.ids) for row in rows), default=0)
    width = longest if width is None else width
    ids = [_filled(row.ids, pad_id, width, side) for row in rows]
    masks = [_filled([1] * len(row.ids), 0, width, side) for row in rows] if mask else None
    spans = [_filled(row.offsets, (0, 0), width, side) for row in rows] if offsets else None
    if not arrays:
        return Encoding(ids, masks, spans)
    if len({len(row) for row in ids}) > 1:
        raise UsageError("return_tensors='np': the rows differ in length; pass padding=True")
    shape = (len(ids), -1 if any(ids) else 0)
    return Encoding(
        np.array(ids, np.int64).reshape(shape),  # [B, T]
        None if masks is None else np.array(masks, np.int64).reshape(shape),
        None if spans is None else np.array(spans, np.int64).reshape(*shape, 2),
    )


def check_texts(texts: Sequence[str]) -> None:
    """Raises: UsageError for what is no list of texts."""
    if not isinstance(texts, list | tuple):
        raise UsageError(f"texts: expected a list of str, found {type(texts).__name__}")
    for row, text in enumerate(texts):
        check_text(text, f"text {row}")


def check_text(text: str, where: str) -> None:
    """Raises: UsageError, naming `where`, for what is no text, or none that UTF-8 can hold."""
    if not isinstance(text, str):
        raise UsageError(f"{where}: expected str, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fault = f"lone surrogate U+{ord(text[error.start]):04X} at position {error.start}"
        raise UsageError(f"{where}: {fault}, which UTF-8 cannot hold; remove it") from None


def as_ids(ids: Ids) -> list[int]:
    """An int or [T] -> T ints >= 0; what the library's 32 bits cannot hold is clamped: no token."""
    array = np.array(ids, dtype=object)  # Python's own ints: no overflow, no float in between
    if array.ndim > 1 or not all(isinstance(i, int | np.integer) for i in array.flat):
        raise UsageError("ids: expected one row of integers; batch_decode takes several rows")
    if min(array.flat, default=0) < 0:
        raise UsageError(f"id {min(array.flat)} is negative; expected 0 or more")
    return [min(int(i), 2**32 - 1) for i in array.flat]


def _filled(row: list[Item], filler: Item, width: int, side: Side) -> list[Item]:
    filling = [filler] * (width - len(row))
    return filling + row if side == "left" else row + filling
