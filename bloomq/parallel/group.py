"""Ranks that talk by torch.distributed: gloo between hosts, NCCL between GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch._C._distributed_c10d import PrefixStore, TCPStore

from bloomq.errors import BackendError
from bloomq.layers import X
from bloomq.parallel.place import Place

Array = NDArray[Any]
Tensor = torch.Tensor
# Beyond so many bytes of all ranks' arrays, each rank sums a part of them and gets the others'
# sums: twice the calls and 2 / world of the traffic. Below, one call decides, not its bytes.
GATHERED_BYTES = 1 << 20


class ProcessGroup:
    """`Group` of the processes that one launch has started.

    timeout_s: how long a rank waits for another one, at most. Invariant: the sums of both ways have
    the same bits, x0 + x1 + ... from the left, which no library's all-reduce promises.
    """

    def __init__(self, place: Place, timeout_s: float) -> None:
        self.rank, self.world, self.timeout_s = place.rank, place.world, timeout_s
        wait = timedelta(seconds=timeout_s)
        self._has_gpu = torch.cuda.device_count() >= place.local_world
        kinds = "cpu:gloo,cuda:nccl" if self._has_gpu else "gloo"
        if self._has_gpu:
            torch.cuda.set_device(place.local_rank)
        with self._together():
            store = TCPStore(
                place.address, place.port, place.world, timeout=wait,
                is_master=place.rank == 0 and not place.store_is_there,
            )  # fmt: skip
            self._store = PrefixStore(f"bloomq/{place.attempt}", store)
            dist.init_process_group(
                kinds, store=PrefixStore("group", self._store), rank=place.rank,
                world_size=place.world, timeout=wait,
            )  # fmt: skip

    @contextmanager
    def _together(self) -> Iterator[None]:
        """torch's errors of a rank that is gone, as ours."""
        try:
            yield
        except RuntimeError as error:
            slow = "timed out" in str(error).lower() or "timeout" in str(error).lower()
            what = f"has not answered for {self.timeout_s:g} s" if slow else "has died"
            raise BackendError(
                f"rank {self.rank} of {self.world} stops, since another one {what}: see what that "
                "one says, and start all of them again"
            ) from None

    def gather(self, mine: Array) -> Array:
        contiguous = np.ascontiguousarray(mine)
        raw = torch.from_numpy(contiguous.reshape(-1).view(np.uint8).copy())
        parts = self._gathered(raw).numpy()  # [world, bytes]
        return parts.view(mine.dtype).reshape(self.world, *mine.shape)

    def sum(self, mine: X) -> X:
        if isinstance(mine, np.ndarray):
            return self._sum(torch.from_numpy(np.ascontiguousarray(mine))).numpy()
        return self._sum(mine.contiguous())

    def _sum(self, mine: Tensor) -> Tensor:
        if mine.numel() * mine.element_size() * self.world <= GATHERED_BYTES:
            return _from_the_left(self._gathered(mine))
        size = -(-mine.numel() // self.world)
        padded = mine.new_zeros(self.world * size)
        padded[: mine.numel()] = mine.reshape(-1)
        parts = torch.empty_like(padded)
        with self._together():
            dist.all_to_all_single(parts, padded)
        total = self._gathered(_from_the_left(parts.view(self.world, size)))
        return total.reshape(-1)[: mine.numel()].view(mine.shape)

    def _gathered(self, mine: Tensor) -> Tensor:
        """[...] -> [world, ...]."""
        parts = mine.new_empty((self.world, *mine.shape))
        with self._together():
            dist.all_gather(list(parts.unbind(0)), mine)
        return parts

    def share(self, data: bytes) -> bytes:
        """The bytes of rank 0."""
        size = int(self.gather(np.array([len(data)], np.int64))[0, 0])
        shared = torch.zeros(size, dtype=torch.uint8)
        if self.rank == 0 and size:
            shared = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with self._together():
            if size:
                dist.broadcast(shared, 0)
        return shared.numpy().tobytes()

    def is_first_to(self, what: str) -> bool:
        """Has no other rank asked this yet? True where there is nobody to ask."""
        try:
            return int(self._store.add(what, 1)) == 1
        except RuntimeError:
            return True

    def free_bytes(self) -> int:
        """Memory that is free on the GPU of this rank, on which alone this process has a context;
        0 where there are fewer GPUs than ranks of this machine."""
        return int(torch.cuda.mem_get_info()[0]) if self._has_gpu else 0

    def close(self) -> None:
        """Part from the others, when all have done everything."""
        dist.destroy_process_group()


def _from_the_left(parts: Tensor) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
