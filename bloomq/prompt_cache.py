"""A prompt's keys and values in a file, so that another process need not read the prompt again.

One safetensors file: `ids` int64 [S], `keys` and `values` [layer, S, H, D] as the cache holds them,
`scales` float32 [2, layer, S, H] of an int8 cache. Its header says which pack it is of and what
arithmetic made it. The file is untrusted: no number of it is an address or a size of anything. But
its checksum is no signature: who writes the file decides what a prompt with these ids means.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np

from bloomq.errors import CheckpointError, PromptCacheError, UsageError
from bloomq.files import shown, write_whole
from bloomq.language_model import LanguageModel
from bloomq.layers import Stored
from bloomq.prompts import Prompt
from bloomq.schemes import F32, Array
from bloomq.tensorfile import TensorFile

_FORMAT, _VERSION = "bloomq prompt cache", "1"
_NAMES = ("ids", "keys", "values", "scales")


def save(model: LanguageModel, prompt: Prompt, path: str | os.PathLike[str]) -> int:
    """Write what the model holds of a prompt, after reading it where it must; how many tokens.

    The file is either whole or not there. Raises: UsageError, CapacityError; OutputError where it
    cannot be written.
    """
    ids = model.prompt_ids(prompt)
    stored = model.engine.stored(ids)
    if stored is None:
        model.generate(ids, max_new_tokens=1)
        stored = model.engine.stored(ids)
    if stored is None:
        raise UsageError("the prompt was not kept: another thread needs the memory, try again")
    given = (np.array(ids, np.int64), stored.keys, stored.values, stored.scales)
    arrays: dict[str, Array] = dict(zip(_NAMES, given, strict=True))
    _write(Path(path), arrays, {**_about(model), "sha256": _digest(arrays)})
    return len(ids)


def load(model: LanguageModel, path: str | os.PathLike[str]) -> list[int]:
    """The ids of a prompt that `save` wrote. Texts that begin with them do not read them again.

    Raises: InputNotFound; PromptCacheError for a file that is damaged, of another pack or another
    arithmetic; CapacityError where the model's context is smaller.
    """
    path = Path(path)
    with _as_ours():
        file = TensorFile.open(path)
    if file.metadata.get("format") != _FORMAT or file.metadata.get("version") != _VERSION:
        raise PromptCacheError(f"{path}: is no prompt cache of version {_VERSION}: save it again")
    for name, expected in _about(model).items():
        found = shown(file.metadata.get(name, "nothing"))
        if found != expected:
            raise PromptCacheError(
                f"{path}: belongs to another model: its {name} is {found:.80}, this one's is "
                f"{expected}: save it again"
            )
    if sorted(file.entries) != sorted(_NAMES):
        raise PromptCacheError(f"{path}: holds {', '.join(map(shown, file.entries))}, expected ids")
    with _as_ours():
        arrays = {name: file.copied(name) for name in _NAMES}
    if _digest(arrays) != file.metadata.get("sha256"):
        raise PromptCacheError(f"{path}: does not match its checksum: it is damaged, save it again")
    ids = arrays["ids"]
    if ids.dtype != np.int64 or ids.ndim != 1 or ids.shape != arrays["keys"].shape[1:2]:
        raise PromptCacheError(f"{path}: its ids are not of its keys: save it again")
    if not all(np.isfinite(arrays[name]).all() for name in ("keys", "values", "scales")):
        raise PromptCacheError(f"{path}: holds NaN or infinity: it is damaged, save it again")
    prompt = model.prompt_ids(ids.tolist())
    keys, values, scales = (arrays[name] for name in _NAMES[1:])
    with _named(path):
        model.engine.restore(prompt, Stored(keys, values, cast("F32", scales)))  # checked there
    return prompt


def _about(model: LanguageModel) -> dict[str, str]:
    """What two models must share for one to go on with the other's keys and values."""
    return {"pack": str(model.pack.manifest["checksum"]), "arithmetic": model.backend.arithmetic}


def _digest(arrays: dict[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in _NAMES:
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@contextmanager
def _as_ours() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise PromptCacheError(str(error)) from None


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        raise PromptCacheError(f"{path}: {error}") from None


def _write(path: Path, arrays: dict[str, Array], about: dict[str, str]) -> None:
    from safetensors.numpy import save

    metadata = {"format": _FORMAT, "version": _VERSION, **about}
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_whole(path, save(plain, metadata))
