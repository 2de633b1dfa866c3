"""Which backends there are, which can run here, and which one a load gets.

Nothing heavy is imported before a backend is asked for by name.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from bloomq.errors import BackendError, UsageError
from bloomq.layers import Backend
from bloomq.pack import Pack

NAMES = ("numba", "cuda", "jax", "reference")
_FASTEST_FIRST = ("cuda", "numba", "jax", "reference")


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend, and why it was taken."""

    backend: Backend
    reason: str


def one_line(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def why_not(name: str) -> str | None:
    """Why a backend cannot run here; None where it can."""
    if name == "jax" and importlib.util.find_spec("jax") is None:
        return "jax is not installed (it comes with pip install 'bloomq[jax]')"
    if name in ("numba", "jax"):
        try:
            importlib.import_module(name)
        except ImportError as error:  # not installed, or not for this NumPy
            return one_line(error)
        return None
    if name == "cuda":
        from bloomq.backends.cuda.device import why_not as why_not_cuda

        return why_not_cuda()
    return None


def available() -> list[str]:
    """The backends that can run here, best first."""
    return [name for name in _FASTEST_FIRST if why_not(name) is None]


def choose(
    name: str, pack: Pack, threads: int | None, cache_dtype: str = "auto", devices: str = "auto"
) -> Choice:
    """Build the backend `name` for a pack; "auto" takes the fastest that can run here.

    devices: "auto", "cpu", or "cuda:0" and so on, which asks for the CUDA backend. That one runs on
    torch's CPU device where it is asked for by name with devices="cpu": for tests.

    Raises: BackendError for one that is unknown or not available, UsageError for impossible
    threads or devices.
    """
    if name == "auto" and devices not in ("auto", "cpu"):
        name, reason = "cuda", "auto: what runs on these devices"
    elif name == "auto":
        name, reason = _fastest(on_gpu=devices == "auto")
    else:
        reason = "asked for"
    if name not in NAMES:
        raise BackendError(f"unknown backend {name!r}, expected auto, {', '.join(NAMES)}")
    if name != "cuda":
        if devices not in ("auto", "cpu"):
            raise UsageError(f"devices is {devices!r}, the {name} backend has the CPU alone")
        problem = why_not(name)
    else:
        problem = why_not(name) if devices == "auto" else None  # else it is asked for by device
    if problem is not None:
        raise BackendError(f"backend {name} is not available: {problem}: use one of {available()}")
    if cache_dtype not in ("auto", "f16", "f32", "int8"):
        raise UsageError(f"cache_dtype is {cache_dtype!r}, expected auto, f16, f32 or int8")
    if name != "numba" and not (threads is None or _is_count(threads)):
        raise UsageError(f"threads is {threads!r}, expected 1 or more, or None")
    if name in ("jax", "reference") and cache_dtype not in ("auto", "f32"):
        raise UsageError(f"cache_dtype is {cache_dtype!r}, the {name} backend has f32 alone")
    if cache_dtype == "auto":
        # Unquantized packs are the yardstick, so nothing of theirs is rounded to float16.
        exact = all(scheme.is_float for scheme in pack.schemes.values())
        cache_dtype = "f32" if exact else "f16"
    backend = _BUILD[name](threads, cache_dtype, devices)
    return Choice(backend, f"{reason}; {backend.description}")


def _fastest(*, on_gpu: bool) -> tuple[str, str]:
    """The fastest backend here, and what is to be said of those that are not: of CUDA, where there
    is no GPU and a CPU backend for any machine, nothing."""
    from bloomq.backends.cuda.device import NO_GPU

    passed = {}
    for name in _FASTEST_FIRST:
        problem = why_not(name) if on_gpu or name != "cuda" else NO_GPU
        if problem is None:
            break
        passed[name] = problem
    if name == "numba" and passed["cuda"] == NO_GPU:
        passed = {}
    said = [f"not {other}: {passed[other]}" for other in NAMES if other in passed]
    return name, "; ".join(["auto: the fastest available here", *said])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _numba(threads: int | None, cache_dtype: str, devices: str) -> Backend:
    from bloomq.backends.numba_cpu.layers import NumbaBackend

    return NumbaBackend(threads, cache_dtype)  # type: ignore[arg-type]  # checked by `choose`


def _cuda(threads: int | None, cache_dtype: str, devices: str) -> Backend:
    """torch has its own threads: see `choose`."""
    from bloomq.backends.cuda.device import one_device

    device = one_device(devices)
    from bloomq.backends.cuda.layers import CudaBackend

    return CudaBackend(device, cache_dtype)  # type: ignore[arg-type]  # checked by `choose`


def _reference(threads: int | None, cache_dtype: str, devices: str) -> Backend:
    """NumPy has its own threads, and the reference its float32 cache: see `choose`."""
    from bloomq.backends.reference import ReferenceBackend

    return ReferenceBackend()


def _jax(threads: int | None, cache_dtype: str, devices: str) -> Backend:
    """XLA has its own threads, and the cache is float32: see `choose`."""
    from bloomq.backends.jax.layers import JaxBackend

    return JaxBackend()


_BUILD: dict[str, Callable[[int | None, str, str], Backend]] = {
    "numba": _numba,
    "cuda": _cuda,
    "jax": _jax,
    "reference": _reference,
}
