"""BLOOM's tokenizer: text to ids and back, over a tokenizer.json of the `tokenizers` library.

Invariant: nothing is added, nothing tidied. No bos, no eos, no <unk>: a byte that the vocabulary
lacks vanishes. A leading space survives, and the pieces of a stream are the decoded whole.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import InputNotFound, TokenizerError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids: TypeAlias = int | np.integer[Any] | Sequence[int | np.integer[Any]] | NDArray[np.integer[Any]]
Rows: TypeAlias = list[int] | list[list[int]] | NDArray[np.int64]
Side: TypeAlias = Literal["left", "right"]

MAX_FILE_BYTES = 256 << 20  # 18 times BLOOM's own tokenizer.json of 14.5 MB
# tokenizers 0.23.3 panics at load on these; a byte-level BPE has neither (vocabularies map to ints)
_PANICKING = re.compile(rb'"type"\s*:\s*"Precompiled"|"continuing_subword_prefix"\s*:\s*"[^"]')


@dataclass(frozen=True, slots=True, eq=False)
class Encoding(Mapping[str, Rows]):
    """Ids and mask (1 text, 0 padding) of a text or a batch, made for `model(**encoding)`."""

    input_ids: Rows
    attention_mask: Rows

    def __getitem__(self, key: str) -> Rows:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("input_ids", "attention_mask"))

    def __len__(self) -> int:
        return 2


class BloomTokenizer:
    """Text to ids and ids to text, exactly as the tokenizer.json says; made by `from_file`."""

    def __init__(self, tokenizer: "Tokenizer", padding_side: Side) -> None:
        if padding_side not in ("left", "right"):
            raise UsageError(f"padding_side {padding_side!r}: expected 'left' or 'right'")
        tokenizer.no_padding()  # a file may carry the settings of the session that saved it
        tokenizer.no_truncation()
        self._tokenizer, self.padding_side = tokenizer, padding_side
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.unk_token, self.unk_token_id = self._find("<unk>")
        self.bos_token, self.bos_token_id = self._find("<s>")
        self.eos_token, self.eos_token_id = self._find("</s>")
        self.pad_token, self.pad_token_id = self._find("<pad>")
        added = tokenizer.get_added_tokens_decoder().items()
        self._special = {token.content: i for i, token in added if token.special}
        self.all_special_ids: list[int] = sorted(self._special.values())
        self._byte_of_char = _byte_alphabet()
        self._bytes_of_id: dict[int, bytes] = {}  # filled as ids are met

    @classmethod
    def from_file(cls, path: str | Path, *, padding_side: Side = "left") -> "BloomTokenizer":
        """The tokenizer of a tokenizer.json, or of a folder with one."""
        try:
            path = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
            if (size := path.stat().st_size) > MAX_FILE_BYTES:
                raise TokenizerError(f"{path}: {size} bytes, expected at most {MAX_FILE_BYTES}")
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES)  # bounded: a device has size 0 and no end
        except FileNotFoundError:
            raise InputNotFound(f"{path}: no such file; expected a tokenizer.json") from None
        except OSError as error:
            raise TokenizerError(f"{path}: {error.strerror}; check the path and rights") from None
        return cls.from_bytes(data, str(path), padding_side=padding_side)

    @classmethod
    def from_bytes(
        cls, data: bytes, source: str = "tokenizer.json", *, padding_side: Side = "left"
    ) -> "BloomTokenizer":
        """The tokenizer of a tokenizer.json's content; errors name `source`."""
        from tokenizers import Tokenizer, decoders, models  # here: `import bloomq` stays light

        with _library_errors(f"{source}: not a tokenizer.json"):
            tokenizer = None if _PANICKING.search(data) else Tokenizer.from_buffer(data)
        kinds = (models.BPE, decoders.ByteLevel)
        if tokenizer and all(map(isinstance, (tokenizer.model, tokenizer.decoder), kinds)):
            return cls(tokenizer, padding_side)
        fault = "expected a byte-level BPE such as BLOOM's, found another kind"
        raise TokenizerError(f"{source}: {fault}; take the tokenizer.json of the model")

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | Literal["longest", "max_length"] = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: Literal["np"] | None = None,
    ) -> Encoding:
        """Ids and mask: lists as deep as `text`, or int64 arrays [B, T] (B = 1 for one text).

        `padding` fills to the longest row or ("max_length") `max_length`; `truncation` cuts to it.
        """
        if padding not in (True, False, "longest", "max_length"):
            raise UsageError(f"padding {padding!r}: expected a bool, 'longest' or 'max_length'")
        if return_tensors not in ("np", None):
            raise UsageError(f"return_tensors {return_tensors!r}: expected 'np' or None")
        if (max_length or 0) < 1 if truncation or padding == "max_length" else max_length:
            raise UsageError(f"max_length {max_length}: expected >= 1 to cut or pad to, else None")
        if padding and self.pad_token_id is None:
            raise TokenizerError("no <pad> token to pad with; encode the texts one by one")
        rows = [self.encode(text)] if isinstance(text, str) else self.encode_batch(text)
        rows = [row[:max_length] for row in rows] if truncation else rows
        longest = max(map(len, rows), default=0) if padding else 0
        width = max_length or 0 if padding == "max_length" else longest
        ids = [self._fill(row, self.pad_token_id or 0, width) for row in rows]
        masks = [self._fill([1] * len(row), 0, width) for row in rows]
        if return_tensors == "np":
            return Encoding(_array(ids), _array(masks))
        return Encoding(ids[0], masks[0]) if isinstance(text, str) else Encoding(ids, masks)

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        _check_text(text, "the text")
        with _library_errors("the tokenizer failed on the text"):
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed in parallel."""
        if not isinstance(texts, list | tuple):
            raise UsageError(f"texts: expected a list of str, found {type(texts).__name__}")
        for row, text in enumerate(texts):
            _check_text(text, f"text {row}")
        with _library_errors("the tokenizer failed on the texts"):
            batch = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in batch]

    def decode(self, ids: Ids, *, skip_special_tokens: bool = False) -> str:
        """The text of one row; broken characters give U+FFFD, the padded rows' ids nothing."""
        return str(self._tokenizer.decode(_as_ids(ids), skip_special_tokens=skip_special_tokens))

    def batch_decode(self, rows: Iterable[Ids], *, skip_special_tokens: bool = False) -> list[str]:
        """The text of each row."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    def stream(self) -> "TextStream":
        """A new decoder for ids that come one by one; special tokens give no text."""
        return TextStream(self._bytes_of)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """The id of a token, or of each of a list; None for what is no token."""
        if isinstance(tokens, str):
            return self._find(tokens)[1]
        return [self._find(token)[1] for token in tokens]

    def convert_ids_to_tokens(self, ids: Ids) -> str | list[str | None] | None:
        """The token, in the byte alphabet (Ġ is a space), of an id or of each; None beyond."""
        tokens = [self._tokenizer.id_to_token(i) for i in _as_ids(ids)]
        return tokens[0] if isinstance(ids, int | np.integer) else tokens

    def _find(self, token: str) -> tuple[str | None, int | None]:
        _check_text(token, "the token")
        found = self._tokenizer.token_to_id(token)
        return (None, None) if found is None else (token, found)

    def _fill(self, row: list[int], filler: int, width: int) -> list[int]:
        filling = [filler] * (width - len(row))
        return filling + row if self.padding_side == "left" else row + filling

    def _bytes_of(self, token_id: int) -> bytes:
        """A token's bytes by the alphabet, else its UTF-8. Source: tokenizers, byte_level.rs."""
        if token_id not in self._bytes_of_id:
            token = self._tokenizer.id_to_token(token_id)
            if token is None or token in self._special:
                return b""
            values = [self._byte_of_char.get(char, -1) for char in token]
            self._bytes_of_id[token_id] = token.encode() if -1 in values else bytes(values)
        return self._bytes_of_id[token_id]


class TextStream:
    """Ids to text, O(1) each; the pieces, joined, are `decode(ids, skip_special_tokens=True)`."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of  # below: over 720,874 byte sequences the same U+FFFDs as Rust's
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Ids) -> str:
        """The text that became certain with this id (or these), maybe ""."""
        return self._decoder.decode(b"".join(map(self._bytes_of, _as_ids(ids))))

    def finish(self) -> str:
        """What was left: U+FFFD for a character cut short, else ""; the stream is as new."""
        return self._decoder.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    """The byte behind each of the 256 characters. Source: GPT-2, encoder.py, bytes_to_unicode."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return dict(zip(map(chr, [*printable, *range(0x100, 0x144)]), printable + others, strict=True))


def _as_ids(ids: Ids) -> list[int]:
    """An int or [T] -> T ints >= 0; what the library's 32 bits cannot hold is clamped: no token."""
    array = np.array(ids, dtype=object)  # Python's own ints: no overflow, no float in between
    if array.ndim > 1 or not all(isinstance(i, int | np.integer) for i in array.flat):
        raise UsageError("ids: expected one row of integers; batch_decode takes several rows")
    if min(array.flat, default=0) < 0:
        raise UsageError(f"id {min(array.flat)} is negative; expected 0 or more")
    return [min(int(i), 2**32 - 1) for i in array.flat]


def _array(rows: list[list[int]]) -> NDArray[np.int64]:
    if len({len(row) for row in rows}) > 1:
        raise UsageError("return_tensors='np': the rows differ in length; pass padding=True")
    return np.array(rows, dtype=np.int64).reshape(len(rows), -1 if any(rows) else 0)  # [B, T]


def _check_text(text: str, where: str) -> None:
    if not isinstance(text, str):
        raise UsageError(f"{where}: expected str, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fault = f"lone surrogate U+{ord(text[error.start]):04X} at position {error.start}"
        raise UsageError(f"{where}: {fault}, which UTF-8 cannot hold; remove it") from None


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Turns ValueError, bare Exception and PanicException, a BaseException, to TokenizerError."""
    try:
        yield
    except BaseException as error:  # PanicException is exported nowhere: known by its name
        if type(error) not in (ValueError, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).removeprefix("Cannot instantiate Tokenizer from buffer: ")
        raise TokenizerError(f"{what}: {' '.join(reason.split())}") from None
