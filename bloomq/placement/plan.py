"""Which device gets which layers, in bytes, before one is read.

Layers lie in ranges, in the order of the devices, as evenly as their memory is filled: on the
fewest GPUs that are then not nearly full. Where all GPUs together have too little, the CPU takes
the first layers, so that the head, whose matrix is the largest, stays on a GPU. With several
devices the embedding is looked up in host memory: a row of the mapped pack for each token. In
tensor parallel every device has a share of every layer, and of the table.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Literal

from bloomq.config import BloomConfig
from bloomq.layers import CacheDtype
from bloomq.placement.hardware import Device
from bloomq.placement.options import capped
from bloomq.placement.request import Placement, Request, Share, Split
from bloomq.schemes import Scheme

# Another GPU is used before one is fuller than this: what the work space is estimated to be may be
# wrong, and other processes come.
_NEARLY_FULL = 0.9
_STEPS = 200  # of how full devices may be, when layers are spread evenly


def plan(
    config: BloomConfig,
    schemes: Mapping[str, Scheme],
    devices: Sequence[Device],
    *,
    context: int,
    batch: int = 1,
    cache_dtype: CacheDtype | Literal["auto"] = "auto",
    max_memory: Mapping[str, int] | None = None,
    split: Split = "layers",
) -> Placement:
    """Where the layers of a model go, whether they fit or not: `advice.check` refuses.

    schemes: of every matrix by name, as a pack has them; devices: in the order in which they are
    filled, the CPU last; context, batch: tokens of a row of the cache, and rows; max_memory: bytes
    that a device may use at most, by name.

    Raises: UsageError.
    """
    devices = capped(devices, max_memory or {})
    return placed(Request(config, schemes, devices, context, batch, cache_dtype, split))


def placed(request: Request) -> Placement:
    """See `plan`."""
    if request.split == "tensor":
        return _tensor(request)
    for gpus in (_enough(request, _NEARLY_FULL), request.gpus, _enough(request, 1.0)):
        if gpus and _ranges(request, gpus, 1.0) is not None:
            return _spread(request, gpus)
    return _filled(request)


def has_room(request: Request) -> bool:
    """Would its placement fit? Told sooner than by the placement."""
    if request.split == "layers" and _enough(request, 1.0) is not None:
        return True
    return placed(request).fits


def _enough(request: Request, fraction: float) -> list[Device] | None:
    """The fewest GPUs, from the first on, that have room for all within this fraction of their
    memory."""
    gpus = request.gpus
    for count in range(1, len(gpus) + 1):
        if _ranges(request, gpus[:count], fraction) is not None:
            return gpus[:count]
    return None


def _spread(request: Request, gpus: Sequence[Device]) -> Placement:
    """On these GPUs, which have room, as evenly as their memory is filled."""
    step = bisect_left(
        range(_STEPS), True, key=lambda n: _ranges(request, gpus, n / _STEPS) is not None
    )
    ranges = _ranges(request, gpus, step / _STEPS)
    assert ranges is not None  # there is room at _STEPS / _STEPS
    return _made(request, list(zip(gpus, ranges, strict=True)))


def _ranges(request: Request, gpus: Sequence[Device], fraction: float) -> list[range] | None:
    """The layers that each takes in turn within this fraction of its memory; None where these are
    not all, or one would get none."""
    free, ranges = range(request.config.n_layer), []
    for behind, device in zip(reversed(range(len(gpus))), gpus, strict=True):
        budget = int(device.memory_bytes * fraction)
        most = free[: len(free) - behind]  # the rest is for those behind it
        layers = _fitting(
            request, device, budget, most, is_last=not behind, is_alone=len(gpus) == 1
        )
        if not layers:
            return None
        ranges.append(layers)
        free = free[len(layers) :]
    return None if free else ranges


def _fitting(
    request: Request, device: Device, budget: int, free: range, *, is_last: bool,
    is_alone: bool = False, from_end: bool = False,
) -> range:  # fmt: skip
    """The layers of `free`, from its start or its end, that a device holds in `budget` bytes."""

    def cut(count: int) -> range:
        return free[len(free) - count :] if from_end else free[:count]

    def needed(count: int) -> int:
        return request.share(device, cut(count), is_last=is_last, is_alone=is_alone).nbytes

    return cut(bisect_right(range(1, len(free) + 1), budget, key=needed))


def _filled(request: Request) -> Placement:
    """All that the GPUs have room for, from the last layer on; the first ones on the CPU."""
    free, got = range(request.config.n_layer), list[tuple[Device, range]]()
    for device in reversed(request.gpus):
        layers = _fitting(
            request, device, device.memory_bytes, free, is_last=not got, from_end=True
        )
        if layers:
            got.insert(0, (device, layers))
            free = free[: len(free) - len(layers)]
    cpu = next((device for device in request.devices if device.kind == "cpu"), None)
    if cpu is not None:
        return _made(request, [(cpu, free), *got])
    rest = request.share(request.gpus[0], free, is_last=not got)  # as on one more GPU
    return _made(request, got, rest.weights.total_bytes + rest.cache.total_bytes)


def _made(
    request: Request, places: Sequence[tuple[Device, range]], missing_bytes: int = 0
) -> Placement:
    """The shares of these devices, in the order of the layers."""
    shares = tuple(
        request.share(device, layers, is_last=i == len(places) - 1, is_alone=len(places) == 1)
        for i, (device, layers) in enumerate(places)
        if layers
    )
    return _placement(request, shares, missing_bytes)


def _tensor(request: Request) -> Placement:
    """A share of every layer and of the table on each device."""
    every = range(request.config.n_layer)
    shares = tuple(
        request.share(device, every, is_last=True, is_alone=True) for device in request.devices
    )
    return _placement(request, shares, 0)


def _placement(request: Request, shares: tuple[Share, ...], missing_bytes: int) -> Placement:
    over_bytes = sum(max(0, share.nbytes - share.device.memory_bytes) for share in shares)
    return Placement(
        shares, request.split, request.context, request.batch, request.dtype,
        missing_bytes + over_bytes,
    )  # fmt: skip
