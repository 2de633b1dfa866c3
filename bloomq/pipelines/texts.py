"""Texts as the rows of ids that a model takes: checked, tokenized, cut where that is asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from bloomq.checks import is_whole
from bloomq.encoding import Tokens
from bloomq.errors import UsageError
from bloomq.tokenizer import BloomTokenizer


@dataclass(frozen=True, slots=True)
class Text:
    """A text with its tokens, as `read` of a pipeline gives it and that pipeline takes it in place
    of a str. tokens: with offsets from a `Tagger` alone."""

    text: str
    tokens: Tokens


Texts = Sequence[str] | Sequence[Text]


def read(
    tokenizer: BloomTokenizer,
    texts: Texts,
    *,
    most: int | None = None,
    truncate: bool = False,
    offsets: bool = False,
    names: Sequence[str] | None = None,
) -> list[Text]:
    """Each text with its tokens; offsets: and the characters that each of these came from. Those
    that were read before stay as they are.

    most: tokens of a text; names: what errors call each text; None: text 0, text 1, ...

    Raises: UsageError for a text without tokens, and for one of more than `most` unless `truncate`.
    """
    if most is not None and (not is_whole(most) or most < 1):
        raise UsageError(f"max_tokens is {most!r}, expected 1 or more")
    if isinstance(texts, list | tuple) and texts and all(isinstance(one, Text) for one in texts):
        return cast(list[Text], list(texts))
    texts = cast(Sequence[str], texts)  # or the tokenizer refuses it
    if offsets:
        rows = tokenizer.encode_with_offsets(texts)
    else:
        rows = [Tokens(ids, []) for ids in tokenizer.encode_batch(texts)]
    for i, row in enumerate(rows):
        name = f"text {i}" if names is None else names[i]
        if not row.ids:
            raise UsageError(f"{name}: has no tokens: leave empty texts out")
        if most is not None and len(row.ids) > most and not truncate:
            raise UsageError(
                f"{name}: has {len(row.ids)} tokens, expected {most} at most: truncate it, or "
                "raise max_tokens"
            )
    if most is not None:
        rows = [row.cut(most) for row in rows]
    return [Text(text, row) for text, row in zip(texts, rows, strict=True)]


def least_score(threshold: float | None) -> float:
    """The score from which a result counts. Raises: UsageError for what is no number."""
    if threshold is None:
        return -np.inf
    value = threshold.item() if isinstance(threshold, np.generic) else threshold
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) <= sys.float_info.max:
        raise UsageError(f"threshold is {threshold!r:.80}, expected None or a number")
    return float(value)
