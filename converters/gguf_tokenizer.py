"""A tokenizer.json from a GGUF file's vocabulary and merges, and the reverse.

A GGUF names the pre-tokenizer (`tokenizer.ggml.pre`) and each program knows its expression; BLOOM's
is written here. A token's type is normal, control (special in a tokenizer.json), user-defined
(added, not special) or unused (`[PAD17]`, a row of the embedding without a token).

What it cannot carry: the side that padding goes to, and of added tokens whether they strip blanks
or want to be words of their own. Invariant: what is read encodes and decodes as BLOOM does, or is
not taken at all; what is written had nothing that would be lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bloomq.config import BloomConfig
from bloomq.errors import CheckpointError, TokenizerError
from bloomq.files import shown
from bloomq.tokenizer_config import Settings, templates_of

from .gguf_header import Numbers, Value

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
MODEL = "gpt2"  # a byte-level BPE
# llama.cpp has one expression for all of these; a file without a name comes from an old converter.
_BLOOM_PRE = ("bloom", "gpt3-finnish", "poro-chat")
_UNNAMED_PRE = ("", "default")
PREFIX = "tokenizer.ggml."
# BLOOM's token -> the GGUF's key of its id.
IDS = {
    "unk_token": f"{PREFIX}unknown_token_id", "bos_token": f"{PREFIX}bos_token_id",
    "eos_token": f"{PREFIX}eos_token_id", "pad_token": f"{PREFIX}padding_token_id",
}  # fmt: skip
_ADDS = (f"{PREFIX}add_bos_token", f"{PREFIX}add_eos_token")
_TEMPLATE, _TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"

# Source: the tokenizer.json of bigscience/bloom.
PRE_TOKENIZER: dict[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": " ?[^(\\s|[.,!?…。，、।۔،])]+"},
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
_BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": False}
_DECODER = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
_BPE: dict[str, Any] = {
    "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
    "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
}  # fmt: skip
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_Token: TypeAlias = tuple[str, int, int]  # its text, id and type
# Fields whose empty values differ, and mean the same.
_NOTHING = (None, False, "")


def read_tokenizer(
    metadata: Mapping[str, Value], vocab_size: int, path: Path
) -> tuple[bytes | None, Settings, tuple[str, ...]]:
    """The tokenizer.json of a GGUF's metadata, its settings, and notes. None, with a note that says
    why, where the file has no vocabulary that this tokenizer can have.

    Raises: CheckpointError for a damaged vocabulary, TokenizerError for settings it has not.
    """
    why = _not_ours(metadata)
    if why:
        return None, Settings(), (f"{path}: {why}: the pack will take token ids only, not text",)
    tokens, merges = (_texts(metadata, f"{PREFIX}{name}", path) for name in ("tokens", "merges"))
    if len(tokens) > vocab_size:
        raise CheckpointError(
            f"{path}: {len(tokens)} tokens for the {vocab_size} rows of the embedding"
        )
    for key in _ADDS:
        if metadata.get(key, False) not in (False, 0):
            raise TokenizerError(f"{path}: {key} is set, and this tokenizer adds no token itself")
    named = {token: _token_id(metadata, key, tokens, path) for token, key in IDS.items()}
    types = _types(metadata, tokens, path)
    for token_id in named.values():
        if token_id is not None and types[token_id] == NORMAL:  # old converters wrote no other type
            types[token_id] = CONTROL
    vocab = _vocabulary(tokens, types, path)
    added = [
        {"id": i, "content": tokens[i], **dict.fromkeys(_FLAGS, False),
         "special": types[i] != USER_DEFINED}
        for i in sorted(vocab.values()) if types[i] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]  # fmt: skip
    model = {**_BPE, "vocab": vocab, "merges": _merges(merges, vocab, path)}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": None, "pre_tokenizer": PRE_TOKENIZER, "post_processor": _BYTES,
        "decoder": _DECODER, "model": model,
    }  # fmt: skip
    special = Settings().special | {t: tokens[i] for t, i in named.items() if i is not None}
    settings = Settings("left", special, _templates(metadata, path))
    notes: tuple[str, ...] = ()
    if metadata.get(f"{PREFIX}pre", "") in _UNNAMED_PRE:
        notes = (f"{path}: names no pre-tokenizer: BLOOM's is taken",)
    return json.dumps(content, ensure_ascii=False).encode(), settings, notes


def _not_ours(metadata: Mapping[str, Value]) -> str:
    """Why the vocabulary is none that this tokenizer can have, or ""."""
    model, pre = metadata.get(f"{PREFIX}model"), metadata.get(f"{PREFIX}pre", "")
    if model in (None, "no_vocab", "none"):
        return "has no vocabulary"
    if model != MODEL:
        return f"its tokenizer is {model!r:.40}, expected {MODEL!r}"
    if pre not in _BLOOM_PRE + _UNNAMED_PRE:
        return f"its pre-tokenizer is {pre!r:.40}, expected 'bloom'"
    missing = [n for n in ("tokens", "merges") if metadata.get(f"{PREFIX}{n}") in (None, ())]
    return f"its vocabulary has no {missing[0]}" if missing else ""


def _texts(metadata: Mapping[str, Value], key: str, path: Path) -> tuple[str, ...]:
    value = metadata[key]
    if not isinstance(value, tuple):
        raise CheckpointError(f"{path}: metadata {key} is {value!r:.40}, expected a list of texts")
    return value


def _types(metadata: Mapping[str, Value], tokens: tuple[str, ...], path: Path) -> list[int]:
    value = metadata.get(f"{PREFIX}token_type")
    if value is None:
        return [NORMAL] * len(tokens)
    array = value.values if isinstance(value, Numbers) else np.empty(0)
    if len(array) != len(tokens) or array.dtype.kind not in "iu":
        raise CheckpointError(
            f"{path}: {PREFIX}token_type does not give each of {len(tokens)} tokens its type"
        )
    types: list[int] = array.tolist()  # type: ignore[assignment]
    return types


def _token_id(
    metadata: Mapping[str, Value], key: str, tokens: tuple[str, ...], path: Path
) -> int | None:
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(tokens):
        raise CheckpointError(
            f"{path}: {key} is {value!r:.40}, expected the number of one of {len(tokens)} tokens"
        )
    return value


def _vocabulary(tokens: tuple[str, ...], types: list[int], path: Path) -> dict[str, int]:
    """Token -> id, without the rows that have no token."""
    vocab: dict[str, int] = {}
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (UNUSED, USER_DEFINED) and token == f"[PAD{i}]":  # old ones: user-defined
            continue
        if token in vocab:
            raise CheckpointError(
                f"{path}: tokens {vocab[token]} and {i} are both {shown(token)!r:.40}"
            )
        vocab[token] = i
    return vocab


def _merges(merges: tuple[str, ...], vocab: Mapping[str, int], path: Path) -> list[list[str]]:
    pairs = []
    for i, merge in enumerate(merges):
        pair = merge.split(" ")
        if len(pair) != 2 or not all(pair):
            raise CheckpointError(f"{path}: merge {i} is {merge!r:.40}, expected two tokens")
        if not {*pair, "".join(pair)} <= vocab.keys():
            raise CheckpointError(f"{path}: merge {i}, {merge!r:.40}, is not of the file's tokens")
        pairs.append(pair)
    return pairs


def _templates(metadata: Mapping[str, Value], path: Path) -> dict[str, str]:
    names = metadata.get(_TEMPLATES, ())
    found: dict[str, object] = {}
    if _TEMPLATE in metadata:
        found["default"] = metadata[_TEMPLATE]
    for name in names if isinstance(names, tuple) else ():
        if f"{_TEMPLATE}.{name}" in metadata:
            found[name] = metadata[f"{_TEMPLATE}.{name}"]
    return templates_of(found or None, str(path), TokenizerError)


# -- the reverse -----------------------------------------------------------------------------------


def write_tokenizer(
    tokenizer: bytes | None, config: BloomConfig, settings: Settings, path: Path
) -> dict[str, Value]:
    """The metadata that a tokenizer.json, and the config's and the settings' special tokens, become
    in a GGUF; without one, those of a file that takes ids only. Errors name `path`.

    Raises: TokenizerError, naming it, for what a GGUF cannot carry.
    """
    ids = {
        "unk_token": config.unk_token_id, "bos_token": config.bos_token_id,
        "eos_token": config.eos_token_id, "pad_token": config.pad_token_id,
    }  # fmt: skip
    found: dict[str, Value] = {}
    if tokenizer is None:
        found |= {f"{PREFIX}model": "no_vocab", "bloom.vocab_size": config.vocab_size}
    else:
        listed, merges = _content(tokenizer, path)
        tokens, types = _rows(listed, config.vocab_size, path)
        at = {token: i for i, token in enumerate(tokens)}
        ids = {name: at.get(settings.special[name], i) for name, i in ids.items()}
        found |= {
            f"{PREFIX}model": MODEL, f"{PREFIX}pre": "bloom", f"{PREFIX}tokens": tuple(tokens),
            f"{PREFIX}token_type": Numbers(np.array(types, np.int32)), f"{PREFIX}merges": merges,
        }  # fmt: skip
        found |= dict.fromkeys(_ADDS, False)
    found |= {IDS[name]: i for name, i in ids.items() if i is not None}
    others = tuple(name for name in settings.chat_templates if name != "default")
    found |= {_TEMPLATES: others} if others else {}
    for name, text in settings.chat_templates.items():
        found[_TEMPLATE if name == "default" else f"{_TEMPLATE}.{name}"] = text
    return found


def _content(tokenizer: bytes, path: Path) -> tuple[list[_Token], tuple[str, ...]]:
    """The tokens and the merges of the file, once nothing in it would be lost."""
    try:
        content: dict[str, Any] = json.loads(tokenizer)
        model, added = content["model"], content.get("added_tokens") or []
        listed = [(token, i, NORMAL) for token, i in model["vocab"].items()]
        listed += [
            (one["content"], one["id"], CONTROL if one.get("special") else USER_DEFINED)
            for one in added
        ]
        merges = tuple(m if isinstance(m, str) else " ".join(m) for m in model["merges"])
        texts = [token for token, _, _ in listed if isinstance(token, str)]
        "".join([*texts, *merges]).encode()  # half of a surrogate pair is no text
        same = {
            "pre_tokenizer": _as_blooms(content["pre_tokenizer"]) == _as_blooms(PRE_TOKENIZER),
            "normalizer": content.get("normalizer") in _NOTHING,
            "decoder": content["decoder"]["type"] == "ByteLevel",
            "post_processor": (content.get("post_processor") or _BYTES)["type"] == "ByteLevel",
            "model": all(
                model.get(k) == v or {model.get(k), v} <= {*_NOTHING} for k, v in _BPE.items()
            ),
            "added_tokens": not any(one.get(flag) for one in added for flag in _FLAGS[:3]),
            "merges": all(merge.count(" ") == 1 for merge in merges),
        }
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise TokenizerError(f"{path}: no tokenizer.json that could become a GGUF's") from None
    for field, is_same in same.items():
        if not is_same:
            raise TokenizerError(f"{path}: its {field} is not BLOOM's, which a GGUF cannot carry")
    return listed, merges


def _as_blooms(pre_tokenizer: dict[str, Any]) -> list[object]:
    """What of a pre-tokenizer changes ids: that it trims offsets does not."""
    split, level = pre_tokenizer["pretokenizers"]
    rest = {k: v for k, v in level.items() if k != "trim_offsets"}
    return [pre_tokenizer["type"], split, rest]


def _rows(listed: list[_Token], vocab_size: int, path: Path) -> tuple[list[str], list[int]]:
    """The token and its type of every row of the embedding."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, i, kind in listed:
        if not isinstance(token, str) or not isinstance(i, int) or not 0 <= i < vocab_size:
            raise TokenizerError(f"{path}: token {token!r:.40} has none of {vocab_size} rows")
        tokens[i], types[i] = token, kind
    return tokens, types
