"""Random weights in a published BLOOM's shapes, as packs store them, in a few megabytes of memory.

A stored array [N/16, ...] is N/16 tiles that lie one after another. Here every tile is a window of
one short random buffer, each a step behind the one before: strided views, all rows different, so
that a backend takes up 100 GB of weights which nobody has written anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from bloomq.config import BloomConfig, WeightSpec, weight_specs
from bloomq.pack import stored_arrays
from bloomq.pack_writer import writing_pack
from bloomq.placement.models import published, schemes_of
from bloomq.schemes import Array, Part, Scheme, f32_to_bf16
from bloomq.weights import Matrix, Norm

DEVIATION = 0.02  # of the weights, about BLOOM's
# The deviation of codes drawn evenly: -127..127, -32..31, -8..7, and of what is in nl4's and nf4's
# books.
CODE_DEVIATION = {"int8": 73.6, "int6": 18.5, "nl4": 33.8, "int4": 4.6, "nf4": 0.56}
PIECE_BYTES = 64 << 20  # of an array, written at a time
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8, "U8": np.uint8}


def config_of(model: str) -> BloomConfig:
    """The configuration of a published model, or of "tiny"."""
    if model == "tiny":
        return BloomConfig(hidden_size=256, n_layer=2, n_head=4, vocab_size=512)
    return published(model)


class RandomWeights:
    """`Weights` of random numbers; the same for the same model, scheme and seed."""

    def __init__(self, model: str, scheme: str, seed: int = 0) -> None:
        self.config = config_of(model)
        self.schemes = schemes_of(self.config, scheme)
        self._seed = seed
        self._specs = {spec.name: spec for spec in weight_specs(self.config)}
        self._matrices: dict[str, Matrix] = {}

    def matrix(self, name: str) -> Matrix:
        """The same object for `lm_head` and `wte` where they are tied."""
        if name == "lm_head" and self.config.head_is_embedding:
            name = "wte"
        if name not in self._matrices:
            n, k = self._specs[name].shape
            scheme, parts = self.schemes[name], {}
            rng = np.random.default_rng([self._seed, *name.encode()])
            for part, at in scheme.parts((n, k)).items():
                parts[part] = _random_part(rng, part, at, scheme)
            self._matrices[name] = Matrix(name, scheme, (n, k), parts)
        return self._matrices[name]

    def vector(self, key: str, length: int) -> NDArray[np.float32]:
        rng = np.random.default_rng([self._seed, *key.encode()])
        return rng.standard_normal(length, np.float32) * np.float32(DEVIATION)

    def norm(self, name: str) -> Norm:
        c = self.config.hidden_size
        bias = self.vector(f"{name}.bias", c)
        return Norm(name, 1 + self.vector(f"{name}.weight", c), bias, 1e-5)

    @property
    def nbytes(self) -> int:
        """Stored bytes of every matrix, as in a pack; vectors, a thousandth, are not counted."""
        return sum(
            math.prod(at.shape) * np.dtype(NUMPY[at.dtype]).itemsize
            for name, scheme in self.schemes.items()
            for at in scheme.parts(_shape2(self._specs[name])).values()
        )

    @property
    def bytes_per_token(self) -> int:
        """What a step of one token reads: all, as the head is the table."""
        return self.nbytes

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """Everything that a pack holds, in the order in which it is written."""
        for name, spec in self._specs.items():
            for key, part in stored_arrays(spec, self.schemes.get(name)).items():
                if spec.is_matrix and not key.endswith(".bias"):
                    yield key, self.matrix(name).parts[key.rsplit(".", 1)[1]]
                    continue
                values = np.zeros(part.shape, np.float32)  # padded with zeros
                length = spec.shape[0]
                norm = None if spec.is_matrix else self.norm(name)
                if norm is None:
                    values[:length] = self.vector(key, length)
                else:
                    values[:length] = norm.gain if key.endswith(".weight") else norm.bias
                yield key, values
            self._matrices.clear()  # a buffer each


def write_pack(weights: RandomWeights, target: Path) -> int:
    """Write the weights as a pack and return its bytes; no tokenizer."""
    with writing_pack(target, weights.config, weights.schemes, force=True) as writer:
        for key, array in weights.arrays():
            tiles = max(1, PIECE_BYTES * len(array) // max(array.nbytes, 1))
            for start in range(0, len(array), tiles):
                writer.write(key, array[start : start + tiles])
        writer.finish(None, {})
        return writer.nbytes


def _random_part(rng: np.random.Generator, name: str, at: Part, scheme: Scheme) -> Array:
    """A stored array: one value a row, or tiles [T, k, ...] that are windows of one buffer."""
    if len(at.shape) == 1:
        return _values(rng, name, at.shape, at.dtype, scheme)
    tiles, k, *rest = at.shape
    buffer = _values(rng, name, (tiles + k, *rest), at.dtype, scheme)
    step = buffer.strides[0]
    return as_strided(buffer, at.shape, (step, step, *buffer.strides[1:]), writeable=False)


def _values(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: str, scheme: Scheme
) -> Array:
    if name == "codes":
        raw = rng.integers(0, 256, shape, np.uint8)
        return np.maximum(raw.view(np.int8), -127) if dtype == "I8" else raw
    if name == "scales":
        spread = 1 + 0.2 * rng.random(shape, np.float32)
        return (spread * np.float32(DEVIATION / CODE_DEVIATION[scheme.name])).astype(NUMPY[dtype])
    values = rng.standard_normal(shape, np.float32) * np.float32(DEVIATION)
    return f32_to_bf16(values) if dtype == "BF16" else values.astype(NUMPY[dtype])


def _shape2(spec: WeightSpec) -> tuple[int, int]:
    n, k = spec.shape
    return n, k
