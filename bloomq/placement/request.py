"""What is to be placed, and a placement: both values that never change.

Invariant: a placement that `fits` needs at most `memory_bytes` of each device, work space included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

from bloomq.checks import is_whole
from bloomq.config import BloomConfig
from bloomq.errors import UsageError
from bloomq.layers import CacheDtype
from bloomq.placement.hardware import Device
from bloomq.placement.sizes import Held, Kind, Sizes, cache_bytes, sizes
from bloomq.placement.work import Work, work
from bloomq.schemes import Scheme

Split = Literal["layers", "tensor"]
MOST_BATCH, MOST_CONTEXT = 1 << 16, 1 << 24


@dataclass(frozen=True, slots=True)
class Share:
    """What one device gets. weights: of its layers, and of head and embedding where it has them (a
    tied table is one); cache: of its layers; read_bytes: of weights, by a decode step."""

    device: Device
    layers: range
    has_embedding: bool
    has_head: bool
    weights: Held
    cache: Held
    work: Work
    read_bytes: int

    @property
    def first_layer(self) -> int | None:
        return self.layers[0] if self.layers else None

    @property
    def last_layer(self) -> int | None:
        return self.layers[-1] if self.layers else None

    @property
    def work_bytes(self) -> int:
        """Work space, and what the allocator takes on top of weights and cache."""
        return self.work.nbytes + self.weights.rounding_bytes + self.cache.rounding_bytes

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes + self.cache.nbytes + self.work_bytes


@dataclass(frozen=True, slots=True)
class Placement:
    """A model on devices. shares: of those that get something, in the order of the layers; context,
    batch, cache_dtype: of the cache that there is room for; missing_bytes: what no device has room
    for, 0 where all fits."""

    shares: tuple[Share, ...]
    split: Split
    context: int
    batch: int
    cache_dtype: CacheDtype
    missing_bytes: int = 0

    @property
    def fits(self) -> bool:
        return not self.missing_bytes

    @property
    def weights_bytes(self) -> int:
        return sum(share.weights.nbytes for share in self.shares)

    @property
    def cache_bytes(self) -> int:
        return sum(share.cache.nbytes for share in self.shares)

    @property
    def work_bytes(self) -> int:
        return sum(share.work_bytes for share in self.shares)

    @property
    def nbytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.work_bytes

    @property
    def head(self) -> int | None:
        """Which share has the head; of tensor parallel every one has a piece."""
        return next((i for i, share in enumerate(self.shares) if share.has_head), None)

    @property
    def embedding(self) -> int | None:
        """Which share has the embedding; None: it is looked up in host memory."""
        return next((i for i, share in enumerate(self.shares) if share.has_embedding), None)


@dataclass(frozen=True)
class Request:
    """What is to be placed. cache_dtype: "auto" is float16, or float32 for a model that is not
    quantized.

    Raises: UsageError for what cannot be.
    """

    config: BloomConfig
    schemes: Mapping[str, Scheme]
    devices: tuple[Device, ...]
    context: int
    batch: int = 1
    cache_dtype: CacheDtype | Literal["auto"] = "auto"
    split: Split = "layers"

    def __post_init__(self) -> None:
        for name, value, most in (
            ("context", self.context, MOST_CONTEXT), ("batch", self.batch, MOST_BATCH)
        ):  # fmt: skip
            if not is_whole(value) or not 1 <= value <= most:
                raise UsageError(f"{name} to plan for is {value!r}, expected 1 to {most}")
        if self.cache_dtype not in ("auto", *get_args(CacheDtype)):
            raise UsageError(
                f"cache_dtype to plan for is {self.cache_dtype!r}, expected auto, f16, f32 or int8"
            )
        if not self.devices:
            raise UsageError("no devices to plan for, expected one or more")
        kinds = [device.kind for device in self.devices]
        if "cpu" in kinds[:-1]:
            raise UsageError("the CPU is before a GPU, expected it last: it takes what GPUs cannot")
        if self.split == "tensor":
            self._check_tensor(kinds)
        elif len({device.node for device in self.devices}) > 1:
            raise UsageError(
                "layers of one process cannot lie on several machines: split them with "
                "--split tensor"
            )

    def _check_tensor(self, kinds: Sequence[Kind]) -> None:
        if "cpu" in kinds:
            raise UsageError("tensor parallel plans are for GPUs alone: drop the CPU")
        if self.config.n_head % len(kinds):
            raise UsageError(
                f"{self.config.n_head} heads cannot be shared evenly by {len(kinds)} GPUs: use a "
                "number that divides them, or --split layers"
            )

    @property
    def dtype(self) -> CacheDtype:
        if self.cache_dtype != "auto":
            return self.cache_dtype
        exact = all(scheme.is_float for scheme in self.schemes.values())
        return "f32" if exact else "f16"

    @property
    def gpus(self) -> list[Device]:
        return [device for device in self.devices if device.kind == "cuda"]

    @property
    def ranks(self) -> int:
        return len(self.devices) if self.split == "tensor" else 1

    @cached_property
    def sizes(self) -> dict[Kind, Sizes]:
        """Of each kind of device that there is."""
        kinds = {device.kind for device in self.devices}
        return {kind: sizes(self.config, self.schemes, kind, self.ranks) for kind in kinds}

    def changed(
        self, *, context: int | None = None, batch: int | None = None,
        cache_dtype: CacheDtype | None = None, devices: tuple[Device, ...] | None = None,
    ) -> Request:  # fmt: skip
        """The same with something else."""
        return replace(
            self, context=context or self.context, batch=batch or self.batch,
            cache_dtype=cache_dtype or self.cache_dtype, devices=devices or self.devices,
        )  # fmt: skip

    @cached_property
    def layer_cache(self) -> dict[Kind, Held]:
        """The cache of a layer, on each kind of device that there is."""
        return {
            kind: cache_bytes(self.config, self.dtype, kind, self.batch, self.context, self.ranks)
            for kind in self.sizes
        }

    @cached_property
    def scheme_kinds(self) -> frozenset[Scheme]:
        """Each scheme that there is, once."""
        return frozenset(self.schemes.values())

    def share(
        self, device: Device, layers: range, *, is_last: bool, is_alone: bool = False
    ) -> Share:
        """What a device gets with these layers: the last also the head, the only one all."""
        at, cache = self.sizes[device.kind], self.layer_cache[device.kind]
        read = at.layers(layers) + (at.head if is_last else Held(0))
        count = len(layers)
        space = work(
            self.config, device.kind, layers=count, has_head=is_last, batch=self.batch,
            context=self.context, cache_dtype=self.dtype, schemes=self.scheme_kinds,
            ranks=self.ranks,
        )  # fmt: skip
        return Share(
            device, layers, is_alone, is_last, read + (at.embedding if is_alone else Held(0)),
            Held(count * cache.nbytes, count * cache.rounding_bytes), space, read.nbytes,
        )  # fmt: skip
