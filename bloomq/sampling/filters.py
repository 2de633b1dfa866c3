"""What cuts and shapes the distribution before a draw: temperature, top-k, top-p, min-p, typical,
top-n-sigma, XTC, mirostat.

A filter takes candidates and gives candidates; None means that the answer depends on tokens that
are not listed. Then the filters start anew, on a longer list, and at last on the whole row by its
levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bloomq.sampling.candidates import Candidates
from bloomq.sampling.listed import Listed
from bloomq.sampling.logits import Logits
from bloomq.sampling.options import LEAST_TEMPERATURE, Sampling
from bloomq.sampling.ranked import Ranked

# How many tokens are listed at first, and then: a nucleus has fewer in most places of a text.
FEW = (256, 1024)


@dataclass(slots=True)
class Turn:
    """What differs from token to token: does XTC exclude this time, and mirostat's bound in bits
    (None: mirostat is off)."""

    exclude: bool = False
    surprise: float | None = None


Filter = Callable[[Sampling, Turn, Candidates], Candidates | None]


def temperature(sampling: Sampling, turn: Turn, c: Candidates) -> Candidates | None:
    """Scores divided by the temperature; by a dynamic one, that follows the entropy: from
    temperature - range, where one token has all, to temperature + range, where all are equal.

    Source of the dynamic one: llama.cpp's llama_sampler_temp_ext (kalomaze).
    """
    middle, extent = sampling.temperature, sampling.dynamic_temperature
    if not extent:
        return c if middle == 1.0 else c.cooled(middle)
    size = c.size()
    if size < 2:
        return c
    unsure = max(c.entropy(), 0.0) / np.log(size)
    low, high = max(middle - extent, 0.0), middle + extent
    dynamic = low + (high - low) * unsure**sampling.dynamic_exponent
    return c.cooled(max(float(dynamic), LEAST_TEMPERATURE))


def top_k(sampling: Sampling, turn: Turn, c: Candidates) -> Candidates | None:
    """The k likeliest, of equals those of the lower id."""
    return c.first(sampling.top_k)


def top_p(sampling: Sampling, turn: Turn, c: Candidates) -> Candidates | None:
    """The fewest whose probabilities reach top_p. Source: arXiv 1904.09751."""
    return c.reaching(sampling.top_p)


def min_p(sampling: Sampling, turn: Turn, c: Candidates) -> Candidates | None:
    """Those at least min_p times as likely as the likeliest. Source: arXiv 2407.01082."""
    return c.at_least(c.best + float(np.log(sampling.min_p)))


def top_n_sigma(sampling: Sampling, turn: Turn, c: Candidates) -> Candidates | None:
    """Those whose scores are within n standard deviations of the best. Source: arXiv 2411.07641."""
    return c.at_least(c.best - sampling.top_n_sigma * c.deviation())


def typical(sampling: Sampling, turn: Turn, c: Candidates) -> Candidates | None:
    """Those whose surprise is nearest to the entropy, the fewest whose probabilities reach
    typical_p; of equally near ones all. Source: arXiv 2202.00666, transformers'
    TypicalLogitsWarper."""
    return c.typical(sampling.typical_p)


def xtc(sampling: Sampling, turn: Turn, c: Candidates) -> Candidates | None:
    """All but those above the threshold, of which the least likely stays. Source: p-e-w,
    text-generation-webui pull request 6335; llama.cpp's llama_sampler_xtc."""
    return c.below(sampling.xtc_threshold) if turn.exclude else c


def mirostat(sampling: Sampling, turn: Turn, c: Candidates) -> Candidates | None:
    """Those with a surprise of at most the bound, at least the likeliest. Source: arXiv
    2007.14966, algorithm 2, as in llama.cpp's llama_sampler_mirostat_v2."""
    if turn.surprise is None:
        return c
    return c.at_least(c.logsumexp() - turn.surprise * float(np.log(2)))


FILTERS: dict[str, Filter] = {
    "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
    "typical": typical, "top_n_sigma": top_n_sigma, "xtc": xtc,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chain:
    """The filters that do something, in their order, and then mirostat."""

    sampling: Sampling
    filters: tuple[Filter, ...]
    temperature: float  # at which the levels of a row are wanted first

    @classmethod
    def of(cls, sampling: Sampling) -> Chain:
        on = {
            "temperature": sampling.temperature != 1.0 or sampling.dynamic_temperature > 0,
            "top_k": sampling.top_k > 0, "top_p": sampling.top_p < 1.0,
            "min_p": sampling.min_p > 0, "typical": sampling.typical_p < 1.0,
            "top_n_sigma": sampling.top_n_sigma > 0, "xtc": sampling.xtc_probability > 0,
        }  # fmt: skip
        names = [name for name in sampling.order if on[name]]
        filters = [FILTERS[name] for name in names]
        if sampling.mirostat_tau:
            filters.append(mirostat)
        plain = names[:1] == ["temperature"] and not sampling.dynamic_temperature
        return cls(sampling, tuple(filters), sampling.temperature if plain else 1.0)

    @property
    def cuts(self) -> bool:
        """Is the draw from a part of the tokens, even where XTC spares them all?"""
        return bool(set(self.filters) - {temperature, xtc})

    def left(self, row: Logits, turn: Turn, few: int = FEW[0]) -> Candidates:
        """What the filters leave of a row; at least one token. few: tokens listed at first (0:
        none), which changes the time, and where two are equally good to rounding which is taken."""
        sizes = [self.sampling.top_k or few]
        if not self.sampling.top_k:
            sizes += [size for size in FEW if size > few]
        for size in sizes if sizes[0] else ():
            found = self._applied(turn, Listed.of(row, size))
            if found is not None:
                return found
        found = self._applied(turn, Ranked.of(row, self.temperature))
        assert found is not None, "levels know everything"
        return found

    def _applied(self, turn: Turn, start: Candidates) -> Candidates | None:
        found: Candidates | None = start
        for step in self.filters:
            if found is None:
                break
            found = step(self.sampling, turn, found)
        return found
