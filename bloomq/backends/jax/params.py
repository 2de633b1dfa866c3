"""A model's weights as a tree of arrays, and the tree as the weights of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bloomq.backends.jax.restore import placed
from bloomq.config import BloomConfig, weight_specs
from bloomq.errors import UsageError
from bloomq.pack import Pack
from bloomq.schemes import Scheme
from bloomq.weights import Matrix, Norm

Params = Mapping[str, Mapping[str, Any]]


def read_params(pack: Pack) -> dict[str, dict[str, jax.Array]]:
    """{weight: {part: array}}: {"h.0.attn.qkv": {"codes": ..., "scales": ..., "bias": ...}, ...}.

    Matrices are in the layout of their scheme (docs/format.md), bf16 as such; vectors are without
    padding.
    """
    params: dict[str, dict[str, jax.Array]] = {}
    for spec in weight_specs(pack.config):
        parts: dict[str, Any] = dict(pack.matrix(spec.name).parts) if spec.is_matrix else {}
        if spec.is_matrix and pack.schemes[spec.name].name == "bf16":
            parts = {name: part.view(jnp.bfloat16) for name, part in parts.items()}
        if not spec.is_matrix:
            parts["weight"] = pack.vector(f"{spec.name}.weight", spec.shape[0])
        if spec.has_bias:
            parts["bias"] = pack.vector(f"{spec.name}.bias", spec.shape[0])
        params[spec.name] = {name: placed(part) for name, part in parts.items()}
    return params


class ParamWeights:
    """`Weights` over such a tree, of arrays or tracers."""

    def __init__(self, config: BloomConfig, schemes: Mapping[str, Scheme], params: Params) -> None:
        self.config, self._schemes, self._params = config, schemes, params
        self._shapes = {spec.name: spec.shape for spec in weight_specs(config)}

    def matrix(self, name: str) -> Matrix:
        if name == "lm_head" and self.config.head_is_embedding:
            name = "wte"
        scheme, (n, k) = self._schemes[name], self._shapes[name]
        parts = {part: self._array(name, part) for part in scheme.parts((n, k))}
        return Matrix(name, scheme, (n, k), parts)

    def vector(self, key: str, length: int) -> Any:
        name, _, part = key.rpartition(".")
        return self._array(name, part)

    def norm(self, name: str) -> Norm:
        gain, bias = self._array(name, "weight"), self._array(name, "bias")
        return Norm(name, gain, bias, self.config.layer_norm_epsilon)

    def _array(self, name: str, part: str) -> Any:
        if part not in self._params.get(name, {}):
            raise UsageError(f"params has no {name}.{part}, expected the form of model.params")
        return self._params[name][part]
