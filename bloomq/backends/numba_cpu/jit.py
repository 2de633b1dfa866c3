"""Compiling and caching: which instructions this processor has, where compiled kernels are kept.

Invariant: a cached kernel is used only by the sources, versions and processor that made it. Numba
keys its cache by the file of the function alone, so the directory is named after a digest of all of
this package's sources.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

import llvmlite
import numba
from llvmlite import binding as llvm

from bloomq.backends.numba_cpu.simd import TIERS

_log = logging.getLogger("bloomq.compile")
# Only explicit prange loops become parallel: array expressions are left as they are written.
_PARALLEL = {
    "comprehension": False, "reduction": False, "inplace_binop": False, "setitem": False,
    "numpy": False, "stencil": False, "fusion": False, "prange": True,
}  # fmt: skip


def cpu_features() -> frozenset[str]:
    """The LLVM feature names that compiled code may use: the processor's own, or what
    NUMBA_CPU_NAME and NUMBA_CPU_FEATURES lower them to."""
    text = numba.config.CPU_FEATURES
    if text is None and numba.config.CPU_NAME in (None, "host"):
        return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)
    return frozenset(item[1:] for item in (text or "").split(",") if item.startswith("+"))


def best_tier(features: frozenset[str]) -> str:
    """The first tier of `simd.TIERS` whose features are all there."""
    return next(tier for tier, needs in TIERS.items() if features.issuperset(needs))


def cache_dir() -> Path:
    """Where compiled kernels are kept: BLOOMQ_CACHE_DIR, or bloomq in the user's cache
    directory.
    """
    base = os.environ.get("BLOOMQ_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "bloomq"
    )
    return Path(base) / f"kernels-{_source_digest()}"


@lru_cache(maxsize=1)
def _source_digest() -> str:
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    folder = Path(__file__).parent
    for source in [*sorted(folder.glob("*.py")), folder.parent.parent / "schemes.py"]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _cache_here() -> Iterator[bool]:
    """Numba's cache directory set to ours while a function is declared, then put back.

    Yields False where the directory cannot be written: kernels are then compiled in every process.
    The files hold pickles, so the directory is the owner's alone.
    """
    directory = cache_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        writable = os.access(directory, os.W_OK)
    except OSError:
        writable = False
    before = numba.config.CACHE_DIR
    if writable:
        numba.config.CACHE_DIR = str(directory)
    try:
        yield writable
    finally:
        numba.config.CACHE_DIR = before


def compiled(
    signature: Any, *, parallel: bool = False, fastmath: frozenset[str] = frozenset()
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: compile now, for one signature, without the GIL, through the cache.

    A compilation (not a cache hit) is logged on `bloomq.compile`: it takes seconds.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        started = perf_counter()
        with _cache_here() as cached:
            kernel = numba.njit(
                signature,
                parallel=_PARALLEL if parallel else False,
                fastmath=set(fastmath),
                cache=cached,
                nogil=True,
                error_model="numpy",
            )(function)
        if not kernel.stats.cache_hits:
            spent = perf_counter() - started
            _log.info("compiled %s for this machine, once (%.1f s)", function.__name__, spent)
        return kernel

    return decorate
