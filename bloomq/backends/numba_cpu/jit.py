"""Compiling and caching: which instructions this processor has, where compiled kernels are kept.

Invariant: a cached kernel is used only by the sources, versions and processor that made it. Numba
keys its cache by the file of the function alone, so the directory is named after a digest of all of
this package's sources.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from time import perf_counter
from typing import Any

import llvmlite
import numba
from llvmlite import binding as llvm

from bloomq.backends.numba_cpu.simd import TIERS

_log = logging.getLogger("bloomq.compile")
_CACHE_SETTING = threading.Lock()
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
    """Where compiled kernels are kept: BLOOMQ_CACHE_DIR, or bloomq in the user's cache folder."""
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


def _is_private(directory: Path) -> bool:
    """Can we write there, and nobody else? Cached kernels are pickles, which run code when read."""
    if not directory.is_absolute():  # no home folder: "~" was not expanded
        return False
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = directory.stat()
    except OSError:
        return False
    if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        return False
    return os.access(directory, os.W_OK)


@contextmanager
def _cache_at(directory: Path) -> Iterator[None]:
    """Numba's cache directory set while a function is declared, then put back: the setting is
    Numba's own, for all functions of the process."""
    with _CACHE_SETTING:
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(directory)
        try:
            yield
        finally:
            numba.config.CACHE_DIR = before


def compiled(signature: Any, *, parallel: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: compile now, for one signature, without the GIL, through the cache.

    A compilation (not a cache hit) is logged on `bloomq.compile`: it takes seconds. A cache that
    cannot be used costs time, never an error.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        started = perf_counter()
        kernel = _from_cache(function, signature, parallel)
        if kernel is None:
            kernel = _declare(function, signature, parallel, cache=False)
        if not kernel.stats.cache_hits:
            spent = perf_counter() - started
            _log.info("compiled %s (%.1f s)", function.__name__, spent)
        return kernel

    return decorate


def _declare(function: Callable[..., Any], signature: Any, parallel: bool, cache: bool) -> Any:
    return numba.njit(
        signature,
        parallel=_PARALLEL if parallel else False,
        cache=cache,
        nogil=True,
        error_model="numpy",
    )(function)


def _from_cache(function: Callable[..., Any], signature: Any, parallel: bool) -> Any:
    """The kernel through the cache; None, with a line in the log, where the cache is of no use."""
    directory = cache_dir()
    if not _is_private(directory):
        _log.warning(
            "%s is not a folder that only you can write: kernels are compiled in every process; "
            "set BLOOMQ_CACHE_DIR to one that is",
            directory,
        )
        return None
    try:
        with _cache_at(directory):
            return _declare(function, signature, parallel, cache=True)
    except (OSError, EOFError, ValueError, UnpicklingError) as error:
        _log.warning("%s is damaged or full (%s): delete it", directory, error)
        return None
