"""The two models that are compared, each by blocks of rows: a pack, or a checkpoint of any form.

Invariant: nothing of a tensor is in memory but the rows that were asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bloomq.config import BloomConfig, weight_specs
from bloomq.errors import OutputError, UsageError
from bloomq.files import exists
from bloomq.pack import MANIFEST, Pack
from bloomq.schemes import TILE, bf16_to_f32, round_up, untile_rows

if TYPE_CHECKING:
    from bloomq.converters.source import Checkpoint

F32 = NDArray[np.float32]
# What two models must share for their weights to be of the same things.
_SAME = (
    "architecture", "hidden_size", "n_layer", "n_head", "vocab_size", "num_labels",
    "tie_word_embeddings", "apply_residual_connection_post_layernorm", "layer_norm_epsilon",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PackSide:
    """A pack; path: as the user named it."""

    path: Path
    pack: Pack
    kind: str = "pack"

    @property
    def config(self) -> BloomConfig:
        return self.pack.config

    @property
    def tokenizer(self) -> bytes | None:
        return self.pack.tokenizer_bytes()

    @property
    def provenance(self) -> Mapping[str, Any]:
        found = self.pack.manifest.get("provenance")
        return found if isinstance(found, dict) else {}

    @property
    def nbytes(self) -> int:
        return self.pack.nbytes

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    def stored(self, name: str) -> tuple[str, int]:
        """How a matrix is stored, and its bytes."""
        matrix = self.pack.matrix(name)
        return matrix.scheme.label, matrix.nbytes

    def vector(self, key: str, length: int) -> F32:
        return self.pack.vector(key, length)

    def rows(self, name: str, start: int, stop: int) -> F32:
        """Rows of a matrix, [stop - start, K]; start is a multiple of a tile's rows."""
        matrix = self.pack.matrix(name)
        parts = _tiles(matrix.parts, start, stop)
        return matrix.scheme.dequantize(parts, (stop - start, matrix.shape[1]))

    def steps(self, name: str, start: int, stop: int) -> F32 | None:
        """What a code of 1 stands for at each weight, [stop - start, K] or [stop - start, 1]; None
        where weights are not coded."""
        matrix = self.pack.matrix(name)
        scales = _tiles(matrix.parts, start, stop).get("scales")
        if scales is None:
            return None
        if scales.ndim == 1:
            return np.asarray(scales, np.float32)[: stop - start, None]
        by_group = untile_rows(scales).astype(np.float32)[: stop - start]
        return np.repeat(by_group, matrix.scheme.group_size, axis=1)[:, : matrix.shape[1]]


def _tiles(parts: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The parts of whole tiles with these rows: of one value a row, or tile by tile."""
    first, last = start // TILE, round_up(stop, TILE) // TILE
    return {
        name: part[first * TILE : last * TILE] if part.ndim == 1 else part[first:last]
        for name, part in parts.items()
    }


@dataclass(frozen=True, slots=True)
class CheckpointSide:
    """A checkpoint; path: as the user named it."""

    path: Path
    checkpoint: Checkpoint
    kind: str = field(default="checkpoint")

    @property
    def config(self) -> BloomConfig:
        config: BloomConfig = self.checkpoint.config
        return config

    @property
    def tokenizer(self) -> bytes | None:
        tokenizer: bytes | None = self.checkpoint.tokenizer
        return tokenizer

    @property
    def provenance(self) -> Mapping[str, Any]:
        return {**self.checkpoint.provenance, "fingerprint": self.checkpoint.fingerprint}

    @property
    def nbytes(self) -> int:
        return int(self.checkpoint.nbytes)

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self.checkpoint.notes)

    def stored(self, name: str) -> tuple[str, int]:
        tensor = self.checkpoint.tensors[f"{name}.weight"]
        return tensor.dtype.lower(), tensor.nbytes

    def vector(self, key: str, length: int) -> F32:
        return self._floats(key, 0, length)

    def rows(self, name: str, start: int, stop: int) -> F32:
        return self._floats(f"{name}.weight", start, stop)

    def steps(self, name: str, start: int, stop: int) -> F32 | None:
        return None

    def _floats(self, key: str, start: int, stop: int) -> F32:
        tensor = self.checkpoint.tensors[key]
        raw = tensor.rows(start, stop)
        return bf16_to_f32(raw.view(np.uint16)) if tensor.dtype == "BF16" else raw.astype("f4")


Side = PackSide | CheckpointSide


def open_side(path: Path) -> Side:
    """A pack or a checkpoint; nothing of its matrices is read yet.

    Raises: InputNotFound, PackError, and those of `bloomq.convert`.
    """
    if exists(path / MANIFEST):
        return PackSide(path, Pack.open(path))
    from bloomq.converters.reading import read_checkpoint

    return CheckpointSide(path, read_checkpoint(path))


def check_same_model(ours: Side, theirs: Side) -> None:
    """Raises: UsageError, which names what differs."""
    different = [
        f"{name} is {getattr(ours.config, name)}, there {getattr(theirs.config, name)}"
        for name in _SAME
        if getattr(ours.config, name) != getattr(theirs.config, name)
    ]
    if different:
        raise UsageError(
            f"{ours.path}: is of another model than {theirs.path}: {'; '.join(different)}: compare "
            "a pack with the checkpoint it was made from"
        )


@contextmanager
def runnable(side: Side) -> Iterator[Pack]:
    """A pack to run: of a checkpoint an exact one, of floats, in a temporary folder that is gone
    behind the block.

    Raises: OutputError where that folder's disk is too small, and those of `bloomq.convert`.
    """
    if isinstance(side, PackSide):
        yield side.pack
        return
    from bloomq.converters.convert import convert

    with tempfile.TemporaryDirectory(prefix="bloomq-", ignore_cleanup_errors=True) as folder:
        try:
            convert(side.path, Path(folder) / "exact", scheme=exact_scheme(side))
        except OutputError as error:
            raise OutputError(
                f"{error}; the original runs from there: set TMPDIR, or compare weights only"
            ) from None
        yield Pack.open(Path(folder) / "exact")


def exact_scheme(side: CheckpointSide) -> str:
    """The scheme that holds every matrix as it is."""
    names = [spec.name for spec in weight_specs(side.config) if spec.is_matrix]
    found = {side.stored(name)[0] for name in names}
    return found.pop() if len(found) == 1 else "f32"
