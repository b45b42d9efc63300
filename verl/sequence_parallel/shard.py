"""A rank's piece of a packed row, and what all ranks of its group find put together again.

Rows are built whole: positions, media and targets are those of the whole row, and only then it is
cut into equal pieces of tokens. A target goes with the token that predicts it.
Letters: S packed tokens, L = S / ranks, T predicted tokens, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl.sequence_parallel.layout import ROOT, Layout
from verl.sequence_parallel.packing import PackedRow
from verl.sequence_parallel.topology import SequenceGroup
from verl.utils.torch_functional import to_device


def pad_row(row: PackedRow, multiple: int, pad_id: int) -> PackedRow:
    """The row with a sequence of its own behind it that makes its length a multiple.

    Nothing sees these tokens and they predict nothing; `pad_id` must not be that of a medium.
    """
    n = -len(row.ids_S) % multiple
    if n == 0:
        return row
    layout = row.layout
    return replace(
        row,
        ids_S=torch.cat([row.ids_S, row.ids_S.new_full((n,), pad_id)]),
        positions_3S=torch.cat([row.positions_3S, row.positions_3S.new_zeros(3, n)], dim=1),
        layout=Layout((*layout.lengths, n), (*layout.parents, ROOT)),
    )


@dataclass(frozen=True)
class Shard:
    """Which tokens and targets of a row are a rank's, and where the others' are."""

    sequence: SequenceGroup
    tokens: slice
    """Of the row."""
    predict_local: Tensor
    """Of this rank's targets: the predicting token's place in the piece."""
    own_T: Tensor
    """This rank's targets among those of the row."""
    place_T: Tensor
    """Where each target of the row is in what the ranks gather: rank * most + number."""
    most: int
    """Targets of the rank that has most."""


def shard_of(row: PackedRow, sequence: SequenceGroup, device: torch.device) -> Shard:
    """A rank's piece of a row that was padded to a multiple of the group; `row` is on the host.

    All that ranks must know of each other follows from the row: nothing is sent.
    """
    length = len(row.ids_S) // sequence.size
    owner_T = row.predict_T // length
    counts = torch.bincount(owner_T, minlength=sequence.size)
    most = int(counts.max())
    place_T = torch.empty_like(row.predict_T)
    for rank in range(sequence.size):
        mine = owner_T == rank
        place_T[mine] = rank * most + torch.arange(int(counts[rank]))
    own_T = torch.nonzero(owner_T == sequence.rank).flatten()
    start = sequence.rank * length
    return Shard(
        sequence,
        slice(start, start + length),
        to_device(row.predict_T[own_T] - start, device),
        to_device(own_T, device),
        to_device(place_T, device),
        most,
    )


def gather_targets(own: Sequence[Tensor], shard: Shard) -> list[Tensor]:
    """Values of every target of the row, on every rank, from those of the rank's own targets.

    Every rank goes on with the same values to the same loss. In backward a rank takes the gradient
    of its own targets alone: the sum over ranks is that of one loss.
    """
    return list(_GatherTargets.apply(shard, *own))


class _GatherTargets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Shard, *own: Tensor) -> tuple[Tensor, ...]:
        ctx.shard = shard
        if shard.most == 0:
            return tuple(values.clone() for values in own)
        size = shard.sequence.size
        send = own[0].new_zeros(len(own), shard.most)
        send[:, : len(own[0])] = torch.stack(own)
        received = send.new_empty(size, *send.shape)
        # Into parts of one tensor: the call for that has another name from torch 2.13 on.
        dist.all_gather(list(received.unbind()), send, group=shard.sequence.group)
        flat = received.transpose(0, 1).flatten(1)
        return tuple(values[shard.place_T] for values in flat)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(grad[ctx.shard.own_T] for grad in grads)
