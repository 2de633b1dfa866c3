"""A loaded model that takes text: prompts as text or ids in, text, pieces of it, or logits out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from bloomq.config import BloomConfig
from bloomq.errors import PackError, UsageError
from bloomq.generation import Batch, Clock, FinishReason, Generation, PrefillProgress
from bloomq.heads import Head
from bloomq.layers import Backend
from bloomq.lora import Choices
from bloomq.modeling import BloomForCausalLM
from bloomq.outputs import CausalLMOutput
from bloomq.sampling import Sampling
from bloomq.speculation import DraftModel, Guesser, Lookup
from bloomq.text import TextAssembler
from bloomq.tokenizer import BloomTokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Piece:
    """A token of a stream: its id, its logprob, and the text that it made certain ("" while a
    character or a possible stop string is incomplete)."""

    text: str
    id: int
    logprob: float


class Stream:
    """An iterator over the pieces of one generation. `generation` is what has been produced so far,
    also after an exception or Ctrl-C ended the loop."""

    def __init__(self, model: LanguageModel, prompt: Prompt, options: _Options) -> None:
        self._run = _Run(model, [prompt], options)
        self._pieces = self._run.pieces()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)[1]

    @property
    def generation(self) -> Generation:
        return self._run.result(0)


@dataclass(frozen=True, slots=True)
class _Options:
    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...]
    progress: PrefillProgress
    guessers: Callable[[int], Guesser] | None
    adapters: Choices


class _Run:
    """One call of generate: the batch, the text of each sequence, and why each ended."""

    def __init__(self, model: LanguageModel, prompts: Sequence[Prompt], options: _Options) -> None:
        self._model, self._options = model, options
        self._clock = Clock(len(prompts))
        self._prompts = [model.prompt_ids(prompt) for prompt in prompts]
        lm = model.head
        self._batch = Batch(
            lm, self._prompts, options.sampling,
            max_new_tokens=options.max_new_tokens, context=model.context,
            guessers=options.guessers, gates=lm.adapters.gates(options.adapters, len(prompts)),
        )  # fmt: skip
        tokenizer = model.tokenizer
        if tokenizer is None and options.stop:
            raise UsageError("stop strings need a tokenizer, which this pack has not")
        self._assemblers = [
            None if tokenizer is None else TextAssembler(tokenizer.stream(), options.stop)
            for _ in prompts
        ]
        self._texts = ["" for _ in prompts]
        self._reasons: list[FinishReason | None] = [None for _ in prompts]

    def pieces(self) -> Iterator[tuple[int, Piece]]:
        """(index of the sequence, piece) as they come."""
        eos = self._model.config.eos_token_id
        for token in self._batch.run(self._options.progress):
            self._clock.tick(token.index)
            index, assembler = token.index, self._assemblers[token.index]
            text = "" if assembler is None else assembler.push(token.id)
            if assembler is not None and assembler.stopped:
                self._reasons[index] = "stop"
            elif token.id == eos:
                self._reasons[index] = "eos"
            elif len(self._batch.sequences[index].ids) == self._options.max_new_tokens:
                self._reasons[index] = "length"
            if self._reasons[index] is not None:
                self._batch.stop(index)
                text += "" if assembler is None else assembler.finish()
            self._texts[index] += text
            yield index, Piece(text, token.id, token.logprob)

    def result(self, index: int) -> Generation:
        """What sequence `index` has produced; "interrupted" where it has not ended."""
        sequence, assembler = self._batch.sequences[index], self._assemblers[index]
        reason = self._reasons[index]
        text = self._texts[index]
        if reason is None and assembler is not None:
            text += assembler.held
        stats = self._clock.stats(index, sequence, self._model.load_s)
        return Generation(
            text, tuple(sequence.ids), tuple(sequence.logprobs),
            reason or "interrupted", stats,
        )  # fmt: skip


class LanguageModel:
    """A loaded BLOOM: call it for logits, `generate` or `stream` for text."""

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
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        draft: LanguageModel | Literal["lookup"] | None = None,
        adapters: Choices = None,
        progress: PrefillProgress = lambda done, total: None,
    ) -> Any:
        """Continue a prompt (text, or token ids): a Generation; or several at once: a list of them.

        Sampling options: see `Sampling`; stop: strings that end the text, and are not part of it;
        draft: who guesses tokens ahead, which changes the speed and nothing else: a smaller model
        of the same vocabulary, or "lookup" for what the text itself repeats; adapters: None for the
        base, the name of a loaded one, a mapping of names to scales, or a list with one of these
        for each prompt.
        Ctrl-C ends the call and returns what was produced, with finish_reason "interrupted".

        Raises: UsageError, CapacityError, NumericError.
        """
        sampling = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p,
            repetition_penalty=repetition_penalty, seed=seed,
        )  # fmt: skip
        options = _Options(
            sampling, max_new_tokens, _stop_strings(stop), progress, self._guessers(draft), adapters
        )
        single = isinstance(prompt, str) or _is_ids(prompt)
        prompts: Any = [prompt] if single else _several(prompt)
        run = _Run(self, prompts, options)
        try:
            for _ in run.pieces():
                pass
        except KeyboardInterrupt:
            pass  # what was produced is worth more than a traceback
        results = [run.result(index) for index in range(len(prompts))]
        return results[0] if single else results

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        draft: LanguageModel | Literal["lookup"] | None = None,
        adapters: Choices = None,
        progress: PrefillProgress = lambda done, total: None,
    ) -> Stream:
        """`generate` for one prompt, piece by piece."""
        sampling = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p,
            repetition_penalty=repetition_penalty, seed=seed,
        )  # fmt: skip
        options = _Options(
            sampling, max_new_tokens, _stop_strings(stop), progress, self._guessers(draft), adapters
        )
        return Stream(self, prompt, options)

    def _guessers(
        self, draft: LanguageModel | Literal["lookup"] | None
    ) -> Callable[[int], Guesser] | None:
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
            if not _is_ids(prompt):
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


def _is_ids(prompt: object) -> bool:
    """Is this one prompt of token ids: whole numbers in a list, tuple or one-dimensional array?"""
    if isinstance(prompt, np.ndarray):
        return prompt.ndim == 1 and prompt.dtype.kind in "iu"
    if not isinstance(prompt, list | tuple):
        return False
    return all(isinstance(t, int | np.integer) and not isinstance(t, bool) for t in prompt)


def _several(prompts: object) -> list[Any]:
    """Several prompts, as a list. Raises: UsageError for what is neither one nor several."""
    if isinstance(prompts, list | tuple | np.ndarray):
        return list(prompts)
    raise UsageError(f"prompt is {prompts!r:.80}, expected text, token ids, or a list of either")


def _stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(stop, str | list | tuple):
        raise UsageError(f"stop is {stop!r}, expected a string or a list of them")
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in strings):
        raise UsageError(f"stop is {stop!r}, expected strings of at least one character")
    return strings
