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
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed, and this version of bloomq has no CUDA layers yet"
        return "this version of bloomq has no CUDA layers yet"
    return None


def available() -> list[str]:
    """The backends that can run here, best first."""
    return [name for name in NAMES if why_not(name) is None]


def choose(name: str, pack: Pack, threads: int | None, cache_dtype: str = "auto") -> Choice:
    """Build the backend `name` for a pack; "auto" takes the first that can run here.

    Raises: BackendError for one that is unknown or not available, UsageError for impossible
    threads.
    """
    if name == "auto":
        name = next(n for n in NAMES if why_not(n) is None)  # none after it is imported to ask
        passed = [f"not {n}: {why_not(n)}" for n in NAMES[: NAMES.index(name)]]
        reason = "; ".join(["auto: the fastest available here", *passed])
    else:
        reason = "asked for"
    if name not in NAMES:
        raise BackendError(f"unknown backend {name!r}, expected auto, {', '.join(NAMES)}")
    problem = why_not(name)
    if problem is not None:
        raise BackendError(f"backend {name} is not available: {problem}: use one of {available()}")
    if cache_dtype not in ("auto", "f16", "f32", "int8"):
        raise UsageError(f"cache_dtype is {cache_dtype!r}, expected auto, f16, f32 or int8")
    if name in ("jax", "reference") and not (threads is None or _is_count(threads)):
        raise UsageError(f"threads is {threads!r}, expected 1 or more, or None")
    if name in ("jax", "reference") and cache_dtype not in ("auto", "f32"):
        raise UsageError(f"cache_dtype is {cache_dtype!r}, the {name} backend has f32 alone")
    if cache_dtype == "auto":
        # Unquantized packs are the yardstick, so nothing of theirs is rounded to float16.
        exact = all(scheme.is_float for scheme in pack.schemes.values())
        cache_dtype = "f32" if exact else "f16"
    backend = _BUILD[name](threads, cache_dtype)
    return Choice(backend, f"{reason}; {backend.description}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _numba(threads: int | None, cache_dtype: str) -> Backend:
    from bloomq.backends.numba_cpu.layers import NumbaBackend

    return NumbaBackend(threads, cache_dtype)  # type: ignore[arg-type]  # checked by `choose`


def _reference(threads: int | None, cache_dtype: str) -> Backend:
    """NumPy has its own threads, and the reference its float32 cache: see `choose`."""
    from bloomq.backends.reference import ReferenceBackend

    return ReferenceBackend()


def _jax(threads: int | None, cache_dtype: str) -> Backend:
    """XLA has its own threads, and the cache is float32: see `choose`."""
    from bloomq.backends.jax.layers import JaxBackend

    return JaxBackend()


_BUILD: dict[str, Callable[[int | None, str], Backend]] = {
    "numba": _numba,
    "jax": _jax,
    "reference": _reference,
}
