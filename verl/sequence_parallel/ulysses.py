"""Ulysses sequence parallelism (arXiv:2309.14509): ranks trade tokens for attention heads.

Outside of attention a rank has all heads of its piece of the row. Before attention every rank sends
each other rank the heads that are that one's, and has then the whole row for N / size heads; after
it the outputs go back. Key-value heads travel as they are, and are repeated only where there are
too few of them for the ranks (`verl.sequence_parallel.topology.kv_copies`).
Letters: N heads, K key-value heads, D head dim, S tokens of the row, L = S / size, P ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl.sequence_parallel.attention import AttentionContext
from verl.sequence_parallel.topology import SequenceGroup, kv_copies


class UlyssesAttention:
    """An `AttentionContext` for pieces of rows, around one for whole rows."""

    def __init__(self, whole: AttentionContext, sequence: SequenceGroup) -> None:
        self._whole, self._sequence = whole, sequence

    def __call__(
        self, layer: int, q_NLD: Tensor, k_KLD: Tensor, v_KLD: Tensor, scale: float
    ) -> Tensor:
        """Attention output of this rank's tokens, (L, N, D)."""
        size = self._sequence.size
        n_heads, n_kv = len(q_NLD), len(k_KLD)
        copies = kv_copies(n_heads, n_kv, size)
        # Autograd adds the copies' gradients up.
        k_KLD, v_KLD = (x.repeat_interleave(copies, 0) if copies > 1 else x for x in (k_KLD, v_KLD))
        # One exchange for all three; [r] is what rank r works on.
        send = torch.cat([x.unflatten(0, (size, -1)) for x in (q_NLD, k_KLD, v_KLD)], dim=1)
        received_PHLD = exchange(send, self._sequence)
        heads_HSD = received_PHLD.transpose(0, 1).flatten(1, 2)
        kv = n_kv * copies // size
        q_NSD, k_KSD, v_KSD = heads_HSD.split([n_heads // size, kv, kv])
        out_SND = self._whole(layer, q_NSD, k_KSD, v_KSD, scale)
        back_PLND = exchange(out_SND.unflatten(0, (size, -1)), self._sequence)
        return back_PLND.transpose(0, 1).flatten(1, 2)


def exchange(x_P: Tensor, sequence: SequenceGroup) -> Tensor:
    """Sends `x_P[r]` to rank r and returns what each rank sent here, in their order."""
    return _Exchange.apply(x_P, sequence)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_P: Tensor, sequence: SequenceGroup) -> Tensor:
        ctx.sequence = sequence
        return _all_to_all(x_P, sequence)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grads[0], ctx.sequence), None


def _all_to_all(x_P: Tensor, sequence: SequenceGroup) -> Tensor:
    x_P = x_P.contiguous()
    received = torch.empty_like(x_P)
    dist.all_to_all_single(received, x_P, group=sequence.group)
    return received
