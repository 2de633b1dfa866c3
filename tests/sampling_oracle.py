"""Sampling written out plainly: every filter over the whole vocabulary in float64, DRY and mirostat
as llama.cpp has them. What the tests compare with, made for reading, not for speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bloomq.backends.reference import ReferenceBackend
from bloomq.layers import Backend
from bloomq.sampling import Logits, Sampling
from bloomq.sampling.candidates import Candidates
from bloomq.sampling.filters import FEW, Chain, Turn


def logits_of(*probabilities: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities)).astype(np.float32)


def row_of(values: np.ndarray, backend: Backend | None = None) -> Logits:
    """One token's logits, by default on the reference backend, whose sums are float64's."""
    return Logits(backend or ReferenceBackend(), np.asarray(values, np.float32)[None], 0)


def left_of(
    values: np.ndarray, sampling: Sampling, turn: Turn | None = None, few: int = FEW[0],
    backend: Backend | None = None,
) -> Candidates:  # fmt: skip
    """What the filters leave of a row."""
    if turn is not None and turn.surprise is not None:
        sampling = replace(sampling, mirostat_tau=1.0)
    return Chain.of(sampling).left(row_of(values, backend), turn or Turn(), few)


def probabilities(values: np.ndarray, sampling: Sampling, **options: object) -> np.ndarray:
    """The probability of each token [V] behind the filters, as the sampler has it."""
    ids, scores = left_of(values, sampling, **options).tokens()
    out = np.zeros(len(values))
    out[ids] = np.exp(scores - scores[0])
    return out / out.sum()


@dataclass
class State:
    """Tokens alive, best first, and their scores; margin: how near a decision was to another."""

    ids: np.ndarray
    scores: np.ndarray
    margin: float = np.inf

    @property
    def shares(self) -> np.ndarray:
        exponentials = np.exp(self.scores - self.scores.max())
        return exponentials / exponentials.sum()

    def keep(self, mask: np.ndarray, *distances: np.ndarray | float) -> None:
        """distances: of what was compared from its bounds."""
        for distance in distances:
            self.margin = min(self.margin, float(np.abs(distance).min(initial=np.inf)))
        self.ids, self.scores = self.ids[mask], self.scores[mask]

    def reaching(self, order: np.ndarray, share: float) -> int:
        """How many in this order are the fewest that reach a share."""
        total = np.cumsum(self.shares[order])
        self.margin = min(self.margin, float(np.abs(total[:-1] - share).min(initial=np.inf)))
        return min(int((total < share).sum()) + 1, len(order))


def entropy(shares: np.ndarray) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())


def expected(
    values: np.ndarray, sampling: Sampling, exclude: bool = False, surprise: float | None = None
) -> tuple[np.ndarray, float]:
    """The probability of each token [V], and the margin by which decisions were clear."""
    values = np.asarray(values, np.float64)
    ids = np.argsort(-values, kind="stable")
    ids = ids[values[ids] > -np.inf]
    state = State(ids, values[ids])
    for name in sampling.order:
        apply(name, state, sampling, exclude)
    if surprise is not None:  # mirostat 2
        surprises = -np.log2(state.shares)
        within = surprises <= surprise
        within[0] = True
        state.keep(within, surprises - surprise)
    out = np.zeros(len(values))
    out[state.ids] = state.shares
    return out, state.margin


def apply(name: str, state: State, sampling: Sampling, exclude: bool) -> None:
    """One filter."""
    count, places = len(state.ids), np.arange(len(state.ids))
    if name == "temperature":
        heat = sampling.temperature
        if sampling.dynamic_temperature and count > 1:
            low = max(heat - sampling.dynamic_temperature, 0)
            high = heat + sampling.dynamic_temperature
            unsure = entropy(state.shares) / np.log(count)
            heat = max(low + (high - low) * unsure**sampling.dynamic_exponent, 0.001)
        elif sampling.dynamic_temperature:
            heat = 1.0
        state.scores = state.scores / heat
    elif name == "top_k" and sampling.top_k:
        state.keep(places < sampling.top_k)
    elif name == "top_p" and sampling.top_p < 1:
        state.keep(places < state.reaching(places, sampling.top_p))
    elif name == "min_p" and sampling.min_p:
        bound = state.scores[0] + np.log(sampling.min_p)
        within = state.scores >= bound
        within[0] = True
        state.keep(within, state.scores[1:] - bound)
    elif name == "top_n_sigma" and sampling.top_n_sigma:
        bound = state.scores[0] - sampling.top_n_sigma * state.scores.std()
        within = state.scores >= bound
        within[0] = True
        state.keep(within, state.scores[1:] - bound)
    elif name == "typical" and sampling.typical_p < 1:
        distance = np.abs(-np.log(state.shares) - entropy(state.shares))
        order = np.argsort(distance, kind="stable")
        last = order[state.reaching(order, sampling.typical_p) - 1]
        # Equal scores are equally near and all kept; others, even one as far on the other side of
        # the entropy, should be told apart by rounding.
        others = state.scores != state.scores[last]
        apart = np.abs(distance - distance[last])[others]
        state.keep(distance <= distance[last] + 1e-9, apart)
    elif name == "xtc" and exclude:
        shares = state.shares
        above = int((shares >= sampling.xtc_threshold).sum())
        state.keep(places >= max(above - 1, 0), shares - sampling.xtc_threshold)


def dry(values: np.ndarray, sampling: Sampling, text: Sequence[int]) -> np.ndarray:
    """llama_sampler_dry_apply of llama.cpp, token by token, for breakers of one token."""
    tokens = list(text)[-sampling.dry_range :] if sampling.dry_range else list(text)
    allowed, base = sampling.dry_allowed_length, sampling.dry_base
    out = np.array(values, np.float64)
    if len(tokens) <= allowed:
        return out
    limit = len(tokens)
    for i, token in enumerate(reversed(tokens)):
        if token in sampling.dry_sequence_breakers:
            limit = i
            break
    if limit < allowed:
        return out
    longest: dict[int, int] = {}
    for end in range(len(tokens) - 1):
        length = 0
        while length <= end and tokens[end - length] == tokens[-1 - length]:
            length += 1
        length = min(length, limit)
        if length >= allowed:
            following = tokens[end + 1]
            longest[following] = max(longest.get(following, 0), length)
    most = int(88.7228391 / np.log(base)) if base > 1.000001 else 0
    for token, length in longest.items():
        exponent = length - allowed
        exponent = min(exponent, most) if most else exponent
        out[token] -= sampling.dry_multiplier * base**exponent
    return out
