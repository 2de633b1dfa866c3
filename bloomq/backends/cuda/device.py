"""What a GPU needs to be used from here, and what is missing.

Importing this imports nothing heavy; a machine without an NVIDIA driver is told by that alone, so
that `auto` costs no import of torch there.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import logging
import re
import subprocess
import sys
from functools import lru_cache

from bloomq.errors import BackendError, UsageError

NO_GPU = "no NVIDIA GPU with a driver is here"
INSTALL = "pip install 'bloomq[cuda]'"
UPGRADE = "pip install -U 'bloomq[cuda]'"
# The first whose products of 16 bits can end in float32, and the first with `gemm_4bit`.
LEAST_VERSIONS = {"torch": (2, 8), "bitsandbytes": (0, 50)}


@lru_cache(maxsize=1)
def driver_version() -> int | None:
    """The CUDA version of the driver, 12040 for 12.4; None where there is no driver or no GPU."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value


def missing_package() -> str | None:
    """What of torch and bitsandbytes is not installed or too old; None where both will do."""
    for name, least in LEAST_VERSIONS.items():
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed (it comes with {INSTALL})"
        version = importlib.metadata.version(name)
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < least:
            wanted = ".".join(map(str, least))
            return f"{name} {version} is too old, expected {wanted} or newer: {UPGRADE}"
    return None


def why_not() -> str | None:
    """Why no GPU can be used here; None where one can."""
    driver = driver_version()
    if driver is None:
        return NO_GPU
    missing = missing_package()
    if missing is not None:
        return missing
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA: install torch for CUDA"
    if driver // 1000 < int(torch.version.cuda.split(".")[0]):
        return (
            f"the NVIDIA driver is too old: it runs CUDA {driver // 1000}.{driver % 1000 // 10}, "
            f"torch {torch.__version__} needs {torch.version.cuda}: update the driver"
        )
    if not torch.cuda.is_available():
        return "torch sees no GPU (nvidia-smi and CUDA_VISIBLE_DEVICES say which there are)"
    return None


@lru_cache(maxsize=1)
def why_no_triton() -> str | None:
    """Why Triton's kernels cannot run on this machine's GPUs; None where they can.

    Its driver is a file of C that it compiles once for each Python: that wants a C compiler,
    Python's headers, and a folder to keep it in.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from triton.runtime import driver

    try:
        driver.active.get_current_device()
    except subprocess.CalledProcessError as error:
        compiler = error.cmd[0] if isinstance(error.cmd, list) else error.cmd
        return f"{compiler} ended with exit code {error.returncode}: are Python's headers there?"
    except (RuntimeError, OSError, ImportError, AssertionError) as error:  # asserts: no libcuda
        said = str(error).strip().splitlines()
        return said[0] if said else type(error).__name__
    return None


def one_device(devices: str) -> str:
    """The device that `devices` names: "cpu" or "cuda:0" and so on; "auto" and "cuda" are the first
    GPU.

    Raises: UsageError for what names none; BackendError where it cannot be used.
    """
    if devices == "cpu":
        missing = missing_package()
        if missing is not None:
            raise BackendError(f"torch's CPU device cannot be used: {missing}")
        return devices
    name = "cuda:0" if devices in ("auto", "cuda") else devices
    if not isinstance(name, str) or not re.fullmatch(r"cuda:\d{1,3}", name):
        raise UsageError(f"devices is {devices!r}, expected auto, cpu, cuda or cuda:0 and so on")
    problem = why_not()
    if problem is not None:
        raise BackendError(f"devices is {devices!r}, but {problem}: devices='cpu' needs no GPU")
    import torch

    count = torch.cuda.device_count()
    if int(name[5:]) >= count:
        raise UsageError(f"devices is {devices!r}, torch sees {count} GPUs: cuda:0 is the first")
    return name


def import_bitsandbytes() -> None:
    """Register `torch.ops.bitsandbytes`.

    It logs a warning of a kernel for the CPU that it would download, which nothing here uses.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    quiet, logger.disabled = logger.disabled, True
    try:
        import bitsandbytes  # noqa: F401
    finally:
        logger.disabled = quiet
