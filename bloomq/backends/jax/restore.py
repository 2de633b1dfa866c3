"""A stored matrix as float32, inside a traced function: the twin of `schemes.dequantize`.

Invariant: the same bits as there. A stored array is first brought to one line a row of the matrix,
of all its rows or of some; what a scheme is comes after that, the same for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bloomq.grids import GRIDS
from bloomq.schemes import NF4_CODEBOOK, TILE, Scheme

Array = jax.Array
Parts = Mapping[str, Any]


def placed(array: Any) -> Array:
    """The array on JAX's device; a tracer, or what is there already, as it is.

    What nobody can write, such as a mapped pack, is used where it lies if the device is the CPU.
    """
    if isinstance(array, jax.Array):
        return array
    if array.flags.writeable:
        return jnp.array(array, copy=True)
    there: Array = jax.device_put(array, may_alias=True)
    return there


def whole(parts: Parts, scheme: Scheme, shape: tuple[int, int]) -> Array:
    """The stored arrays of a matrix -> [N, K] float32."""
    n, k = shape
    lines = {name: part if part.ndim == 1 else _lines(part) for name, part in parts.items()}
    return _restored(lines, scheme)[:n, :k]


def picked(parts: Parts, scheme: Scheme, shape: tuple[int, int], ids: Array) -> Array:
    """The stored arrays of a matrix -> its rows `ids`, [M, K] float32, reading those alone."""
    tile, lane = ids // TILE, ids % TILE
    lines = {
        name: part[ids] if part.ndim == 1 else part[tile, :, lane] for name, part in parts.items()
    }
    return _restored(lines, scheme)[:, : shape[1]]


def _lines(part: Array) -> Array:
    """[N/16, J, 16, ...] -> [N, J, ...]."""
    rows = jnp.moveaxis(part, 2, 1)  # [N/16, 16, J, ...]
    return rows.reshape(-1, *rows.shape[2:])


def _restored(lines: Mapping[str, Array], scheme: Scheme) -> Array:
    """Arrays with one line a row -> [N, K] float32."""
    if scheme.is_float:
        values = lines["values"]
        if values.dtype == np.uint16:  # bfloat16, as NumPy holds it
            values = jax.lax.bitcast_convert_type(values, jnp.bfloat16)
        return values.astype(jnp.float32)
    codes = lines["codes"]
    if scheme.name == "int8":
        flat = codes.reshape(len(codes), -1).astype(jnp.float32)
        return flat * lines["scales"][:, None]
    scales = jnp.repeat(lines["scales"].astype(jnp.float32), scheme.group_size, axis=1)
    numbers = NF4_CODEBOOK if scheme.name == "nf4" else GRIDS[scheme.name].numbers
    index = _sixes(codes) if scheme.name == "int6" else _nibbles(codes)
    return jnp.asarray(numbers)[index] * scales


def _nibbles(codes: Array) -> Array:
    """[N, K/8, 4] -> [N, K] of 0..15."""
    split = jnp.stack([codes & 15, codes >> 4], axis=2)  # [N, K/8, 2, 4]
    return split.reshape(len(codes), -1)


def _sixes(codes: Array) -> Array:
    """[N, K/16 * 3, 4] -> [N, K] of 0..63."""
    n = len(codes)
    split = codes.reshape(n, -1, 3, 4)  # two blocks of low bits, one of high ones
    low = _nibbles(split[:, :, :2].reshape(n, -1, 4))  # [N, K]
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = (split[:, :, 2, None] >> shifts) & 3  # [N, K/16, 4, 4]
    return low | (high.reshape(n, -1) << 4)
