"""Devices by size or by name: how much memory each has, and how fast it is read.

    3x80GB            three GPUs of 80e9 bytes, read as fast as the slowest below of that size
    2xH100, 1x24GB    by name, several kinds
    4x48GB@900        as many GB/s
    cpu:64GB          memory for the layers that no GPU has room for

GB is 1e9 bytes and GiB 2**30, as everywhere in bloomq; a card that is sold as 80 GB has 85e9.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bloomq.errors import UsageError
from bloomq.placement.sizes import Kind

_MIB = 1 << 20
# Of nvidia-smi's total a process can have at least so much, the rest is the driver's: an H100 80GB
# gives 79.11 of 79.65 GiB, an A100 80GB 81,050 of 81,920 MiB, an RTX 4090 23.64 of 23.99 GiB (as
# reports of full memory to PyTorch and vLLM say).
_USABLE = 0.985
_MOST_DEVICES = 1024
_DEFAULT_CPU_GB_S = 40.0  # of two channels, as measured for the README


@dataclass(frozen=True, slots=True)
class Gpu:
    """A product. nominal_gb: as it is sold; total_mib: as nvidia-smi says; gb_s: of its memory."""

    name: str
    nominal_gb: int
    total_mib: int
    gb_s: float

    @property
    def usable_bytes(self) -> int:
        return int(_USABLE * self.total_mib * _MIB)


# Source: bandwidths from NVIDIA's data sheets of each product (SXM where none is named); totals as
# nvidia-smi prints them in public logs (modal-labs/modal-client, pull request 2797, lists most).
GPUS = (
    Gpu("B200", 192, 183359, 8000),
    Gpu("H200", 141, 143771, 4800),
    Gpu("H100", 80, 81559, 3350),
    Gpu("H100-PCIe", 80, 81559, 2000),
    Gpu("A100-80GB", 80, 81920, 2039),
    Gpu("A100-40GB", 40, 40960, 1555),
    Gpu("L40S", 48, 46068, 864),
    Gpu("A40", 48, 46068, 696),
    Gpu("RTX-A6000", 48, 49140, 768),
    Gpu("V100-32GB", 32, 32768, 900),
    Gpu("V100-16GB", 16, 16384, 900),
    Gpu("RTX-5090", 32, 32607, 1792),
    Gpu("RTX-4090", 24, 24564, 1008),
    Gpu("RTX-3090", 24, 24576, 936),
    Gpu("A10", 24, 23028, 600),
    Gpu("L4", 24, 23034, 300),
    Gpu("T4", 16, 15360, 320),
)


@dataclass(frozen=True, slots=True)
class Device:
    """A place for layers.

    name: as torch calls it, `cuda:0`, or `cpu`; memory_bytes: that this process may use there, its
    CUDA context included; gb_s: at which its memory is read (1e9), None where nobody knows; label:
    what it is, for people; node: the machine that it is in.
    """

    name: str
    memory_bytes: int
    gb_s: float | None
    label: str
    node: int = 0

    @property
    def kind(self) -> Kind:
        return "cpu" if self.name == "cpu" else "cuda"


def parse_gpus(text: str, *, nodes: int = 1) -> tuple[Device, ...]:
    """The devices of `3x80GB`, `2xH100,1x24GB@900,cpu:64GB`, of each of `nodes` machines that are
    alike; the CPU comes last.

    Raises: UsageError.
    """
    if not 1 <= nodes <= _MOST_DEVICES:
        raise UsageError(f"{nodes} machines, expected 1 to {_MOST_DEVICES}")
    gpus: list[tuple[str, int, float | None]] = []
    cpu: Device | None = None
    for item in text.split(","):
        found = _ITEM.fullmatch(item.strip())
        if found is None:
            raise UsageError(f"hardware {item.strip()!r}, expected {_EXPECTED}")
        count, what = int(found["count"] or 1), found["what"].strip()
        gb_s = None if found["gb_s"] is None else float(found["gb_s"])
        if gb_s is not None and not 0 < gb_s < 1e6:
            raise UsageError(f"hardware {item.strip()!r}: {gb_s:g} GB/s, expected more than 0")
        if what.lower().startswith("cpu:"):
            if cpu is not None or count != 1:
                raise UsageError(f"hardware {text!r} has several CPUs, expected cpu:SIZE once")
            cpu = Device("cpu", parse_bytes(what[4:]), gb_s or _DEFAULT_CPU_GB_S, "CPU")
            continue
        one = _described(what, gb_s)
        if not 1 <= count <= _MOST_DEVICES or len(gpus) + count > _MOST_DEVICES:
            raise UsageError(f"hardware {text!r}, expected 1 to {_MOST_DEVICES} GPUs in all")
        gpus += [one] * count
    if not gpus and cpu is None:
        raise UsageError(f"hardware {text!r}, expected {_EXPECTED}")
    devices = [
        Device(f"cuda:{i}", nbytes, speed, label, node)
        for node in range(nodes)
        for i, (label, nbytes, speed) in enumerate(gpus)
    ]
    return (*devices, cpu) if cpu is not None else tuple(devices)


_EXPECTED = "such as 3x80GB, 2xH100, 1x24GB@900 (GB/s) or cpu:64GB"
_ITEM = re.compile(
    r"(?:(?P<count>\d{1,9})\s*[xX×]\s*)?(?P<what>[^@]+?)"
    r"(?:@\s*(?P<gb_s>\d+(?:\.\d+)?)\s*(?:GB/s)?)?"
)


def _described(what: str, gb_s: float | None) -> tuple[str, int, float | None]:
    """Label, bytes and GB/s of one GPU. Raises: UsageError."""
    if what[:1].isdigit() and _SIZE.fullmatch(what):
        nbytes = parse_bytes(what)
        alike = [gpu for gpu in GPUS if gpu.nominal_gb == round(nbytes / 1e9)]
        if gb_s is not None or not alike:
            return what, nbytes, gb_s
        slowest = min(alike, key=lambda gpu: gpu.gb_s)
        return f"{what} as {slowest.name}", nbytes, slowest.gb_s
    words = _words(what)
    for gpu in GPUS:
        if words - {f"{gpu.nominal_gb}gb"} == _words(gpu.name) - {f"{gpu.nominal_gb}gb"} and (
            _words(gpu.name) <= words
        ):
            return gpu.name, gpu.usable_bytes, gb_s or gpu.gb_s
    raise UsageError(
        f"unknown GPU {what!r}, expected one of {', '.join(gpu.name for gpu in GPUS)}, or its size "
        "as in 24GB"
    )


def gpu_called(name: str) -> Gpu | None:
    """The product that a driver's name means: "NVIDIA A100-SXM4-80GB"; None for unknown ones."""
    fitting = [gpu for gpu in GPUS if _words(gpu.name) <= _words(name)]
    return max(fitting, key=lambda gpu: len(_words(gpu.name)), default=None)


def _words(name: str) -> frozenset[str]:
    """What tells a product: "RTX 4090" and "GeForce RTX4090" are 4090."""
    plain = re.sub(r"rtx(?=[a\d])", "rtx ", name.lower())
    return frozenset(re.findall(r"[a-z0-9]+", plain)) - {"nvidia", "geforce", "tesla", "rtx"}


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}  # fmt: skip


def parse_bytes(text: str) -> int:
    """Bytes of `80GB` (1e9 each), `70GiB` (2**30), `500MB`.

    Raises: UsageError.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or (found[2] is None and not text.strip().isdecimal()):
        raise UsageError(f"size {text.strip()!r}, expected a number and its unit, as in 80GB")
    nbytes = int(float(found[1]) * _UNITS[(found[2] or "").lower()])
    if not 1 << 20 <= nbytes < 1 << 60:
        raise UsageError(f"size {text.strip()!r} is {nbytes} bytes, expected 1 MiB or more")
    return nbytes
