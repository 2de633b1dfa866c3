"""Which files are a GGUF: one, or the parts of a split one, by itself or alone in a folder."""

from __future__ import annotations

import re
from pathlib import Path

from bloomq.errors import CheckpointError
from bloomq.files import exists, shown

from .gguf_header import MAGIC

PART = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf")


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that a folder without config.json holds alone (of a split
    one, the first part); None for anything else."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                return path if file.read(len(MAGIC)) == MAGIC else None
        if not path.is_dir() or exists(path / "config.json"):
            return None
        files = _listed(path)
    except OSError:  # may not be looked at: another reader says so
        return None
    return files[0] if len(files) == 1 else None


def refuse_choice(path: Path) -> None:
    """Raises: CheckpointError for a folder without other weights that holds GGUF files, of which
    `find_gguf` takes none."""
    if files := _listed(path):
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise CheckpointError(
            f"{path}: holds {shown(files[0].name)}{more} and no other weights: name the file that "
            "is to be converted"
        )


def _listed(folder: Path) -> list[Path]:
    """The GGUF files in a folder, of split ones the first parts."""
    return [file for file in sorted(folder.glob("*.gguf")) if _number(file) in (None, 1)]


def parts_beside(path: Path) -> list[Path]:
    """The file itself or, of a split one, every part that lies beside it."""
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    try:
        found = [(file, PART.fullmatch(file.name)) for file in path.parent.iterdir()]
    except OSError:  # its files may be readable all the same
        return [path]
    return [file for file, part in found if part and part.group(1, 3) == match.group(1, 3)]


def _number(path: Path) -> int | None:
    """Which part of a split file this is by its name, from 1; None: of none."""
    match = PART.fullmatch(path.name)
    return int(match[2]) if match else None
