"""What errors of an embedding cost where it is looked up.

The rows that reach the first block are read there by `attn.qkv` and `mlp.up`, behind two layer
norms: an error e of a row does harm as far as these see it, |W diag(gain) M diag(emb_ln gain) M e|,
M taking off the mean as a norm does. On the demo this has 0.80 of the cosine with the Fisher
information of the rows, the identity 0.63 (docs/experiments.md); later blocks add nothing to that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.products import add_product

from ..source import Checkpoint
from .forward import rows_of, vector_of

F32 = NDArray[np.float32]

_READERS = (("ln_1", "attn.qkv"), ("ln_2", "mlp.up"))
_ROWS = 64 << 20  # bytes of float32 rows at a time


def look_up_moment(checkpoint: Checkpoint) -> F32:
    """[C, C], its mean diagonal 1: how errors of the columns of a looked-up row count together.

    Raises: NumericError where a weight is damaged.
    """
    c, tensors = checkpoint.config.hidden_size, checkpoint.tensors
    total = np.zeros((c, c), np.float32)
    for norm, name in _READERS:
        tensor = tensors[f"h.0.{name}.weight"]
        seen, step = np.zeros((c, c), np.float32), max(1, _ROWS // (4 * c))
        for start in range(0, tensor.shape[0], step):
            w = rows_of(tensor, start, min(start + step, tensor.shape[0]))
            with np.errstate(over="ignore", invalid="ignore"):  # refused when it is solved
                add_product(seen, w, w)
        if not np.isfinite(seen.sum(dtype=np.float64)):
            seen = np.eye(c, dtype=np.float32)
        total += _behind_norm(seen, vector_of(tensors[f"h.0.{norm}.weight"]))
    return _behind_norm(total, vector_of(tensors["emb_ln.weight"]))


def _behind_norm(moment: F32, gain: F32) -> F32:
    """Of what a layer norm of this gain is given, from that of what it gives; mean diagonal 1."""
    moment *= gain[:, None]
    moment *= gain
    moment -= moment.mean(axis=0)
    moment -= moment.mean(axis=1)[:, None]
    moment /= np.float32(np.diag(moment).mean(dtype=np.float64) or 1.0)
    return moment
