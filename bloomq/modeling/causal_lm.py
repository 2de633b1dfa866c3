"""The language model: logits, loss and text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bloomq.checks import is_whole
from bloomq.errors import UsageError
from bloomq.inputs import KeyValues, check_inputs
from bloomq.lora import Choices
from bloomq.losses import causal_lm_loss
from bloomq.modeling.base import BloomPreTrainedModel, as_asked
from bloomq.modeling.generate import Asked, Streamer, generate
from bloomq.outputs import CausalLMOutput

I64 = NDArray[np.int64]


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
        first = length - logits_to_keep if logits_to_keep else 0
        wanted = np.broadcast_to(np.arange(length) >= first, inputs.shape)
        logits, rest = self._run(
            inputs, wanted, use_cache, output_attentions, output_hidden_states, adapters, first
        )
        loss = None if labels is None else causal_lm_loss(logits, labels, inputs.mask)
        return as_asked(CausalLMOutput(loss, logits, **rest), return_dict)

    forward = __call__

    def generate(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        min_new_tokens: int | None = None,
        do_sample: bool = False,
        temperature: float | None = 1.0,
        top_k: int | None = 50,
        top_p: float | None = 1.0,
        min_p: float | None = None,
        typical_p: float | None = 1.0,
        repetition_penalty: float | None = 1.0,
        no_repeat_ngram_size: int | None = 0,
        bad_words_ids: Sequence[Sequence[int]] | None = None,
        num_return_sequences: int = 1,
        num_beams: int = 1,
        num_beam_groups: int = 1,
        diversity_penalty: float = 0.0,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        penalty_alpha: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        streamer: Streamer | None = None,
        seed: int | None = None,
        use_cache: bool | None = None,
        adapters: Choices = None,
    ) -> I64:
        """The prompts with what follows them, int64 [B * num_return_sequences, T + new], filled up
        with pad_token_id where a row ended before the longest. Without attention_mask it hides the
        padding of the prompts, unless that ends texts too.

        Names and defaults are transformers': 20 new tokens where neither max_new_tokens nor
        max_length (prompt and output) is given; greedy unless do_sample; None switches a sampling
        option off. num_beams above 1 searches, as penalty_alpha does (contrastive search, among the
        top_k likeliest): see `BeamOptions` and `ContrastOptions`. seed: same seed, same tokens.
        use_cache is taken for transformers' sake: nothing depends on it. adapters: None for the
        base, a name, a mapping of names to scales, or a list with one of these for each prompt. An
        argument that is not here is refused by Python, not ignored.

        Raises: UsageError, NumericError.
        """
        asked = Asked(
            max_new_tokens=max_new_tokens, max_length=max_length, min_new_tokens=min_new_tokens,
            do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            typical_p=typical_p, repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size, bad_words_ids=bad_words_ids,
            num_return_sequences=num_return_sequences, num_beams=num_beams,
            num_beam_groups=num_beam_groups, diversity_penalty=diversity_penalty,
            length_penalty=length_penalty, early_stopping=early_stopping,
            penalty_alpha=penalty_alpha, seed=seed,
        )  # fmt: skip
        return generate(
            self.head, input_ids, attention_mask, asked, eos_token_id=eos_token_id,
            pad_token_id=pad_token_id, streamer=streamer, adapters=adapters,
        )  # fmt: skip
