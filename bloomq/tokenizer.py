"""BLOOM's tokenizer: text to ids and back, over a tokenizer.json of the `tokenizers` library.

Invariant: nothing is added, nothing tidied. No bos, no eos, no <unk>: a byte that the vocabulary
lacks vanishes. A leading space survives, and the pieces of a stream are the decoded whole.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bloomq.byte_level import TextStream, byte_alphabet
from bloomq.chat.template import ChatTemplate, Message
from bloomq.encoding import (
    Encoding,
    Ids,
    Side,
    Tokens,
    as_ids,
    batched,
    check_text,
    check_texts,
    paired,
)
from bloomq.errors import InputNotFound, PackError, TokenizerError, UsageError
from bloomq.files import exists, read_bounded
from bloomq.pack import MANIFEST, TOKENIZER, Pack
from bloomq.tokenizer_config import SPECIAL, read_settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_FILE_BYTES = 256 << 20  # 18 times BLOOM's own tokenizer.json of 14.5 MB
# tokenizers 0.23.3 panics at load on these; a byte-level BPE has neither (vocabularies map to ints)
_PANICKING = re.compile(rb'"type"\s*:\s*"Precompiled"|"continuing_subword_prefix"\s*:\s*"[^"]')


class BloomTokenizer:
    """Text to ids and ids to text, exactly as the tokenizer.json says; made by `from_pretrained`.

    special: the names of unk_token, bos_token, eos_token and pad_token; chat_template: Jinja, or
    several by name.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        padding_side: Side,
        special: Mapping[str, str] = SPECIAL,
        chat_template: str | Mapping[str, str] | None = None,
    ) -> None:
        if padding_side not in ("left", "right"):
            raise UsageError(f"padding_side {padding_side!r}: expected 'left' or 'right'")
        tokenizer.no_padding()  # a file may carry the settings of the session that saved it
        tokenizer.no_truncation()
        self._tokenizer, self.padding_side = tokenizer, padding_side
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.unk_token, self.unk_token_id = self._find(special["unk_token"])
        self.bos_token, self.bos_token_id = self._find(special["bos_token"])
        self.eos_token, self.eos_token_id = self._find(special["eos_token"])
        self.pad_token, self.pad_token_id = self._find(special["pad_token"])
        added = tokenizer.get_added_tokens_decoder().items()
        self._special = {token.content: i for i, token in added if token.special}
        self.all_special_ids: list[int] = sorted(self._special.values())
        self._byte_of_char = byte_alphabet()
        self._bytes_of_id: dict[int, bytes] = {}  # filled as ids are met
        self.chat_template = chat_template or None
        self._compiled: ChatTemplate | None = None  # the template that was used last

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, padding_side: Side | None = None
    ) -> "BloomTokenizer":
        """The tokenizer of a pack, a checkpoint's folder or a tokenizer.json.

        padding_side: None for what the pack, or the tokenizer_config.json beside the file, says,
        "left" where neither does.

        Raises: InputNotFound, PackError, TokenizerError; also for settings that are not supported.
        """
        file = _file_of(path)
        if file.name == TOKENIZER and exists(file.parent / MANIFEST):
            return cls.of_pack(Pack.open(file.parent), padding_side=padding_side)
        data, settings = _content(file), read_settings(file.parent)
        side = settings.padding_side if padding_side is None else padding_side
        return cls.from_bytes(
            data, str(file), padding_side=side, special=settings.special,
            chat_template=settings.chat_templates,
        )  # fmt: skip

    @classmethod
    def of_pack(cls, pack: Pack, *, padding_side: Side | None = None) -> "BloomTokenizer":
        """The tokenizer of an open pack, with the settings of the checkpoint it was made from.

        Raises: PackError where it has none, TokenizerError where it does not fit the model.
        """
        data = pack.tokenizer_bytes()
        if data is None:
            raise PackError(
                f"{pack.path}: has no tokenizer: convert a checkpoint that has a tokenizer.json"
            )
        source, settings = str(pack.path / TOKENIZER), pack.tokenizer_settings
        side = settings.padding_side if padding_side is None else padding_side
        made = cls.from_bytes(
            data, source, padding_side=side, special=settings.special,
            chat_template=settings.chat_templates,
        )  # fmt: skip
        if made.vocab_size > pack.config.vocab_size:
            raise TokenizerError(
                f"{source}: {made.vocab_size} tokens, the model has {pack.config.vocab_size}: "
                "it belongs to another model"
            )
        return made

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        padding_side: Side = "left",
        special: Mapping[str, str] = SPECIAL,
    ) -> "BloomTokenizer":
        """The tokenizer of a tokenizer.json, or of a folder with one, and of nothing beside it."""
        file = _file_of(path)
        data = _content(file)
        return cls.from_bytes(data, str(file), padding_side=padding_side, special=special)

    @classmethod
    def from_bytes(
        cls,
        data: bytes,
        source: str = "tokenizer.json",
        *,
        padding_side: Side = "left",
        special: Mapping[str, str] = SPECIAL,
        chat_template: str | Mapping[str, str] | None = None,
    ) -> "BloomTokenizer":
        """The tokenizer of a tokenizer.json's content; errors name `source`."""
        from tokenizers import Tokenizer, decoders, models  # here: `import bloomq` stays light

        with _library_errors(f"{source}: not a tokenizer.json"):
            tokenizer = None if _PANICKING.search(data) else Tokenizer.from_buffer(data)
        kinds = (models.BPE, decoders.ByteLevel)
        if tokenizer and all(map(isinstance, (tokenizer.model, tokenizer.decoder), kinds)):
            return cls(tokenizer, padding_side, special, chat_template)
        fault = "expected a byte-level BPE such as BLOOM's, found another kind"
        raise TokenizerError(f"{source}: {fault}; take the tokenizer.json of the model")

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | Literal["longest", "max_length"] = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: Literal["np"] | None = None,
        return_attention_mask: bool = True,
        return_offsets_mapping: bool = False,
    ) -> Encoding:
        """Ids and mask: lists as deep as `text`, or int64 arrays [B, T] (B = 1 for one text).

        `text_pair` follows its text, with nothing between them; `padding` fills to the longest row
        or ("max_length") `max_length`; `truncation` cuts to it, of a pair the longer text first.
        `add_special_tokens` is taken as transformers' code passes it: BLOOM adds none either way.
        """
        if padding not in (True, False, "longest", "max_length"):
            raise UsageError(f"padding {padding!r}: expected a bool, 'longest' or 'max_length'")
        if return_tensors not in ("np", None):
            raise UsageError(f"return_tensors {return_tensors!r}: expected 'np' or None")
        if (max_length or 0) < 1 if truncation or padding == "max_length" else max_length:
            raise UsageError(f"max_length {max_length}: expected >= 1 to cut or pad to, else None")
        if padding and self.pad_token_id is None:
            raise TokenizerError("no <pad> token to pad with; encode the texts one by one")
        most = max_length if truncation else None
        rows = self._rows(text, return_offsets_mapping)
        if text_pair is not None:
            rows = paired(
                rows, text, self._rows(text_pair, return_offsets_mapping), text_pair, most
            )
        elif most is not None:
            rows = [row.cut(most) for row in rows]
        width = max_length if padding == "max_length" else None if padding else 0
        batch = batched(
            rows, self.pad_token_id or 0, self.padding_side, width=width,
            mask=return_attention_mask, offsets=return_offsets_mapping,
            arrays=return_tensors == "np",
        )  # fmt: skip
        if not isinstance(text, str) or return_tensors is not None:
            return batch
        return Encoding(**{name: part[0] for name, part in batch.items()})  # type: ignore[arg-type]

    def _rows(self, texts: str | Sequence[str], offsets: bool) -> list[Tokens]:
        """A text, or each of several, as a row."""
        if offsets:
            return self.encode_with_offsets([texts] if isinstance(texts, str) else texts)
        rows = [self.encode(texts)] if isinstance(texts, str) else self.encode_batch(texts)
        return [Tokens(row, []) for row in rows]

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        check_text(text, "the text")
        with _library_errors("the tokenizer failed on the text"):
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed in parallel."""
        check_texts(texts)
        with _library_errors("the tokenizer failed on the texts"):
            batch = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in batch]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[Tokens]:
        """The ids of each text, and the characters that each came from, computed in parallel."""
        check_texts(texts)
        with _library_errors("the tokenizer failed on the texts"):
            batch = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [Tokens(list(encoding.ids), list(encoding.offsets)) for encoding in batch]

    def decode(self, ids: Ids, *, skip_special_tokens: bool = False) -> str:
        """The text of one row; broken characters give U+FFFD, the padded rows' ids nothing."""
        return str(self._tokenizer.decode(as_ids(ids), skip_special_tokens=skip_special_tokens))

    def batch_decode(self, rows: Iterable[Ids], *, skip_special_tokens: bool = False) -> list[str]:
        """The text of each row."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    def apply_chat_template(
        self,
        conversation: Sequence[Message],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        return_tensors: Literal["np"] | None = None,
    ) -> str | Encoding:
        """A conversation, messages of `role` and `content`, as text that ends where the answer
        begins; with `tokenize` as an `Encoding`.

        What transformers' method writes, whose defaults are False and True: it tokenizes, and
        begins no answer. chat_template: Jinja, or the name of one of several, None: the
        tokenizer's; variables: more names for the template.

        Raises: UsageError for messages that are none; TokenizerError without a template, and for
        one that fails.
        """
        source = self._template_named(chat_template)
        if self._compiled is None or self._compiled.source != source:
            self._compiled = ChatTemplate(source)
        special = {
            "bos_token": self.bos_token, "eos_token": self.eos_token, "unk_token": self.unk_token,
            "pad_token": self.pad_token,
        }  # fmt: skip
        known = {name: token for name, token in special.items() if token is not None}
        text = self._compiled.render(
            conversation, add_generation_prompt=add_generation_prompt, tools=tools,
            documents=documents, variables={**known, **(variables or {})},
        )  # fmt: skip
        return self(text, return_tensors=return_tensors) if tokenize else text

    def _template_named(self, given: str | None) -> str:
        """The Jinja of a name, of Jinja itself, or of None."""
        ours = self.chat_template
        named = {"default": ours} if isinstance(ours, str) else dict(ours or {})
        if given is not None:
            return named.get(given, given)
        if "default" not in named:
            names = ", ".join(sorted(named)) or "none at all"
            raise TokenizerError(
                f"the tokenizer has no default chat template, but {names}: pass chat_template"
            )
        return named["default"]

    def stream(self) -> TextStream:
        """A new decoder for ids that come one by one; special tokens give no text."""
        return TextStream(self._bytes_of)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """The id of a token, or of each of a list; None for what is no token."""
        if isinstance(tokens, str):
            return self._find(tokens)[1]
        return [self._find(token)[1] for token in tokens]

    def convert_ids_to_tokens(self, ids: Ids) -> str | list[str | None] | None:
        """The token, in the byte alphabet (Ġ is a space), of an id or of each; None beyond."""
        tokens = [self._tokenizer.id_to_token(i) for i in as_ids(ids)]
        return tokens[0] if isinstance(ids, int | np.integer) else tokens

    def _find(self, token: str) -> tuple[str | None, int | None]:
        check_text(token, "the token")
        found = self._tokenizer.token_to_id(token)
        return (None, None) if found is None else (token, found)

    def _bytes_of(self, token_id: int) -> bytes:
        """A token's bytes by the alphabet, else its UTF-8. Source: tokenizers, byte_level.rs."""
        if token_id not in self._bytes_of_id:
            token = self._tokenizer.id_to_token(token_id)
            if token is None or token in self._special:
                return b""
            values = [self._byte_of_char.get(char, -1) for char in token]
            self._bytes_of_id[token_id] = token.encode() if -1 in values else bytes(values)
        return self._bytes_of_id[token_id]


BloomTokenizerFast = BloomTokenizer  # transformers' name: there, the slow one was another class


def _file_of(path: str | os.PathLike[str]) -> Path:
    """The path itself, or the tokenizer.json of a folder; also of a name that no file can have."""
    return Path(path, TOKENIZER) if os.path.isdir(path) else Path(path)


def _content(path: Path) -> bytes:
    try:
        return read_bounded(path, MAX_FILE_BYTES, TokenizerError)
    except InputNotFound:
        raise InputNotFound(f"{path}: no such file; expected a tokenizer.json") from None


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
