"""The classes of transformers' BLOOM page, over quantized weights.

Names, arguments and results are those of transformers 5; arrays are NumPy's. What differs is said
in docs/coming-from-transformers.md: masked positions give 0, and nothing is ever trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bloomq import backends
from bloomq.config import Architecture, BloomConfig
from bloomq.errors import UsageError
from bloomq.forward import Inputs, KeyValues, Trace, check_inputs, run
from bloomq.generation import Batch
from bloomq.heads import Head
from bloomq.layers import Backend
from bloomq.lora import Choices
from bloomq.losses import causal_lm_loss, sequence_loss, span_loss, token_loss
from bloomq.opening import open_or_convert
from bloomq.outputs import (
    BaseModelOutput,
    CausalLMOutput,
    ModelOutput,
    QuestionAnsweringOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from bloomq.pack import Pack
from bloomq.sampling import Sampling, is_whole

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Output = TypeVar("Output", bound=ModelOutput)


class Streamer(Protocol):
    """What `generate` tells of tokens as they come, as in transformers."""

    def put(self, value: I64) -> None: ...
    def end(self) -> None: ...


class BloomPreTrainedModel:
    """What every class has: a head on a backend, `from_pretrained`, and how calls are answered."""

    _architecture: Architecture | None = None

    def __init__(self, pack: Pack, backend: Backend) -> None:
        self.pack, self.config, self.backend = pack, pack.config, backend
        self.head = Head(pack, backend, self._architecture)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        scheme: str | None = None,
        backend: str = "auto",
        threads: int | None = None,
        cache_dtype: str = "auto",
        save_pack: str | os.PathLike[str] | None = None,
    ) -> Self:
        """The model of a pack, or of a checkpoint's folder, which is quantized on the way in.

        scheme: of a checkpoint's matrices ("int8", "int4", "nf4", ...); None: as they are stored.
        save_pack: where its pack is kept, and found the next time; None: nowhere.
        backend, threads, cache_dtype: see `bloomq.load`.

        Raises: UsageError, InputNotFound, PackError, BackendError, and those of `bloomq.convert`.
        """
        pack = open_or_convert(path, scheme, None if save_pack is None else Path(save_pack))
        return cls(pack, backends.choose(backend, pack, threads, cache_dtype).backend)

    def eval(self) -> Self:
        """This model: there is no dropout to switch off."""
        return self

    def num_parameters(self) -> int:
        return self.pack.parameters

    @property
    def adapters(self) -> dict[str, int]:
        """The rank of each adapter loaded, by its name."""
        return self.head.adapters.names

    def load_adapter(self, path: str | os.PathLike[str], name: str) -> None:
        """Load the LoRA adapter that PEFT saved in folder `path`, for calls to use by `name`.

        Calls that run go on with what they began with; `past_key_values` of before cannot be
        continued.

        Raises: InputNotFound, ConfigError, CheckpointError, UsageError for a name that is taken.
        """
        from bloomq.converters.peft import read_adapter

        adapter = read_adapter(path, self.config)
        self.head = self.head.adapted(self.head.adapters.added(name, adapter))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises: UsageError for a name that is not loaded."""
        self.head = self.head.adapted(self.head.adapters.removed(name))

    def get_input_embeddings(self) -> Callable[[ArrayLike], F32]:
        """ids of any shape -> their embeddings [..., C], as `inputs_embeds` takes them."""

        def embed(ids: ArrayLike) -> F32:
            whole = np.asarray(ids)
            if whole.dtype.kind not in "iu" or (
                whole.size and not 0 <= whole.min() <= whole.max() < self.config.vocab_size
            ):
                raise UsageError(
                    f"ids are {whole.dtype}, expected whole numbers from 0 to "
                    f"{self.config.vocab_size - 1}"
                )
            rows = self.head.model.wte(whole.reshape(-1).astype(np.int64))
            return self.head.backend.numpy(rows).reshape(*whole.shape, self.config.hidden_size)

        return embed

    def _run(
        self, inputs: Inputs, wanted: NDArray[np.bool_], use_cache: bool | None,
        output_attentions: bool | None, output_hidden_states: bool | None, adapters: Choices,
    ) -> tuple[F32, dict[str, Any]]:  # fmt: skip
        """Results [B, T, columns], and the fields that every output has."""
        head, past = self.head, inputs.past
        if past is None:
            most = int(inputs.mask.sum(axis=1).max())
            past = KeyValues(head.cache(inputs.shape[0], most), head.cache_kind)
        head.choose(past.cache, adapters)
        trace = None
        if output_attentions or output_hidden_states:
            trace = Trace(bool(output_hidden_states), bool(output_attentions))
        out = run(head, inputs, past, wanted, trace)
        kept = self.config.use_cache if use_cache is None else use_cache
        return out, {
            "past_key_values": past if kept or inputs.past is not None else None,
            "hidden_states": tuple(trace.hidden_states) if trace and trace.states else None,
            "attentions": tuple(trace.attention_weights) if trace and trace.attentions else None,
        }


def _answer(output: Output, return_dict: bool | None) -> Any:
    """The output; as a tuple where return_dict is False."""
    return output.to_tuple() if return_dict is False else output


class BloomModel(BloomPreTrainedModel):
    """BLOOM without a head: hidden states behind the last norm. Takes a pack of any head."""

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        past_key_values: KeyValues | None = None,
        attention_mask: ArrayLike | None = None,
        inputs_embeds: ArrayLike | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        adapters: Choices = None,
    ) -> Any:
        """A `BaseModelOutput`, or a tuple where return_dict is False.

        input_ids: whole numbers [B, T] (or [T]), or inputs_embeds: floats [B, T, C];
        attention_mask: [B, past + T], 0 for padding, on either side or in the middle;
        past_key_values: of an earlier call, to continue (and changed in place); adapters: what each
        row uses in this call: see `generate`.

        Raises: UsageError for wrong shapes, kinds, ids or adapters.
        """
        inputs = check_inputs(
            self.config, input_ids, inputs_embeds, attention_mask, past_key_values
        )
        hidden, rest = self._run(
            inputs, inputs.mask, use_cache, output_attentions, output_hidden_states, adapters
        )
        return _answer(BaseModelOutput(hidden, **rest), return_dict)

    forward = __call__


class BloomForCausalLM(BloomPreTrainedModel):
    """BLOOM with its language-model head."""

    _architecture = "BloomForCausalLM"

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        past_key_values: KeyValues | None = None,
        attention_mask: ArrayLike | None = None,
        inputs_embeds: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        *,
        adapters: Choices = None,
    ) -> Any:
        """A `CausalLMOutput`, or a tuple where return_dict is False.

        Inputs: see `BloomModel`. labels: [B, T], the ids themselves, -100 for what does not count;
        each is compared with the logits one position before. logits_to_keep: logits of the last so
        many positions alone; 0: of all.

        Raises: UsageError for wrong shapes, kinds, ids or labels.
        """
        inputs = check_inputs(
            self.config, input_ids, inputs_embeds, attention_mask, past_key_values
        )
        length = inputs.shape[1]
        if not is_whole(logits_to_keep) or not 0 <= logits_to_keep <= length:
            raise UsageError(f"logits_to_keep is {logits_to_keep!r}, expected 0 to {length}")
        logits_to_keep = int(logits_to_keep)  # NumPy's kinds without a sign wrap around
        if labels is not None and logits_to_keep:
            raise UsageError("labels need all logits: leave logits_to_keep at 0")
        wanted = np.zeros(inputs.shape, bool)
        wanted[:, -logits_to_keep:] = True  # -0: all of them
        logits, rest = self._run(
            inputs, wanted, use_cache, output_attentions, output_hidden_states, adapters
        )
        loss = None if labels is None else causal_lm_loss(logits, labels, inputs.mask)
        return _answer(CausalLMOutput(loss, logits[:, -logits_to_keep:], **rest), return_dict)

    forward = __call__

    def generate(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        num_return_sequences: int = 1,
        num_beams: int = 1,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        streamer: Streamer | None = None,
        seed: int | None = None,
        adapters: Choices = None,
    ) -> I64:
        """The prompts with what follows them, int64 [B * num_return_sequences, T + new], filled up
        with pad_token_id where a row ended before the longest. Without attention_mask it hides the
        padding of the prompts, unless that ends texts too.

        Names and defaults are transformers': 20 new tokens where neither max_new_tokens nor
        max_length (prompt and output) is given; greedy unless do_sample. seed: same seed, same
        tokens. adapters: None for the base, a name, a mapping of names to scales, or a list with
        one of these for each prompt. An argument that is not here is refused by Python, not
        ignored.

        Raises: UsageError, NumericError.
        """
        inputs = check_inputs(self.config, input_ids, None, attention_mask, None)
        ends = _end_ids(eos_token_id, self.config)
        pad = _pad_id(pad_token_id, self.config)
        mask = inputs.mask
        if attention_mask is None and pad is not None and pad not in ends:
            mask = np.asarray(inputs.ids != pad, bool)
        if inputs.ids is None or not mask.any(axis=1).all():
            raise UsageError("a prompt has no token that attention_mask leaves")
        if num_beams != 1:
            raise UsageError(f"num_beams is {num_beams!r}, this version searches with 1 beam")
        several = 1 if not do_sample else num_return_sequences
        if not is_whole(num_return_sequences) or not 1 <= num_return_sequences <= several:
            raise UsageError(
                f"num_return_sequences is {num_return_sequences!r}, expected 1, or more with "
                "do_sample=True"
            )
        new_tokens = _new_tokens(max_new_tokens, max_length, inputs.shape[1])
        sampling = Sampling(
            temperature=temperature if do_sample else 0.0, top_k=top_k if do_sample else 0,
            top_p=top_p if do_sample else 1.0, repetition_penalty=repetition_penalty, seed=seed,
        )  # fmt: skip
        prompts = np.repeat(inputs.ids, num_return_sequences, axis=0)
        masks = np.repeat(mask, num_return_sequences, axis=0)
        head = self.head
        gates = head.adapters.gates(adapters, len(inputs.ids))
        batch = Batch(
            head, [ids[mask].tolist() for ids, mask in zip(prompts, masks, strict=True)],
            sampling, max_new_tokens=new_tokens, context=inputs.shape[1] + new_tokens,
            gates=np.repeat(gates, num_return_sequences, axis=0),
        )  # fmt: skip
        if streamer is not None:
            if len(prompts) > 1:
                raise UsageError(f"a streamer takes one sequence, found {len(prompts)}")
            streamer.put(prompts)
        for token in batch.run():
            if token.id in ends:
                batch.stop(token.index)
            if streamer is not None:
                streamer.put(np.array([token.id]))
        if streamer is not None:
            streamer.end()
        filler = pad if pad is not None else next(iter(ends), 0)
        return _filled(prompts, [row.ids for row in batch.sequences], filler)


def _filled(prompts: I64, produced: list[list[int]], filler: int) -> I64:
    """Prompts and outputs as one array."""
    longest = max(len(ids) for ids in produced)
    tail = np.full((len(produced), longest), filler, np.int64)
    for row, ids in enumerate(produced):
        tail[row, : len(ids)] = ids
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
    if not all(is_whole(end) for end in ends):
        raise UsageError(f"eos_token_id is {eos_token_id!r}, expected a token id or a list of them")
    return tuple(int(end) for end in ends)


def _pad_id(pad_token_id: int | None, config: BloomConfig) -> int | None:
    if pad_token_id is None:
        return config.pad_token_id
    if not is_whole(pad_token_id):
        raise UsageError(f"pad_token_id is {pad_token_id!r}, expected a token id")
    return pad_token_id


class BloomForSequenceClassification(BloomPreTrainedModel):
    """BLOOM that sorts texts into classes, by the last token of each."""

    _architecture = "BloomForSequenceClassification"

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        past_key_values: KeyValues | None = None,
        attention_mask: ArrayLike | None = None,
        inputs_embeds: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        adapters: Choices = None,
    ) -> Any:
        """A `SequenceClassifierOutput`, or a tuple where return_dict is False.

        Inputs: see `BloomModel`. A row's class is read off its last token that is attended to and
        is not padding. labels: [B] class ids; [B] or [B, K] numbers for regression and several
        labels (see `bloomq.losses.sequence_loss`).

        Raises: UsageError; also for several rows with neither pad_token_id nor attention_mask.
        """
        inputs = check_inputs(
            self.config, input_ids, inputs_embeds, attention_mask, past_key_values
        )
        pooled = _last_tokens(inputs, self.config.pad_token_id, attention_mask is not None)
        wanted = np.zeros(inputs.shape, bool)
        rows = np.arange(len(pooled))
        wanted[rows, pooled] = True
        out, rest = self._run(
            inputs, wanted, use_cache, output_attentions, output_hidden_states, adapters
        )
        logits = out[rows, pooled]
        loss = None if labels is None else sequence_loss(logits, labels, self.config)
        return _answer(SequenceClassifierOutput(loss, logits, **rest), return_dict)

    forward = __call__


def _last_tokens(inputs: Inputs, pad_token_id: int | None, masked: bool) -> I64:
    """The column of each row's last token that is real and not padding; of a row of padding alone
    its first real one. As transformers, with embeddings the last real one."""
    batch, length = inputs.shape
    real = inputs.mask
    if not real.any(axis=1).all():
        raise UsageError("attention_mask hides a whole row: nothing to classify")
    if inputs.ids is not None and pad_token_id is not None:
        text = real & (inputs.ids != pad_token_id)
        first = real & (np.cumsum(real, axis=1) == 1)
        real = text | (first & ~text.any(axis=1, keepdims=True))
    elif inputs.ids is not None and not masked and batch > 1:
        raise UsageError(
            f"{batch} rows, and the model has no pad_token_id to find their ends by: pass "
            "attention_mask"
        )
    return np.asarray(length - 1 - real[:, ::-1].argmax(axis=1), np.int64)


class BloomForTokenClassification(BloomPreTrainedModel):
    """BLOOM that sorts each token into classes."""

    _architecture = "BloomForTokenClassification"

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        past_key_values: KeyValues | None = None,
        attention_mask: ArrayLike | None = None,
        inputs_embeds: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        adapters: Choices = None,
    ) -> Any:
        """A `TokenClassifierOutput`, or a tuple where return_dict is False.

        Inputs: see `BloomModel`. labels: [B, T] class ids, -100 for what does not count.

        Raises: UsageError for wrong shapes, kinds, ids or labels.
        """
        inputs = check_inputs(
            self.config, input_ids, inputs_embeds, attention_mask, past_key_values
        )
        logits, rest = self._run(
            inputs, inputs.mask, use_cache, output_attentions, output_hidden_states, adapters
        )
        del rest["past_key_values"]  # no field of this output, as in transformers
        loss = None if labels is None else token_loss(logits, labels, inputs.mask)
        return _answer(TokenClassifierOutput(loss, logits, **rest), return_dict)

    forward = __call__


class BloomForQuestionAnswering(BloomPreTrainedModel):
    """BLOOM that finds where in a text an answer starts and ends."""

    _architecture = "BloomForQuestionAnswering"

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        inputs_embeds: ArrayLike | None = None,
        start_positions: ArrayLike | None = None,
        end_positions: ArrayLike | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        adapters: Choices = None,
    ) -> Any:
        """A `QuestionAnsweringOutput`, or a tuple where return_dict is False.

        Inputs: see `BloomModel`. start_positions, end_positions: [B] columns of the answer; one
        from T on (cut off) does not count.

        Raises: UsageError for wrong shapes, kinds, ids or positions.
        """
        inputs = check_inputs(self.config, input_ids, inputs_embeds, attention_mask, None)
        out, rest = self._run(
            inputs, inputs.mask, False, output_attentions, output_hidden_states, adapters
        )
        del rest["past_key_values"]
        starts, ends = out[:, :, 0], out[:, :, 1]
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = span_loss(starts, ends, start_positions, end_positions, inputs.mask)
        return _answer(QuestionAnsweringOutput(loss, starts, ends, **rest), return_dict)

    forward = __call__
