"""From the logits of one row to the next token: options checked once, then a callable per
sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.checks import check_number, is_whole
from bloomq.errors import UsageError
from bloomq.layers import Top

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    temperature 0: the most likely token (of equals the lowest id). Otherwise a draw from
    softmax(logits / temperature), cut to the top_k likeliest (0: all), then to the fewest whose
    probabilities reach top_p (1: all). repetition_penalty p: the logit of a token that occurred, in
    prompt or output, is divided by p where positive and multiplied where negative (1: off), before
    all else. seed None: a new one each time; sequence i of a call draws from a stream of (seed, i).

    Raises: UsageError for a value that cannot be.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0.0, 100.0, "0 (greedy) to 100")
        if not is_whole(self.top_k) or self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k!r}, expected a whole number, 0 for all")
        check_number("top_p", self.top_p, 1e-9, 1.0, "above 0, at most 1")
        check_number("repetition_penalty", self.repetition_penalty, 1e-3, 1e3, "0.001 to 1000")
        if self.seed is not None and (not is_whole(self.seed) or self.seed < 0):
            raise UsageError(f"seed is {self.seed!r}, expected a whole number from 0")
        if 0.0 < self.temperature < 1e-3:
            raise UsageError(
                f"temperature is {self.temperature!r}, expected 0 (greedy) or at least 0.001"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0


def generator(sampling: Sampling, index: int) -> np.random.Generator:
    """The random numbers of sequence `index` of a call: its own stream, whatever the batch."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([_seed(sampling), index])))


def _seed(sampling: Sampling) -> int:
    if sampling.seed is not None:
        return sampling.seed
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0])


TopOf = Callable[[int, float], Top]  # (k, temperature) -> Top of one row, exact


def draw(
    sampling: Sampling,
    rng: np.random.Generator,
    vocab_size: int,
    top: TopOf,
    logits: Callable[[], F32],
) -> int:
    """The next token. `top` gives the row's best k and its logsumexp, `logits` all of its logits,
    which are fetched only when a draw needs them."""
    if sampling.greedy:
        return int(top(1, 1.0).ids[0, 0])
    u = rng.random()  # one number a token, so that streams stay in step
    if sampling.top_k:
        best = top(min(sampling.top_k, vocab_size), sampling.temperature)
        scaled = best.logits[0].astype(np.float64) / sampling.temperature
        shares = np.exp(scaled - scaled[0])
        return _pick(best.ids[0], shares / shares.sum(), sampling.top_p, u)
    if sampling.top_p < 1.0:
        k = min(_NUCLEUS, vocab_size)
        best = top(k, sampling.temperature)
        shares = np.exp(best.logits[0] / np.float64(sampling.temperature) - best.logsumexp[0])
        if k == vocab_size or shares.sum() >= sampling.top_p:
            return _pick(best.ids[0], shares, sampling.top_p, u)
    row = logits().astype(np.float64) / sampling.temperature
    shares = np.exp(row - row.max())
    order = np.argsort(-row, kind="stable") if sampling.top_p < 1.0 else np.arange(len(row))
    return _pick(order, shares[order] / shares.sum(), sampling.top_p, u)


_NUCLEUS = 1024  # candidates of a top-p draw; a flatter distribution takes all logits


def _pick(ids: I64, shares: NDArray[np.float64], top_p: float, u: float) -> int:
    """Draw from `ids` with probabilities `shares`, cut to the first whose sum reaches top_p. `u` is
    uniform in [0, 1)."""
    total = np.cumsum(shares)
    count = len(total) if top_p >= 1.0 else int(np.searchsorted(total, top_p)) + 1
    count = min(count, len(total))
    at = int(np.searchsorted(total[:count], u * total[count - 1], side="right"))
    return int(ids[min(at, count - 1)])  # u * total may round up to total


def top_of(logits: F32, k: int, temperature: float = 1.0) -> Top:
    """`Backend.top` for one row of NumPy logits [V]."""
    k = min(k, len(logits))
    threshold = np.partition(logits, len(logits) - k)[len(logits) - k]
    above = np.flatnonzero(logits >= threshold)
    best = above[np.argsort(-logits[above], kind="stable")[:k]]
    scaled = logits.astype(np.float64) / temperature
    peak = scaled.max()
    logsumexp = peak + np.log(np.exp(scaled - peak).sum())
    return Top(best[None], logits[best][None], np.array([logsumexp]))


def penalise(logits: F32, seen: I64, penalty: float) -> F32:
    """Copy of logits [V] with the tokens `seen` made less likely. Source: CTRL (arXiv 1909.05858),
    in transformers' form."""
    out = logits.copy()
    picked = out[seen]
    out[seen] = np.where(picked > 0, picked / np.float32(penalty), picked * np.float32(penalty))
    return out
