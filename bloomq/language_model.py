"""A loaded model that takes text: prompts as text or ids in, text, pieces of it, or logits out."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from bloomq import perplexity, scoring
from bloomq.checks import is_whole
from bloomq.config import BloomConfig
from bloomq.constraints import AnyConstraint
from bloomq.constraints.matching import Compiler
from bloomq.errors import CapacityError, PackError, UsageError
from bloomq.generation import Engine, Generation, Piece, PrefillProgress, Reader, Window, read
from bloomq.heads import Head
from bloomq.layers import Backend
from bloomq.lora import Choice, Choices
from bloomq.modeling import BloomForCausalLM
from bloomq.outputs import CausalLMOutput
from bloomq.prompts import Prompt, is_ids, several
from bloomq.sampling import Sampling
from bloomq.search import AnySearch
from bloomq.speculation import DraftModel, Lookup
from bloomq.text import stop_strings
from bloomq.tokenizer import BloomTokenizer
from bloomq.windows import WindowProtocol
from bloomq.writing import Guessers, Options, Writer


class Stream:
    """An iterator over the pieces of one generation. `generation` is what has been read so far,
    also after an exception or Ctrl-C ended the loop."""

    def __init__(
        self, engine: Engine, reader: Reader, load_s: float, progress: PrefillProgress
    ) -> None:
        self._reader, self._load_s = reader, load_s
        self._pieces = read(engine, [reader], progress)

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)[1]

    @property
    def generation(self) -> Generation:
        return self._reader.result(self._load_s)


class LanguageModel:
    """A loaded BLOOM: call it for logits, `generate` or `stream` for text.

    Texts that begin as an earlier one did are not read again: the keys and values of the latest
    `context` tokens stay in memory until there is none for others, or until `forget`.
    """

    def __init__(
        self,
        model: BloomForCausalLM,
        tokenizer: BloomTokenizer | None,
        context: int,
        reason: str,
        load_s: float,
    ) -> None:
        self.model, self.tokenizer, self.pack = model, tokenizer, model.pack
        self.context, self.load_s = int(context), load_s
        self.backend_reason = reason
        self._engine: Engine | None = None
        self._compiler = Compiler(tokenizer, model.config.vocab_size)
        self._making = threading.Lock()

    @property
    def config(self) -> BloomConfig:
        return self.pack.config

    @property
    def backend(self) -> Backend:
        return self.model.backend

    @property
    def head(self) -> Head:
        return self.model.head

    @property
    def engine(self) -> Engine:
        """What runs this model's texts, together; a new one after adapters came or went."""
        with self._making:
            if self._engine is None or self._engine.head is not self.head:
                self._engine = Engine(self.head, context=self.context, idle_tokens=self.context)
            return self._engine

    def forget(self) -> None:
        """Give back the memory of texts that have ended."""
        self.engine.forget()

    @property
    def adapters(self) -> dict[str, int]:
        """The rank of each adapter loaded, by its name."""
        return self.model.adapters

    def load_adapter(self, path: str | os.PathLike[str], name: str) -> None:
        """Load a LoRA adapter saved by PEFT: see `BloomPreTrainedModel.load_adapter`."""
        self.model.load_adapter(path, name)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises: UsageError for a name that is not loaded."""
        self.model.unload_adapter(name)

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        *,
        adapters: Choices = None,
    ) -> CausalLMOutput:
        """Logits [B, T, V], float32: see `BloomForCausalLM`."""
        output: CausalLMOutput = self.model(
            input_ids, attention_mask=attention_mask, use_cache=False, adapters=adapters
        )
        return output

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        window: Window | None = None,
        constraint: AnyConstraint | None = None,
        top_logprobs: int = 0,
        best_of: int = 1,
        num_return_sequences: int = 1,
        search: AnySearch | None = None,
        draft: LanguageModel | Literal["lookup"] | None = None,
        adapters: Choices = None,
        progress: PrefillProgress = lambda done, total: None,
    ) -> Any:
        """Continue a prompt (text, or token ids): a Generation; or several at once: a list of them.

        sampling: how tokens are chosen, None: always the likeliest; temperature, top_k, top_p,
        min_p, repetition_penalty, seed: these fields of it, in its place.
        stop: strings that end the text, and are not part of it; stop_ids: tokens that end it,
        beside the model's own; window: see `Window`; constraint:
        what the text must be, a `JsonSchema`, a `Regex` or a `Grammar`; top_logprobs: how many
        alternatives of each token come with it.
        best_of: so many texts are drawn, of which the num_return_sequences with the likeliest
        tokens are returned; search: `BeamOptions` or `ContrastOptions`, instead of drawing; where
        several results are asked for, a prompt has a list of them, best first.
        draft: who guesses tokens ahead, which changes the speed and nothing else: a smaller model
        of the same vocabulary, or "lookup" for what the text itself repeats; adapters: None for the
        base, the name of a loaded one, a mapping of names to scales, or a list with one of these
        for each prompt.
        Ctrl-C ends the call and returns what was produced, with finish_reason "interrupted".

        Raises: UsageError, CapacityError, NumericError.
        """
        chosen = _sampling(sampling, temperature, top_k, top_p, min_p, repetition_penalty, seed)
        options = self._options(
            chosen, max_new_tokens, stop, stop_ids, window, constraint, top_logprobs, draft
        )
        single = isinstance(prompt, str) or is_ids(prompt)
        given: list[Any] = [prompt] if single else several(prompt)
        prompts = [self.prompt_ids(one) for one in given]
        if not prompts:
            raise UsageError("no prompts: give at least one")
        writer = self._writer()
        gates = writer.engine.head.adapters.gates(adapters, len(prompts))
        if search is None:
            results: list[Any] = writer.drawn(
                prompts, options, best_of, num_return_sequences, gates, progress
            )
        elif best_of != 1 or num_return_sequences != 1:
            raise UsageError(
                "best_of and num_return_sequences are of draws: a search has its own options"
            )
        else:
            results = writer.searched(prompts, options, search, gates, progress)
        return results[0] if single else results

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        window: Window | None = None,
        constraint: AnyConstraint | None = None,
        top_logprobs: int = 0,
        draft: LanguageModel | Literal["lookup"] | None = None,
        adapters: Choices = None,
        progress: PrefillProgress = lambda done, total: None,
    ) -> Stream:
        """`generate` for one prompt, piece by piece. Streams that are read in turn, or by several
        threads, share their steps."""
        chosen = _sampling(sampling, temperature, top_k, top_p, min_p, repetition_penalty, seed)
        options = self._options(
            chosen, max_new_tokens, stop, stop_ids, window, constraint, top_logprobs, draft
        )
        writer = self._writer()
        gates = writer.engine.head.adapters.gates(adapters, 1)[0]
        reader = writer.reader(self.prompt_ids(prompt), 0, options, gates)
        return Stream(writer.engine, reader, self.load_s, progress)

    def generate_each(
        self,
        prompts: Iterable[Prompt],
        *,
        parallel: int = 8,
        first: int = 0,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        window: Window | None = None,
        constraint: AnyConstraint | None = None,
        top_logprobs: int = 0,
        draft: LanguageModel | Literal["lookup"] | None = None,
        adapters: Choices = None,
    ) -> Iterator[Generation]:
        """A Generation of each of any number of prompts, in their order, each when it is done.

        `parallel` texts run at a time; where one ends, the next takes its place. first: the number
        of the first prompt, by which it draws: so the rest of a list that was interrupted gives
        what the whole would have. Options: see `generate`.
        """
        if isinstance(prompts, str):
            raise UsageError(f"prompts are {prompts!r:.60}, expected several: put one into a list")
        chosen = _sampling(sampling)
        options = self._options(
            chosen, max_new_tokens, stop, stop_ids, window, constraint, top_logprobs, draft
        )
        writer = self._writer()
        gates = writer.engine.head.adapters.gates(adapters, 1)[0]
        return writer.each(map(self.prompt_ids, prompts), options, first, parallel, gates)

    def score(
        self,
        text: Prompt | Sequence[Prompt],
        *,
        context: Prompt = (),
        top: int = 0,
        adapters: Choices = None,
    ) -> Any:
        """How likely a text is behind `context`: its Scores; of several texts, a list of them.

        top: the likeliest tokens of each place come with it. A text's first token has no logprob
        where nothing stands before it. Raises: UsageError, CapacityError, NumericError.
        """
        single = isinstance(text, str) or is_ids(text)
        first = [] if is_ids(context) and not len(context) else self.prompt_ids(context)
        given: list[Any] = [text] if single else several(text)
        rows = [[*first, *self.prompt_ids(one)] for one in given]
        for row in rows:
            if len(row) > self.context:
                raise CapacityError(
                    f"a text of {len(row)} tokens exceeds the context of {self.context}: shorten "
                    "it, or load with a larger context"
                )
        found = scoring.score(
            self.head, rows, first=[len(first)] * len(rows), top=top,
            gates=self.head.adapters.gates(adapters, len(rows)),
        )  # fmt: skip
        return found[0] if single else found

    def perplexity(
        self,
        text: Prompt,
        *,
        protocol: WindowProtocol = "fixed",
        window: int | None = None,
        stride: int | None = None,
        base: LanguageModel | None = None,
        most_tokens: int | None = None,
        adapters: Choice = None,
        progress: perplexity.Progress = lambda done, total, so_far: None,
    ) -> perplexity.Perplexity:
        """How surprising a long text is, in windows: see `perplexity.perplexity`; base: another
        model, from which the divergence of this one is measured too."""
        return perplexity.perplexity(
            self, text, protocol=protocol, window=window, stride=stride, base=base,
            most_tokens=most_tokens, adapters=adapters, progress=progress,
        )  # fmt: skip

    def _writer(self) -> Writer:
        return Writer(self.engine, self.tokenizer, self._compiler, self.load_s)

    def _options(
        self,
        sampling: Sampling,
        max_new_tokens: int,
        stop: str | Sequence[str],
        stop_ids: Sequence[int],
        window: Window | None,
        constraint: AnyConstraint | None,
        top_logprobs: int,
        draft: LanguageModel | Literal["lookup"] | None,
    ) -> Options:
        if window is not None and not isinstance(window, Window):
            raise UsageError(f"window is {window!r:.60}, expected a bloomq.Window")
        if window is not None and isinstance(draft, LanguageModel):
            raise UsageError("a draft model together with a window: it would keep the whole text")
        if not is_whole(max_new_tokens) or max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens!r}, expected at least 1")
        if not is_whole(top_logprobs) or not 0 <= top_logprobs <= self.config.vocab_size:
            raise UsageError(
                f"top_logprobs is {top_logprobs!r}, expected 0 to {self.config.vocab_size}"
            )
        strings = stop_strings(stop)
        if strings and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer, which this pack has not")
        return Options(
            sampling=sampling, max_new_tokens=int(max_new_tokens), stop=strings,
            ends=self._ends(stop_ids), window=window,
            top_logprobs=int(top_logprobs), guessers=self._guessers(draft), constraint=constraint,
        )  # fmt: skip

    def _ends(self, more: Sequence[int]) -> tuple[int, ...]:
        """The tokens that end a text. Raises: UsageError."""
        most = self.config.vocab_size - 1
        ids: list[Any] = list(more) if isinstance(more, list | tuple | np.ndarray) else [None]
        if not all(is_whole(one) and 0 <= one <= most for one in ids):
            raise UsageError(f"stop_ids are {more!r:.80}, expected token ids from 0 to {most}")
        eos = self.config.eos_token_id
        return tuple(dict.fromkeys([*([] if eos is None else [eos]), *map(int, more)]))

    def _guessers(self, draft: LanguageModel | Literal["lookup"] | None) -> Guessers | None:
        """What makes a sequence's guesser. Raises: UsageError."""
        if draft is None:
            return None
        if isinstance(draft, str) and draft == "lookup":
            return lambda capacity: Lookup()
        if not isinstance(draft, LanguageModel):
            raise UsageError(f"draft is {draft!r:.80}, expected a model, 'lookup' or None")
        ours, theirs = self.config.vocab_size, draft.config.vocab_size
        if ours != theirs:
            raise UsageError(
                f"the draft model has {theirs} tokens, this one {ours}: use one of the same "
                "vocabulary"
            )
        return lambda capacity: DraftModel(draft.head, capacity)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """A prompt as token ids. Raises: UsageError, PackError for text without a tokenizer."""
        if not isinstance(prompt, str):
            if not is_ids(prompt):
                raise UsageError(f"prompt is {prompt!r:.80}, expected text or a list of token ids")
            ids = [int(token) for token in prompt]
            for token in ids:
                if not 0 <= token < self.config.vocab_size:
                    most = self.config.vocab_size - 1
                    raise UsageError(f"token id {token}, expected 0 to {most}")
            return ids
        if self.tokenizer is None:
            raise PackError(f"{self.pack.path}: has no tokenizer.json: pass token ids, not text")
        return self.tokenizer.encode(prompt)


def _sampling(
    base: Sampling | None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
) -> Sampling:
    """`base` with the fields that are given."""
    if base is not None and not isinstance(base, Sampling):
        raise UsageError(f"sampling is {base!r:.80}, expected a bloomq.Sampling")
    given = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(base or Sampling(), **changes)
