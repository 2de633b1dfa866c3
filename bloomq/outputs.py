"""What a forward call returns: arrays by name, by index, or as a tuple, as in transformers.

A field that was not asked for is None, and does not exist as far as indexing, iterating and
`to_tuple` go. Arrays are the backend's: NumPy's, or jax's from the Flax classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Array = Any


class ModelOutput(Mapping[str, Any]):
    """Base of all outputs: `out.logits`, `out["logits"]`, `out[0]`, `out[:2]`, `out.to_tuple()`."""

    __slots__ = ()
    __eq__, __hash__ = object.__eq__, object.__hash__  # arrays have no truth value to compare by

    def _present(self) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return {name: v for name in names if (v := getattr(self, name)) is not None}

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self._present():
            raise KeyError(f"this output has no {key!r}, only {', '.join(self._present())}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are there, in order."""
        return tuple(self._present().values())


@dataclass(frozen=True, slots=True, eq=False)
class BaseModelOutput(ModelOutput):
    """Of `BloomModel`.

    last_hidden_state: float32 [B, T, C], behind the last norm; past_key_values: to continue from;
    hidden_states: n_layer + 1 arrays [B, T, C], the embedding's first, the last behind the last
    norm; attentions: n_layer arrays [B, H, T, S]. 0 at masked positions.
    """

    last_hidden_state: Array
    past_key_values: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class CausalLMOutput(ModelOutput):
    """Of `BloomForCausalLM`. loss: a float; logits: float32 [B, T, V] before softmax, 0 at masked
    positions; the rest as of `BaseModelOutput`."""

    loss: Array | None = None
    logits: Array | None = None
    past_key_values: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SequenceClassifierOutput(ModelOutput):
    """Of `BloomForSequenceClassification`. logits: float32 [B, labels], of the pooled token."""

    loss: Array | None = None
    logits: Array | None = None
    past_key_values: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TokenClassifierOutput(ModelOutput):
    """Of `BloomForTokenClassification`. logits: float32 [B, T, labels]."""

    loss: Array | None = None
    logits: Array | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class QuestionAnsweringOutput(ModelOutput):
    """Of `BloomForQuestionAnswering`. start_logits, end_logits: float32 [B, T]."""

    loss: Array | None = None
    start_logits: Array | None = None
    end_logits: Array | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
