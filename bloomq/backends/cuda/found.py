"""The GPUs of this machine, as a plan for them needs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Gpu:
    """name: as torch calls it, `cuda:0`; label: as the driver does; free_bytes: now, with a context
    of this process made there."""

    name: str
    label: str
    free_bytes: int


def gpus() -> list[Gpu]:
    """Every GPU that torch sees. Asking makes a CUDA context on each."""
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [
        Gpu(name, torch.cuda.get_device_name(name), torch.cuda.mem_get_info(i)[0])
        for i, name in enumerate(names)
    ]
