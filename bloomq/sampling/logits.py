"""One token's logits, on the backend that computed them, and what samplers ask of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bloomq.layers import Backend, Top, X
from bloomq.levels import LEVELS, Levels, Sums

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class Logits:
    """Row `index` of logits [R, V] of a backend, copied only where the backend must.

    best: `backend.top` of all these rows, where the caller has it already: it is then not computed
    again for the few tokens that it has.
    """

    __slots__ = (
        "_backend",
        "_best",
        "_levels",
        "_listed",
        "_logsumexp",
        "_row",
        "_sums",
        "_values",
    )

    def __init__(self, backend: Backend, rows: X, index: int, best: Top | None = None) -> None:
        self._backend = backend
        if isinstance(rows, np.ndarray):
            self._row: X = rows[index : index + 1]
        else:
            self._row = rows if len(rows) == 1 else backend.take(rows, np.array([index]))
        self._values: F32 | None = None
        self._best: tuple[I64, F32] | None = None  # the most of the best tokens that are known
        self._logsumexp: float | None = None  # at temperature 1
        self._sums: dict[float, Sums] = {}  # by temperature
        self._levels: dict[float, Levels] = {}  # by temperature
        self._listed: dict[float, dict[int, tuple[I64, F64]]] = {}  # by temperature and level
        if best is not None:
            self._best = best.ids[index], best.logits[index]
            self._logsumexp = float(best.logsumexp[index])

    @property
    def vocab_size(self) -> int:
        return int(self._row.shape[1])

    def best(self, k: int) -> tuple[I64, F32]:
        """Ids and logits [k] of the best k, of equals those of the lower id."""
        k = min(k, self.vocab_size)
        if self._best is None or len(self._best[0]) < k:
            self._best = self._backend.best(self._row, k)
        ids, logits = self._best
        return ids[:k], logits[:k]

    def logsumexp(self, temperature: float = 1.0) -> float:
        """log sum exp(logits / temperature)."""
        if temperature == 1.0 and self._logsumexp is not None:
            return self._logsumexp
        return self.sums(temperature).logsumexp()

    def sums(self, temperature: float = 1.0) -> Sums:
        """What is summed over the row, computed once."""
        if temperature in self._levels:
            return self._levels[temperature].sums
        if temperature not in self._sums:
            self._sums[temperature] = self._backend.sums(self._row, temperature)
        return self._sums[temperature]

    def levels(self, temperature: float = 1.0) -> Levels:
        """How the probability lies over the logits, computed once."""
        if temperature not in self._levels:
            self._levels[temperature] = self._backend.levels(self._row, temperature)
        return self._levels[temperature]

    def listed(self, temperature: float, wanted: Sequence[int]) -> list[tuple[I64, F64]]:
        """Ids and logits of the tokens of each of these levels, in ascending order, best first (of
        equals the lower id); none at -infinity. Each level is listed once."""
        known = self._listed.setdefault(temperature, {})
        fresh = [level for level in wanted if level not in known]
        if fresh:
            levels, values = self.levels(temperature), self.values()
            ids, logits = levels.listed(values, fresh)
            if len(fresh) == 1:
                known[fresh[0]] = ids, logits
            else:
                ends = levels.levels[ids].searchsorted(np.array([*fresh, LEVELS], np.uint16))
                for level, (start, stop) in zip(fresh, pairwise(ends.tolist()), strict=True):
                    known[level] = ids[start:stop], logits[start:stop]
        return [known[level] for level in wanted]

    def values(self) -> F32:
        """The logits, float32 [V]: to be read; or written and put back, where they can be."""
        if self._values is None:
            self._values = self._backend.numpy(self._row)[0]
        return self._values

    def edited(self, values: F32) -> Logits:
        """These values [V] as logits on the same backend."""
        return Logits(self._backend, values[None], 0)

    def masked(self, allowed: NDArray[np.bool_]) -> Logits:
        """These with -infinity where a token is not allowed, [V]."""
        return Logits(self._backend, self._backend.masked(self._row, allowed), 0)

    def logit(self, token: int) -> float:
        """One token's logit."""
        if self._best is not None and self._best[0][0] == token:
            return float(self._best[1][0])
        return float(self.values()[token])
