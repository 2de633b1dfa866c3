"""`generate` as transformers has it: padded prompts in, padded sequences out.

Invariant: a row's tokens do not depend on its padding or on the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bloomq.checks import is_whole
from bloomq.config import BloomConfig
from bloomq.errors import UsageError
from bloomq.generation import Batch
from bloomq.heads import Head
from bloomq.inputs import check_inputs
from bloomq.lora import Choices
from bloomq.sampling import Sampling

I64 = NDArray[np.int64]


class Streamer(Protocol):
    """What `generate` tells of tokens as they come, as in transformers."""

    def put(self, value: I64) -> None: ...
    def end(self) -> None: ...


def generate(
    head: Head,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None,
    *,
    max_new_tokens: int | None,
    max_length: int | None,
    do_sample: bool,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float | None,
    num_return_sequences: int,
    num_beams: int,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    streamer: Streamer | None,
    seed: int | None,
    adapters: Choices,
) -> I64:
    """[B * num_return_sequences, T + new]: see `BloomForCausalLM.generate`, which documents it."""
    ends, pad = _end_ids(eos_token_id, head.config), _pad_id(pad_token_id, head.config)
    if num_beams != 1:
        raise UsageError(f"num_beams is {num_beams!r}, this version searches with 1 beam")
    _check_several(num_return_sequences, do_sample)
    ids, mask = _prompts(head.config, input_ids, attention_mask, None if pad in ends else pad)
    gates = head.adapters.gates(adapters, len(ids))
    ids = np.repeat(ids, num_return_sequences, axis=0)
    mask = np.repeat(mask, num_return_sequences, axis=0)
    new_tokens = _new_tokens(max_new_tokens, max_length, ids.shape[1])
    sampling = Sampling(
        temperature=1.0 if temperature is None else temperature, top_k=top_k or 0,
        top_p=1.0 if top_p is None else top_p,
        repetition_penalty=1.0 if repetition_penalty is None else repetition_penalty, seed=seed,
    )  # fmt: skip
    if not do_sample:  # checked all the same
        sampling = replace(sampling, temperature=0.0, top_k=0, top_p=1.0)
    batch = Batch(
        head, [row[real].tolist() for row, real in zip(ids, mask, strict=True)], sampling,
        max_new_tokens=new_tokens, context=ids.shape[1] + new_tokens,
        gates=np.repeat(gates, num_return_sequences, axis=0),
    )  # fmt: skip
    if streamer is not None:
        if len(ids) > 1:
            raise UsageError(f"a streamer takes one sequence, found {len(ids)}")
        streamer.put(ids)
    for token in batch.run():
        if token.id in ends:
            batch.stop(token.index)
        if streamer is not None:
            streamer.put(np.array([token.id]))
    if streamer is not None:
        streamer.end()
    filler = pad if pad is not None else next(iter(ends), 0)
    return _joined(ids, [row.ids for row in batch.sequences], filler)


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


def _check_several(num_return_sequences: int, do_sample: bool) -> None:
    if not isinstance(do_sample, bool):
        raise UsageError(f"do_sample is {do_sample!r}, expected True or False")
    most = num_return_sequences if do_sample else 1
    if not is_whole(num_return_sequences) or not 1 <= num_return_sequences <= most:
        raise UsageError(
            f"num_return_sequences is {num_return_sequences!r}, expected 1, or more with "
            "do_sample=True"
        )


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
