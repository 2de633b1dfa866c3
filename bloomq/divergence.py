"""How two models' predictions of the same tokens differ: KL divergence, and what both like best."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.scoring import Piece

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
BEST = 10  # likeliest tokens, of which both models' are compared
# Logits whose exponentials are summed in float32 at a time, 64 KB: the sums of these in float64.
# Measured at 250,880 logits: 0.5 ms a token, and within 1e-7 nats of all in float64, at 4.9 ms.
_PART = 16384


@dataclass(frozen=True, slots=True, eq=False)
class Differences:
    """Of W tokens. kl: KL(base || model), nats; same_top: do both like the same one best; common:
    how many of the base's 10 likeliest are the model's."""

    kl: F64
    same_top: NDArray[np.bool_]
    common: NDArray[np.int64]


def differences(base: Piece, model: Piece) -> Differences:
    """How the model's predictions of a piece differ from the base's, of which `BEST` were found."""
    kl = [divergence(p, q) for p, q in zip(base.logits, model.logits, strict=True)]
    both = base.best.ids, model.best.ids
    common = [len(np.intersect1d(ours, theirs)) for ours, theirs in zip(*both, strict=True)]
    return Differences(np.array(kl), both[0][:, 0] == both[1][:, 0], np.array(common, np.int64))


def divergence(base: F32, model: F32) -> float:
    """KL(softmax(base) || softmax(model)) of logits [V], in nats.

    sum p (log p - log q) = sum e^b (b - m) / sum e^b - log(sum e^b / sum e^m), b and m the logits
    less their largest; so no log of a probability that is 0 is taken.
    """
    top_b, top_m = base.max(), model.max()
    sum_b = sum_m = weighted = 0.0
    for start in range(0, len(base), _PART):
        b, m = base[start : start + _PART] - top_b, model[start : start + _PART] - top_m
        exp_b = np.exp(b)
        sum_b += float(exp_b.sum())
        sum_m += float(np.exp(m).sum())
        weighted += float((exp_b * (b - m)).sum())
    return weighted / sum_b - math.log(sum_b / sum_m)
