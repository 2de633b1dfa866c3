"""What a language model's quantization changes of its predictions, summed up.

Invariant: perplexities, divergence and agreement are those of `bloomq.perplexity` over the same
tokens and windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bloomq.comparison.places import FEW, Places
from bloomq.divergence import BEST
from bloomq.perplexity import NORMAL_95, QUANTILES
from bloomq.windows import mean_of_windows

F64 = NDArray[np.float64]
_CHUNKS = 120  # points of a curve along a text, at most
_CHUNK = 16  # places of one, at least
_BINS = 10  # of probabilities
_NEAR = 0.1  # nats: of two tokens as near as this one has at most 1.105 times the other's chance
_SHOWN = 8  # places that are shown


@dataclass(frozen=True, slots=True)
class Figures:
    """Of the places of one text, or of all.

    perplexity, base_perplexity: with 95 % intervals, windows as independent samples; change: of the
    perplexity, as a fraction of the base's, with the interval of the paired difference; kl: mean of
    KL(base || model) in nats, with its standard error; same_top: the share of places with the same
    likeliest token; same_few, same_best: of the base's 5 and 10 likeliest that the model shares.
    """

    name: str
    places: int
    windows: int
    perplexity: float
    interval: tuple[float, float]
    base_perplexity: float
    base_interval: tuple[float, float]
    change: float
    change_interval: tuple[float, float]
    kl: float
    kl_standard_error: float
    kl_quantiles: Mapping[str, float]
    kl_most: float
    same_top: float
    same_few: float
    same_best: float


@dataclass(frozen=True, slots=True)
class Ties:
    """Where the likeliest token differs: how many places; the median of how many nats lie between
    the original's two best there; the share where these are within 0.1 nats; the share where the
    pack's best is the original's second."""

    places: int
    median_gap: float
    near: float
    second: float


@dataclass(frozen=True, slots=True)
class Bin:
    """Places whose probability of the likeliest token lies in one tenth: how many, its mean, and
    the share of them where something is so."""

    places: int
    mean: float
    share: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """How often the likeliest token comes, by the probability that it was given; error: the mean
    distance of the two over places (expected calibration error)."""

    bins: tuple[Bin, ...]
    error: float


@dataclass(frozen=True, slots=True)
class Place:
    """One place: the text before it, what came, what each model likes best, its divergence."""

    text: str
    before: str
    came: str
    base_best: str
    best: str
    kl: float


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the pack's predictions are beside the original's.

    along: of each text the mean KL of consecutive places, so many a point; agreement: by the
    original's confidence; worst: the places that differ most.
    """

    window: int
    total: Figures
    texts: tuple[Figures, ...]
    ties: Ties
    calibration: Calibration
    base_calibration: Calibration
    agreement: tuple[Bin, ...]
    along: tuple[tuple[int, tuple[float, ...]], ...]
    worst: tuple[Place, ...]
    is_text: bool = True


def figures(name: str, texts: Sequence[Places]) -> Figures:
    """Of these texts together."""
    counts = np.concatenate([text.counts for text in texts])
    starts = np.cumsum(counts) - counts

    def joined(field: str) -> F64:
        return np.concatenate([getattr(text, field) for text in texts])

    def mean(values: F64) -> tuple[float, float]:
        return mean_of_windows(np.add.reduceat(values, starts), counts)

    loss, base, kl = -joined("logprob"), -joined("base_logprob"), joined("kl")
    nll, base_nll, change, divergence = mean(loss), mean(base), mean(loss - base), mean(kl)
    common = joined("common").mean(axis=0)
    low, high = interval(*change)
    return Figures(
        name, int(counts.sum()), len(counts), exp(nll[0]), interval(*nll), exp(base_nll[0]),
        interval(*base_nll), exp(change[0]) - 1, (low - 1, high - 1), *divergence,
        {f"{100 * q:g}%": float(np.quantile(kl, q)) for q in QUANTILES}, float(kl.max()),
        float(joined("same").mean()), float(common[0]) / FEW, float(common[1]) / BEST,
    )  # fmt: skip


def exp(x: float) -> float:
    """exp, infinite where it is too large: a broken model's loss may be anything."""
    with np.errstate(over="ignore"):
        return float(np.exp(x))


def interval(mean: float, error: float) -> tuple[float, float]:
    """exp of the 95 % interval of a mean of logarithms."""
    return exp(mean - NORMAL_95 * error), exp(mean + NORMAL_95 * error)


def ties(texts: Sequence[Places]) -> Ties:
    other = np.concatenate([~text.same for text in texts])
    gap = np.concatenate([text.gap for text in texts])[other]
    second = np.concatenate([text.second for text in texts])[other]
    if not len(gap):
        return Ties(0, float("nan"), float("nan"), float("nan"))
    near = float((gap < _NEAR).mean())
    return Ties(len(gap), float(np.median(gap)), near, float(second.mean()))


def binned(probability: F64, holds: NDArray[np.bool_]) -> tuple[Bin, ...]:
    """Tenths of a probability, and how often something holds in each."""
    index = np.minimum((probability * _BINS).astype(np.int64), _BINS - 1)
    found = []
    for i in range(_BINS):
        here = index == i
        count = int(here.sum())
        share = float(holds[here].mean()) if count else float("nan")
        found.append(Bin(count, float(probability[here].mean()) if count else float("nan"), share))
    return tuple(found)


def calibration(confidence: F64, right: NDArray[np.bool_]) -> Calibration:
    bins = binned(confidence, right)
    off = sum(part.places * abs(part.mean - part.share) for part in bins if part.places)
    return Calibration(bins, off / len(confidence))


def along(text: Places) -> tuple[int, tuple[float, ...]]:
    """(places a point, the mean KL of each point) from the start of a text to its end."""
    size = max(_CHUNK, -(-len(text.kl) // _CHUNKS))
    starts = np.arange(0, len(text.kl), size)
    counts = np.diff([*starts, len(text.kl)])
    return size, tuple((np.add.reduceat(text.kl, starts) / counts).tolist())


def most_different(texts: Sequence[Places]) -> list[tuple[int, int]]:
    """(text, place in it) of the largest divergences where the likeliest token differs, at most one
    in four consecutive places."""
    all_places = [
        (float(text.kl[i]), number, int(i))
        for number, text in enumerate(texts)
        for i in np.flatnonzero(~text.same)
    ]
    found: list[tuple[int, int]] = []
    for _, number, i in sorted(all_places, key=lambda place: (-place[0], *place[1:])):
        if all(number != other or abs(i - j) >= 4 for other, j in found):
            found.append((number, i))
        if len(found) == _SHOWN:
            break
    return found
