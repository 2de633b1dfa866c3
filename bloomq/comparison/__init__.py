"""What a pack lost against the checkpoint it was made from, or against another pack: the error of
every matrix, outliers, and on texts what became of the predictions. As values, and as one page.

Invariant: the original is never whole in memory, and runs in full precision.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bloomq.checks import is_whole
from bloomq.comparison import page, words
from bloomq.comparison.labels import Labels
from bloomq.comparison.outputs import Outputs
from bloomq.comparison.running import measure_outputs, sample
from bloomq.comparison.sides import PackSide, Side, check_same_model, open_side
from bloomq.comparison.weights import Tensor, measure
from bloomq.config import weight_specs
from bloomq.errors import OutputError, UsageError
from bloomq.files import as_path, check_replaceable, exists, write_whole
from bloomq.pack import Pack
from bloomq.token_texts import TokenTexts
from bloomq.tokenizer import BloomTokenizer

__all__ = ["Report", "check_target", "compare", "sample"]

TOKENS, WINDOW = 2000, 512
_MOST_PAGE_BYTES = 256 << 20
_MOST_THREADS = 8  # of those that read weights; each needs some 50 MB
Progress = Callable[[str, int, int], None]  # (what is measured, done, in all)


@dataclass(frozen=True, slots=True)
class Model:
    """One of the two. kind: pack or checkpoint; provenance: as the pack's manifest or the
    checkpoint's reader tells it."""

    name: str
    path: str
    kind: str
    nbytes: int
    bits_per_weight: float
    provenance: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the model: its weights, and its bytes in the pack and in the original."""

    name: str
    weights: int
    nbytes: int
    original_bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """A comparison. outputs: of a language model `Outputs`, of a classifier `Labels`, None where
    only weights were compared; notes: what else a reader has to know; row_names: the tokens that
    are the embedding's worst rows, where there is a tokenizer."""

    pack: Model
    original: Model
    config: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    parts: tuple[Part, ...]
    outputs: Outputs | Labels | None
    notes: tuple[str, ...]
    row_names: Mapping[int, str]

    @property
    def verdict(self) -> str:
        return words.verdict(self.outputs, self.tensors)

    @property
    def headline(self) -> str:
        return words.headline(self.outputs, self.tensors)

    def facts(self) -> dict[str, Any]:
        """Everything but the histograms, as JSON can hold it (NaN and infinity apart)."""
        found = asdict(self)
        for tensor in found["tensors"]:
            del tensor["histogram"]
        return {"verdict": self.verdict, "headline": self.headline, **found}

    def page(self) -> str:
        """A whole HTML page, which needs nothing but itself."""
        return page.written(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file, whole or not at all; an earlier page there is replaced.

        Raises: OutputError; also where another file has that name.
        """
        target = as_path(path)
        check_target(target)
        write_whole(target, self.page().encode())

    def _repr_html_(self) -> str:
        return page.framed(self.page())

    def __repr__(self) -> str:
        return f"<Report of {self.pack.name} beside {self.original.name}: {self.headline}>"


def compare(
    pack: str | os.PathLike[str],
    original: str | os.PathLike[str],
    *,
    texts: Mapping[str, str] | None = None,
    tokens: int = TOKENS,
    window: int = WINDOW,
    weights_only: bool = False,
    backend: str = "auto",
    threads: int | None = None,
    cache_dtype: str = "auto",
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """What `pack` lost against `original`, a checkpoint or another pack.

    texts: by their names, None for a sample in ten languages, or random ids where there is no
    tokenizer; tokens: of each text, from its start; window: what a token sees at most;
    weights_only: run neither model. backend, threads, cache_dtype (of the pack): see `bloomq.load`.
    A checkpoint runs as an exact pack in the temporary folder, which is as large as the checkpoint.

    Raises: UsageError where these are two different models; InputNotFound, PackError, OutputError,
    NumericError, and those of `bloomq.convert`.
    """
    for name, value in (("tokens", tokens), ("window", window)):
        if not is_whole(value) or value < 2:
            raise UsageError(f"{name} is {value!r}, expected 2 or more to compare predictions on")
    if threads is not None and (not is_whole(threads) or threads < 1):
        raise UsageError(f"threads is {threads!r}, expected 1 or more to compare with")
    if texts is not None and not texts:
        raise UsageError("no texts to compare on: give one, or None for the sample")
    ours = PackSide(as_path(pack), Pack.open(as_path(pack)))
    theirs = open_side(as_path(original))
    check_same_model(ours, theirs)
    notes = _notes(ours, theirs)
    workers = min(_MOST_THREADS, threads or os.cpu_count() or 1)
    tensors = tuple(
        measure(ours, theirs, workers, lambda done, total: progress("weights", done, total))
    )
    outputs = None
    if not weights_only:
        outputs = measure_outputs(
            ours, theirs, texts, int(tokens), int(window), (backend, threads, cache_dtype),
            lambda done, total: progress("outputs", done, total),
        )  # fmt: skip
    parts = _parts(ours, theirs)
    weights = sum(part.weights for part in parts)
    config = {
        key: value for key, value in ours.config.to_dict().items()
        if key in ("architectures", "hidden_size", "n_layer", "n_head", "vocab_size", "seq_length")
    }  # fmt: skip
    return Report(
        _model(ours, weights), _model(theirs, weights), config, tensors, parts, outputs, notes,
        _row_names(ours.pack, tensors),
    )  # fmt: skip


def check_target(path: Path) -> None:
    """Can a page be written there? Asked before hours of work. Raises: OutputError."""
    check_replaceable(path, _MOST_PAGE_BYTES, _is_page, "page of bloomq compare")
    folder = path.parent
    if not exists(folder) or not folder.is_dir():
        raise OutputError(f"{path}: there is no folder {folder} to write the page to: make it")
    if exists(path) and not path.is_file():
        raise OutputError(f"{path}: is not a regular file: choose another name for the page")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: no right to write a page into {folder}: choose another folder")


def _is_page(data: bytes) -> bool:
    return page.MARK.encode() in data[:200]


def _model(side: Side, weights: int) -> Model:
    bits = 8 * side.nbytes / weights
    name = side.path.resolve().name
    return Model(name, str(side.path), side.kind, side.nbytes, bits, dict(side.provenance))


def _row_names(pack: Pack, tensors: Sequence[Tensor]) -> dict[int, str]:
    if not pack.has_tokenizer:
        return {}
    texts = TokenTexts(BloomTokenizer.of_pack(pack))
    tables = [tensor for tensor in tensors if tensor.kind in ("wte", "lm_head")]
    return {row: texts.of(row) for tensor in tables for row, _ in tensor.worst_rows}


def _parts(ours: Side, theirs: Side) -> tuple[Part, ...]:
    """Matrices by what they are for; the rest, norms and biases, together."""
    sums: dict[str, list[int]] = {}
    vectors = 0
    for spec in weight_specs(ours.config):
        if not spec.is_matrix or spec.has_bias:
            vectors += spec.shape[0] * (1 if spec.is_matrix else 2)
        if not spec.is_matrix:
            continue
        name = {"linear": "attention" if ".attn." in spec.name else "mlp"}.get(spec.kind, spec.kind)
        n, k = spec.shape
        found = sums.setdefault(name, [0, 0, 0])
        for i, value in enumerate((n * k, ours.stored(spec.name)[1], theirs.stored(spec.name)[1])):
            found[i] += value
    left = [side.nbytes - sum(v[i] for v in sums.values()) for i, side in ((1, ours), (2, theirs))]
    rest = Part("norms and biases", vectors, left[0], left[1])
    return (*(Part(name, *values) for name, values in sums.items()), rest)


def _notes(ours: Side, theirs: Side) -> tuple[str, ...]:
    """What a reader should know of the two files."""
    notes = list(dict.fromkeys((*ours.notes, *theirs.notes)))
    mine, other = (side.provenance.get("fingerprint") for side in (ours, theirs))
    if mine is not None and other is not None and mine != other:
        notes.append(
            "by their fingerprints the pack was not made from this checkpoint as it is now"
        )
    tokenizers = ours.tokenizer, theirs.tokenizer
    if None not in tokenizers and tokenizers[0] != tokenizers[1]:
        notes.append("the tokenizers differ: both models are given the tokens of the pack's")
    changed = _changed_vectors(ours, theirs)
    if changed:
        listed = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if changed[3:] else "")
        notes.append(f"norms or biases that are not the original's: {listed}")
    return tuple(notes)


def _changed_vectors(ours: Side, theirs: Side) -> Sequence[str]:
    keys = []
    for spec in weight_specs(ours.config):
        leaves = ("weight", "bias") if not spec.is_matrix else ("bias",) if spec.has_bias else ()
        keys += [(f"{spec.name}.{leaf}", spec.shape[0]) for leaf in leaves]
    return [
        key for key, n in keys if not np.array_equal(ours.vector(key, n), theirs.vector(key, n))
    ]
