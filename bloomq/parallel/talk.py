"""What ranks tell each other, whatever carries it, and arrays whose columns lie on all of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import BackendError
from bloomq.layers import X

Array = NDArray[Any]
_TOLD_BYTES = 512  # of a text that ranks compare


class Group(Protocol):
    """The ranks of one model. Every rank must call the same methods in the same order.

    Raises (each method): BackendError where another rank has died or does not answer in time.
    """

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    def gather(self, mine: Array) -> Array:
        """The arrays of all ranks, which have one shape, [world, ...]."""
        ...

    def sum(self, mine: X) -> X:
        """The sum over all ranks of an array of the backend, x0 + x1 + ... from the left: the same
        bits on every rank, and for an element whatever else is in the array."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """An array [M, N] of which this rank has columns edges[rank] .. edges[rank + 1]."""

    mine: X
    edges: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.edges[-1]

    def __len__(self) -> int:
        return int(self.mine.shape[0])


def whole(group: Group, mine: Array, edges: tuple[int, ...], *, axis: int) -> Array:
    """The parts of all ranks side by side; the others' are as large as this one but for `axis`,
    where they have edges[r] .. edges[r + 1]."""
    widths = np.diff(edges)
    padded = np.zeros((*mine.shape[:axis], int(widths.max()), *mine.shape[axis + 1 :]), mine.dtype)
    inside = (slice(None),) * axis
    padded[(*inside, slice(mine.shape[axis]))] = mine
    each = zip(group.gather(padded), widths.tolist(), strict=True)
    return np.concatenate([part[(*inside, slice(width))] for part, width in each], axis=axis)


def check_alike(group: Group, what: str, mine: str, remedy: str) -> None:
    """Raises: BackendError, the same on every rank, where `mine` is not one text on all."""
    padded = np.frombuffer(mine.encode()[:_TOLD_BYTES].ljust(_TOLD_BYTES, b"\0"), np.uint8)
    first, *others = (row.tobytes().rstrip(b"\0") for row in group.gather(padded))
    for rank, other in enumerate(others, 1):
        if other != first:
            raise BackendError(
                f"{what} of rank {rank} is {other.decode(errors='replace')}, of rank 0 "
                f"{first.decode(errors='replace')}: {remedy}"
            )


def check_step(group: Group, *given: Array) -> None:
    """Compare 8 bytes of what a step is given. Raises: BackendError, on every rank, where it is not
    the same on all."""
    digest = hashlib.blake2b(digest_size=8)
    for array in given:
        digest.update(np.int64(array.size).tobytes() + np.ascontiguousarray(array).tobytes())
    each = group.gather(np.frombuffer(digest.digest(), np.int64))[:, 0].tolist()
    apart = [rank for rank, one in enumerate(each) if one != each[0]]
    if apart:
        raise BackendError(
            f"rank {apart[0]} runs other tokens than rank 0: the ranks have drawn apart: give all "
            "of them the same prompt, options and seed"
        )
