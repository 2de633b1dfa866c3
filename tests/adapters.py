"""Adapters for tests: as the real PEFT saves them, and as files written by hand.

`random_lora` gives PEFT's model too, which is the oracle; `written` needs no PEFT.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from conftest import Tensors, to_dtype, write_safetensors

TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(TARGETS)}


def random_lora(model: Any, folder: Path, *, seed: int = 0, r: int = 4, **options: Any) -> Any:
    """PEFT's model over a copy of transformers' `model`, with factors of which both are random;
    saved in `folder`. options: of `LoraConfig`."""
    import peft
    import torch

    options = {"target_modules": list(TARGETS), "lora_alpha": 8, **options}
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=r, **options))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.copy_(noise * 0.4 * parameter.shape[1] ** -0.5)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def stacked(first: Any, *folders: Path) -> Any:
    """PEFT's model with its own adapter and those in `folders`, all in use at once."""
    for i, folder in enumerate(folders):
        first.load_adapter(folder, f"other{i}")
    first.base_model.set_adapter(["default", *(f"other{i}" for i in range(len(folders)))])
    return first.eval()


def scaled(model: Any, scale: float) -> Any:
    """PEFT's model with its adapter times `scale`."""
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)
    return model


def written(
    folder: Path,
    *,
    hidden_size: int = 32,
    layers: int = 2,
    rank: int = 4,
    dtype: str = "F32",
    prefix: str = "base_model.model.transformer.",
    config: dict[str, Any] | None = None,
    edit: Callable[[Tensors], None] | None = None,
    seed: int = 0,
) -> Path:
    """A random adapter of every linear, in `folder`. config: more keys for adapter_config.json;
    edit: a last change to the tensors."""
    rng, c = np.random.default_rng(seed), hidden_size
    sizes = {
        "self_attention.query_key_value": (3 * c, c), "self_attention.dense": (c, c),
        "mlp.dense_h_to_4h": (4 * c, c), "mlp.dense_4h_to_h": (c, 4 * c),
    }  # fmt: skip
    tensors: Tensors = {}
    for layer in range(layers):
        for name, (n, k) in sizes.items():
            for factor, shape in (("A", (rank, k)), ("B", (n, rank))):
                values = 0.4 * rng.standard_normal(shape).astype(np.float32) / np.sqrt(shape[1])
                key = f"{prefix}h.{layer}.{name}.lora_{factor}.weight"
                tensors[key] = (dtype, to_dtype(values, dtype))
    if edit is not None:
        edit(tensors)
    folder.mkdir(parents=True)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    raw = {**CONFIG, "r": rank, **(config or {})}
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    return folder
