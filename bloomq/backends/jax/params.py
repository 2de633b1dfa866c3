"""A model's weights as a tree of arrays, and the tree as the weights of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bloomq.backends.jax.restore import placed
from bloomq.config import BloomConfig, WeightSpec, weight_specs
from bloomq.errors import UsageError
from bloomq.pack import Pack
from bloomq.schemes import Part, Scheme
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


def checked_params(
    config: BloomConfig, schemes: Mapping[str, Scheme], params: Any
) -> dict[str, dict[str, Any]]:
    """The arrays of `params`, of arrays or tracers, that `read_params` has of such a model.

    Raises: UsageError for one that is not there, or of another shape or kind.
    """
    if not isinstance(params, Mapping):
        raise UsageError(f"params is a {type(params).__name__}, expected the form of model.params")
    checked: dict[str, dict[str, Any]] = {}
    for spec in weight_specs(config):
        given, expected = params.get(spec.name), _parts(spec, schemes)
        for part, kind in expected.items():
            if not isinstance(given, Mapping) or part not in given:
                raise UsageError(
                    f"params has no {spec.name}.{part}, expected the form of model.params"
                )
            _check_part(f"{spec.name}.{part}", given[part], kind)
        checked[spec.name] = {part: given[part] for part in expected} if given else {}
    return checked


def _parts(spec: WeightSpec, schemes: Mapping[str, Scheme]) -> dict[str, Part]:
    vector = Part("F32", (spec.shape[0],))
    n, k = spec.shape[0], spec.shape[-1]
    parts = schemes[spec.name].parts((n, k)) if spec.is_matrix else {"weight": vector}
    return {**parts, "bias": vector} if spec.has_bias else parts


def _check_part(name: str, array: Any, expected: Part) -> None:
    """Floats may be of any precision (bfloat16 also as NumPy's bits), codes are what they are."""
    if not isinstance(array, jax.Array | np.ndarray):
        raise UsageError(f"params has a {type(array).__name__} for {name}, expected an array")
    codes = {"I8": jnp.int8, "U8": jnp.uint8}.get(expected.dtype)
    if codes is not None:
        right = array.dtype == codes
    else:
        bits = expected.dtype == "BF16" and array.dtype == np.uint16
        right = bits or jnp.issubdtype(array.dtype, jnp.floating)
    if not right or array.shape != expected.shape:
        raise UsageError(
            f"params has {name} as {array.dtype} {list(array.shape)}, this model has "
            f"{expected.dtype} {list(expected.shape)}"
        )


class ParamWeights:
    """`Weights` over such a tree, of arrays or tracers. Raises: see `checked_params`."""

    def __init__(self, config: BloomConfig, schemes: Mapping[str, Scheme], params: Params) -> None:
        self.config, self._schemes = config, schemes
        self._params = checked_params(config, schemes, params)
        self._shapes = {spec.name: spec.shape for spec in weight_specs(config)}

    def matrix(self, name: str) -> Matrix:
        if name == "lm_head" and self.config.head_is_embedding:
            name = "wte"
        scheme, (n, k) = self._schemes[name], self._shapes[name]
        parts = {part: self._params[name][part] for part in scheme.parts((n, k))}
        return Matrix(name, scheme, (n, k), parts)

    def vector(self, key: str, length: int) -> Any:
        name, _, part = key.rpartition(".")
        return self._params[name][part]

    def norm(self, name: str) -> Norm:
        parts = self._params[name]
        return Norm(name, parts["weight"], parts["bias"], self.config.layer_norm_epsilon)
