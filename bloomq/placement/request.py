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
from bloomq.parallel.cuts import Cuts
from bloomq.placement.hardware import Device
from bloomq.placement.sizes import Held, Kind, Rank, Sizes, cache_bytes, sizes
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


@dataclass(frozen=True)  # without slots: it keeps the sizes that it has counted
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
        _ = self.ranks  # raises where heads are too few

    @property
    def dtype(self) -> CacheDtype:
        if self.cache_dtype != "auto":
            return self.cache_dtype
        exact = all(scheme.is_float for scheme in self.schemes.values())
        return "f32" if exact else "f16"

    @property
    def gpus(self) -> list[Device]:
        return [device for device in self.devices if device.kind == "cuda"]

    @cached_property
    def ranks(self) -> tuple[Rank | None, ...]:
        """Which rank each device is of those that share every matrix; None: it has whole layers."""
        world = len(self.devices)
        if self.split == "layers":
            return (None,) * world
        cuts = Cuts.of(self.config, self.schemes, world)
        return tuple(Rank(cuts, number) for number in range(world))

    @cached_property
    def _sizes(self) -> dict[tuple[Kind, Rank | None], tuple[Sizes, Held]]:
        """Of each kind of device and each rank: of the model, and of the cache of a layer."""
        found: dict[tuple[Kind, Rank | None], tuple[Sizes, Held]] = {}
        for device, rank in zip(self.devices, self.ranks, strict=True):
            if (device.kind, rank) not in found:
                found[device.kind, rank] = (
                    sizes(self.config, self.schemes, device.kind, rank),
                    cache_bytes(self.config, self.dtype, device.kind, self.batch, self.context,
                                None if rank is None else rank.heads),
                )  # fmt: skip
        return found

    @property
    def weights_bytes(self) -> int:
        """Of the whole model, as the first device would hold it; of all ranks together."""
        kind = self.devices[0].kind
        every = [self._sizes[kind, rank][0] for rank in dict.fromkeys(self.ranks)]
        return sum(at.before[-1].nbytes + at.head.nbytes + at.embedding.nbytes for at in every)

    @property
    def cache_bytes(self) -> int:
        """Of all layers, as the first device would hold them; of all ranks together."""
        kind = self.devices[0].kind
        every = [self._sizes[kind, rank][1].nbytes for rank in dict.fromkeys(self.ranks)]
        return self.config.n_layer * sum(every)

    @cached_property
    def scheme_kinds(self) -> frozenset[Scheme]:
        """Each scheme that there is, once."""
        return frozenset(self.schemes.values())

    def changed(
        self, *, context: int | None = None, batch: int | None = None,
        cache_dtype: CacheDtype | None = None, devices: tuple[Device, ...] | None = None,
    ) -> Request:  # fmt: skip
        """The same with something else."""
        return replace(
            self, context=context or self.context, batch=batch or self.batch,
            cache_dtype=cache_dtype or self.cache_dtype, devices=devices or self.devices,
        )  # fmt: skip

    def share(
        self, device: Device, layers: range, *, is_last: bool, is_alone: bool = False,
        rank: Rank | None = None,
    ) -> Share:  # fmt: skip
        """What a device gets with these layers: the last also the head, the only one all."""
        at, cache = self._sizes[device.kind, rank]
        read = at.layers(layers) + (at.head if is_last else Held(0))
        count = len(layers)
        space = work(
            self.config, device.kind, layers=count, has_head=is_last, batch=self.batch,
            context=self.context, cache_dtype=self.dtype, schemes=self.scheme_kinds,
            heads=None if rank is None else rank.heads,
        )  # fmt: skip
        return Share(
            device, layers, is_alone, is_last, read + (at.embedding if is_alone else Held(0)),
            Held(count * cache.nbytes, count * cache.rounding_bytes), space, read.nbytes,
        )  # fmt: skip
