"""Where in a text the answer to a question stands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from bloomq.checks import is_whole
from bloomq.encoding import Offsets
from bloomq.errors import UsageError
from bloomq.lora import Choice
from bloomq.modeling import BloomForQuestionAnswering
from bloomq.pipelines.batches import BATCH_TOKENS, results
from bloomq.pipelines.texts import least_score, read
from bloomq.tokenizer import BloomTokenizer

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
_WINDOW_TOKENS, _OVERLAP = 512, 128


@dataclass(frozen=True, slots=True)
class Answer:
    """Characters start to end of a context; score: their share of the probability of all spans."""

    text: str
    score: float
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Window:
    """A question, and the tokens of its context from `first` on behind it.

    ids: of both; skip: how many are the question's; offsets: the characters of the context's.
    """

    first: int
    ids: list[int]
    skip: int
    offsets: Offsets


@dataclass(frozen=True, slots=True)
class Pair:
    """A context and the windows that it is read in, each behind the question."""

    context: str
    windows: list[Window]


class Answerer:
    """Finds answers with a `BloomForQuestionAnswering`.

    BLOOM reads from left to right, so the question comes before the context. separator: what stands
    between them: nothing, as transformers' `tokenizer(question, context)` has it for BLOOM, unless
    the model was trained otherwise.
    """

    def __init__(
        self, model: BloomForQuestionAnswering, tokenizer: BloomTokenizer, *, separator: str = ""
    ) -> None:
        if not isinstance(separator, str):
            raise UsageError(f"separator is {separator!r:.80}, expected text")
        self.model, self.tokenizer, self.separator = model, tokenizer, separator

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        separator: str = "",
        backend: str = "auto",
        threads: int | None = None,
        scheme: str | None = None,
        cache_dtype: str = "auto",
        devices: str = "auto",
        max_memory: str | None = None,
        save_pack: str | os.PathLike[str] | None = None,
    ) -> Self:
        """The answerer of a pack or a checkpoint's folder; options: see
        `BloomForQuestionAnswering.from_pretrained`."""
        model = BloomForQuestionAnswering.from_pretrained(
            path, backend=backend, threads=threads, scheme=scheme, cache_dtype=cache_dtype,
            devices=devices, max_memory=max_memory, save_pack=save_pack,
        )  # fmt: skip
        return cls(model, BloomTokenizer.of_pack(model.pack), separator=separator)

    def answer(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        *,
        top_k: int = 1,
        threshold: float | None = None,
        max_answer_tokens: int = 64,
        window_tokens: int | None = None,
        overlap: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        adapters: Choice = None,
    ) -> list[list[Answer]]:
        """The best spans of each context, best first; none where it is white space alone.

        top_k: so many; threshold: those alone that score as much; windows: see `pairs`;
        batch_tokens, adapters: see `Classifier.scores`.

        Raises: UsageError, NumericError.
        """
        return self.answer_pairs(
            self.pairs(questions, contexts, window_tokens=window_tokens, overlap=overlap),
            top_k=top_k, threshold=threshold, max_answer_tokens=max_answer_tokens,
            batch_tokens=batch_tokens, adapters=adapters,
        )  # fmt: skip

    def answer_pairs(
        self,
        pairs: Sequence[Pair],
        *,
        top_k: int = 1,
        threshold: float | None = None,
        max_answer_tokens: int = 64,
        batch_tokens: int = BATCH_TOKENS,
        adapters: Choice = None,
    ) -> list[list[Answer]]:
        """`answer` of pairs that `pairs` has read."""
        for name, value in (("top_k", top_k), ("max_answer_tokens", max_answer_tokens)):
            if not is_whole(value) or value < 1:
                raise UsageError(f"{name} is {value!r}, expected a whole number from 1")
        least = least_score(threshold)
        windows = [(i, window) for i, pair in enumerate(pairs) for window in pair.windows]
        ids = [window.ids for _, window in windows]
        parts: list[list[tuple[Window, F32]]] = [[] for _ in pairs]
        found: list[list[Answer]] = [[] for _ in pairs]
        for at, logits in results(
            self.model.head, ids, batch_tokens=batch_tokens, last=False, adapters=adapters
        ):
            i, window = windows[at]
            context = pairs[i].context
            parts[i].append((window, logits))
            if len(parts[i]) == len(pairs[i].windows):  # only answers are kept of what is whole
                spans = [spans_of(context, *part, max_answer_tokens) for part in parts[i]]
                parts[i] = []
                answers = best_answers(context, spans, top_k)
                found[i] = [answer for answer in answers if answer.score >= least]
        return found

    def pairs(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        *,
        window_tokens: int | None = None,
        overlap: int | None = None,
        names: Sequence[str] | None = None,
    ) -> list[Pair]:
        """What is read at once: a question and its context, or as much of that as there is room
        for, then the question again with what comes next.

        window_tokens: of both together (512, or what the model was trained on); overlap: tokens of
        a context that its next window has again (128, or a quarter): longer answers may be missed
        where windows meet. names: what errors call each pair; None: pair 0, pair 1, ...

        Raises: UsageError.
        """
        most = self.model.config.seq_length
        if window_tokens is None:
            window_tokens = min(_WINDOW_TOKENS, most)
        if not is_whole(window_tokens) or window_tokens < 2:
            raise UsageError(f"window_tokens is {window_tokens!r}, expected 2 or more")
        if overlap is None:
            overlap = min(_OVERLAP, window_tokens // 4)
        if not is_whole(overlap) or not 0 <= overlap < window_tokens:
            raise UsageError(f"overlap is {overlap!r}, expected 0 to {window_tokens - 1} tokens")
        _check_texts("questions", questions)
        _check_texts("contexts", contexts)
        if len(questions) != len(contexts):
            raise UsageError(f"{len(questions)} questions, and {len(contexts)} contexts for them")
        names = [f"pair {i}" for i in range(len(questions))] if names is None else names
        asked = read(
            self.tokenizer, [question + self.separator for question in questions],
            names=[f"{name}: the question" for name in names],
        )  # fmt: skip
        searched = read(
            self.tokenizer, contexts, offsets=True, names=[f"{name}: the context" for name in names]
        )
        found = []
        for name, question, context in zip(names, asked, searched, strict=True):
            ids, tokens = question.tokens.ids, context.tokens
            room = window_tokens - len(ids)
            if room <= overlap:
                raise UsageError(
                    f"{name}: a question of {len(ids)} tokens leaves too few of "
                    f"{window_tokens} to its context: raise window_tokens or lower overlap"
                )
            windows = []
            for first in range(0, max(1, len(tokens.ids) - overlap), room - overlap):
                part = slice(first, first + room)
                windows.append(
                    Window(first, ids + tokens.ids[part], len(ids), tokens.offsets[part])
                )
            found.append(Pair(context.text, windows))
        return found


def _check_texts(name: str, texts: object) -> None:
    if not isinstance(texts, list | tuple):
        raise UsageError(f"{name} are {type(texts).__name__}, expected a list of texts")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UsageError(f"{name}: number {i} is {type(text).__name__}, expected text")


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Every span that a window offers: characters [N] from and to, and its two logits' sum [N]."""

    start: I64
    end: I64
    total: NDArray[np.float64]


def spans_of(context: str, window: Window, logits: F32, most: int) -> Spans:
    """Spans of 1 to `most` tokens of a window's context, without white space around them.

    logits: [T, 2] of the window's tokens, to be the first or the last of an answer.
    """
    starts, ends = logits[window.skip :].astype(np.float64).T  # [S] each
    count = len(starts)
    most = min(most, count)
    filler = np.full(most - 1, -np.inf)
    total = starts[:, None] + sliding_window_view(np.concatenate([ends, filler]), most)  # [S, most]
    start, end = _visible(context, window.offsets)
    last = np.minimum(np.arange(count)[:, None] + np.arange(most), count - 1)  # [S, most]
    inside = np.isfinite(total) & (start[:, None] < end[last])
    first = np.broadcast_to(np.arange(count)[:, None], last.shape)
    return Spans(start[first[inside]], end[last[inside]], total[inside])


def _visible(context: str, offsets: Offsets) -> tuple[I64, I64]:
    """Of each token: the first character from its start on that is no white space, and the end of
    the last such one before its end. Neither goes beyond the window's characters."""
    low, high = offsets[0][0], offsets[-1][1]
    solid = np.array([not char.isspace() for char in context[low:high]], bool)
    at = np.arange(len(solid))
    following = np.minimum.accumulate(np.where(solid, at, len(solid))[::-1])[::-1]
    before = np.maximum.accumulate(np.where(solid, at + 1, 0))
    begins, stops = np.array(offsets, np.int64).T - low  # a token has a character, or a part of one
    return following[begins] + low, before[stops - 1] + low


def best_answers(context: str, windows: Sequence[Spans], top_k: int) -> list[Answer]:
    """The likeliest spans over all windows: softmax of start + end logits, each distinct piece of
    the context counted once with all that speaks for it."""
    start = np.concatenate([spans.start for spans in windows])
    if not len(start):
        return []
    end = np.concatenate([spans.end for spans in windows])
    total = np.concatenate([spans.total for spans in windows])
    keys, which = np.unique(start * (len(context) + 1) + end, return_inverse=True)
    weights = np.bincount(which, np.exp(total - total.max()))
    weights = weights / weights.sum()
    answers = []
    for i in np.argsort(-weights, kind="stable")[:top_k]:
        first, last = divmod(int(keys[i]), len(context) + 1)
        answers.append(Answer(context[first:last], float(weights[i]), first, last))
    return answers
