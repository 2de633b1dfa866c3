"""A calibration by torch: on a GPU, or on torch's CPU device, for tests.

The layers are the CUDA backend's, in float32, which round no activations but those of int8
matrices. The host reads, rounds to nearest and packs codes; the device waits for it meanwhile.
Invariant: of the device's memory, what one matrix and some windows' activations need
(`estimate.device_bytes`).

Everything is on one stream, where cuBLAS gives the same bits each time on GPUs of one architecture
and size. Source: cuBLAS, "Results Reproducibility".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bloomq.backends.cuda.layers import CudaBackend
from bloomq.errors import CapacityError
from bloomq.schemes import Scheme

from .cpu_engine import SOLVED_BYTES
from .engine import Sums
from .torch_rounding import TorchRounding
from .torch_sums import TorchMoments, TorchWanted, there

F32 = NDArray[np.float32]
# Rows that are solved together at least: each lot of them costs all launches anew.
_LEAST_ROWS = 4096
_ALLOCATION_FAILED = re.compile("CUDA error: out of memory|STATUS_ALLOC_FAILED")


class TorchEngine:
    """`Engine` on torch's `device`."""

    def __init__(self, device: str, pool: ThreadPoolExecutor) -> None:
        self.pool, self.at_once = pool, None
        self.layers = CudaBackend(device, "f32", compute_dtype="f32", kernels="torch")
        self._device = torch.device(device)

    def there(self, x: F32) -> torch.Tensor:
        return there(x, self._device)

    def moments(self) -> TorchMoments:
        return TorchMoments(self._device)

    def wanted(self, stream: F32, moments: Sums) -> TorchWanted:
        return TorchWanted(stream, moments, self._device)

    def rounding(
        self, moment: Any, scheme: Scheme, *, damping: float, sweeps: int
    ) -> TorchRounding:
        h = there(moment, self._device)
        return TorchRounding(h, scheme, damping=damping, sweeps=sweeps)

    def solved_rows(self, k: int) -> int:
        return solved_rows(k)

    @contextmanager
    def watched(self) -> Iterator[None]:
        try:
            with _whole_products():
                yield
            return
        except torch.OutOfMemoryError:
            pass  # its traceback holds tensors: raised outside
        except RuntimeError as error:  # what CUDA's libraries raise when they get no work space
            if not _ALLOCATION_FAILED.search(str(error)):
                raise
        raise CapacityError(
            f"the memory of {self._device} is too small to calibrate there, or others use it: free "
            "some (--dry-run says how much is needed), or calibrate on the CPU"
        )


@contextmanager
def _whole_products() -> Iterator[None]:
    """Within it, products of float32 are float32's own, whatever the program around has asked for,
    or TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which NVIDIA's containers set: TF32's 10 bits are too few
    for the moments of correlated inputs."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # asked for by torch's newer names, of which the older ones will not tell
        narrow = torch.backends.cuda.matmul.fp32_precision == "tf32"
        before = "high" if narrow else "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def solved_rows(k: int) -> int:
    """Of K columns, that are solved at a time."""
    return max(_LEAST_ROWS, SOLVED_BYTES // (4 * k) // 32 * 32)


def label_of(device: str) -> str:
    """The kind of device and torch's version, on which the bits of its sums depend."""
    kind = "CPU" if device == "cpu" else torch.cuda.get_device_name(device)
    return f"torch {torch.__version__}, {kind}"
