"""Requests as lm-eval makes them, answered by a model: logprobs of continuations, of whole texts in
windows, and texts that are written up to a stop string. Here lm-eval is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bloomq.checks import is_whole
from bloomq.errors import UsageError
from bloomq.language_model import LanguageModel
from bloomq.sampling import Sampling
from bloomq.scoring import BATCH_TOKENS, each
from bloomq.search import BeamOptions
from bloomq.search.options import check_greedy

MOST_NEW = 256  # tokens of an answer where a task names no number, as lm-eval's own models
# Of a request to generate, what is taken, by the names of lm-eval and transformers; of the lengths
# the first counts. Sampling and BeamOptions have the same names.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DRAW = (
    "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size",
    "min_new_tokens",
)  # fmt: skip
_BEAMS = ("length_penalty", "early_stopping")


def check_whole(name: str, value: object, least: int) -> int:
    """A whole number from `least`. Raises: UsageError."""
    if not is_whole(value) or value < least:  # type: ignore[operator]
        raise UsageError(f"{name} is {value!r:.60}, expected a whole number from {least} on")
    return int(value)  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True, slots=True)
class Options:
    """How an answer is written: what `LanguageModel.generate` takes."""

    max_new_tokens: int = MOST_NEW
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    search: BeamOptions | None = None

    @classmethod
    def of(cls, request: Mapping[str, Any], most: int = MOST_NEW) -> Options:
        """Of a task's generation_kwargs; `most` new tokens where they name none.

        do_sample false, or no temperature: greedy; do_sample true without one: 1; None: as if it
        were not there. Raises: UsageError for what bloomq has not, and for a value that cannot be.
        """
        given = {name: value for name, value in request.items() if value is not None}
        stop = _strings(given.pop("until", []))
        lengths = [given.pop(name) for name in _LENGTHS if name in given]
        count = check_whole(_LENGTHS[0], lengths[0] if lengths else most, 1)
        sample, temperature = given.pop("do_sample", None), given.pop("temperature", None)
        if sample is False:
            temperature = 0.0
        elif temperature is None:
            temperature = 1.0 if sample else 0.0
        draw = {name: given.pop(name) for name in _DRAW if name in given}
        beams = check_whole("num_beams", given.pop("num_beams", 1), 1)
        search = {name: given.pop(name) for name in _BEAMS if name in given}
        if given:
            raise UsageError(
                f"generation_kwargs has {', '.join(sorted(map(str, given)))}, expected until, "
                f"{_LENGTHS[0]}, do_sample, temperature, {', '.join(_DRAW)}, num_beams and "
                f"{' and '.join(_BEAMS)}"
            )
        sampling = Sampling(temperature=temperature, **draw)
        if beams == 1:
            return cls(count, stop, sampling)
        check_greedy(sampling, "num_beams")
        return cls(count, stop, sampling, BeamOptions(num_beams=beams, **search))


def _strings(until: object) -> tuple[str, ...]:
    """The stop strings that are not empty. Raises: UsageError."""
    found = [until] if isinstance(until, str) else until
    if not isinstance(found, list | tuple) or not all(isinstance(one, str) for one in found):
        raise UsageError(f"until is {until!r:.60}, expected strings that end an answer")
    return tuple(one for one in found if one)


class Answers:
    """What a model says, as tokens and texts: what `evaluation.BloomqLM` is made of.

    max_length: the most tokens that the model reads to predict one; batch_tokens: of the cache that
    texts share while they are scored, or continued; seed: of draws. Raises: UsageError.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_length: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        seed: int = 0,
    ) -> None:
        if model.tokenizer is None:
            raise UsageError(f"{model.pack.path}: has no tokenizer, which tasks of text need")
        self.model, self.tokenizer = model, model.tokenizer
        self.max_length = model.context
        if max_length is not None:
            self.max_length = check_whole("max_length", max_length, 1)
        self.batch_tokens = check_whole("batch_tokens", batch_tokens, 1)
        self.seed = check_whole("seed", seed, 0)

    @property
    def prefix_id(self) -> int:
        """What stands before a text that nothing stands before: <s>, else </s>."""
        found = self.tokenizer.bos_token_id
        found = self.tokenizer.eos_token_id if found is None else found
        if found is None:
            raise UsageError("the tokenizer has neither <s> nor </s> to put before a text")
        return found

    def likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """(number of the pair, (logprob of its continuation, would greedy decoding write it)) of
        (context, continuation), as they are found; what is too long loses its beginning."""
        rows = [[*context, *rest][-(self.max_length + 1) :] for context, rest in pairs]
        first = [len(row) - len(rest) for row, (_, rest) in zip(rows, pairs, strict=True)]
        for number, (context, rest) in enumerate(pairs):
            if not context or len(rest) > self.max_length:
                raise UsageError(
                    f"request {number} has a context of {len(context)} tokens and {len(rest)} to "
                    f"score, expected 1 or more and {self.max_length} at most"
                )
        for number, scores in each(
            self.model.head, rows, first=first, batch_tokens=self.batch_tokens
        ):
            yield number, (scores.total, scores.is_greedy)

    def rolling(self, text: str) -> list[tuple[list[int], list[int]]]:
        """(context, continuation) of a text's windows of max_length tokens: each of its tokens is
        in one continuation, the first behind `prefix_id`, and the last window is a whole one.

        Source: lm_eval.utils, get_rolling_token_windows with context_len 1.
        """
        ids, most = self.tokenizer.encode(text), self.max_length
        pairs = [([self.prefix_id], ids[:most])] if ids else []
        for start in range(most, len(ids), most):
            end = min(start + most, len(ids))
            pairs.append((ids[end - most - 1 : start], ids[start:end]))
        return pairs

    def texts(self, contexts: Sequence[str], options: Options) -> Iterator[tuple[int, str]]:
        """(number of the context, what follows it, before a stop string) as batches end; a context
        that is too long loses its beginning."""
        room = self.max_length - options.max_new_tokens
        if room < 1:
            raise UsageError(
                f"a task asks for {options.max_new_tokens} new tokens, expected less than the "
                f"{self.max_length} of the model: set max_gen_toks"
            )
        prompts = [(self.tokenizer.encode(text) or [self.prefix_id])[-room:] for text in contexts]
        beams = 1 if options.search is None else options.search.num_beams
        sizes = [beams * (len(prompt) + options.max_new_tokens) for prompt in prompts]
        for batch in self._batches(sizes):
            found = self.model.generate(
                [prompts[i] for i in batch], max_new_tokens=options.max_new_tokens,
                stop=options.stop, search=options.search,
                sampling=replace(options.sampling, seed=self.seed + batch[0]),
            )  # fmt: skip
            if any(one.finish_reason == "interrupted" for one in found):
                raise KeyboardInterrupt
            yield from ((i, one.text) for i, one in zip(batch, found, strict=True))

    def _batches(self, sizes: list[int]) -> Iterator[list[int]]:
        """Numbers of the prompts that are continued together, from short to long; size: of a row,
        in tokens."""
        batch: list[int] = []
        for i in sorted(range(len(sizes)), key=sizes.__getitem__):
            if batch and (len(batch) + 1) * sizes[i] > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch
