"""The activations between two blocks, on disk, so that memory is bounded and work can go on.

    x-KEY-00007.npy    float32 [tokens, C], the input of block 7 with the weights as they are
                       stored; where these make up for errors, behind it that with the
                       checkpoint's own weights, [2 * tokens, C]

Invariant: a file with its final name is whole; KEY is a digest of all that it depends on.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import OutputError

F32 = NDArray[np.float32]
FILES = 3  # at once, at most: of the block before, of this one, and what the next one gets


class Scratch:
    """The activations of one calibration in `folder`, which is made."""

    def __init__(self, folder: Path, key: str, tokens: int, columns: int) -> None:
        self._folder, self._key, self._shape = folder, key, (tokens, columns)

    def _path(self, block: int) -> Path:
        return self._folder / f"x-{self._key}-{block:05d}.npy"

    def latest(self, most: int) -> int | None:
        """The last block, up to `most`, whose input is here."""
        return next((i for i in range(most, -1, -1) if self._path(i).exists()), None)

    def open(self, block: int) -> F32:
        """The input of a block, mapped. Raises: OutputError."""
        try:
            x: F32 = np.load(self._path(block), mmap_mode="r")
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{self._path(block)}: activations cannot be read ({error}): remove the folder"
            ) from None
        return x

    def new(self) -> F32:
        """Room for the input of one block, mapped, under no name yet. Raises: OutputError."""
        need = 4 * self._shape[0] * self._shape[1]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "new.npy").unlink(missing_ok=True)  # an interrupted run's
            free = shutil.disk_usage(self._folder).free
            if free >= need:
                return self._reserved()
        except OSError as error:
            raise OutputError(
                f"{self._folder}: activations of {need / 1e6:.0f} MB cannot be written: "
                f"{error.strerror}: free some space, or calibrate with fewer tokens"
            ) from None
        raise OutputError(
            f"{self._folder}: activations need {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are "
            "free: free some space, or calibrate with fewer tokens"
        )

    def _reserved(self) -> F32:
        """A new file with all its blocks: who writes to a mapped one and finds no room on the disk
        is killed, not told."""
        path = self._folder / "new.npy"
        x: F32 = np.lib.format.open_memmap(path, "w+", np.dtype(np.float32), self._shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return x

    def keep(self, x: F32, block: int) -> None:
        """Name what `new` gave, and forget what lies two blocks back."""
        assert isinstance(x, np.memmap)
        x.flush()
        (self._folder / "new.npy").replace(self._path(block))
        self._path(block - 2).unlink(missing_ok=True)

    def remove(self) -> None:
        """All of it."""
        shutil.rmtree(self._folder, ignore_errors=True)
