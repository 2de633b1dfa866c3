"""Packs for others to read: each module writes one format, `export` chooses it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Protocol

from bloomq.errors import OutputError, UsageError
from bloomq.files import as_path, exists
from bloomq.pack import Pack

Progress = Callable[[int, int], None]  # (bytes written, bytes in all)
# Name -> the ending of a target by which it is chosen; the first is for any other.
FORMATS = {"huggingface": "", "gguf": ".gguf"}


class Format(Protocol):
    """What a module of a format has. DTYPES: how matrices may be stored; the first is chosen where
    the user says nothing."""

    DTYPES: tuple[str, ...]

    def write(
        self, pack: Pack, target: Path, *, dtype: str, progress: Progress | None = None
    ) -> None:
        """Write `target`, whole or not at all, in place of nothing or of an earlier export."""
        ...

    def notes(self, pack: Pack, dtype: str) -> tuple[str, ...]:
        """What someone who chose this would not expect, and what to choose instead."""
        ...


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote. nbytes: of all files."""

    target: Path
    to: str
    dtype: str
    nbytes: int
    seconds: float
    notes: tuple[str, ...]


def export(
    pack: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write the pack in folder `pack` as another program's model at `target`.

    to: huggingface, a folder with safetensors, or gguf, a file; None: by target's ending. dtype: of
    the weights there (f32, bf16 or f16; more for gguf); None: the smallest that holds the pack's
    weights exactly, or nearly. `force` replaces an earlier export.

    Raises: UsageError, InputNotFound, PackError, NumericError, OutputError; TokenizerError for a
    tokenizer that the format cannot hold.
    """
    started, path = perf_counter(), as_path(target)
    name = _format_of(path, to)
    module: Format = importlib.import_module(f".{name}", __package__)
    if dtype is not None and dtype not in module.DTYPES:
        raise UsageError(f"dtype {dtype!r} for {name}, expected one of {', '.join(module.DTYPES)}")
    opened = Pack.open(as_path(pack))
    _check_target(path, force)
    chosen = module.DTYPES[0] if dtype is None else dtype
    module.write(opened, path, dtype=chosen, progress=progress)
    files = path.iterdir() if path.is_dir() else [path]
    nbytes = sum(file.stat().st_size for file in files)
    notes = module.notes(opened, chosen)
    return Exported(path, name, chosen, nbytes, perf_counter() - started, notes)


def _format_of(target: Path, to: str | None) -> str:
    """The format that is asked for, or that the target's ending says."""
    if to is not None:
        if to not in FORMATS:
            raise UsageError(f"format {to!r} to export to, expected one of {', '.join(FORMATS)}")
        return to
    if target.suffix == ".safetensors":
        raise UsageError(f"{target}: the Hugging Face format is a folder: name one, without ending")
    found = (name for name, ending in FORMATS.items() if ending and target.suffix == ending)
    return next(found, next(iter(FORMATS)))


def _check_target(target: Path, force: bool) -> None:
    """What is there is replaced only by `force`, and then only if it is an export: the formats see
    to that."""
    if force or not exists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    raise OutputError(f"{target}: already exists: --force replaces an earlier export")
