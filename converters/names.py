"""Every foreign name of a BLOOM tensor, in one table."""

from __future__ import annotations

import re

from bloomq.config import BloomConfig, weight_specs

# Ours -> Hugging Face's, without the `transformer.` prefix that some checkpoints have.
_HUGGINGFACE = {
    "wte": "word_embeddings",
    "emb_ln": "word_embeddings_layernorm",
    "ln_1": "input_layernorm",
    "attn.qkv": "self_attention.query_key_value",
    "attn.out": "self_attention.dense",
    "ln_2": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
    "ln_f": "ln_f",
    "lm_head": "lm_head",
    "score": "score",
    "classifier": "classifier",
    "qa_outputs": "qa_outputs",
}
_LAYER = re.compile(r"(h\.\d+)\.(.+)")
PREFIX = "transformer."


def huggingface_name(name: str) -> str:
    """`h.3.attn.qkv.bias` -> `h.3.self_attention.query_key_value.bias`."""
    stem, _, leaf = name.rpartition(".")
    layer = _LAYER.fullmatch(stem)
    if layer:
        return f"{layer[1]}.{_HUGGINGFACE[layer[2]]}.{leaf}"
    return f"{_HUGGINGFACE[stem]}.{leaf}"


def expected_tensors(config: BloomConfig) -> dict[str, tuple[int, ...]]:
    """Our name -> shape of every tensor of a checkpoint: `NAME.weight` and, where there is one,
    `NAME.bias`."""
    tensors: dict[str, tuple[int, ...]] = {}
    for spec in weight_specs(config):
        tensors[f"{spec.name}.weight"] = spec.shape
        if spec.has_bias:
            tensors[f"{spec.name}.bias"] = spec.shape[:1]
    return tensors
