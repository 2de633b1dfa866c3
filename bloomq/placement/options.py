"""What `--devices` and `--max-memory` say, as values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from bloomq.errors import BackendError, UsageError
from bloomq.placement.hardware import Device, parse_bytes

AUTO = "auto"


def parse_devices(text: str) -> tuple[str, ...]:
    """The devices of `auto`, `cuda:0,1`, `cpu`, `cuda:0,cpu`, by their names: ("cuda:0", "cuda:1").

    A number alone is another GPU; `cuda` is the first; `auto` stays as it is, for `choose_devices`.
    Raises: UsageError.
    """
    if text.strip() == AUTO:
        return (AUTO,)
    names: list[str] = []
    for item in text.split(","):
        found = re.fullmatch(r"cpu|cuda|(?:cuda:)?(\d{1,4})", item.strip())
        is_number = found is not None and item.strip().isdecimal()
        if found is None or (is_number and (not names or names[-1] == "cpu")):
            raise UsageError(
                f"devices {text!r}: {item.strip()!r}, expected auto, cpu, or GPUs as in cuda:0,1 "
                "or cuda:0,cpu"
            )
        names.append("cpu" if found[0] == "cpu" else f"cuda:{int(found[1] or 0)}")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"devices {text!r} has {twice} twice, expected every device once")
    if "cpu" in names[:-1]:
        raise UsageError(f"devices {text!r}, expected the CPU last: it takes what GPUs cannot")
    return tuple(names)


def choose_devices(names: Sequence[str], found: Sequence[Device]) -> tuple[Device, ...]:
    """Those of the devices `found` here that `parse_devices` names; auto: all GPUs, or the CPU.

    Raises: BackendError for one that is not here.
    """
    gpus = tuple(device for device in found if device.kind == "cuda")
    if tuple(names) == (AUTO,):
        return gpus or tuple(found)
    here = {device.name: device for device in found}
    for name in names:
        if name not in here:
            raise BackendError(
                f"device {name} is not on this machine: found {', '.join(here) or 'none'}"
            )
    return tuple(here[name] for name in names)


def parse_max_memory(text: str) -> dict[str, int]:
    """The bytes that each device of `0:70GiB,cpu:64GiB` may use at most, by name.

    Raises: UsageError.
    """
    if not isinstance(text, str):
        raise UsageError(f"max_memory is {text!r}, expected text as in 0:70GiB,cpu:64GiB")
    caps: dict[str, int] = {}
    for item in text.split(","):
        found = re.fullmatch(r"(?:cuda:)?(\d{1,4}|cpu)\s*[:=]\s*(.+)", item.strip())
        if found is None:
            raise UsageError(
                f"most memory {item.strip()!r}, expected DEVICE:SIZE as in 0:70GiB or cpu:64GiB"
            )
        name = "cpu" if found[1] == "cpu" else f"cuda:{int(found[1])}"
        if name in caps:
            raise UsageError(f"most memory {text!r} has {name} twice, expected it once")
        caps[name] = parse_bytes(found[2])
    return caps


def capped(devices: Sequence[Device], max_memory: Mapping[str, int]) -> tuple[Device, ...]:
    """The devices, none with more memory than it may use: weights, cache and work space together.

    Raises: UsageError for the name of none of them.
    """
    names = {device.name for device in devices}
    strange = next((name for name in max_memory if name not in names), None)
    if strange is not None:
        raise UsageError(
            f"most memory is given for {strange}, which is none of the devices {', '.join(names)}"
        )
    return tuple(
        replace(d, memory_bytes=min(d.memory_bytes, max_memory.get(d.name, d.memory_bytes)))
        for d in devices
    )
