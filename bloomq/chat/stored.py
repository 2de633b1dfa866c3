"""A conversation as a file: JSON that people can read, and that is checked as anybody's.

    {"format": "bloomq-conversation", "version": 1, "template": "bloomz",
     "messages": [{"role": "user", "content": "..."}, ...],
     "settings": {"max_new_tokens": 256, "stop": [], "sampling": {"temperature": 0.7}}}

Of `sampling`, what differs from the usual. Of the template the name alone, if it has one.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from bloomq.checks import is_whole
from bloomq.errors import UsageError
from bloomq.files import check_replaceable, read_bounded, shown
from bloomq.sampling import Sampling

FORMAT, VERSION = "bloomq-conversation", 1
USUAL_NEW_TOKENS = 256  # of an answer, where the context has room for twice that
_MOST_BYTES = 1 << 24  # thirty times the text of the longest context


@dataclass(frozen=True, slots=True)
class Stored:
    """What a file holds."""

    messages: list[dict[str, str]]
    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...]
    template: str | None


def read(path: Path) -> bytes:
    """Raises: InputNotFound, UsageError."""
    return read_bounded(path, _MOST_BYTES, UsageError)


def to_json(stored: Stored, path: Path) -> bytes:
    """The content of the file `path`. Raises: OutputError where something else lies there."""
    check_replaceable(path, _MOST_BYTES, _is_ours, "saved conversation")
    content = {
        "format": FORMAT,
        "version": VERSION,
        **({} if stored.template is None else {"template": stored.template}),
        "messages": stored.messages,
        "settings": {
            "max_new_tokens": stored.max_new_tokens,
            "stop": stored.stop,
            "sampling": changed(stored.sampling),
        },
    }
    return json.dumps(content, indent=1, ensure_ascii=False, default=_plain).encode() + b"\n"


def _plain(value: Any) -> Any:
    """What JSON has no word for: sets, and NumPy's numbers."""
    return value.item() if isinstance(value, np.generic) else sorted(value)


def changed(sampling: Sampling) -> dict[str, Any]:
    """The fields of a Sampling that are not as usual."""
    usual = Sampling()
    names = [field.name for field in dataclasses.fields(Sampling)]
    return {n: v for n in names if (v := getattr(sampling, n)) != getattr(usual, n)}


def from_json(data: bytes, where: str) -> Stored:
    """What a file's content says. Raises: UsageError, naming `where`."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        raise UsageError(f"{where}: is no JSON: expected a conversation that was saved") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UsageError(f"{where}: is no conversation that bloomq saved")
    if not is_whole(raw.get("version")) or not 1 <= raw["version"] <= VERSION:
        raise UsageError(
            f"{where}: conversation of version {raw.get('version')!r:.20}, this bloomq reads "
            f"{VERSION}: upgrade bloomq"
        )
    settings = raw.get("settings", {})
    if not isinstance(settings, dict):
        raise UsageError(f"{where}: settings are {settings!r:.40}, expected them by name")
    new_tokens, stop = settings.get("max_new_tokens", USUAL_NEW_TOKENS), settings.get("stop", [])
    if not is_whole(new_tokens) or new_tokens < 1:
        raise UsageError(f"{where}: max_new_tokens is {new_tokens!r:.40}, expected at least 1")
    if not isinstance(stop, list) or not all(isinstance(one, str) and one for one in stop):
        raise UsageError(f"{where}: stop is {stop!r:.40}, expected a list of texts")
    template = raw.get("template")
    if template is not None and (not isinstance(template, str) or not template.isprintable()):
        raise UsageError(f"{where}: template is {template!r:.40}, expected the name of one")
    messages = _messages(raw.get("messages"), where)
    sampling = _sampling(settings.get("sampling", {}), where)
    return Stored(messages, sampling, new_tokens, tuple(stop), template)


def sampling_with(sampling: Sampling, changes: dict[str, Any]) -> Sampling:
    """A Sampling with other values, lists as tuples. Raises: UsageError; also for a name that it
    does not have."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    for name in changes:
        if name not in names:
            near = ", ".join(get_close_matches(str(name)[:40], names) or ["temperature", "top_k"])
            raise UsageError(
                f"sampling has no {shown(str(name)):.40}, expected a field such as {near}"
            )
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in changes.items()}
    try:
        return dataclasses.replace(sampling, **values)
    except UsageError:
        raise
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:  # of no known kind
        text = " ".join(str(error).split())
        raise UsageError(f"sampling cannot be {changes!r:.80}: {text:.80}") from None


def _sampling(raw: Any, where: str) -> Sampling:
    if not isinstance(raw, dict):
        raise UsageError(f"{where}: sampling is {raw!r:.40}, expected its fields by name")
    try:
        return sampling_with(Sampling(), raw)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _messages(raw: Any, where: str) -> list[dict[str, str]]:
    """Messages in their order, without what else is said of them."""
    if not isinstance(raw, list):
        raise UsageError(f"{where}: messages are {raw!r:.40}, expected a list")
    found: list[dict[str, str]] = []
    wanted: tuple[str, ...] = ("system", "user")
    for number, one in enumerate(raw, 1):
        role = one.get("role") if isinstance(one, dict) else None
        content = one.get("content") if isinstance(one, dict) else None
        if role not in wanted:
            raise UsageError(
                f"{where}: message {number} is by {role!r:.40}, expected {' or '.join(wanted)}"
            )
        if not isinstance(content, str) or _is_broken(content):
            raise UsageError(f"{where}: message {number} is no text: {content!r:.40}")
        found.append({"role": role, "content": content})
        wanted = ("assistant",) if role == "user" else ("user",)
    if wanted == ("assistant",):
        raise UsageError(f"{where}: ends with a message that has no answer")
    return found


def _is_broken(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _is_ours(data: bytes) -> bool:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT
