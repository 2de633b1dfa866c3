"""Compiling and caching: how kernels are declared, and where what was compiled is kept.

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

_log = logging.getLogger("bloomq.compile")
_CACHE_SETTING = threading.Lock()
CONSTANTS = ("grids", "levels", "schemes")  # modules of bloomq whose constants kernels hold

# Sums may be vectorised; NaN and infinity keep their meaning (fastmath=True would drop them).
VECTOR_SUMS = frozenset({"reassoc", "contract", "nsz"})


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
    others = (folder.parent.parent / f"{name}.py" for name in CONSTANTS)
    for source in [*sorted(folder.glob("*.py")), *others]:
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


# A kernel of a program: kernel(address of its arguments, first unit, last unit). See program.py.
KERNEL = numba.void(numba.int64, numba.int64, numba.int64)


def kernel(function: Callable[..., Any]) -> Any:
    """Decorator: a kernel of a `Program`, compiled now, with its `address` to be called at.

    Kernels run without the GIL and raise nothing.
    """
    return _compile(function, lambda cache: _declare_kernel(function, cache))


def compiled(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: a function called from Python, compiled now for one signature, without the GIL."""

    def decorate(function: Callable[..., Any]) -> Any:
        return _compile(function, lambda cache: _declare(function, signature, cache))

    return decorate


def called(*, fastmath: frozenset[str] = frozenset()) -> Any:
    """Decorator: a function that kernels call. Python cannot call it, which saves a third of the
    time that compiling it takes."""
    return numba.njit(
        no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy", fastmath=set(fastmath)
    )


def _compile(function: Callable[..., Any], declare: Callable[[bool], Any]) -> Any:
    """Declare a function through the cache. A compilation (not a cache hit) is logged on
    `bloomq.compile`: it takes time. A cache that cannot be used costs time, never an error."""
    started = perf_counter()
    made = _through_cache(declare)
    if made is None:
        made = declare(False)
    hits = made.cache_hits if hasattr(made, "cache_hits") else len(made.stats.cache_hits)
    if not hits:
        _log.info("compiled %s (%.1f s)", function.__name__, perf_counter() - started)
    return made


def _declare_kernel(function: Callable[..., Any], cache: bool) -> Any:
    return numba.cfunc(KERNEL, nopython=True, cache=cache, error_model="numpy")(function)


def _declare(function: Callable[..., Any], signature: Any, cache: bool) -> Any:
    return numba.njit(signature, cache=cache, nogil=True, error_model="numpy")(function)


def _through_cache(declare: Callable[[bool], Any]) -> Any:
    """What `declare` makes through the cache; None, with a line in the log, where the cache is of
    no use."""
    directory = cache_dir()
    if not _is_private(directory):
        _warn_once(
            f"{directory} is not a folder that only you can write: kernels are compiled in every "
            "process; set BLOOMQ_CACHE_DIR to one that is"
        )
        return None
    try:
        with _cache_at(directory):
            return declare(True)
    except (OSError, EOFError, ValueError, UnpicklingError) as error:
        _warn_once(f"{directory} is damaged or full ({error}): delete it")
        return None


@lru_cache(maxsize=16)
def _warn_once(message: str) -> None:
    """Log a warning that would otherwise come with every kernel."""
    _log.warning(message)
