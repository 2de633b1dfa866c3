"""Where a model's layers go, before one is read: sizes, hardware, what fits and how fast it is.

    plan(config, schemes, devices, context=2048, batch=4) -> Placement

Nothing here touches a device: models and hardware need not be present.
"""

from __future__ import annotations

from bloomq.placement.hardware import GPUS, Device, Gpu, gpu_called, parse_bytes, parse_gpus
from bloomq.placement.options import choose_devices, parse_devices, parse_max_memory
from bloomq.placement.plan import placed, plan
from bloomq.placement.request import Placement, Request, Share, Split

__all__ = [
    "GPUS", "Device", "Gpu", "Placement", "Request", "Share", "Split", "choose_devices",
    "gpu_called", "parse_bytes", "parse_devices", "parse_gpus", "parse_max_memory", "placed",
    "plan",
]  # fmt: skip
