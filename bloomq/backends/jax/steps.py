"""A step in few shapes: what makes replaying it cheap.

XLA compiles a function for every shape it meets. So tokens, rows, results and keys of a step are
padded to powers of two, and the layers' own compiled functions are called one by one: as they serve
every layer of their shape, a model of 70 layers costs no more compiling than one of two, and a
longer text compiles attention anew and nothing else. (One function for the whole step took 4 to 8 s
to compile for each shape of 24 layers, against 0.8 s and less, and ran no faster.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bloomq.backends.jax.attention import JaxCache, Places, padded, ragged
from bloomq.layers import Span, Step

Array = jax.Array
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


def bucket(n: int) -> int:
    """The power of two from n on: at most twice the work, for the logarithm of the shapes."""
    return 1 << (n - 1).bit_length() if n else 0


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """The cache as a padded step sees it: `places` tells what its span would."""

    cache: JaxCache
    places: Places
    gates: Array  # of each block's row, [R, ranks]

    def attend(self, layer: int, q: Array, k: Array, v: Array, slope: Array, span: Span) -> Array:
        mixed: Array
        layers = self.cache.layers
        layers[layer], mixed = ragged(layers[layer], q, k, v, slope, self.places)
        return mixed

    def token_gates(self, span: Span) -> Array:
        return self.gates.at[self.places.row].get(mode="clip")


def in_few_shapes(step: Step) -> Step:
    """The same step, run on padded ids or hidden states and for padded `wanted`."""

    def call(ids: Any, cache: JaxCache, span: Span, wanted: I64) -> Array:
        cache.check_kept()
        places = Places.of(span, cache, bucket)
        gates = cache.gates[np.minimum(places.rows, cache.batch - 1)]  # padding: any
        frame = Frame(cache, jax.device_put(places), jnp.asarray(gates))
        nothing: Any = None  # for the span, which knows nothing of the padding
        read = padded(wanted, bucket(len(wanted)))
        size = len(places.row)
        given = padded(ids, size) if ids.ndim == 1 else _padded_states(ids, size)
        results: Array = step(given, frame, nothing, read)
        return results if len(results) == len(wanted) else results[: len(wanted)]

    return call


def _padded_states(states: Any, size: int) -> F32:
    """states [M, C] -> float32 [size, C]."""
    out = np.zeros((size, states.shape[1]), np.float32)
    out[: len(states)] = states
    return out
