"""What calibration is tested against: a textbook's GPTQ and descent, and errors of outputs, in
float64; and the reference's block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from bloomq.converters.calibration.forward import UnderWay
from bloomq.converters.calibration.gptq import SHRINK

from bloomq.backends.reference import ReferenceBackend, layer_norm
from bloomq.grids import Grid
from bloomq.layers import Span
from bloomq.model import Block


def problem(n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights [N, K] and the moment [K, K] of correlated inputs, a few of them large."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((k, k)) * np.exp(rng.standard_normal(k))
    x = (rng.standard_normal((3 * k, k)) @ mix).astype(np.float32)
    w = rng.standard_normal((n, k)).astype(np.float32) * np.float32(0.02)
    return w, x.T @ x / np.float32(len(x))


def output_errors(w: np.ndarray, values: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """[N], in float64."""
    e = (w - values).astype(np.float64)
    return np.asarray(((e @ moment.astype(np.float64)) * e).sum(axis=1))


def half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


def textbook(
    w: np.ndarray, h: np.ndarray, order: np.ndarray, group: int, grid: Grid,
    fixed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """GPTQ as its paper has it, by the Cholesky factor of H's inverse, in float64: codes [N, K] and
    values [N, K]. A group's scale is found by trying each on a copy."""
    u = np.linalg.cholesky(np.linalg.inv(h.astype(np.float64)[np.ix_(order, order)])).T
    left, low, high = w.astype(np.float64)[:, order], grid.lowest, grid.highest
    codes, values = np.zeros(w.shape), np.zeros(w.shape)

    def columns(now: np.ndarray, start: int, stop: int, scale: np.ndarray):
        now, q, loss = now.copy(), np.zeros((len(w), stop - start)), np.zeros(len(w))
        for j in range(start, stop):
            inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
            q[:, j - start] = grid.nearest(now[:, j] * inverse)
            error = (now[:, j] - q[:, j - start] * scale) / u[j, j]
            now[:, j:] -= np.outer(error, u[j, j:])
            loss += error**2
        return now, q, loss

    for start in range(0, w.shape[1], group):
        stop = start + group
        up = np.maximum(left[:, start:stop].max(axis=1), 0)
        down = np.maximum(-left[:, start:stop].min(axis=1), 0)
        tried = [fixed] if fixed is not None else []
        for s in SHRINK if fixed is None else ():
            tried.append(half(s * np.maximum(up / high, down / -low)))
            tried.append(-half(s * np.maximum(up / -low, down / high)))
        found = [columns(left, start, stop, scale.astype(np.float64)) for scale in tried]
        pick = np.argmin([loss for _, _, loss in found], axis=0)
        rows = np.arange(len(w))
        left = np.stack([now for now, _, _ in found])[pick, rows]
        codes[:, start:stop] = np.stack([q for _, q, _ in found])[pick, rows]
        values[:, start:stop] = codes[:, start:stop] * np.stack(tried)[pick, rows][:, None]
    back = np.argsort(order)
    return codes[:, back], values[:, back]


def textbook_descent(
    w: np.ndarray, h: np.ndarray, codes: np.ndarray, scales: np.ndarray, grid: Grid
) -> tuple[np.ndarray, np.ndarray]:
    """One sweep in float64: of each group of w [N, K] the scale [N, K/G], then every code [N, K],
    set to the best for all else."""
    wide, h, group = w.astype(np.float64), h.astype(np.float64), w.shape[1] // scales.shape[1]
    codes, scales = codes.astype(np.float64), scales.astype(np.float64)

    def gradient(columns: slice | int) -> np.ndarray:
        return np.asarray((wide - codes * np.repeat(scales, group, axis=1)) @ h[:, columns])

    for at in range(scales.shape[1]):
        part = slice(at * group, (at + 1) * group)
        c, s = codes[:, part], scales[:, at]
        top, bottom = (c * gradient(part)).sum(axis=1), (c @ h[part, part] * c).sum(axis=1)
        fresh = half(np.where(bottom > 0, s + top / bottom, s)).astype(np.float64)
        step = fresh - s
        better = (step * (2 * top - step * bottom) > 0) & (fresh != 0)
        scales[:, at] = np.where(better, fresh, s)
        for k in range(part.start, part.stop):
            wanted = codes[:, k] + gradient(k) / h[k, k] / scales[:, at]
            codes[:, k] = grid.nearest(wanted)
    return codes, scales


def through_the_reference(
    weights: UnderWay, layer: int, x: np.ndarray, shape: tuple[int, int]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The inputs of a block's matrices, by name, and its output; x: its own input, of windows."""
    reference, inputs = ReferenceBackend(), dict[str, np.ndarray]()

    class Recording(ReferenceBackend):
        def linear(
            self, weight: Any, bias: Any = None, *, norm: Any = None, act: Any = None
        ) -> Any:
            inner = reference.linear(weight, bias, norm=norm, act=act)

            def call(x: np.ndarray, add: Any = None, delta: Any = None) -> np.ndarray:
                inputs[weight.name] = x if norm is None else layer_norm(x, norm)
                return inner(x, add=add)

            return call

    count, length = shape
    cache, span = reference.cache(weights.config, count, length), [length] * count
    return inputs, Block(weights, Recording(), layer)(x, cache, Span.of(range(count), span))
