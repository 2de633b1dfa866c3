"""Texts behind prompts of token ids, drawn or searched, as one call asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.checks import is_whole
from bloomq.constraints import AnyConstraint
from bloomq.constraints.matching import Compiler, Forced
from bloomq.errors import UsageError
from bloomq.generation import (
    MOST_ROWS,
    Clock,
    Engine,
    Generation,
    PrefillProgress,
    Reader,
    Request,
    Stats,
    Window,
    read,
    read_each,
)
from bloomq.sampling import Sampler, Sampling
from bloomq.search import AnySearch, BeamOptions, Hypothesis, best, searcher_of
from bloomq.speculation import Guesser
from bloomq.text import TextAssembler
from bloomq.tokenizer import BloomTokenizer

F32 = NDArray[np.float32]
Guessers = Callable[[int], Guesser]  # (most tokens of a sequence) -> its guesser


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What one call asks of each of its texts: see `LanguageModel.generate`. ends: the tokens that
    end a text; guessers: of its draft."""

    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...]
    ends: tuple[int, ...]
    window: Window | None
    constraint: AnyConstraint | None
    top_logprobs: int
    guessers: Guessers | None


class Writer:
    """Writes the texts of one model. load_s: how long that took to load, for the statistics."""

    def __init__(
        self, engine: Engine, tokenizer: BloomTokenizer | None, compiler: Compiler, load_s: float
    ) -> None:
        self.engine, self._tokenizer = engine, tokenizer
        self._compiler, self._load_s = compiler, load_s

    def reader(self, prompt: Sequence[int], index: int, options: Options, gates: F32) -> Reader:
        """Of the text behind one prompt, the call's `index`th, not yet begun.

        Raises: UsageError, CapacityError.
        """
        ends, most, tokenizer = options.ends, options.max_new_tokens, self._tokenizer
        guesser: Callable[[], Guesser] | None = None
        if options.guessers is not None:
            guesser = partial(options.guessers, len(prompt) + most)
        matcher = None
        if options.constraint is not None:
            matcher = self._compiler.matcher(options.constraint, ends)
            guesser = guesser or partial(Forced, matcher)
        vocab_size = self.engine.head.config.vocab_size
        request = Request(
            prompt=tuple(prompt), max_new_tokens=most, ends=ends, gates=gates, guesser=guesser,
            sampler=Sampler(options.sampling, prompt, index, vocab_size, ends, matcher),
            constraint=matcher, window=options.window, top_logprobs=options.top_logprobs,
        )  # fmt: skip
        decoder = None if tokenizer is None else tokenizer.stream()
        return Reader(self.engine.sequence(request), decoder, options.stop)

    def drawn(
        self, prompts: Sequence[Sequence[int]], options: Options, best_of: int, count: int,
        gates: F32, progress: PrefillProgress,
    ) -> list[Any]:  # fmt: skip
        """Behind each prompt the best of so many texts, or the `count` best of them. Ctrl-C ends
        them where they are."""
        for name, value in (("best_of", best_of), ("num_return_sequences", count)):
            if not is_whole(value) or value < 1 or (value > 1 and options.sampling.greedy):
                raise UsageError(f"{name} is {value!r}, expected 1, or more with a temperature")
        count, best_of = int(count), max(int(best_of), int(count))
        readers = [
            self.reader(prompt, best_of * row + i, options, gates[row])
            for row, prompt in enumerate(prompts)
            for i in range(best_of)
        ]
        with suppress(KeyboardInterrupt):  # what was produced is worth more than a traceback
            for _ in read(self.engine, readers, progress):
                pass
        results = [reader.result(self._load_s) for reader in readers]
        groups = (results[i : i + best_of] for i in range(0, len(results), best_of))
        return [best(group, count) if count > 1 else best(group)[0] for group in groups]

    def each(
        self, prompts: Iterable[Sequence[int]], options: Options, first: int, parallel: int,
        gates: F32,
    ) -> Iterator[Generation]:  # fmt: skip
        """Behind each prompt its text, when it is done: see `LanguageModel.generate_each`."""
        if not is_whole(parallel) or not 1 <= parallel <= MOST_ROWS:
            raise UsageError(f"parallel is {parallel!r}, expected 1 to {MOST_ROWS} texts at a time")
        if not is_whole(first) or first < 0:
            raise UsageError(f"first is {first!r}, expected the number of a prompt, from 0")
        readers = (
            self.reader(prompt, index, options, gates)
            for index, prompt in enumerate(prompts, first)
        )
        found = read_each(self.engine, readers, int(parallel))
        return (reader.result(self._load_s) for reader in found)

    def searched(
        self, prompts: Sequence[Sequence[int]], options: Options, search: AnySearch, gates: F32,
        progress: PrefillProgress,
    ) -> list[Any]:  # fmt: skip
        """What a search finds behind each prompt: a Generation, or as many as were asked for.
        Ctrl-C ends it with what is under way."""
        if not isinstance(search, AnySearch):
            raise UsageError(f"search is {search!r:.60}, expected BeamOptions or ContrastOptions")
        for name, given in (
            ("a constraint", options.constraint), ("a draft", options.guessers),
            ("a window", options.window), ("top_logprobs", options.top_logprobs),
        ):  # fmt: skip
            if given:
                raise UsageError(f"{name} together with a search, expected one of them")
        # So many prompts at a time that a step has no more rows than one that draws.
        count = max(1, MOST_ROWS // search.rows)
        found: list[Any] = []
        for first in range(0, len(prompts), count):
            here = slice(first, first + count)
            found += self._some_searched(prompts[here], options, search, gates[here], progress)
        return found

    def _some_searched(
        self, prompts: Sequence[Sequence[int]], options: Options, search: AnySearch, gates: F32,
        progress: PrefillProgress,
    ) -> list[Any]:  # fmt: skip
        searcher = searcher_of(
            self.engine.head, prompts, search, max_new_tokens=options.max_new_tokens,
            context=self.engine.context, ends=options.ends, sampling=options.sampling,
            stopped=self._stopped(options.stop), gates=gates,
        )  # fmt: skip
        clock = Clock()
        with suppress(KeyboardInterrupt):
            for _ in searcher.run(progress):
                clock.tick()
        several = isinstance(search, BeamOptions) and search.num_return_sequences > 1
        found = [
            [self._generation(one, len(prompt), options.stop, clock) for one in texts]
            for prompt, texts in zip(prompts, searcher.results(), strict=True)
        ]
        return [texts if several else texts[0] for texts in found]

    def _stopped(self, stop: tuple[str, ...]) -> Callable[[tuple[int, ...]], bool]:
        """Does the text of some tokens hold one of these strings?"""
        tokenizer = self._tokenizer
        if tokenizer is None or not stop:
            return lambda ids: False
        return lambda ids: any(text in tokenizer.decode(ids) for text in stop)

    def _generation(
        self, found: Hypothesis, prompt_tokens: int, stop: tuple[str, ...], clock: Clock
    ) -> Generation:
        text = ""
        if self._tokenizer is not None:
            assembler = TextAssembler(self._tokenizer.stream(), stop)
            text = "".join(map(assembler.push, found.ids)) + assembler.finish()
        seconds = clock.prompt_s, clock.generate_s, self._load_s
        return Generation(
            text, found.ids, found.logprobs, found.finish_reason,
            Stats(prompt_tokens, len(found.ids), *seconds), score=found.score,
        )  # fmt: skip
