"""Which ranks share a sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


@dataclass(frozen=True)
class SequenceGroup:
    """Neighbouring ranks, each with an equal piece of every row."""

    group: dist.ProcessGroup | None
    """None for a rank alone."""
    rank: int
    """Within the group."""
    size: int

    @classmethod
    def alone(cls) -> SequenceGroup:
        """A rank that has its rows to itself."""
        return cls(None, 0, 1)

    @classmethod
    def of_neighbours(cls, size: int, device_type: str) -> SequenceGroup:
        """Splits all ranks into groups of `size`. A collective over all ranks."""
        if size == 1:
            return cls.alone()
        mesh = init_device_mesh(
            device_type,
            (dist.get_world_size() // size, size),
            mesh_dim_names=("data", "sequence"),
        )
        return cls(mesh.get_group("sequence"), mesh.get_local_rank("sequence"), size)


def kv_copies(heads: int, kv_heads: int, size: int) -> int:
    """How often each key-value head is repeated before heads are spread over `size` ranks.

    As little as leaves every rank with whole groups of query heads: the smallest divisor of
    `heads / kv_heads` with which the key-value heads are a multiple of `size`. 1 moves them as they
    are.

    Raises ValueError where `size` does not divide `heads`.
    """
    if heads % size:
        raise ValueError(f"{size} ranks cannot share {heads} attention heads")
    per_group = heads // kv_heads
    return next(
        e for e in range(1, per_group + 1) if per_group % e == 0 and kv_heads * e % size == 0
    )
