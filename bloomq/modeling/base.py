"""What the classes share, and the one without a head."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bloomq import placing
from bloomq.config import Architecture
from bloomq.errors import UsageError
from bloomq.forward import run
from bloomq.heads import Head
from bloomq.inputs import Inputs, KeyValues, check_inputs
from bloomq.layers import Backend
from bloomq.lora import Choices
from bloomq.opening import open_or_convert
from bloomq.outputs import BaseModelOutput, ModelOutput
from bloomq.pack import Pack
from bloomq.tracing import Trace

F32 = NDArray[np.float32]
Output = TypeVar("Output", bound=ModelOutput)


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
        devices: str = "auto",
        max_memory: str | None = None,
        save_pack: str | os.PathLike[str] | None = None,
    ) -> Self:
        """The model of a pack, or of a checkpoint's folder, which is quantized on the way in.

        scheme: of a checkpoint's matrices ("int8", "nl4", "nf4", ...); None: as they are stored.
        save_pack: where its pack is kept, and found the next time; None: nowhere.
        backend, threads, cache_dtype, devices, max_memory: see `bloomq.load`.

        Raises: UsageError, InputNotFound, PackError, BackendError, CapacityError where the devices
        have no room for the model, and those of `bloomq.convert`.
        """
        placing.check_options(devices, max_memory)
        pack = open_or_convert(path, scheme, None if save_pack is None else Path(save_pack))
        choice = placing.choose(
            backend, pack, threads, cache_dtype, devices=devices, max_memory=max_memory
        )
        return cls(pack, choice.backend)

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
            try:
                given = np.asarray(ids)
            except ValueError:
                raise UsageError("ids have rows of different lengths: pad them") from None
            whole = check_inputs(self.config, given.reshape(1, -1), None, None, None).ids
            assert whole is not None
            rows = self.head.model.wte(whole[0])
            return self.head.backend.numpy(rows).reshape(*given.shape, self.config.hidden_size)

        return embed

    def _run(
        self, inputs: Inputs, wanted: NDArray[np.bool_], use_cache: bool | None,
        output_attentions: bool | None, output_hidden_states: bool | None, adapters: Choices,
        first: int = 0,
    ) -> tuple[F32, dict[str, Any]]:  # fmt: skip
        """Results [B, T - first, columns], and the fields that every output has."""
        head, past = self.head, inputs.past
        if past is None:
            most = int(inputs.mask.sum(axis=1).max())
            past = KeyValues(head.cache(inputs.shape[0], most), head.cache_kind)
        past.check(head)
        head.choose(past.cache, adapters)
        trace = None
        if output_attentions or output_hidden_states:
            trace = Trace(bool(output_hidden_states), bool(output_attentions))
        out = run(head, inputs, past, wanted, first=first, trace=trace)
        kept = self.config.use_cache if use_cache is None else use_cache
        return out, {
            "past_key_values": past if kept or inputs.past is not None else None,
            "hidden_states": tuple(trace.hidden_states) if trace and trace.states else None,
            "attentions": tuple(trace.attention_weights) if trace and trace.attentions else None,
        }


def as_asked(output: Output, return_dict: bool | None) -> Any:
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
        return as_asked(BaseModelOutput(hidden, **rest), return_dict)

    forward = __call__
