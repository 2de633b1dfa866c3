"""A text as windows of token ids, to calibrate on."""

from __future__ import annotations

import codecs
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bloomq.checks import is_whole
from bloomq.errors import InputNotFound, TokenizerError, UsageError
from bloomq.files import exists
from bloomq.tokenizer import BloomTokenizer

from ..source import Checkpoint

I64 = NDArray[np.int64]
TOKENS = 24576  # more than 7b1's widest matrix has columns, so that its moments have full rank
_WINDOW = 2048  # as GPTQ's, where the model has such a context
_MOST_TOKENS = 1 << 24  # of 7b1, 270 GB of activations
_TOKEN_BYTES = 16  # of text, more than a token has on average in any language of BLOOM's


def read_windows(
    checkpoint: Checkpoint, text: str | Path, *, tokens: int = TOKENS, window: int | None = None
) -> I64:
    """Token ids [B, T] of a file, or of the .txt files of a folder in equal shares: as many whole
    windows as `tokens` fill, from the start of each file.

    window: tokens, None for 2,048 or the model's context, if that is less. A text of less than a
    window is one shorter window. Raises: InputNotFound, UsageError, TokenizerError.
    """
    path, length = Path(text), min(_WINDOW, checkpoint.config.seq_length)
    if not is_whole(tokens) or not 2 <= tokens <= _MOST_TOKENS:
        raise UsageError(f"calibration tokens are {tokens!r}, expected 2 to {_MOST_TOKENS}")
    if window is not None:
        if not is_whole(window) or not 2 <= window <= checkpoint.config.seq_length:
            raise UsageError(
                f"calibration window is {window!r}, expected 2 to {checkpoint.config.seq_length}, "
                "the model's context"
            )
        length = window
    if not exists(path):
        raise InputNotFound(f"{path}: no such text to calibrate on")
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"{path}: no .txt file in this folder: name a text to calibrate on")
    rows = _rows(checkpoint, files, max(1, tokens // length // len(files)), min(length, tokens))
    if not rows:
        raise UsageError(f"{path}: too short to calibrate on, expected 2 tokens or more")
    most = max(1, tokens // length)  # of more files than windows, some have no share
    if len(rows) > most:
        rows = [rows[i * len(rows) // most] for i in range(most)]
    return np.stack(rows)


def _rows(checkpoint: Checkpoint, files: list[Path], count: int, length: int) -> list[I64]:
    """Up to `count` windows of each file; if none has a whole one, the longest text there is."""
    if checkpoint.tokenizer is None:
        raise TokenizerError(
            "the checkpoint has no tokenizer.json: it is needed to read a text to calibrate on"
        )
    tokenizer = BloomTokenizer.from_bytes(checkpoint.tokenizer, "tokenizer.json")
    rows: list[I64] = []
    longest: I64 = np.zeros(0, np.int64)
    for file in files:
        start = _start_of(file, _TOKEN_BYTES * count * length)
        ids = np.array(tokenizer.encode(start), np.int64)
        _check_ids(file, ids, checkpoint.config.vocab_size)
        starts = range(0, len(ids) - length + 1, length)
        rows += [ids[i : i + length] for i in starts[:count]]
        longest = max(longest, ids, key=len)
    if not rows and len(longest) >= 2:
        return [longest]
    return rows


def _start_of(file: Path, nbytes: int) -> str:
    """What so many bytes hold of a text, less a character that they cut. Raises: UsageError."""
    try:
        with file.open("rb") as stream:
            data = stream.read(nbytes)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read to calibrate on: {error.strerror}") from None
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file}: is not UTF-8 (byte {error.start}), expected text to calibrate on: convert it"
        ) from None


def _check_ids(file: Path, ids: I64, vocab_size: int) -> None:
    if ids.size and int(ids.max()) >= vocab_size:
        raise TokenizerError(
            f"{file}: gives token {int(ids.max())}, the model has {vocab_size}: its "
            "tokenizer is of another model"
        )


def spread(ids: I64) -> I64:
    """The windows in another order: from all over the text, however few are then taken."""
    step = max(1, round(len(ids) ** 0.5))
    return np.concatenate([ids[start::step] for start in range(step)])
