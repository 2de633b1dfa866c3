"""`generate` as transformers has it: padded prompts in, padded sequences out.

Invariant: a row's tokens do not depend on its padding or on the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bloomq.checks import is_whole
from bloomq.config import BloomConfig
from bloomq.errors import UsageError
from bloomq.generation import Engine, Reader, Request, read
from bloomq.heads import Head
from bloomq.inputs import check_inputs
from bloomq.lora import Choices
from bloomq.sampling import Sampler, Sampling
from bloomq.search import AnySearch, BeamOptions, ContrastOptions, searcher_of

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


class Streamer(Protocol):
    """What `generate` tells of tokens as they come, as in transformers."""

    def put(self, value: I64) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """transformers' arguments of `generate`, as they were given; None switches one off."""

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float | None = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    min_p: float | None = None
    typical_p: float | None = 1.0
    repetition_penalty: float | None = 1.0
    no_repeat_ngram_size: int | None = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    num_return_sequences: int = 1
    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    penalty_alpha: float | None = None
    seed: int | None = None

    def sampling(self) -> Sampling:
        """Raises: UsageError, for what is not used too."""
        drawn = Sampling(
            temperature=_or(self.temperature, 1.0), top_k=_or(self.top_k, 0),
            top_p=_or(self.top_p, 1.0), min_p=_or(self.min_p, 0.0),
            typical_p=_or(self.typical_p, 1.0), seed=self.seed,
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            no_repeat_ngram_size=_or(self.no_repeat_ngram_size, 0),
            bad_words=_or(self.bad_words_ids, ()), min_new_tokens=_or(self.min_new_tokens, 0),
        )  # fmt: skip
        if not isinstance(self.do_sample, bool):
            raise UsageError(f"do_sample is {self.do_sample!r}, expected True or False")
        if self.do_sample:
            return drawn
        return replace(drawn, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0)

    def search(self) -> AnySearch | None:
        """What searches; None: each token is drawn, or the likeliest."""
        beams = BeamOptions(
            num_beams=self.num_beams, num_beam_groups=self.num_beam_groups,
            diversity_penalty=self.diversity_penalty, length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            num_return_sequences=1 if self.num_beams == 1 else self.num_return_sequences,
        )  # fmt: skip
        if self.penalty_alpha is None:
            return None if self.num_beams == 1 else beams
        if self.num_beams != 1:
            raise UsageError(f"penalty_alpha with {self.num_beams} beams, expected one of them")
        return ContrastOptions(penalty_alpha=self.penalty_alpha, top_k=_or(self.top_k, 0))


def _or(value: Any, usual: Any) -> Any:
    return usual if value is None else value


def generate(
    head: Head,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None,
    asked: Asked,
    *,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    streamer: Streamer | None,
    adapters: Choices,
) -> I64:
    """[B * num_return_sequences, T + new]: see `BloomForCausalLM.generate`, which documents it."""
    ends, pad = _end_ids(eos_token_id, head.config), _pad_id(pad_token_id, head.config)
    sampling, search = asked.sampling(), asked.search()
    count = _check_several(asked, search)
    ids, mask = _prompts(head.config, input_ids, attention_mask, None if pad in ends else pad)
    new_tokens = _new_tokens(asked.max_new_tokens, asked.max_length, ids.shape[1])
    if streamer is not None and len(ids) * count > 1:
        raise UsageError(f"a streamer takes one sequence, found {len(ids) * count}")
    if streamer is not None and search is not None:
        raise UsageError("a streamer together with a search, expected one of them")
    prompts = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    gates = head.adapters.gates(adapters, len(ids))
    context = ids.shape[1] + new_tokens
    ids = np.repeat(ids, count, axis=0)
    if search is None:
        if streamer is not None:
            streamer.put(ids)
        found = _drawn(head, prompts, count, sampling, ends, new_tokens, context, gates, streamer)
    else:
        searcher = searcher_of(
            head, prompts, search, max_new_tokens=new_tokens, context=context, ends=ends,
            sampling=sampling, stopped=lambda ids: False, gates=gates,
        )  # fmt: skip
        for _ in searcher.run():
            pass
        found = [list(one.ids) for texts in searcher.results() for one in texts]
        if len(found) < len(ids):
            raise UsageError(
                f"the search found {len(found)} texts, expected {len(ids)}: processors and this "
                "vocabulary leave no more, ask for fewer"
            )
    return _joined(ids, found, pad if pad is not None else next(iter(ends), 0))


def _drawn(
    head: Head, prompts: list[list[int]], count: int, sampling: Sampling, ends: tuple[int, ...],
    new_tokens: int, context: int, gates: F32, streamer: Streamer | None,
) -> list[list[int]]:  # fmt: skip
    """`count` texts behind each prompt."""
    engine = Engine(head, context=context)
    readers = []
    for index in range(count * len(prompts)):
        prompt = prompts[index // count]
        sampler = Sampler(sampling, prompt, index, head.config.vocab_size, ends)
        request = Request(
            prompt=tuple(prompt), max_new_tokens=new_tokens, sampler=sampler, ends=ends,
            gates=gates[index // count],
        )  # fmt: skip
        readers.append(Reader(engine.sequence(request), None, ()))
    for _, piece in read(engine, readers):
        if streamer is not None:
            streamer.put(np.array([piece.id]))
    if streamer is not None:
        streamer.end()
    return [list(reader.result(0.0).ids) for reader in readers]


def _prompts(
    config: BloomConfig, input_ids: ArrayLike, attention_mask: ArrayLike | None, pad: int | None
) -> tuple[I64, NDArray[np.bool_]]:
    """Ids [B, T], and which of them are real: where no mask says so, those that are not `pad`."""
    inputs = check_inputs(config, input_ids, None, attention_mask, None)
    assert inputs.ids is not None
    mask = inputs.mask
    if attention_mask is None and pad is not None:
        mask = np.asarray(inputs.ids != pad, bool)
    if not mask.any(axis=1).all():
        raise UsageError("a prompt has no token that attention_mask leaves")
    return inputs.ids, mask


def _check_several(asked: Asked, search: AnySearch | None) -> int:
    """How many texts each prompt gets."""
    count: Any = asked.num_return_sequences
    many = asked.do_sample or isinstance(search, BeamOptions)
    if not is_whole(count) or not 1 <= count <= (count if many else 1):
        raise UsageError(
            f"num_return_sequences is {count!r}, expected 1, or more with do_sample=True or beams"
        )
    return int(count)


def _joined(prompts: I64, produced: list[list[int]], filler: int) -> I64:
    """Prompts and outputs as one array."""
    tail = np.full((len(produced), max(map(len, produced))), filler, np.int64)
    for row, ids in zip(tail, produced, strict=True):
        row[: len(ids)] = ids
    return np.concatenate([prompts, tail], axis=1)


def _new_tokens(max_new_tokens: int | None, max_length: int | None, length: int) -> int:
    for name, given in (("max_new_tokens", max_new_tokens), ("max_length", max_length)):
        if given is not None and (not is_whole(given) or given < 1):
            raise UsageError(f"{name} is {given!r}, expected a whole number from 1")
    if max_new_tokens is not None:
        return int(max_new_tokens)
    if max_length is None:
        return 20
    if max_length <= length:
        raise UsageError(
            f"max_length is {max_length}, the prompts have {length} already: raise it, or pass "
            "max_new_tokens"
        )
    return int(max_length) - length


def _end_ids(eos_token_id: int | Sequence[int] | None, config: BloomConfig) -> tuple[int, ...]:
    if eos_token_id is None:
        return () if config.eos_token_id is None else (config.eos_token_id,)
    ends: Any = eos_token_id if isinstance(eos_token_id, list | tuple) else (eos_token_id,)
    if not all(is_whole(end) and 0 <= end < config.vocab_size for end in ends):
        raise UsageError(f"eos_token_id is {eos_token_id!r}, expected a token id or a list of them")
    return tuple(int(end) for end in ends)


def _pad_id(pad_token_id: int | None, config: BloomConfig) -> int | None:
    if pad_token_id is None:
        return config.pad_token_id
    if not is_whole(pad_token_id) or not 0 <= pad_token_id < config.vocab_size:
        raise UsageError(f"pad_token_id is {pad_token_id!r}, expected a token id")
    return pad_token_id
