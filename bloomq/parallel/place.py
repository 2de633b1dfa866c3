"""Which process this is of those that torchrun has started, by its environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bloomq.errors import UsageError

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Place:
    """rank of `world` processes, local_rank of the `local_world` on this machine; address, port:
    where they meet; store_is_there: by torchrun, else rank 0 makes one; attempt: of torchrun."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int
    store_is_there: bool = False
    attempt: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place | None:
        """None where nothing or a single process was started by torchrun.

        Raises: UsageError for what are no ranks.
        """
        if any(name not in environment for name in _NEEDED):
            return None
        rank, world, local_rank, local_world, port = (
            _whole(environment, name) for name in _NEEDED if name != "MASTER_ADDR"
        )
        if not 0 <= rank < world or not 0 <= local_rank < local_world:
            raise UsageError(
                f"RANK {rank} of WORLD_SIZE {world}, expected 0 to {world - 1}: start with torchrun"
            )
        if world == 1:
            return None
        return cls(
            rank, world, local_rank, local_world, environment["MASTER_ADDR"], port,
            environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            _whole(environment, "TORCHELASTIC_RESTART_COUNT", "0"),
        )  # fmt: skip


def _whole(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default)
    if not text.isdecimal():
        raise UsageError(f"{name} is {text!r}, expected a whole number: start with torchrun")
    return int(text)
