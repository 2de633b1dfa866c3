"""transformers' BLOOM beside bloomq: bitsandbytes int8 and nf4, and 16 bits, drawn on the device.

Built on the meta device and filled matrix by matrix, quantized by bitsandbytes where they lie. What
transformers would load from a checkpoint: linears of the blocks quantized, table and head in 16
bits. The loop is a forward pass and an argmax on the device, less than `generate` does. Random
weights have no outliers, so LLM.int8 with its threshold is faster here than on a real BLOOM.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from gpu_run import Run
from gpu_weights import DEVIATION, config_of

Kind = Literal["int8", "nf4", "bf16"]


@dataclass(frozen=True, slots=True)
class Setting:
    """A peer as it is run. threshold: LLM.int8's, of activations; sdpa: attention by torch's
    `scaled_dot_product_attention`, which transformers' BLOOM has not."""

    name: str
    kind: Kind
    threshold: float = 0.0
    sdpa: bool = False


INT8 = Setting("transformers bitsandbytes int8", "int8", threshold=6.0)  # as it comes
INT8_PLAIN = Setting("transformers bitsandbytes int8, threshold 0", "int8")
NF4 = Setting("transformers bitsandbytes nf4", "nf4")
BF16 = Setting("transformers bf16", "bf16")
BF16_SDPA = Setting("transformers bf16, SDPA", "bf16", sdpa=True)


class Transformers:
    """`Engine` over transformers' BloomForCausalLM."""

    is_peer = True

    def __init__(self, run: Run, setting: Setting, model: Any) -> None:
        self.name, self._setting, self._model, self._device = (
            setting.name,
            setting,
            model,
            run.device,
        )
        self._attention = [block.self_attention for block in model.transformer.h]
        self._int8 = [m for m in model.modules() if type(m).__name__ == "Linear8bitLt"]
        table = model.transformer.word_embeddings.weight
        self.bytes_per_token = (
            sum(
                _stored_bytes(parameter)
                for parameter in model.parameters()
                if parameter is not table
            )
            + table.nbytes
        )
        config = model.config
        self.token_bytes = 2 * config.n_layer * config.hidden_size * 2  # 16 bits
        self._cache: Any = None
        self._ids = torch.empty(0)

    @torch.inference_mode()
    def start(self, ids: np.ndarray[Any, Any]) -> None:
        for linear in self._int8:  # two engines may share one model
            linear.state.threshold = self._setting.threshold
        for attention in self._attention:
            attention.__dict__.pop("forward", None)
            if self._setting.sdpa:
                attention.forward = types.MethodType(sdpa_forward, attention)
        self._cache = None
        self._step(torch.tensor(ids, device=self._device))

    @torch.inference_mode()
    def decode(self, count: int) -> None:
        for _ in range(count):
            self._step(self._ids)

    def _step(self, ids: torch.Tensor) -> None:
        out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._ids = out.past_key_values, out.logits[:, -1:].argmax(dim=-1)


def sdpa_forward(
    self: Any, hidden_states: torch.Tensor, residual: torch.Tensor, alibi: torch.Tensor,
    attention_mask: torch.Tensor | None, layer_past: Any = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' BloomAttention.forward with its products and softmax as one call."""
    batch, length, _ = hidden_states.shape
    query, key, value = self._reshape(self.query_key_value(hidden_states))  # [B, H, T, D]
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    bias = alibi.view(batch, self.num_heads, 1, -1)  # [B, H, 1, S]
    if attention_mask is not None:
        bias = bias + attention_mask  # [B, H, T, S]
    elif length > 1:
        hidden = torch.ones(length, key.shape[2], dtype=torch.bool, device=bias.device)
        bias = bias.masked_fill(hidden.triu(key.shape[2] - length + 1), float("-inf"))
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias.to(query.dtype), scale=self.inv_norm_factor
    )
    mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
    return self.dense(mixed) + residual, None


def makers(run: Run, model: str, settings: tuple[Setting, ...]) -> dict[str, Callable[[], Any]]:
    """How to build each: settings of one kind share a model."""
    made: dict[Kind, Any] = {}

    def make(setting: Setting) -> Transformers:
        if setting.kind not in made:
            made[setting.kind] = random_model(run.device, model, setting)
        return Transformers(run, setting, made[setting.kind])

    return {setting.name: partial(make, setting) for setting in settings}


@torch.inference_mode()
def random_model(device: torch.device, model: str, setting: Setting) -> Any:
    """transformers' BLOOM of random weights. LLM.int8 computes in float16, the others in bf16."""
    from transformers import BloomConfig, BloomForCausalLM

    ours = config_of(model)
    dtype = torch.float16 if setting.kind == "int8" else torch.bfloat16
    config = BloomConfig(
        hidden_size=ours.hidden_size, n_layer=ours.n_layer, n_head=ours.n_head,
        vocab_size=ours.vocab_size, use_cache=True,
    )  # fmt: skip
    with torch.device("meta"):
        made: Any = BloomForCausalLM(config)
    made.to(dtype).eval()
    draw = torch.Generator(device).manual_seed(0)
    for name, module in list(made.named_modules()):
        if type(module) is torch.nn.Linear and "transformer.h." in name:
            parent, _, leaf = name.rpartition(".")
            weight = torch.empty(module.weight.shape, dtype=dtype, device=device)
            weight.normal_(0, DEVIATION, generator=draw)
            setattr(made.get_submodule(parent), leaf, _quantized(module, weight, setting))
    for module in made.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                fresh = torch.empty(parameter.shape, dtype=dtype, device=device)
                is_gain = isinstance(module, torch.nn.LayerNorm) and name == "weight"
                fresh.normal_(float(is_gain), DEVIATION, generator=draw)
                setattr(module, name, torch.nn.Parameter(fresh, requires_grad=False))
    made.lm_head.weight = made.transformer.word_embeddings.weight
    return made


def _quantized(linear: Any, weight: torch.Tensor, setting: Setting) -> Any:
    """The linear that transformers would put in its place, over `weight` [N, K]."""
    n, k = weight.shape
    if setting.kind == "bf16":
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        return linear
    import bitsandbytes as bnb

    with torch.device("meta"):
        if setting.kind == "int8":
            made = bnb.nn.Linear8bitLt(k, n, has_fp16_weights=False, threshold=setting.threshold)
        else:
            made = bnb.nn.Linear4bit(
                k, n, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4"
            )
    made.bias = linear.bias
    if setting.kind == "int8":
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight)
        made.weight = bnb.nn.Int8Params(
            codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales
        )
    else:
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, blocksize=64,
            compress_statistics=False, quant_type="nf4", bnb_quantized=True, module=made,
        )  # fmt: skip
        made.quant_state = state
    return made.eval()


def _stored_bytes(parameter: Any) -> int:
    """Of a parameter, bitsandbytes' scales included."""
    scales = getattr(parameter, "SCB", None)
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        scales = state.absmax
    return int(parameter.nbytes) + (0 if scales is None else int(scales.nbytes))
