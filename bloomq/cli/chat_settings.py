"""The settings of a conversation that /set lists and changes: how answers are drawn and end."""

from __future__ import annotations

import dataclasses
import json
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from bloomq.errors import UsageError
from bloomq.files import shown

if TYPE_CHECKING:
    from bloomq.chat.conversation import Conversation


def settings(talk: Conversation) -> dict[str, Any]:
    """All of them, by their names."""
    return {
        **_fields(talk.sampling),
        "max_new_tokens": talk.max_new_tokens,
        "stop": list(talk.stop or talk.template.stop),
    }


def change(talk: Conversation, name: str, text: str) -> None:
    """Give a setting the value that a text says, the usual one for "off" and "none".

    Raises: UsageError.
    """
    known = settings(talk)
    if name not in known:
        near = "".join(f", such as {one}" for one in get_close_matches(name[:40], known, 1))
        raise UsageError(f"there is no setting {shown(name):.40}: /set lists them{near}")
    if not text:
        raise UsageError(f"/set {name} lacks a value")
    if name == "max_new_tokens":
        talk.set(max_new_tokens=talk.usual_new_tokens if _is_off(text) else _value(text))
    elif name == "stop":
        talk.set(stop=() if _is_off(text) else _listed(text))
    else:
        _set_sampling(talk, name, text)


def _set_sampling(talk: Conversation, name: str, text: str) -> None:
    """A field of `Sampling`; texts become token ids as they do for the command's options."""
    from bloomq.chat.stored import sampling_with
    from bloomq.cli.generation_options import BREAKERS, bad_words, ids_with

    values: dict[str, Any] = {name: _value(text)}
    if _is_off(text):
        values[name] = _fields(type(talk.sampling)())[name]
    elif name in _OF_TEXTS:
        given = _listed(text)
        texts = [one for one in given if isinstance(one, str)]
        if "" in texts:
            raise UsageError(f"/set {name} has an empty text, expected some characters")
        find = bad_words if name == "bad_words" else ids_with
        others = [one for one in given if not isinstance(one, str)]  # token ids
        values[name] = [*others, *(find(texts, talk.model) if texts else ())]
    elif name == "forced_prefix" and not isinstance(values[name], list):
        values[name] = talk.model.prompt_ids(_listed(text)[0])
    elif name == "order" and isinstance(values[name], str):
        values[name] = [one.strip() for one in text.split(",")]
    found = sampling_with(talk.sampling, values)
    if name == "dry_multiplier" and not talk.sampling.dry_multiplier and found.dry_multiplier:
        breakers = found.dry_sequence_breakers or ids_with(BREAKERS, talk.model)
        found = sampling_with(found, {"dry_sequence_breakers": breakers})
    talk.sampling = found


_OF_TEXTS = ("bad_words", "dry_sequence_breakers")


def _is_off(text: str) -> bool:
    return text.lower() in ("none", "off")


def _listed(text: str) -> list[Any]:
    """The items of a JSON list; of anything else the text, without quotes if it is JSON's."""
    value = _value(text)
    return value if isinstance(value, list) else [value if isinstance(value, str) else text]


def _fields(sampling: Any) -> dict[str, Any]:
    return {one.name: getattr(sampling, one.name) for one in dataclasses.fields(sampling)}


def _value(text: str) -> Any:
    """As JSON, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
