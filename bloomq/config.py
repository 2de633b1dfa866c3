"""What a BLOOM is: its sizes, and from them every weight it must have.

Invariant: a `BloomConfig` that exists is valid, and is one that bloomq computes exactly.

Source: the configuration of transformers' BLOOM and of BigScience's Megatron-DeepSpeed, whose
config.json files spell two fields differently (`n_embed`, `num_attention_heads`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bloomq.errors import ConfigError
from bloomq.files import read_bounded

# Bounds that no BLOOM comes near, so that a hostile file cannot ask for absurd memory. The 176B has
# hidden_size 14,336, 70 layers, 112 heads and 250,880 tokens.
_MAX = {"hidden_size": 1 << 17, "n_layer": 1 << 12, "n_head": 1 << 12, "vocab_size": 1 << 24}
_MAX_CONTEXT = 1 << 24
# Either spelling, the first one present wins.
_SPELLINGS = {
    "hidden_size": ("n_embed", "hidden_size"),  # as transformers: n_embed overrides hidden_size
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "vocab_size": ("vocab_size",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BloomConfig:
    """The sizes and conventions of one BLOOM model.

    Raises: ConfigError where a value is out of range or asks for another computation.
    """

    hidden_size: int
    n_layer: int
    n_head: int
    vocab_size: int
    layer_norm_epsilon: float = 1e-5
    seq_length: int = 2048
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = 3
    unk_token_id: int | None = 0

    def __post_init__(self) -> None:
        for name, limit in _MAX.items():
            _check_int(name, getattr(self, name), 1, limit)
        _check_int("seq_length", self.seq_length, 1, _MAX_CONTEXT)
        if self.hidden_size % self.n_head:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of n_head {self.n_head}: "
                "check config.json against the checkpoint's model card"
            )
        epsilon = self.layer_norm_epsilon
        if not isinstance(epsilon, float) or not 0.0 < epsilon < 1.0:
            raise ConfigError(f"layer_norm_epsilon is {epsilon!r}, expected a number in (0, 1)")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ConfigError(
                f"tie_word_embeddings is {self.tie_word_embeddings!r}, expected true or false"
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, self.vocab_size - 1)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_head

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> BloomConfig:
        """The config of a Hugging Face config.json, in either spelling of its keys.

        Raises: ConfigError, naming `source`, for another architecture or an unsupported setting.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{source}: expected a JSON object, found {type(raw).__name__}")
        model_type = raw.get("model_type", "bloom")
        if model_type != "bloom":
            raise ConfigError(
                f"{source}: model_type is {model_type!r}, expected 'bloom': "
                "bloomq runs BLOOM, BLOOMZ and their fine-tunes only"
            )
        fields: dict[str, Any] = {}
        for name, spellings in _SPELLINGS.items():
            present = [key for key in spellings if raw.get(key) is not None]
            if not present:
                raise ConfigError(f"{source}: no {' or '.join(spellings)}: the file is incomplete")
            fields[name] = raw[present[0]]
        for field in dataclasses.fields(cls):
            if field.name not in fields and field.name in raw:
                value = raw[field.name]
                if value is None and not field.name.endswith("_token_id"):
                    continue
                fields[field.name] = value
        _refuse_unsupported(raw, fields["hidden_size"], source)
        try:
            return cls(**fields)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def from_file(cls, path: Path) -> BloomConfig:
        """The config of a config.json file.

        Raises: InputNotFound, ConfigError.
        """
        return cls.from_dict(read_json(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}, expected a whole number from {low} to {high}")


def _refuse_unsupported(raw: Mapping[str, Any], hidden_size: object, source: str) -> None:
    """Settings that change the computation are refused by name rather than ignored."""
    if raw.get("apply_residual_connection_post_layernorm"):
        raise ConfigError(
            f"{source}: apply_residual_connection_post_layernorm is true, which this version does "
            "not compute: no published BLOOM uses it"
        )
    n_inner = raw.get("n_inner")
    if n_inner is not None and isinstance(hidden_size, int) and n_inner != 4 * hidden_size:
        raise ConfigError(
            f"{source}: n_inner is {n_inner!r}, expected null or 4 x hidden_size = "
            f"{4 * hidden_size}: no published BLOOM uses another width"
        )


def read_json(path: Path, limit_bytes: int = 64 << 20) -> Any:
    """The parsed JSON of a file of at most `limit_bytes`.

    Raises: InputNotFound, ConfigError for anything that is not JSON.
    """
    data = read_bounded(path, limit_bytes, ConfigError)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({str(error).splitlines()[0]})") from None


WeightKind = Literal["embedding", "linear", "norm", "head"]


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One named weight: a matrix [N, K] with its bias [N], or a norm's gain and bias [C]."""

    name: str
    kind: WeightKind
    shape: tuple[int, ...]

    @property
    def has_bias(self) -> bool:
        return self.kind in ("linear", "norm")

    @property
    def quantized(self) -> bool:
        return self.kind != "norm"


def weight_specs(config: BloomConfig) -> list[WeightSpec]:
    """Every weight of the causal language model, in the order in which a step reads them."""
    c = config.hidden_size
    table = (config.vocab_size, c)
    specs = [WeightSpec("wte", "embedding", table), WeightSpec("emb_ln", "norm", (c,))]
    for i in range(config.n_layer):
        specs += [
            WeightSpec(f"h.{i}.ln_1", "norm", (c,)),
            WeightSpec(f"h.{i}.attn.qkv", "linear", (3 * c, c)),
            WeightSpec(f"h.{i}.attn.out", "linear", (c, c)),
            WeightSpec(f"h.{i}.ln_2", "norm", (c,)),
            WeightSpec(f"h.{i}.mlp.up", "linear", (4 * c, c)),
            WeightSpec(f"h.{i}.mlp.down", "linear", (c, 4 * c)),
        ]
    specs.append(WeightSpec("ln_f", "norm", (c,)))
    if not config.tie_word_embeddings:
        specs.append(WeightSpec("lm_head", "head", table))
    return specs
