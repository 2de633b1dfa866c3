"""GPTQ and the descent after it, on a matrix that lies columns first.

Invariant: rows are independent, and nothing depends on threads or on how the rows were cut.

Source: GPTQ (arXiv 2210.17323); QuIP (arXiv 2307.13304), theorem 6, for the factor; QuantEase
(arXiv 2309.01885) for the descent.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.products import add_product

from .factor import Factor, spread

F32 = NDArray[np.float32]
I8 = NDArray[np.int8]

BLOCK = 128  # columns whose errors are fed forward by loops; to later ones by a product
# What the scale of a group is tried at, of that at which its largest weight is just not cut.
SHRINK: F32 = np.array([1.06, 1.0, 0.95, 0.9, 0.85, 0.8, 0.74, 0.67], np.float32)


@dataclass(slots=True, eq=False)
class Codes:
    """A matrix under way, columns first: codes [K, N], scales [K/group, N]."""

    codes: I8
    scales: F32
    group: int

    def values(self) -> F32:
        """[K, N]."""
        k, n = self.codes.shape
        q = self.codes.reshape(-1, self.group, n).astype(np.float32)
        return (q * self.scales[:, None]).reshape(k, n)

    def errors(self, wt: F32, a: int, b: int, out: F32) -> None:
        """out [:, a:b] = wt less the values, of some rows of the matrix."""
        for i, scale in enumerate(self.scales):
            at = slice(i * self.group, (i + 1) * self.group)
            np.subtract(wt[at, a:b], self.codes[at, a:b] * scale[a:b], out=out[at, a:b])


def gptq(
    wt: F32, by: Factor, group: int, low: int, high: int, pool: ThreadPoolExecutor, *,
    fixed: F32 | None = None,
) -> Codes:  # fmt: skip
    """Round wt [K, N] column by column. A group's scale is the one of a few with which it is
    rounded best when it is reached, errors fed forward included; or `fixed` [1, N], one a row."""
    from .compiled import round_block

    k, n = wt.shape
    w = wt[by.order]
    codes, errors = np.empty((k, n), np.int8), np.empty((k, n), np.float32)
    scales = np.empty((k // group, n), np.float32)
    given = np.empty((0, n), np.float32) if fixed is None else fixed
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        fed = np.zeros((stop - start, n), np.float32)
        unit = np.ascontiguousarray(by.unit[start:stop, start:stop])
        own = scales[start // group : -(-stop // group)]

        def run(
            a: int, b: int, start: int = start, stop: int = stop, fed: F32 = fed, unit: F32 = unit,
            own: F32 = own,
        ) -> None:  # fmt: skip
            add_product(fed[:, a:b], by.unit[:start, start:stop], errors[:start, a:b])
            round_block(
                a, b, w[start:stop], fed, unit, by.weight[start:stop], min(group, stop - start),
                SHRINK, np.float32(low), np.float32(high), given, codes[start:stop], own,
                errors[start:stop],
            )  # fmt: skip

        spread(run, n, pool)
    back = np.argsort(by.order)
    if fixed is not None:
        return Codes(codes[back], fixed, group)
    return Codes(codes[back], scales[np.argsort(by.order[::group] // group)], group)


def descend(
    wt: F32, h: F32, found: Codes, low: int, high: int, sweeps: int, pool: ThreadPoolExecutor
) -> F32:
    """Set every scale (but one that a whole row shares), then every code, to what is best given all
    the others, `sweeps` times over; the errors [K, N] that are left."""
    from .compiled import descend_block

    k, n = wt.shape
    group, free = found.group, found.group <= BLOCK
    errors = np.empty_like(wt)
    spread(lambda a, b: found.errors(wt, a, b, errors), n, pool)
    for start in [i for _ in range(sweeps) for i in range(0, k, BLOCK)]:
        stop = min(start + BLOCK, k)
        gradient = np.zeros((stop - start, n), np.float32)
        part = np.ascontiguousarray(h[start:stop, start:stop])
        own = found.scales[start // group : -(-stop // group)]

        def run(
            a: int, b: int, start: int = start, stop: int = stop, gradient: F32 = gradient,
            part: F32 = part, own: F32 = own,
        ) -> None:  # fmt: skip
            add_product(gradient[:, a:b], h[:, start:stop], errors[:, a:b])
            descend_block(
                a, b, gradient, part, min(group, stop - start), np.float32(low), np.float32(high),
                free, found.codes[start:stop], own, errors[start:stop],
            )  # fmt: skip

        spread(run, n, pool)
    return errors
