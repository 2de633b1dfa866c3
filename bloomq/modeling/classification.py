"""Classes of whole texts, and of each token."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bloomq.errors import UsageError
from bloomq.inputs import Inputs, KeyValues, check_inputs
from bloomq.lora import Choices
from bloomq.losses import sequence_loss, token_loss
from bloomq.modeling.base import BloomPreTrainedModel, as_asked
from bloomq.outputs import SequenceClassifierOutput, TokenClassifierOutput

I64 = NDArray[np.int64]


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
        return as_asked(SequenceClassifierOutput(loss, logits, **rest), return_dict)

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
        return as_asked(TokenClassifierOutput(loss, logits, **rest), return_dict)

    forward = __call__
