"""What a calibration's heavy arithmetic is done with: the CPU's kernels, or torch on a GPU.

What runs it, the order of its work, its scratch files and what it stores are written once, over
this. `X` is an engine's own array type; what is small, and what a pack stores, is NumPy's.
Invariant: one engine gives the same bytes each time; another one may round elsewhere, so a pack's
provenance names the device (`Device.label`), and an interrupted run goes on only on the same.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.cuda.device import why_not
from bloomq.backends.numba_cpu.threads import physical_cores
from bloomq.errors import BackendError, UsageError
from bloomq.schemes import Scheme

from .gptq import Codes

X = Any
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What was chosen for some rows; nearest: of them those that rounding to nearest does better
    or as no number."""

    codes: Codes
    nearest: I64


class Sums(Protocol):
    """Mean and second moment of rows that come a few at a time."""

    def add(self, x: X) -> None:
        """x [M, K], of the engine or NumPy's."""
        ...

    def result(self, *, central: bool) -> tuple[F32, X]:
        """(mean [K], moment [K, K]), about the mean or about 0; at most once."""
        ...


class Regression(Protocol):
    """Sums over a text of what a matrix should add: see `making_up.Wanted`."""

    def add(self, a: X, before: X) -> None: ...
    def weights(self, w: F32, mean: F32, moment: X) -> tuple[F32, F32]: ...


class Rounding(Protocol):
    """Codes of rows that keep their outputs under one moment of the inputs."""

    def rows(self, w: F32, nearest: F32) -> list[Found]:
        """One for each `solver.SPAN` of the rows w [n, K]; nearest: what rounding them to nearest
        stands for."""
        ...


class Engine(Protocol):
    """layers: those of a block; at_once: tokens that one product takes, None for any number;
    pool: the host's threads; solved_rows(k): rows of K columns that are solved at a time."""

    @property
    def layers(self) -> Any: ...
    @property
    def at_once(self) -> int | None: ...
    @property
    def pool(self) -> ThreadPoolExecutor: ...
    def there(self, x: F32) -> X:
        """x, contiguous, in the engine's memory."""
        ...

    def moments(self) -> Sums: ...
    def wanted(self, stream: F32, moments: Sums) -> Regression: ...
    def rounding(self, moment: X, scheme: Scheme, *, damping: float, sweeps: int) -> Rounding:
        """moment: [K, K], taken over and overwritten. Raises: NumericError."""
        ...

    def solved_rows(self, k: int) -> int: ...
    def watched(self) -> AbstractContextManager[None]:
        """Within it, the engine's own errors become ours. Raises: CapacityError."""
        ...


@dataclass(frozen=True, slots=True)
class Device:
    """Where a calibration computes; torch: torch's name of it, None for the CPU's own kernels."""

    torch: str | None = None

    @property
    def label(self) -> str:
        """What its bytes depend on: of a GPU the kind and torch's version."""
        if self.torch is None:
            return "cpu"
        from .torch_engine import label_of

        return label_of(self.torch)

    def engine(self, pool: ThreadPoolExecutor, threads: int | None) -> Engine:
        """threads: of the CPU's layers, None for one a core."""
        if self.torch is None:
            from .cpu_engine import CpuEngine

            return CpuEngine(pool, threads)
        from .torch_engine import TorchEngine

        return TorchEngine(self.torch, pool)


CPU = Device()


def device_of(name: str) -> Device:
    """The device "cpu", "cuda" (the first GPU) or "cuda:N".

    Raises: UsageError for what names none; BackendError where there is none, or no torch.
    """
    if name == "cpu":
        return CPU
    if not isinstance(name, str) or not re.fullmatch(r"cuda(:\d{1,3})?", name):
        raise UsageError(f"calibration device is {name!r}, expected cpu, cuda, cuda:0 and so on")
    problem = why_not()
    if problem is not None:
        raise BackendError(f"cannot calibrate on {name}: {problem}: the device cpu needs no GPU")
    import torch

    number, count = int(name[5:] or 0), torch.cuda.device_count()
    if number >= count:
        raise UsageError(
            f"calibration device is {name}, expected one of the {count} GPUs that torch sees: they "
            "begin with cuda:0"
        )
    return Device(f"cuda:{number}")


def threads_of(threads: int | None) -> int:
    """Of the host's pool: so many, or one a core."""
    return threads or physical_cores()
