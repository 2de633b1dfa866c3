"""The Flax classes of transformers' BLOOM page, which transformers has dropped, over packs.

Names, arguments and results are those documented there; arrays are jax's, and `apply` is a pure
function of the parameters: to be jitted, differentiated, mapped over and sharded. JAX is imported
when a model is made.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from bloomq import backends
from bloomq.checks import is_whole
from bloomq.config import Architecture
from bloomq.errors import BackendError, UsageError
from bloomq.heads import Head
from bloomq.modeling.generate import Asked, generate
from bloomq.opening import open_or_convert
from bloomq.outputs import BaseModelOutput, CausalLMOutput, ModelOutput
from bloomq.pack import Pack

if TYPE_CHECKING:
    import jax

    from bloomq.backends.jax.dense import Past
    from bloomq.backends.jax.params import Params

X = Any  # what jax takes for an array: its own, a tracer, NumPy's, lists


class FlaxBloomPreTrainedModel:
    """What both classes have: `params`, `apply` and the call."""

    _architecture: Architecture | None = None

    def __init__(self, pack: Pack) -> None:
        """Raises: BackendError where there is no JAX, UsageError for a pack of another head."""
        problem = backends.why_not("jax")
        if problem is not None:
            raise BackendError(f"the Flax classes run on JAX: {problem}")
        import jax

        from bloomq.backends.jax.params import read_params

        self.config, self._schemes = pack.config, pack.schemes
        self._params = read_params(pack)
        self._head = self._built(self._params)
        flags = ("output_attentions", "output_hidden_states")
        self._compiled = jax.jit(self._forward, static_argnames=flags)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        scheme: str | None = None,
        dtype: Any = np.float32,
        save_pack: str | os.PathLike[str] | None = None,
    ) -> Self:
        """The model of a pack, or of a checkpoint's folder, which is quantized on the way in.

        scheme: of a checkpoint's matrices ("int8", "nl4", "nf4", ...); None: as they are stored.
        dtype: of the computation; float32 alone. save_pack: where a checkpoint's pack is kept, and
        found the next time; None: nowhere.

        Raises: UsageError, InputNotFound, PackError, BackendError, and those of `bloomq.convert`.
        """
        if getattr(dtype, "__name__", str(dtype)) != "float32":
            raise UsageError(
                f"dtype is {dtype!r:.60}, these classes compute in float32: a scheme makes the "
                "weights small"
            )
        return cls(open_or_convert(path, scheme, None if save_pack is None else Path(save_pack)))

    @property
    def params(self) -> dict[str, dict[str, jax.Array]]:
        """{weight: {part: array}}, as the pack stores them: see docs/format.md."""
        return self._params

    def init_cache(self, batch_size: int, max_length: int) -> Past:
        """An empty `past_key_values` for `max_length` columns.

        Raises: UsageError; CapacityError where there is no such memory.
        """
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if not is_whole(value) or value < 1:
                raise UsageError(f"init_cache's {name} is {value!r:.60}, expected 1 or more")
        from bloomq.backends.jax.dense import Past

        return Past.empty(self.config, int(batch_size), int(max_length))

    def __call__(
        self,
        input_ids: X = None,
        attention_mask: X = None,
        past_key_values: Past | None = None,
        params: Params | None = None,
        dropout_rng: X = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: X = None,
    ) -> Any:
        """`apply`, compiled once for each shape, with ids and mask checked; a tuple where
        return_dict is False. params: others than the model's own, of the same form.

        Raises: UsageError; CapacityError where past_key_values is full.
        """
        if train or dropout_rng is not None:
            raise UsageError(
                "train and dropout_rng ask for dropout: quantized weights do not train"
            )
        from bloomq.backends.jax import inputs
        from bloomq.backends.jax.params import checked_params

        own = params is None
        weights = self._params if own else checked_params(self.config, self._schemes, params)
        inputs.check_past(self.config, past_key_values)
        ids = inputs.as_array("input_ids", input_ids)
        embeds = inputs.as_array("inputs_embeds", inputs_embeds)
        mask = inputs.checked_mask(attention_mask)
        inputs.check_room(ids if embeds is None else embeds, mask, past_key_values)
        tokens, mask = inputs.batch_of(self.config, ids, embeds, mask, past_key_values)
        inputs.check_ids(ids, mask, self.config.vocab_size)
        output = self._compiled(
            weights, tokens, mask, past_key_values,
            output_attentions=bool(output_attentions),
            output_hidden_states=bool(output_hidden_states),
        )  # fmt: skip
        return output.to_tuple() if return_dict is False else output

    def apply(
        self,
        params: Params,
        input_ids: X = None,
        attention_mask: X = None,
        past_key_values: Past | None = None,
        *,
        inputs_embeds: X = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> Any:
        """The outputs (`bloomq.outputs`), as a pure function of arrays; the flags are static.

        input_ids: whole numbers [B, T], or inputs_embeds: floats [B, T, C]; attention_mask: [B, T],
        0 for padding on either side or in the middle; behind past_key_values also of all columns,
        [B, past + T] or [B, max_length]. Traced values are not checked: an id outside the
        vocabulary counts as another one, columns beyond max_length overwrite the last.

        Raises: UsageError for wrong shapes or types.
        """
        from bloomq.backends.jax.inputs import batch_of

        tokens, mask = batch_of(
            self.config, input_ids, inputs_embeds, attention_mask, past_key_values
        )
        return self._forward(
            params, tokens, mask, past_key_values, output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )  # fmt: skip

    def _forward(
        self, params: Params, tokens: jax.Array, mask: jax.Array, past: Past | None, *,
        output_attentions: bool, output_hidden_states: bool,
    ) -> Any:  # fmt: skip
        """tokens: ids [B, T] or embeddings [B, T, C]; mask: bool [B, T]."""
        import jax.numpy as jnp

        from bloomq.backends.jax.dense import Columns

        head = self._built(params)
        columns: Any = Columns(mask, past)  # in place of a cache
        nothing: Any = None  # in place of a span
        real = mask.reshape(-1, 1)  # [B * T, 1]
        embed: Any = head.model.wte
        embeds = embed(tokens.reshape(-1)) if tokens.ndim == 2 else tokens
        # A masked token is 0, so that whatever it was, NaN too, reaches nothing.
        x = jnp.where(real, embeds.reshape(len(real), -1), 0)
        x = head.model.emb_ln(x)
        states = []
        for block in head.model.blocks:
            states.append(x)
            x = block(x, columns, nothing)

        def shown(y: jax.Array) -> jax.Array:
            """[B * T, N] -> [B, T, N], 0 where masked."""
            return jnp.where(real, y, 0).reshape(*mask.shape, -1)

        states = [shown(y) for y in (*states, head.ln_f(x))] if output_hidden_states else []
        return self._output(
            shown(head.read(x)), columns.past, tuple(states) or None,
            tuple(columns.attentions) if output_attentions else None,
        )  # fmt: skip

    def _built(self, params: Params) -> Head:
        from bloomq.backends.jax.layers import JaxBackend
        from bloomq.backends.jax.params import ParamWeights

        weights = ParamWeights(self.config, self._schemes, params)
        return Head(weights, JaxBackend(), self._architecture)

    def _output(
        self, result: jax.Array, past: Past | None, states: Any, attentions: Any
    ) -> ModelOutput:
        return BaseModelOutput(result, past, states, attentions)


class FlaxBloomModel(FlaxBloomPreTrainedModel):
    """BLOOM without a head: hidden states behind the last norm. Takes a pack of any head."""


@dataclass(frozen=True, slots=True, eq=False)
class FlaxGenerateOutput(ModelOutput):
    """sequences: int32 [B, T + new], prompts and what follows them."""

    sequences: Any


class FlaxBloomForCausalLM(FlaxBloomPreTrainedModel):
    """BLOOM with its language-model head."""

    _architecture = "BloomForCausalLM"

    def _output(
        self, result: jax.Array, past: Past | None, states: Any, attentions: Any
    ) -> ModelOutput:
        return CausalLMOutput(None, result, past, states, attentions)

    def generate(
        self,
        input_ids: X,
        attention_mask: X = None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        prng_key: X = None,
        params: Params | None = None,
    ) -> FlaxGenerateOutput:
        """The prompts with what follows them: see `BloomForCausalLM.generate`.

        prng_key: of `jax.random`; the same key, the same tokens; None: the
        key of 0. params: others than the model's own, for which layers are built anew.

        Raises: UsageError, NumericError.
        """
        import jax.numpy as jnp

        from bloomq.backends.jax.inputs import seed_of

        asked = Asked(
            max_new_tokens=max_new_tokens, max_length=max_length, do_sample=do_sample,
            temperature=temperature, top_k=top_k, top_p=top_p,
            repetition_penalty=repetition_penalty, num_beams=num_beams,
            length_penalty=length_penalty, early_stopping=early_stopping, seed=seed_of(prng_key),
        )  # fmt: skip
        sequences = generate(
            self._head if params is None else self._built(params), input_ids, attention_mask,
            asked, eos_token_id=eos_token_id, pad_token_id=pad_token_id, streamer=None,
            adapters=None,
        )  # fmt: skip
        return FlaxGenerateOutput(jnp.asarray(sequences, jnp.int32))
