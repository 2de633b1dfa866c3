"""Which backends there are, which can run here, and which one a load gets.

Nothing heavy is imported before a backend is asked for by name.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from bloomq.errors import BackendError
from bloomq.layers import Backend
from bloomq.pack import Pack

NAMES = ("numba", "cuda", "reference")


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend, and why it was taken."""

    backend: Backend
    reason: str


def why_not(name: str) -> str | None:
    """Why a backend cannot run here; None where it can."""
    if name == "numba":
        return None if importlib.util.find_spec("numba") else "numba is not installed"
    if name == "cuda":
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed, and this version of bloomq has no CUDA layers yet"
        return "this version of bloomq has no CUDA layers yet"
    return None


def available() -> list[str]:
    """The backends that can run here, best first."""
    return [name for name in NAMES if why_not(name) is None]


def choose(name: str, pack: Pack, threads: int | None) -> Choice:
    """Build the backend `name` for a pack; "auto" takes the first that can run here.

    Raises: BackendError for one that is unknown or not available, UsageError for impossible
    threads.
    """
    if name == "auto":
        name, reason = available()[0], "auto: the fastest available here"
    else:
        reason = "asked for"
    if name not in NAMES:
        raise BackendError(f"unknown backend {name!r}, expected auto, {', '.join(NAMES)}")
    problem = why_not(name)
    if problem is not None:
        raise BackendError(f"backend {name} is not available: {problem}: use one of {available()}")
    backend = _BUILD[name](pack, threads)
    return Choice(backend, f"{reason}; {backend.description}")


def _numba(pack: Pack, threads: int | None) -> Backend:
    from bloomq.backends.numba_cpu.layers import NumbaBackend

    # Unquantized packs are the yardstick, so nothing of theirs is rounded to float16.
    exact = all(scheme.is_float for scheme in pack.schemes.values())
    return NumbaBackend(threads, "f32" if exact else "f16")


def _reference(pack: Pack, threads: int | None) -> Backend:
    from bloomq.backends.reference import ReferenceBackend

    return ReferenceBackend()


_BUILD: dict[str, Callable[[Pack, int | None], Backend]] = {
    "numba": _numba,
    "reference": _reference,
}
