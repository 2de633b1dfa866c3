"""LoRA adapters merged into a checkpoint's linears while it is converted: W + scale * (alpha / r) *
B A, in float32, a block of rows at a time. No file of the checkpoint is changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import CheckpointError, UsageError
from bloomq.lora import Factors
from bloomq.schemes import bf16_to_f32

from .peft import CONFIG, read_adapter, weights_file
from .source import Checkpoint, SourceTensor

F32 = NDArray[np.float32]
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class _Merged:
    """A linear's rows with what the adapters add: pairs of a scale and the factors."""

    base: SourceTensor
    added: tuple[tuple[float, Factors], ...]

    def rows(self, start: int, stop: int) -> F32:
        raw = self.base.rows(start, stop)
        bf16 = self.base.dtype == "BF16"
        weights = bf16_to_f32(raw.view(np.uint16)) if bf16 else raw.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # callers look for infinity
            for scale, factors in self.added:
                up = factors.up[start:stop] * np.float32(scale)  # [n, r]
                weights += up @ factors.down  # [n, K]
        return weights


def merged(checkpoint: Checkpoint, adapters: Sequence[tuple[str | Path, float]]) -> Checkpoint:
    """The checkpoint with these adapters, each times its scale, added to its weights; `checkpoint`
    itself without any. Its fingerprint is that of base, adapters and scales: the sums themselves
    may differ in their last bits from machine to machine.

    Raises: UsageError for a scale that is no number, and those of `read_adapter`.
    """
    if not adapters:
        return checkpoint
    added: dict[str, list[tuple[float, Factors]]] = {}
    described: list[dict[str, Any]] = []
    for folder, scale in adapters:
        path = Path(folder)
        number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not number or not abs(scale) <= _LARGEST:
            raise UsageError(f"{path}: the adapter's scale is {scale!r:.40}, expected a number")
        adapter = read_adapter(path, checkpoint.config)
        for name, factors in adapter.factors.items():
            added.setdefault(name, []).append((float(scale), factors))
        described.append(
            {"name": path.resolve().name, "sha256": _digest(path), "scale": float(scale)}
        )
    tensors = dict(checkpoint.tensors)
    for name, factors_of in added.items():
        base = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = replace(
            base, dtype="F32", rows=_Merged(base, tuple(factors_of)).rows,
            columns=None, transposed=False, stored=None,
        )  # fmt: skip
    notes = checkpoint.notes
    if any(checkpoint.tensors[f"{name}.weight"].stored is not None for name in added):
        notes += (
            f"{checkpoint.quantized_by} with an adapter merged in is no grid any more: "
            "dequantized, then quantized anew: a second loss",
        )
    return replace(
        checkpoint, tensors=tensors, provenance={**checkpoint.provenance, "lora": described},
        notes=notes, origin=json.dumps([checkpoint.fingerprint, described]),
    )  # fmt: skip


def _digest(folder: Path) -> str:
    """SHA-256 of the digests of the adapter's config and of its tensors."""
    digest = hashlib.sha256()
    for path in (folder / CONFIG, weights_file(folder)):
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()
