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
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from bloomq.errors import BackendError, UsageError

if TYPE_CHECKING:
    import torch

NO_GPU = "no NVIDIA GPU with a driver is here"
INSTALL = "pip install 'bloomq[cuda]'"
LEAST_BITSANDBYTES = (0, 50)  # the first with `gemm_4bit`


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a device, in bytes."""

    free: int
    total: int


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
    for name in ("torch", "bitsandbytes"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed (it comes with {INSTALL})"
    version = importlib.metadata.version("bitsandbytes")
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < LEAST_BITSANDBYTES:
        least = ".".join(map(str, LEAST_BITSANDBYTES))
        return f"bitsandbytes {version} is too old, expected {least} or newer: pip install -U it"
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


def memory(device: torch.device) -> Memory:
    """Of a GPU, as its driver says: what torch holds in reserve is not free. All 0 for the CPU."""
    if device.type == "cpu":
        return Memory(0, 0)
    import torch

    return Memory(*torch.cuda.mem_get_info(device))


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
