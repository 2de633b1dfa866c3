"""Reads LoRA adapters as PEFT saves them: a folder with adapter_config.json and
adapter_model.safetensors or, in its absence, adapter_model.bin.

Nothing is unpickled, and nothing that changes the computation is ignored: what an adapter asks for
beyond plain LoRA on a block's four linears is refused by name.

Source: PEFT's LoraConfig and LoraLayer.update_layer; rank-stabilised scaling: arXiv 2312.03732.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.config import BloomConfig, WeightSpec, read_json, weight_specs
from bloomq.errors import CheckpointError, ConfigError, InputNotFound
from bloomq.files import exists, shown
from bloomq.lora import Adapter, Factors
from bloomq.schemes import bf16_to_f32

from .names import PREFIX, huggingface_name
from .safetensors_files import safetensors_tensors
from .source import SourceTensor
from .torch_file import torch_tensors

F32 = NDArray[np.float32]
CONFIG = "adapter_config.json"
_TENSORS, _BIN = "adapter_model.safetensors", "adapter_model.bin"
_PEFT_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(A|B)\.weight")
_READABLE = ("F32", "F16", "BF16")
_MOST_RANK = 1 << 12  # each rank takes memory in every linear that any adapter touches
# float16's largest. Whatever the input, products of such factors stay finite, and a gate of 0 can
# keep them from the rows that do not use the adapter; no trained weight comes near.
_LARGEST = 65504.0
# What must be absent, false or empty: each changes the computation, or adds weights of other kinds.
_UNSUPPORTED = (
    "fan_in_fan_out", "use_dora", "lora_bias", "modules_to_save", "layer_replication",
    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip
# Initialisations that leave the base as it is; the others took something off its weights.
_KEEP_BASE = ("gaussian", "eva", "orthogonal", "mica")
_MERGE = "merge it into its checkpoint with PEFT, and convert that"
# A key of rank_pattern is a regular expression from a file, tried on every linear's name: these
# bounds keep it from backtracking for ever. Groups of alternatives multiply: 10^4 ways take 1 ms.
_MOST_REPEATS, _MOST_WAYS = 3, 10_000


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What adapter_config.json says of ranks and scales. The patterns: values by expressions that
    the end of a module's name matches, the first that does."""

    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    stabilised: bool

    @classmethod
    def from_dict(cls, raw: Any, source: str) -> LoraConfig:
        """Raises: ConfigError, naming `source`, for what is no LoRA or not supported."""
        if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
            found = raw.get("peft_type") if isinstance(raw, dict) else None
            raise ConfigError(f"{source}: peft_type is {found!r:.80}, expected 'LORA'")
        _refuse_unsupported(raw, source)
        r, alpha = raw.get("r", 8), raw.get("lora_alpha", 8)  # PEFT's defaults
        ranks, alphas = (_pattern(raw, f"{kind}_pattern", source) for kind in ("rank", "alpha"))
        for rank in (r, *ranks.values()):
            if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= _MOST_RANK:
                raise ConfigError(f"{source}: a rank of {rank!r:.80}, expected 1 to {_MOST_RANK}")
        for value in (alpha, *alphas.values()):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not abs(value) <= _LARGEST:
                raise ConfigError(f"{source}: lora_alpha is {value!r:.80}, expected a number")
        stabilised = raw.get("use_rslora", False)
        if not isinstance(stabilised, bool):
            raise ConfigError(f"{source}: use_rslora is {stabilised!r:.80}, expected true or false")
        return cls(r, alpha, ranks, alphas, stabilised)

    def rank(self, module: str) -> int:
        return int(_of_module(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        rank, alpha = self.rank(module), _of_module(self.alpha_pattern, module, self.alpha)
        return float(alpha / (math.sqrt(rank) if self.stabilised else rank))


def read_adapter(path: str | os.PathLike[str], config: BloomConfig) -> Adapter:
    """The adapter in folder `path`, as float32, for a model of `config`.

    Raises: InputNotFound, ConfigError, CheckpointError: naming file and tensor or field.
    """
    path = Path(path)
    if not exists(path):
        raise InputNotFound(f"{path}: no such adapter")
    try:
        raw = read_json(path / CONFIG)
    except InputNotFound:
        raise CheckpointError(f"{path}: no {CONFIG}: not the folder of a PEFT adapter") from None
    lora = LoraConfig.from_dict(raw, str(path / CONFIG))
    file = weights_file(path)
    tensors = torch_tensors(file) if file.name == _BIN else safetensors_tensors([file])
    modules = _modules(file, tensors, config)
    if not modules:
        raise CheckpointError(f"{file}: holds no lora_A and lora_B: not an adapter")
    return Adapter({
        spec.name: _factors(tensors, module, spec, lora) for module, spec in modules.items()
    })  # fmt: skip


def weights_file(path: Path) -> Path:
    """The file of weights of the adapter in folder `path`. Raises: InputNotFound."""
    found = next((path / name for name in (_TENSORS, _BIN) if exists(path / name)), None)
    if found is None:
        raise InputNotFound(f"{path / _TENSORS}: no such file")
    return found


def _refuse_unsupported(raw: Mapping[str, Any], source: str) -> None:
    changes = {name: raw[name] for name in _UNSUPPORTED if raw.get(name)}
    if raw.get("bias", "none") != "none":
        changes["bias"] = raw["bias"]
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _KEEP_BASE:
        changes["init_lora_weights"] = start
    for name, value in changes.items():
        raise ConfigError(f"{source}: {name} is {value!r:.80}, not supported: {_MERGE}")


def _pattern(raw: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    pattern = raw.get(name) or {}
    if not isinstance(pattern, dict):
        raise ConfigError(f"{source}: {name} is {pattern!r:.80}, expected a JSON object")
    for key in pattern:
        repeats = sum(key.count(sign) for sign in "*+?{")
        groups, ways = key.count("("), 1 + key.count("|")
        many = ways > 1 and groups * math.log(ways) > math.log(_MOST_WAYS)
        if many or repeats > (0 if groups else _MOST_REPEATS):
            raise ConfigError(
                f"{source}: {name} has the key {key!r:.80}, too intricate an expression: write out "
                "the modules' names"
            )
        try:
            re.compile(_expression(key))
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"{source}: {name} has the key {key!r:.80}, no regular expression: {error}"
            ) from None
    return pattern


def _expression(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _of_module(pattern: Mapping[str, float], module: str, default: float) -> float:
    found = (value for key, value in pattern.items() if re.match(_expression(key), module))
    return next(found, default)


def _modules(
    file: Path, tensors: Mapping[str, SourceTensor], config: BloomConfig
) -> dict[str, WeightSpec]:
    """Every module that a file adapts, as it is spelled there, and which of our linears it is."""
    linears = {
        huggingface_name(f"{spec.name}.weight").removesuffix(".weight"): spec
        for spec in weight_specs(config) if spec.kind == "linear"
    }  # fmt: skip
    found: dict[str, set[str]] = {}
    for name in tensors:
        factor = _FACTOR.fullmatch(name)
        module = factor[1].removeprefix(_PEFT_PREFIX) if factor else ""
        if factor is None or module.removeprefix(PREFIX) not in linears:
            kinds = sorted({linear.rpartition(".")[2] for linear in linears})
            raise CheckpointError(
                f"{file}: unexpected {shown(name)}: bloomq adapts {', '.join(kinds)} of "
                f"layers 0 to {config.n_layer - 1}, by lora_A.weight and lora_B.weight"
            )
        found.setdefault(factor[1], set()).add(factor[2])
    modules: dict[str, WeightSpec] = {}
    for stored, factors in found.items():
        if len(factors) < 2:
            raise CheckpointError(f"{file}: {stored} lacks lora_A or lora_B: damaged")
        spec = linears[stored.removeprefix(_PEFT_PREFIX).removeprefix(PREFIX)]
        if spec in modules.values():
            raise CheckpointError(f"{file}: {stored} is there twice, in two spellings")
        modules[stored] = spec
    return modules


def _factors(
    tensors: Mapping[str, SourceTensor], stored: str, spec: WeightSpec, lora: LoraConfig
) -> Factors:
    module = stored.removeprefix(_PEFT_PREFIX)
    (n, k), rank = spec.shape, lora.rank(module)
    down = _values(tensors[f"{stored}.lora_A.weight"], (rank, k), 1.0)
    up = _values(tensors[f"{stored}.lora_B.weight"], (n, rank), lora.scale(module))
    return Factors(down, up)


def _values(tensor: SourceTensor, shape: tuple[int, int], scale: float) -> F32:
    """A tensor times `scale`."""
    if tensor.dtype not in _READABLE:
        raise CheckpointError(
            f"{tensor.name} is {tensor.dtype}, expected one of {', '.join(_READABLE)}"
        )
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.name} is {list(tensor.shape)}, expected {list(shape)} by this model and "
            f"{CONFIG}"
        )
    stored: Any = tensor.rows(0, shape[0])
    values = bf16_to_f32(stored) if tensor.dtype == "BF16" else stored.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        values = values * np.float32(scale)
    if not (np.abs(values) <= _LARGEST).all():  # nor NaN
        raise CheckpointError(
            f"{tensor.name} holds NaN, infinity or a weight beyond {_LARGEST:.0f}: damaged"
        )
    return np.asarray(values, np.float32)
