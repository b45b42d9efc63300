"""Attention under activation checkpointing that is not computed a second time.

Checkpointing runs a layer's forward pass again in backward. For long rows attention is most of that
pass, and its backward needs only its inputs, its output and its log-sum-exp. Output and log-sum-exp
are kept from the first pass (on the host, with a stash), and the second pass puts them in place.
Letters: N heads, K key-value heads, D head dim, S packed tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from verl.sequence_parallel.layout import Layout
from verl.sequence_parallel.tree import ATTENTION_OP, tree_attention
from verl.utils.host_stash import HostStash, Stashed
from verl.utils.recompute import is_recomputing


class KeptAttention:
    """An `AttentionContext` for layers that are checkpointed with `checkpoint_contexts`."""

    def __init__(
        self,
        layout: Layout,
        kernel: str,
        stash: HostStash | None = None,
        tail: Layout | None = None,
    ) -> None:
        """`tail` is the layout for queries of the row's tail alone."""
        self._layout, self._kernel, self._stash, self._tail = layout, kernel, stash, tail
        self._kept: dict[int, tuple[Stashed | Tensor, Tensor]] = {}

    def __call__(
        self, layer: int, q_NSD: Tensor, k_KSD: Tensor, v_KSD: Tensor, scale: float
    ) -> Tensor:
        """Attention output, (S, N, D)."""
        qkv = q_NSD.transpose(0, 1), k_KSD.transpose(0, 1), v_KSD.transpose(0, 1)
        is_tail = self._tail is not None and q_NSD.shape[1] < k_KSD.shape[1]
        layout = self._tail if self._tail is not None and is_tail else self._layout
        if not torch.is_grad_enabled():
            return tree_attention(*qkv, layout, scale, self._kernel, tail=is_tail)
        settings = (layout.as_tensor, scale, self._kernel, is_tail)
        if is_recomputing():
            out, lse_NS = self._kept.pop(layer)
            out_SND = self._stash.take(out) if self._stash else out
            return _Replayed.apply(*qkv, out_SND, lse_NS, *settings)
        out_SND, lse_NS = ATTENTION_OP(*qkv, *settings)
        kept = out_SND.detach()
        self._kept[layer] = self._stash.put(kept) if self._stash else kept, lse_NS.detach()
        return out_SND


class _Replayed(torch.autograd.Function):
    """An output that is known already, with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, q_SND: Tensor, k_SKD: Tensor, v_SKD: Tensor, out_SND: Tensor, lse_NS: Tensor,
        tree_2n: Tensor, scale: float, kernel: str, tail: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(q_SND, k_SKD, v_SKD, out_SND, lse_NS, tree_2n)
        ctx.settings = scale, kernel, tail
        return out_SND.view_as(out_SND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, tree_2n = ctx.saved_tensors
        gradients = torch.ops.verl.tree_attention_backward(
            grads[0].contiguous(), q, k, v, out, lse, tree_2n, *ctx.settings
        )
        return *gradients, None, None, None, None, None, None
