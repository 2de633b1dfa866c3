"""What would fit: the best scheme, the largest batch and context, and the ways out of a refusal."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace

from bloomq.errors import CapacityError, UsageError
from bloomq.placement.hardware import Device
from bloomq.placement.models import BY_QUALITY, label_of, schemes_of
from bloomq.placement.plan import has_room, placed
from bloomq.placement.request import MOST_BATCH, MOST_CONTEXT, Placement, Request

_MORE_GPUS = 64
_CONTEXT_STEP = 64  # contexts are advised in multiples of it


def check(request: Request) -> Placement:
    """The placement of what fits.

    Raises: CapacityError, which says what would.
    """
    placement = placed(request)
    if not placement.fits:
        raise CapacityError(refusal(request, placement))
    return placement


def refusal(request: Request, placement: Placement, ways: Sequence[str] | None = None) -> str:
    """Why a placement is refused, and what would fit instead, in a line; ways: as `remedies` has
    found them before."""
    there_gb = sum(device.memory_bytes for device in request.devices) / 1e9
    count, found = len(request.devices), remedies(request) if ways is None else ways
    of = f"{label_of(request.schemes)}, {request.batch} x {request.context} tokens {request.dtype}"
    return (
        f"the model does not fit: {placement.missing_bytes / 1e9:.1f} GB have no place on "
        f"{count} device{'s' * (count > 1)} of {there_gb:.1f} GB in all ({of}): what would fit: "
        f"{'; '.join(found) or 'a smaller model'}"
    )


def best(request: Request, head_scheme: str | None = None) -> Request:
    """The request in the best scheme that fits, or in the smallest where none does."""
    for scheme, group_size in BY_QUALITY:
        schemes = schemes_of(request.config, scheme, group_size, head_scheme)
        request = replace(request, schemes=schemes)
        if has_room(request):
            break
    return request


def largest_batch(request: Request) -> int:
    """The most rows of this context that fit; 0: not even one."""
    return _most(MOST_BATCH, lambda batch: request.changed(batch=batch))


def largest_context(request: Request) -> int:
    """The most tokens in each row that fit, in steps of 64; 0: not even 64."""
    steps = MOST_CONTEXT // _CONTEXT_STEP
    return _CONTEXT_STEP * _most(steps, lambda n: request.changed(context=_CONTEXT_STEP * n))


def _most(limit: int, changed: Callable[[int], Request]) -> int:
    """The largest number up to `limit` with which a request fits, where smaller ones do too."""
    return bisect_right(range(1, limit + 1), False, key=lambda n: not has_room(changed(n)))


def remedies(request: Request) -> list[str]:
    """Each a change that makes it fit, alone; none where none does."""
    found = []
    if (scheme := _smaller_scheme(request)) is not None:
        found.append(scheme)
    if request.dtype != "int8" and has_room(request.changed(cache_dtype="int8")):
        found.append("cache dtype int8")
    if 0 < (context := largest_context(request)) < request.context:
        found.append(f"context {context}")
    if 0 < (batch := largest_batch(request)) < request.batch:
        found.append(f"batch {batch}")
    if (more := _more_gpus(request)) is not None:
        found.append(more)
    if (cpu := _with_cpu(request)) is not None:
        found.append(cpu)
    return found


def _smaller_scheme(request: Request) -> str | None:
    """The best of the smaller schemes that fits, as options."""
    now = request.weights_bytes
    for scheme, group_size in BY_QUALITY:
        schemes = schemes_of(request.config, scheme, group_size)
        other = replace(request, schemes=schemes)
        if other.weights_bytes < now and has_room(other):
            return f"--scheme {scheme}" + (f" --group-size {group_size}" if group_size else "")
    return None


def _more_gpus(request: Request) -> str | None:
    """How many more of the last GPU it takes."""
    gpus, rest = request.gpus, request.devices[len(request.gpus) :]
    if not gpus:
        return None

    def lacks(more: int) -> bool:
        added = [replace(gpus[-1], name=f"cuda:{len(gpus) + i}") for i in range(more)]
        return not has_room(request.changed(devices=(*gpus, *added, *rest)))

    numbers = range(1, _MORE_GPUS + 1)
    try:
        if request.split == "tensor":
            more = next((n for n in numbers if not lacks(n)), None)
        else:
            found = bisect_left(numbers, True, key=lambda n: not lacks(n))
            more = None if found == _MORE_GPUS else numbers[found]
    except UsageError:  # more ranks than heads
        return None
    return None if more is None else f"{more} more GPU{'s' * (more > 1)} ({gpus[-1].label})"


def _with_cpu(request: Request) -> str | None:
    """How much of the CPU's memory would take the rest."""
    if request.split == "tensor":
        return None
    cpu = Device("cpu", 1 << 60, None, "CPU")
    share = placed(request.changed(devices=(*request.gpus, cpu))).shares[0]
    return f"cpu:{-(-share.nbytes // 10**9)}GB" + " beside the GPUs" * bool(request.gpus)
