"""A run of the GPU figures: its device and sizes, the clock, measured ceilings, rows as they come.

A ratio is of neighbours in time: every round samples the ceilings, then each engine once.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from bloomq.errors import BloomqError

ROWS = "figures.jsonl"
LINE_CHARACTERS = 200  # of an error in the table; the log has all of it


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of what is measured. tokens: of a decode sample, fewer for slow peers; buffer_bytes: of the
    copy that is the ceiling, many times an L2 of 60 MB."""

    prompt: int = 64
    tokens: int = 64
    peer_tokens: int = 16
    prefill: int = 2048
    batch: int = 32
    context: int = 2048
    big_batch: int = 4
    greedy: int = 200
    buffer_bytes: int = 1 << 30
    repeat: int = 5


TINY = Sizes(
    prompt=8, tokens=4, peer_tokens=2, prefill=96, batch=3, context=64, big_batch=2, greedy=24,
    buffer_bytes=1 << 20, repeat=1,
)  # fmt: skip


class Run:
    """What every section gets. tiny: the same code on shapes that any CPU runs in seconds."""

    def __init__(
        self, section: str, device: str, out: Path, scratch: Path, *, tiny: bool, seconds: float,
        strict: bool = False,
    ) -> None:  # fmt: skip
        """strict: whatever fails ends the run, with its traceback."""
        self.section, self.out, self.scratch = section, out, scratch
        self.tiny, self.strict = tiny, strict
        self.device = torch.device(device)
        self.sizes = TINY if tiny else Sizes()
        self._deadline = time.monotonic() + seconds

    @cached_property
    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Random bytes, and room for as many."""
        source = torch.randn(self.sizes.buffer_bytes // 4, device=self.device).view(torch.uint8)
        return source, torch.empty_like(source)

    def model(self, name: str) -> str:
        return "tiny" if self.tiny else name

    def left(self) -> float:
        """Seconds until this section's time is up."""
        return self._deadline - time.monotonic()

    def emit(self, what: str, **facts: object) -> None:
        """Append a row and say so."""
        row = {"section": self.section, "what": what, **facts}
        with (self.out / ROWS).open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def failed(self, what: str, error: BaseException) -> None:
        """Append a row that says why there is no figure; the traceback goes to the log."""
        if self.strict:
            raise error
        traceback.print_exception(error)
        sys.stderr.flush()
        self.emit(what, failed=one_line(error))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """That `work` takes, what it started on the device included."""
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def copy_gb_s(self) -> float:
        """Of a copy within the device, bytes read and written."""
        source, target = self._buffers
        seconds = self.seconds(lambda: [target.copy_(source) for _ in range(10)])
        return 20 * source.nbytes / seconds / 1e9

    def read_gb_s(self) -> float:
        """Of a sum over the same bytes."""
        values = self._buffers[0].view(torch.float32)
        seconds = self.seconds(lambda: [values.sum() for _ in range(10)])
        return 10 * values.nbytes / seconds / 1e9

    def bus_gb_s(self, size: int = 256 << 20) -> float:
        """Of a copy from locked host memory to the device: what PCIe gives."""
        size = min(size, self.sizes.buffer_bytes)
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        pinned.random_(0, 256)
        there = self._buffers[1][:size]
        self.seconds(lambda: there.copy_(pinned))
        seconds = self.seconds(lambda: [there.copy_(pinned, non_blocking=True) for _ in range(4)])
        return 4 * size / seconds / 1e9

    def free(self) -> None:
        """Give memory back that nothing holds."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Engine(Protocol):
    """A loaded model whose work can be asked for in samples.

    bytes_per_token: of weights that a step reads; token_bytes: of keys and values of one token.
    """

    name: str
    is_peer: bool
    bytes_per_token: int
    token_bytes: int

    def start(self, ids: Any) -> object:
        """Read prompts [B, T] in rows of their own, from an empty cache."""
        ...

    def decode(self, count: int) -> object:
        """Produce `count` tokens in each row, greedily."""
        ...


@dataclass(frozen=True, slots=True)
class Sample:
    """seconds a token (of one row), or of a whole prompt."""

    seconds: float
    copy_gb_s: float
    read_gb_s: float


Take = Callable[[Engine], float]


def in_turns(
    run: Run, engines: Mapping[str, Engine], take: Take,
    say: Callable[[Mapping[str, list[Sample]]], None] = lambda samples: None,
) -> dict[str, list[Sample]]:  # fmt: skip
    """Samples of every engine, round after round, each a row at once; the first round, which
    compiles and captures, is not kept. What fails is said, and asked no more. say: is given all
    samples after every round, so that a run which is cut off has its figures."""
    samples: dict[str, list[Sample]] = {name: [] for name in engines}
    lost: set[str] = set()
    for round_ in range(run.sizes.repeat + 1):
        if round_ > 1 and run.left() < 0:
            break
        copy, read = run.copy_gb_s(), run.read_gb_s()
        for name, engine in engines.items():
            if name in lost:
                continue
            try:
                seconds = take(engine)
            except Exception as error:  # any engine's any fault: the others are still measured
                run.failed(name, error)
                lost.add(name)
                continue
            if round_:
                sample = Sample(seconds, copy, read)
                samples[name].append(sample)
                run.emit(f"sample {round_} of {name}", **asdict(sample))
        if round_:
            say({name: found for name, found in samples.items() if found})
    return {name: found for name, found in samples.items() if found}


def report(
    run: Run, model: str, batch: int, depth: float, engines: Mapping[str, Engine],
    samples: Mapping[str, list[Sample]],
) -> None:  # fmt: skip
    """A row of decode for each engine. GB/s: weights, as few bytes as a pack has them in, and keys
    and values at the middle depth; percent: of the higher of the two ceilings beside it."""
    for name, found in samples.items():
        engine = engines[name]
        seconds = [sample.seconds for sample in found]
        step = engine.bytes_per_token + batch * depth * engine.token_bytes
        share = [
            100 * step / s.seconds / 1e9 / max(s.copy_gb_s, s.read_gb_s) for s in found
        ]  # of the higher ceiling  # fmt: skip
        run.emit(
            name, model=model, batch=batch, peer=engine.is_peer,
            tokens_per_s=round(batch / median(seconds), 2), step_s=seconds,
            step_gb=round(step / 1e9, 3), gb_s=round(step / median(seconds) / 1e9, 1),
            percent=round(median(share), 1),
            copy_gb_s=[round(s.copy_gb_s, 1) for s in found],
            read_gb_s=[round(s.read_gb_s, 1) for s in found],
        )  # fmt: skip


def built(run: Run, makers: Mapping[str, Callable[[], Engine]]) -> dict[str, Engine]:
    """The engines that can be built here; a row for each that cannot."""
    engines: dict[str, Engine] = {}
    for name, make in makers.items():
        try:
            engines[name] = make()
        except Exception as error:  # a missing package, no memory, a kernel that does not compile
            run.failed(name, error)
            run.free()
    return engines


def one_line(error: BaseException) -> str:
    """What an error says, for a table."""
    said = str(error).strip().splitlines()
    first = said[0] if said else ""
    kind = "" if isinstance(error, BloomqError) else f"{type(error).__name__}: "
    return (kind + first).strip()[:LINE_CHARACTERS]


def status_mb(field: str) -> float:
    """Of this process, as Linux says: VmHWM is its peak, RssAnon what no file backs."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024 / 1e6
