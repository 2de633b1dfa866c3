"""Texts as the rows of ids that a model takes: checked, tokenized, cut where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from bloomq.encoding import Tokens
from bloomq.errors import PackError, TokenizerError, UsageError
from bloomq.pack import Pack
from bloomq.sampling import is_whole
from bloomq.tokenizer import BloomTokenizer


def tokenizer_of(pack: Pack) -> BloomTokenizer:
    """A pack's tokenizer. Raises: PackError where it has none, TokenizerError."""
    data = pack.tokenizer_bytes()
    source = pack.path / "tokenizer.json"
    if data is None:
        raise PackError(
            f"{pack.path}: has no tokenizer: convert a checkpoint that has a tokenizer.json"
        )
    tokenizer = BloomTokenizer.from_bytes(data, str(source))
    if tokenizer.vocab_size > pack.config.vocab_size:
        raise TokenizerError(
            f"{source}: {tokenizer.vocab_size} tokens, the model has {pack.config.vocab_size}: "
            "it belongs to another model"
        )
    return tokenizer


def tokenized(
    tokenizer: BloomTokenizer,
    texts: Sequence[str],
    *,
    most: int | None = None,
    truncate: bool = False,
    names: Sequence[str] | None = None,
) -> list[Tokens]:
    """The tokens of each text, with the characters that each came from.

    most: of a text; names: what errors call each text; None: text 0, text 1, ...

    Raises: UsageError for a text without tokens, and for one of more than `most` unless `truncate`.
    """
    if most is not None and (not is_whole(most) or most < 1):
        raise UsageError(f"max_tokens is {most!r}, expected 1 or more")
    rows = tokenizer.encode_with_offsets(texts)
    for i, row in enumerate(rows):
        name = f"text {i}" if names is None else names[i]
        if not row.ids:
            raise UsageError(f"{name}: has no tokens: leave empty texts out")
        if most is not None and len(row.ids) > most and not truncate:
            raise UsageError(
                f"{name}: has {len(row.ids)} tokens, expected {most} at most: truncate it, or "
                "raise max_tokens"
            )
    return rows if most is None else [row.cut(most) for row in rows]
