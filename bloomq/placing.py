"""The backend of a load: on one device, or over those that a plan gives layers to.

Invariant: what does not fit is refused before a byte of the weights is read.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from bloomq import backends
from bloomq.backends import Choice
from bloomq.layers import Backend
from bloomq.pack import Pack
from bloomq.placement import (
    Device,
    Request,
    choose_devices,
    gpu_called,
    parse_devices,
    parse_max_memory,
)
from bloomq.placement.advice import check
from bloomq.placement.options import capped
from bloomq.placement.work import CONTEXT_BYTES

_UNKNOWN_BYTES = 1 << 60  # of memory: what a system does not tell is not refused


def choose(
    name: str,
    pack: Pack,
    threads: int | None,
    cache_dtype: str = "auto",
    *,
    devices: str = "auto",
    max_memory: str | None = None,
    context: int | None = None,
) -> Choice:
    """The backend `name` on `devices`: "auto" (all GPUs, or the CPU), "cpu", "cuda:0,1",
    "cuda:0,cpu".

    max_memory: "0:70GiB,cpu:64GiB", what may be used of each; context: tokens of a row that there
    is to be room for, None for what the model was trained on.

    Raises: CapacityError, with what would fit, where the model does not; BackendError for a backend
    or device that is not here; UsageError.
    """
    names = parse_devices(devices) if isinstance(devices, str) else ()
    caps = {} if max_memory is None else parse_max_memory(max_memory)
    on_gpus = name in ("auto", "cuda") and not (
        names in ((), ("cpu",)) or (names == ("auto",) and backends.why_not("cuda") is not None)
    )
    if not on_gpus and not caps:
        return backends.choose(name, pack, threads, cache_dtype, devices)
    here = choose_devices(names, found(names) if on_gpus else (cpu(),))
    request = Request(
        pack.config, pack.schemes, capped(here, caps), context or pack.config.seq_length,
        cache_dtype=cache_dtype,  # type: ignore[arg-type]  # checked by Request
    )  # fmt: skip
    placement = check(request)
    if not on_gpus:
        return backends.choose(name, pack, threads, cache_dtype, devices)
    if len(placement.shares) == 1:
        return on_one(placement.shares[0].device.name, pack, threads, cache_dtype)
    from bloomq.backends.placed.layers import Place, PlacedBackend

    backend: Backend = PlacedBackend([
        Place(on_one(share.device.name, pack, threads, cache_dtype).backend, share.layers)
        for share in placement.shares
    ])  # fmt: skip
    reason = "auto: all GPUs that the model needs" if names == ("auto",) else "asked for"
    return Choice(backend, f"{reason}; {backend.description}")


def check_options(devices: str, max_memory: str | None) -> None:
    """Before a long conversion: can these be asked for at all? Raises: UsageError."""
    if isinstance(devices, str):
        parse_devices(devices)
    if max_memory is not None:
        parse_max_memory(max_memory)


def on_one(device: str, pack: Pack, threads: int | None, cache_dtype: str) -> Choice:
    """The fastest backend for a device: the CUDA layers on a GPU, Numba's on the CPU."""
    kind = "auto" if device == "cpu" else "cuda"
    return backends.choose(kind, pack, threads, cache_dtype, device)


def found(names: tuple[str, ...]) -> tuple[Device, ...]:
    """The GPUs here, with the memory that is free, and the CPU. names: what is asked for, so that
    where no GPU can be used it is said why.

    Raises: BackendError.
    """
    if backends.why_not("cuda") is not None:
        from bloomq.backends.cuda.device import one_device

        one_device(names[0])
    from bloomq.backends.cuda.found import gpus

    devices = []
    for gpu in gpus():
        known = gpu_called(gpu.label)
        # A plan counts the CUDA context, which this process has by now.
        free_bytes = gpu.free_bytes + CONTEXT_BYTES
        gb_s = None if known is None else known.gb_s
        devices.append(Device(gpu.name, free_bytes, gb_s, gpu.label))
    return (*devices, cpu())


def cpu() -> Device:
    """The CPU, with the memory that processes can still get: mapped packs take none of it away."""
    told = Path("/proc/meminfo")
    if told.exists():
        free = re.search(r"^MemAvailable:\s*(\d+) kB$", told.read_text(), re.MULTILINE)
        if free is not None:
            return Device("cpu", int(free[1]) << 10, None, "CPU")
    names = getattr(os, "sysconf_names", {})  # Windows has none
    if "SC_PHYS_PAGES" in names:
        total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Device("cpu", total_bytes, None, "CPU")
    return Device("cpu", _UNKNOWN_BYTES, None, "CPU")
