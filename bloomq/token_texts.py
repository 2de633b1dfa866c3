"""The text of single tokens, of which many are a part of a character alone."""

from __future__ import annotations

from bloomq.byte_level import byte_alphabet
from bloomq.tokenizer import BloomTokenizer


class TokenTexts:
    """The text of single tokens: bytes of a character cut short as \\xNN, ids without a tokenizer
    as #ID."""

    def __init__(self, tokenizer: BloomTokenizer | None) -> None:
        self._tokenizer, self._byte_of = tokenizer, byte_alphabet()

    def of(self, token: int) -> str:
        text = self._whole(token)
        if text is not None or self._tokenizer is None:
            return f"#{token}" if text is None else text
        stored = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(stored, str):
            return f"#{token}"  # beyond the tokenizer: models are padded with such ids
        codes = [self._byte_of.get(char) for char in stored]
        return "".join(stored[i] if c is None else f"\\x{c:02x}" for i, c in enumerate(codes))

    def is_text(self, token: int) -> bool:
        """Is it a text of its own, and not a part of a character?"""
        return self._whole(token) is not None

    def _whole(self, token: int) -> str | None:
        text = "" if self._tokenizer is None else self._tokenizer.decode([token])
        return text if text and "\ufffd" not in text else None
