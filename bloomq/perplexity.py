"""How well a model predicts a text: perplexity, and how far a pack strays from another one.

A text's tokens are read in windows; a token is scored in one of them, and sees that window alone.
Invariant: figures are sums over whole windows, in their order, so an interrupted measurement is
exactly that of the windows it finished.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from bloomq.checks import is_whole
from bloomq.divergence import BEST, Differences, differences
from bloomq.errors import UsageError
from bloomq.heads import Head
from bloomq.layers import Cache
from bloomq.lora import Choice
from bloomq.scoring import Piece, pieces, token_logprobs
from bloomq.tokenizer import BloomTokenizer
from bloomq.windows import (
    WindowProtocol,
    gptq_text,
    mean_of_windows,
    plan,
    stride_tokens,
    window_tokens,
)

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
QUANTILES = (0.5, 0.9, 0.99, 0.999)
NORMAL_95 = 1.959964  # standard deviations on either side of the mean hold 95 %


class Model(Protocol):
    """What is measured: a `LanguageModel`."""

    @property
    def head(self) -> Head: ...
    @property
    def tokenizer(self) -> BloomTokenizer | None: ...
    @property
    def context(self) -> int: ...
    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model against another, the base, over the same windows.

    change: of the perplexity, as a fraction of the base's, with the interval of the paired
    difference; kl: mean over tokens of KL(base || model) in nats, with its standard error;
    kl_quantiles: of the tokens' KL, by their fraction; same_top: the share of tokens of which both
    like the same one best; same_best: the share of the base's 10 likeliest that are the model's.
    """

    base_perplexity: float
    change: float
    change_interval: tuple[float, float]
    kl: float
    kl_standard_error: float
    kl_quantiles: Mapping[str, float]
    kl_most: float
    same_top: float
    same_best: float


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean loss of `tokens` tokens in `windows` windows of `windows_in_all`.

    nll: the mean of -logprob, in nats; standard_error: of nll, windows as independent samples (NaN
    of fewer than two); interval: of the perplexity, 95 % by the normal distribution;
    bits_per_byte: of the text, None where there is no tokenizer.
    """

    perplexity: float
    nll: float
    standard_error: float
    interval: tuple[float, float]
    bits_per_byte: float | None
    tokens: int
    windows: int
    windows_in_all: int
    protocol: WindowProtocol
    window: int
    stride: int
    comparison: Comparison | None = None


Progress = Callable[[int, int, "Perplexity | None"], None]  # (tokens read, in all, so far)


def perplexity(
    model: Model,
    text: str | Sequence[int],
    *,
    protocol: WindowProtocol = "fixed",
    window: int | None = None,
    stride: int | None = None,
    base: Model | None = None,
    most_tokens: int | None = None,
    adapters: Choice = None,
    progress: Progress = lambda done, total, so_far: None,
) -> Perplexity:
    """How well a model predicts a text, or token ids.

    protocol: "fixed": windows side by side, the last one shorter; "gptq": without the last, as
    published figures are (of text by its lines: see `windows.gptq_text`); "sliding": windows
    `stride` apart (None: half a window), of which all but the first score what the one before did
    not reach. A window's first token is never scored. window: tokens, None for the model's context,
    of which "gptq" takes 2,048 at most; base: another model to compare with; most_tokens: of the
    text, from its start; adapters: of the model, None for none of them.
    Ctrl-C ends the call and returns what the finished windows give, if there is one.

    Source: IST-DASLab/gptq; transformers, "Perplexity of fixed-length models".
    Raises: UsageError; PackError for text without a tokenizer; NumericError.
    """
    if not callable(progress):
        raise UsageError(f"progress is {progress!r:.60}, expected a function of three arguments")
    measurement = Measurement(
        model, text, protocol=protocol, window=window, stride=stride, base=base,
        most_tokens=most_tokens, adapters=adapters,
    )  # fmt: skip
    result = None
    try:
        for read in measurement:
            if measurement.windows_done > (0 if result is None else result.windows):
                result = measurement.result
            progress(read, measurement.tokens_to_read, result)
    except KeyboardInterrupt:
        if not measurement.windows_done:
            raise
    result = measurement.result
    assert result is not None  # a plan has a window
    return result


class Measurement:
    """A measurement under way: iterating does it, in steps, and yields how many tokens were read;
    `result` is what the windows finished so far give. Options: see `perplexity`."""

    def __init__(
        self,
        model: Model,
        text: str | Sequence[int],
        *,
        protocol: WindowProtocol = "fixed",
        window: int | None = None,
        stride: int | None = None,
        base: Model | None = None,
        most_tokens: int | None = None,
        adapters: Choice = None,
    ) -> None:
        if protocol not in get_args(WindowProtocol):
            raise UsageError(f"protocol is {protocol!r:.40}, expected fixed, sliding or gptq")
        _check_model("model", model)
        if base is not None:
            _check_model("base", base)
        if most_tokens is not None and (not is_whole(most_tokens) or most_tokens < 1):
            raise UsageError(f"most_tokens is {most_tokens!r}, expected 1 or more of the text")
        context = model.context if base is None else min(model.context, base.context)
        self._protocol: WindowProtocol = protocol
        self._window = window_tokens(protocol, window, context)
        self._stride = stride_tokens(protocol, stride, self._window)
        self._model, self._base = model, base
        if protocol == "gptq" and isinstance(text, str):
            text = gptq_text(text)
        self._ids = np.array(model.prompt_ids(text)[:most_tokens], np.int64)
        if base is not None:
            _check_base(model, base, text, self._ids)
        self._windows = plan(len(self._ids), self._window, self._stride, protocol)
        self._gates = model.head.adapters.gates(adapters, 1)
        self._bytes = _count_bytes(model.tokenizer, self._ids)
        self._done: list[_Window] = []

    @property
    def tokens_to_read(self) -> int:
        """In all windows; of overlapping ones the same token several times."""
        return sum(end - begin for begin, end, _ in self._windows)

    def __iter__(self) -> Iterator[int]:
        cache = self._model.head.cache(1, self._window)
        cache.gates[:] = self._gates
        base_cache = None if self._base is None else self._base.head.cache(1, self._window)
        read = 0
        for begin, end, first in self._windows[len(self._done) :]:
            ids, now = self._ids[begin:end], _Window(end - begin - first)
            for piece, base in self._pieces(ids, first, cache, base_cache):
                ((_, start, stop),) = piece.where
                now.loss -= float(token_logprobs(piece, ids[start:stop]).sum())
                if base is not None:
                    now.base_loss -= float(token_logprobs(base, ids[start:stop]).sum())
                    now.found.append(differences(base, piece))
                yield read + stop
            read += end - begin
            self._done.append(now)

    def _pieces(
        self, ids: I64, first: int, cache: Cache, base_cache: Cache | None
    ) -> Iterator[tuple[Piece, Piece | None]]:
        """The pieces of a window, beside the base's."""
        cache.truncate(0, 0)
        ours = pieces(self._model.head, cache, {0: ids}, {0: first}, top=BEST)
        if self._base is None or base_cache is None:
            yield from ((piece, None) for piece in ours)
            return
        base_cache.truncate(0, 0)
        theirs = pieces(self._base.head, base_cache, {0: ids}, {0: first}, top=BEST)
        yield from zip(ours, theirs, strict=True)

    @property
    def windows_done(self) -> int:
        return len(self._done)

    @property
    def result(self) -> Perplexity | None:
        """None before the first window is finished."""
        if not self._done:
            return None
        counts = np.array([window.count for window in self._done])
        nll, error = mean_of_windows(np.array([window.loss for window in self._done]), counts)
        return Perplexity(
            _exp(nll), nll, error, _interval(nll, error),
            None if not self._bytes else nll * len(self._ids) / self._bytes / math.log(2),
            int(counts.sum()), len(counts), len(self._windows), self._protocol, self._window,
            self._stride, None if self._base is None else self._comparison(nll, counts),
        )  # fmt: skip

    def _comparison(self, nll: float, counts: I64) -> Comparison:
        losses = np.array([window.loss - window.base_loss for window in self._done])
        change, error = mean_of_windows(losses, counts)
        low, high = _interval(change, error)
        found = [part for window in self._done for part in window.found]
        kl = np.concatenate([part.kl for part in found])
        by_window = np.add.reduceat(kl, np.cumsum(counts) - counts)
        mean, kl_error = mean_of_windows(by_window, counts)
        return Comparison(
            _exp(nll - change), _exp(change) - 1, (low - 1, high - 1), mean, kl_error,
            {f"{100 * q:g}%": float(np.quantile(kl, q)) for q in QUANTILES}, float(kl.max()),
            float(np.concatenate([part.same_top for part in found]).mean()),
            float(np.concatenate([part.common for part in found]).mean() / BEST),
        )  # fmt: skip


@dataclass(slots=True, eq=False)
class _Window:
    """A window's sums over its `count` scored tokens."""

    count: int
    loss: float = 0.0
    base_loss: float = 0.0
    found: list[Differences] = field(default_factory=list)


def _interval(mean: float, error: float) -> tuple[float, float]:
    """exp of the 95 % interval of a mean of logarithms."""
    return _exp(mean - NORMAL_95 * error), _exp(mean + NORMAL_95 * error)


def _exp(x: float) -> float:
    """exp, infinite where math.exp would raise: a broken model's loss may be anything."""
    return math.inf if x > math.log(sys.float_info.max) else math.exp(x)


def _check_model(name: str, model: object) -> None:
    if not isinstance(getattr(model, "head", None), Head) or not hasattr(model, "prompt_ids"):
        raise UsageError(f"{name} is {model!r:.60}, expected what bloomq.load returns")


def _check_base(model: Model, base: Model, text: str | Sequence[int], ids: I64) -> None:
    ours, theirs = model.head.columns, base.head.columns
    if ours != theirs:
        raise UsageError(
            f"the base has {theirs} tokens, the model {ours}: compare packs of one vocabulary"
        )
    if base.tokenizer is not None and base.prompt_ids(text)[: len(ids)] != ids.tolist():
        raise UsageError("the base has another tokenizer: compare packs of one model")


def _count_bytes(tokenizer: BloomTokenizer | None, ids: I64) -> int:
    """Of the text of these tokens, 0 without a tokenizer. Bits per byte are the mean loss of a
    token times tokens per byte: The Pile (arXiv 2101.00027), section 3.1."""
    return 0 if tokenizer is None else len(tokenizer.decode(ids).encode())
