"""What may follow each beam: its likeliest tokens, with the scores that a search ranks them by.

A score is a logprob, changed by the processors of the sampling options and by what other groups
have chosen. Where no processor is on, the best few come from the backend and the other 250,000
logits stay there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bloomq.layers import Backend, Top, X
from bloomq.sampling import Sampling, edited

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Tokens that may follow a beam, best first (of equals the lower id). ids: [k]; scores [k]:
    what the search ranks by; logprobs [k]: under the model itself."""

    ids: I64
    scores: F64
    logprobs: F64


# (beam, what it produced, how many, what tokens lose) -> the best that may follow it
Follow = Callable[[int, tuple[int, ...], int, Mapping[int, float]], Candidates]


class Outlook:
    """The tokens that may follow each beam of a step.

    logits: [W, V] on a backend; produced: tokens that these beams have so far; most: the largest
    number of candidates of a beam that will be asked for; editing: what the processors change, and
    scores are then made of.
    """

    def __init__(
        self,
        backend: Backend,
        logits: X,
        sampling: Sampling,
        ends: tuple[int, ...],
        *,
        produced: int,
        most: int,
        editing: Literal["logits", "logprobs"],
    ) -> None:
        self._backend, self._logits, self._sampling, self._ends = backend, logits, sampling, ends
        self._editing = editing
        early = produced < max(sampling.min_new_tokens, len(sampling.forced_prefix))
        self._edits = early or sampling.edits_always
        self.top: Top = backend.top(logits, 1 if self._edits else min(most, logits.shape[1]))

    def behind(self, prompt: Sequence[int], first: int) -> Follow:
        """What may follow the beams of a prompt, whose logits begin at logits[first]: the best few
        candidates, fewer where the others are impossible."""

        def follow(
            beam: int, produced: tuple[int, ...], count: int, lowered: Mapping[int, float]
        ) -> Candidates:
            if self._edits:
                return self._of_all(first + beam, prompt, produced, count, lowered)
            return self._of_top(first + beam, count, lowered)

        return follow

    def _of_top(self, row: int, count: int, lowered: Mapping[int, float]) -> Candidates:
        ids = self.top.ids[row]
        logprobs = self.top.logits[row].astype(np.float64) - self.top.logsumexp[row]
        less = np.array([lowered.get(token, 0.0) for token in ids.tolist()])
        return _best(ids, logprobs - less, logprobs, count)

    def _of_all(
        self,
        row: int,
        prompt: Sequence[int],
        produced: Sequence[int],
        count: int,
        lowered: Mapping[int, float],
    ) -> Candidates:
        backend = self._backend
        values = backend.numpy(backend.take(self._logits, np.array([row])))[0]
        logprobs = values - self.top.logsumexp[row]  # float64 [V]
        scores = values.copy() if self._editing == "logits" else logprobs.astype(np.float32)
        for token, less in lowered.items():
            scores[token] -= np.float32(less)
        scores = edited(self._sampling, scores, prompt, produced, self._ends)
        least = np.partition(scores, -count)[-count] if count < len(scores) else -np.inf
        ids = np.flatnonzero((scores >= least) & (scores > -np.inf))
        best = scores[ids].astype(np.float64)
        if self._editing == "logits" and len(ids):
            best -= _logsumexp(scores)
        return _best(ids, best, logprobs[ids], count)


def _logsumexp(scores: F32) -> float:
    wide = scores.astype(np.float64)
    peak = wide.max()
    return float(peak + np.log(np.exp(wide - peak).sum()))


def _best(ids: I64, scores: F64, logprobs: F64, count: int) -> Candidates:
    """The best `count` of some candidates; of equals the lower id."""
    order = np.lexsort((ids, -scores))[:count]
    return Candidates(ids[order], scores[order], logprobs[order])
