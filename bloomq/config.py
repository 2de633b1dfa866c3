"""What a BLOOM is: its sizes and its head, and from them every weight it must have.

Invariant: a `BloomConfig` that exists is valid, and is one that bloomq computes exactly.

Source: the configuration of transformers' BLOOM and of BigScience's Megatron-DeepSpeed, whose
config.json files spell two fields differently (`n_embed`, `num_attention_heads`).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from bloomq.errors import ConfigError
from bloomq.files import exists, read_bounded

Architecture = Literal[
    "BloomForCausalLM",
    "BloomForSequenceClassification",
    "BloomForTokenClassification",
    "BloomForQuestionAnswering",
]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]
_DEFAULT_LABELS = ("LABEL_0", "LABEL_1")

# Bounds that no BLOOM comes near, so that a hostile file cannot ask for absurd memory. The 176B has
# hidden_size 14,336, 70 layers, 112 heads and 250,880 tokens.
_MAX = {"hidden_size": 1 << 17, "n_layer": 1 << 12, "n_head": 1 << 12, "vocab_size": 1 << 24}
_MAX_CONTEXT, _MAX_LABELS = 1 << 24, 1 << 16
# Either spelling, the first one present wins.
_SPELLINGS = {
    "hidden_size": ("n_embed", "hidden_size"),  # as transformers: n_embed overrides hidden_size
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "vocab_size": ("vocab_size",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BloomConfig:
    """The sizes and conventions of one BLOOM model; sizes default as in transformers.

    From hidden_dropout to slow_but_exact, nothing that is computed here depends on a field:
    dropout and initialisation are training's, and the sums that `slow_but_exact` asks for are exact
    anyway. architecture: the head that the weights have (a bare `BloomModel` counts as the language
    model, whose head it shares); labels: of a classifier, in the order of their ids; problem_type:
    of a sequence classifier, None where labels are to tell.

    Raises: ConfigError where a value is out of range or asks for another computation.
    """

    hidden_size: int = 64
    n_layer: int = 2
    n_head: int = 8
    vocab_size: int = 250880
    layer_norm_epsilon: float = 1e-5
    seq_length: int = 2048
    tie_word_embeddings: bool = True
    apply_residual_connection_post_layernorm: bool = False
    use_cache: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    pretraining_tp: int = 1
    slow_but_exact: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = None
    unk_token_id: int | None = 0
    architecture: Architecture = "BloomForCausalLM"
    labels: tuple[str, ...] = _DEFAULT_LABELS
    problem_type: ProblemType | None = None

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
        for name in ("hidden_dropout", "attention_dropout", "initializer_range"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} is {value!r}, expected a number from 0 to 1")
        _check_int("pretraining_tp", self.pretraining_tp, 1, 1 << 16)
        for name in (
            "tie_word_embeddings", "apply_residual_connection_post_layernorm", "use_cache",
            "slow_but_exact",
        ):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected true or false")
        if self.architecture not in ARCHITECTURES:
            raise ConfigError(
                f"architecture is {self.architecture!r}, expected one of {', '.join(ARCHITECTURES)}"
            )
        _check_labels(self.labels)
        if self.problem_type not in (None, *get_args(ProblemType)):
            raise ConfigError(
                f"problem_type is {self.problem_type!r}, expected null or one of "
                f"{', '.join(get_args(ProblemType))}"
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, self.vocab_size - 1)

    @property
    def model_type(self) -> str:
        return "bloom"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_head

    @property
    def head_is_embedding(self) -> bool:
        """Does this language model's head use the embedding's table?"""
        return self.architecture == "BloomForCausalLM" and self.tie_word_embeddings

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layer

    @property
    def num_attention_heads(self) -> int:
        return self.n_head

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.labels))

    @property
    def label2id(self) -> dict[str, int]:
        return {label: i for i, label in enumerate(self.labels)}

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
            return cls(**{**fields, **_read_head(raw)})
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def from_file(cls, path: Path) -> BloomConfig:
        """The config of a config.json file.

        Raises: InputNotFound, ConfigError.
        """
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> BloomConfig:
        """The config of a checkpoint's folder, or of a pack.

        Raises: InputNotFound, ConfigError.
        """
        manifest = Path(path) / "manifest.json"
        if not exists(manifest):
            return cls.from_file(Path(path) / "config.json")
        raw = read_json(manifest)
        config: Any = raw.get("config") if isinstance(raw, dict) else raw
        return cls.from_dict(config, str(manifest))

    def to_dict(self) -> dict[str, Any]:
        """As a pack's manifest stores it, and `from_dict` reads it."""
        raw = {**dataclasses.asdict(self), "labels": list(self.labels)}
        raw["architectures"] = [raw.pop("architecture")]
        return raw


def _read_head(raw: Mapping[str, Any]) -> dict[str, Any]:
    """architecture and labels, as config.json spells them: `architectures`, `id2label` or
    `num_labels`."""
    head: dict[str, Any] = {}
    given = raw.get("architectures")
    if given:
        known = ("BloomModel", *ARCHITECTURES)
        if not isinstance(given, list) or len(given) != 1 or given[0] not in known:
            raise ConfigError(f"architectures {given}, expected one of {', '.join(known)}")
        head["architecture"] = "BloomForCausalLM" if given[0] == "BloomModel" else given[0]
    names, count = raw.get("id2label"), raw.get("num_labels")
    if isinstance(raw.get("labels"), list):  # a pack's own spelling
        head["labels"] = tuple(raw["labels"])
    elif names is not None:
        if not isinstance(names, Mapping) or {str(k) for k in names} != {
            str(i) for i in range(len(names))
        }:
            raise ConfigError("id2label does not name the labels 0, 1, ... in turn")
        by_id = {str(key): name for key, name in names.items()}
        head["labels"] = tuple(by_id[str(i)] for i in range(len(by_id)))
    elif count is not None:
        _check_int("num_labels", count, 1, _MAX_LABELS)
        head["labels"] = tuple(f"LABEL_{i}" for i in range(count))
    return head


def _check_labels(labels: object) -> None:
    named = isinstance(labels, tuple) and all(isinstance(label, str) for label in labels)
    if not named or not 1 <= len(labels) <= _MAX_LABELS:  # type: ignore[arg-type]
        raise ConfigError(f"labels are {labels!r:.80}, expected 1 to {_MAX_LABELS} names")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r:.80}, expected a whole number from {low} to {high}")


def _refuse_unsupported(raw: Mapping[str, Any], hidden_size: object, source: str) -> None:
    """Settings that change the computation are refused by name rather than ignored."""
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


WeightKind = Literal["embedding", "linear", "norm", "head", "classifier"]


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One named weight: a matrix [N, K], maybe with a bias [N], or a norm's gain and bias [C]."""

    name: str
    kind: WeightKind
    shape: tuple[int, ...]
    has_bias: bool = True

    @property
    def is_matrix(self) -> bool:
        return self.kind != "norm"


def weight_specs(config: BloomConfig) -> list[WeightSpec]:
    """Every weight of the model and its head, in the order in which a step reads them."""
    c = config.hidden_size
    table = (config.vocab_size, c)
    specs = [WeightSpec("wte", "embedding", table, has_bias=False)]
    specs.append(WeightSpec("emb_ln", "norm", (c,)))
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
    return specs + _head_specs(config, table)


def _head_specs(config: BloomConfig, table: tuple[int, int]) -> list[WeightSpec]:
    classes = (config.num_labels, config.hidden_size)
    if config.architecture == "BloomForSequenceClassification":
        return [WeightSpec("score", "classifier", classes, has_bias=False)]
    if config.architecture == "BloomForTokenClassification":
        return [WeightSpec("classifier", "classifier", classes)]
    if config.architecture == "BloomForQuestionAnswering":
        return [WeightSpec("qa_outputs", "classifier", (2, config.hidden_size))]
    return [] if config.head_is_embedding else [WeightSpec("lm_head", "head", table, False)]
