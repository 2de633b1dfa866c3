"""Where in a text an answer starts and ends."""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike

from bloomq.inputs import check_inputs
from bloomq.lora import Choices
from bloomq.losses import span_loss
from bloomq.modeling.base import BloomPreTrainedModel, as_asked
from bloomq.outputs import QuestionAnsweringOutput


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
        return as_asked(QuestionAnsweringOutput(loss, starts, ends, **rest), return_dict)

    forward = __call__
