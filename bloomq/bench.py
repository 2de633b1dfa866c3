"""Speed of a pack here: prefill and decode beside the machine's ceilings, measured in turn.

Tests bear llama-bench's names: `pp512` is a prompt of 512 tokens, `tg128` 128 tokens produced one
after another, `@ d2048` behind 2,048 tokens of context, `x 8` in 8 rows: prompts one after another,
tokens in one step. Every sample of a test follows a sample of the ceilings, because machines drift
by far more than kernels differ.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.layers import NumbaBackend
from bloomq.errors import UsageError
from bloomq.heads import Head
from bloomq.layers import Cache, Span
from bloomq.pack import Pack

I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Workload:
    """A prompt of `prompt` tokens, or `generated` tokens one by one, in each of `batch` rows that
    hold `depth` tokens already. Raises: UsageError for what cannot be."""

    prompt: int = 0
    generated: int = 0
    depth: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        for name in ("prompt", "generated", "depth"):
            if not 0 <= getattr(self, name) <= 1 << 20:
                raise UsageError(f"{name} of {getattr(self, name)} tokens, expected 0 to 1048576")
        if not 1 <= self.batch <= 1024:
            raise UsageError(f"batch of {self.batch} rows, expected 1 to 1024")

    @property
    def name(self) -> str:
        name = f"pp{self.prompt}" if self.prompt else f"tg{self.generated}"
        name += f" @ d{self.depth}" if self.depth else ""
        return name + (f" x {self.batch}" if self.batch > 1 else "")

    @property
    def tokens(self) -> int:
        return (self.prompt or self.generated) * self.batch


@dataclass(slots=True)
class Result:
    """The samples of a test. token_bytes: keys and values of a token; sample_s: seconds of each
    run; step_s: of each decode step of all runs; bandwidth_gb_s, dot_gmac_s: the ceilings before
    each run."""

    test: Workload
    token_bytes: float
    sample_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    bandwidth_gb_s: list[float] = field(default_factory=list)
    dot_gmac_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.test.tokens / median(self.sample_s)

    @property
    def spread(self) -> float:
        """Half the range of the samples, tokens/s."""
        return self.test.tokens * (1 / min(self.sample_s) - 1 / max(self.sample_s)) / 2


class Bench:
    """Runs tests on a pack. `model`: loaded for the Numba backend.

    Raises: UsageError for impossible tests, CapacityError where a cache does not fit.
    """

    def __init__(self, lm: Head, pack: Pack) -> None:
        backend = lm.backend
        if not isinstance(backend, NumbaBackend):
            raise UsageError(f"bench measures the numba backend, not {backend.name}")
        self._lm, self._pack = lm, pack
        self._ceilings = backend.ceilings()
        self._rng = np.random.default_rng(0)

    @property
    def measuring_mb(self) -> float:
        """Memory that only the measurement of the ceilings takes, in 10^6 bytes."""
        return self._ceilings.nbytes / 1e6

    def ceilings(self, samples: int = 3) -> tuple[float, float]:
        """Medians of read bandwidth, GB/s, and of int8 products, 10^9/s."""
        reads = [self._ceilings.read_gb_s() for _ in range(samples)]
        return median(reads), median(self._ceilings.dot_gmac_s() for _ in range(samples))

    def run(self, tests: Sequence[Workload], repeat: int) -> Iterator[Result]:
        """Results as they are ready: each test once unmeasured, then `repeat` times."""
        if repeat < 1:
            raise UsageError(f"repetitions {repeat}, expected at least 1")
        for test in tests:
            yield self._measure(test, repeat)

    def _measure(self, test: Workload, repeat: int) -> Result:
        cache = self._lm.cache(test.batch, test.depth + max(test.prompt, test.generated))
        self._fill(cache, test.depth)
        result = Result(test, cache.token_bytes)
        self._once(test, cache, Result(test, 0))  # unmeasured
        for _ in range(repeat):
            result.bandwidth_gb_s.append(self._ceilings.read_gb_s())
            result.dot_gmac_s.append(self._ceilings.dot_gmac_s())
            self._once(test, cache, result)
        return result

    def _once(self, test: Workload, cache: Cache, result: Result) -> None:
        for row in range(test.batch):
            cache.truncate(row, test.depth)
        if test.prompt:
            started = perf_counter()
            for row in range(test.batch):
                self._prefill(cache, row, test.prompt)
            result.sample_s.append(perf_counter() - started)
            return
        steps = self._decode(cache, test)
        result.sample_s.append(sum(steps))
        result.step_s += steps

    def _fill(self, cache: Cache, depth: int) -> None:
        """The same `depth` tokens in every row."""
        if depth:
            self._prefill(cache, 0, depth)
            for row in range(1, cache.batch):
                cache.copy(0, row)

    def _prefill(self, cache: Cache, row: int, tokens: int) -> None:
        ids, most = self._random_ids(tokens), self._lm.backend.step_tokens
        for start in range(0, tokens, most):
            part = ids[start : start + most]
            last = np.arange(len(part))[-1:] if start + len(part) == tokens else np.arange(0)
            self._lm.step(part, cache, Span.of([row], [len(part)]), last)

    def _decode(self, cache: Cache, test: Workload) -> list[float]:
        """Seconds of each greedy step."""
        ids, rows = self._random_ids(test.batch), list(range(test.batch))
        span, wanted = Span.of(rows, [1] * test.batch), np.arange(test.batch)
        seconds = []
        for _ in range(test.generated):
            started = perf_counter()
            logits = self._lm.step(ids, cache, span, wanted)
            ids = self._lm.backend.top(logits, 1).ids[:, 0]
            seconds.append(perf_counter() - started)
        return seconds

    def _random_ids(self, count: int) -> I64:
        return self._rng.integers(0, self._lm.config.vocab_size, count)

    def row(self, result: Result) -> dict[str, object]:
        """A result as a table and JSON show it. GB/s: of the weights and of all keys and values
        (those that are skipped included); GMAC/s: of the matrices."""
        test, rate = result.test, result.tokens_per_s
        row: dict[str, object] = {
            "test": test.name, "tokens_per_s": round(rate, 2), "spread": round(result.spread, 2),
            "sample_s": [round(s, 5) for s in result.sample_s],
            "bandwidth_gb_s": round(median(result.bandwidth_gb_s), 1),
            "dot_gmac_s": round(median(result.dot_gmac_s)),
        }  # fmt: skip
        if test.prompt:
            gmac_s = rate * self._products / 1e9
            row["gmac_s"] = round(gmac_s)
            row["percent"] = round(100 * gmac_s / median(result.dot_gmac_s), 1)
        else:
            held = test.depth + test.generated / 2  # tokens of a row, in the middle of the test
            step_bytes = self._pack.bytes_per_token + test.batch * held * result.token_bytes
            gb_s = rate / test.batch * step_bytes / 1e9
            low, high = np.percentile(result.step_s, [50, 90]) * 1e3
            row |= {"ms_p50": round(low, 2), "ms_p90": round(high, 2), "gb_s": round(gb_s, 1)}
            row["percent"] = round(100 * gb_s / median(result.bandwidth_gb_s), 1)
        return row

    @property
    def _products(self) -> int:
        """Of a prompt's token: every matrix but the table, the head and the last block's MLP, which
        few tokens need."""
        last = f"h.{self._pack.config.n_layer - 1}.mlp."
        few = ("wte", "lm_head", last + "up", last + "down")
        body = [name for name in self._pack.schemes if name not in few]
        return sum(math.prod(self._pack.matrix(name).shape) for name in body)


def plan(
    prompts: Sequence[int], generated: Sequence[int], depths: Sequence[int], batches: Sequence[int]
) -> list[Workload]:
    """Every prompt length and every number of generated tokens, at every depth, in every batch;
    0 leaves that kind of test out. Raises: UsageError for what cannot be."""
    tests = []
    for depth in depths:
        for batch in batches:
            tests += [Workload(prompt=p, depth=depth, batch=batch) for p in prompts if p]
            tests += [Workload(generated=n, depth=depth, batch=batch) for n in generated if n]
    if not tests:
        raise UsageError("nothing to measure: give -p or -n above 0")
    return tests


def peak_rss_mb() -> float:
    """The largest memory this process has had, mapped files included, in 10^6 bytes; NaN where the
    system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
