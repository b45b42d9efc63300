"""Attention over packed rows, registered with transformers under our own name.

The model is loaded with `attn_implementation=ATTENTION` for its language tower. Every layer then
calls the `AttentionContext` that the caller passes to the forward pass as `attention_context`.
Letters: N heads, K key-value heads, S packed tokens, D head dim, C sequences of a bucket, Q queries
and W keys of a padded sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from verl.sequence_parallel.flash import FlashRow
from verl.sequence_parallel.layout import ROOT, Layout
from verl.sequence_parallel.tree import tree_attention

ATTENTION = "verl_packed"
# Sequences of a bucket are padded to the longest; a bucket closes before this share is wasted.
MAX_PADDING = 0.25
Span = tuple[int, int]
Item = TypeVar("Item", bound=tuple[Any, ...])


class AttentionContext(Protocol):
    """What a layer attends to; one object a forward pass."""

    def __call__(
        self, layer: int, q_NSD: Tensor, k_KSD: Tensor, v_KSD: Tensor, scale: float, /
    ) -> Tensor:
        """Attention output, (S, N, D)."""
        ...


def _registered_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    attention_context: AttentionContext,
    **_: object,
) -> tuple[Tensor, None]:
    """Adapts transformers' attention signature ((1, N, S, D) in, (1, S, N, D) out) to a context."""
    out_SND = attention_context(int(module.layer_idx), query[0], key[0], value[0], scaling)
    return out_SND[None], None


def register_attention() -> None:
    """Makes `ATTENTION` known to transformers; no dense mask is built for it."""
    AttentionInterface.register(ATTENTION, _registered_attention)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


@dataclass(frozen=True)
class _Bucket:
    """Sequences of similar length, padded to one shape.

    `queries_CQ` and `keys_CW` index the row; `out_SQ` says where the valid queries go: flat index
    into (C, Q) and the row index they belong to. `mask_C1QW` is None for a plain causal bucket.
    """

    queries_CQ: Tensor
    keys_CW: Tensor
    flat: Tensor
    rows: Tensor
    mask_C1QW: Tensor | None


class TreeAttention:
    """What segments share is neither repeated nor read again; for long prompts, and any device."""

    def __init__(
        self, layout: Layout, kernel: str | None = None, tail: Layout | None = None
    ) -> None:
        """`kernel` is that of `verl.sequence_parallel.tree.tree_attention`, and `tail` the layout
        for queries of the row's tail alone."""
        self._layout, self._kernel, self._tail = layout, kernel, tail

    def __call__(
        self, layer: int, q_NSD: Tensor, k_KSD: Tensor, v_KSD: Tensor, scale: float
    ) -> Tensor:
        qkv = q_NSD.transpose(0, 1), k_KSD.transpose(0, 1), v_KSD.transpose(0, 1)
        if self._tail is not None and q_NSD.shape[1] < k_KSD.shape[1]:
            return tree_attention(*qkv, self._tail, scale, self._kernel, tail=True)
        return tree_attention(*qkv, self._layout, scale, self._kernel)


def attention_over(
    layout: Layout, device: torch.device, kernel: str, tail: Layout | None = None
) -> AttentionContext:
    """Attention of a row by the kernel that `verl.sequence_parallel.flash.kernel_of` chose.

    `tail` is for the kernels of `TreeAttention`, which alone know it.
    """
    if kernel == "sdpa":
        return PackedAttention(layout, device)
    if kernel == "flash_attn":
        return FlashRow(layout, device)
    return TreeAttention(layout, kernel, tail)


class PackedAttention:
    """Exact causal attention over a packed row through torch's `scaled_dot_product_attention`.

    Segments of similar length are padded to a bucket. Works on any device and dtype, and fast with
    many short segments on a CPU. The keys that a segment continues are gathered for it, which
    bounds the length of prompts that many responses share.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        roots, rest = [], []
        for i, (start, end) in enumerate(layout.spans):
            if start == end:
                continue
            before = [layout.spans[j] for j in layout.ancestors(i)]
            # A segment is padded with what it continues: buckets are by the length of both.
            whole = end - start + sum(b - a for a, b in before)
            if layout.parents[i] == ROOT:
                roots.append((whole, (start, end)))
            else:
                rest.append((whole, (start, end), before))
        buckets = [_causal_bucket([s[1] for s in b]) for b in _by_length(roots)]
        buckets += [_shared_bucket([s[1:] for s in b]) for b in _by_length(rest)]
        self._buckets = [_to(bucket, device) for bucket in buckets]

    def __call__(
        self, layer: int, q_NSD: Tensor, k_KSD: Tensor, v_KSD: Tensor, scale: float
    ) -> Tensor:
        pieces, rows = [], []
        for b in self._buckets:
            out_CNQD = F.scaled_dot_product_attention(
                q_NSD[:, b.queries_CQ].transpose(0, 1),
                k_KSD[:, b.keys_CW].transpose(0, 1),
                v_KSD[:, b.keys_CW].transpose(0, 1),
                attn_mask=b.mask_C1QW,
                is_causal=b.mask_C1QW is None,
                scale=scale,
                enable_gqa=q_NSD.shape[0] != k_KSD.shape[0],
            )
            pieces.append(out_CNQD.transpose(1, 2).flatten(0, 1)[b.flat])
            rows.append(b.rows)
        order = torch.cat(rows)
        out_SND = torch.cat(pieces)
        return torch.empty_like(out_SND).index_copy(0, order, out_SND)


def _to(bucket: _Bucket, device: torch.device) -> _Bucket:
    mask = bucket.mask_C1QW
    return _Bucket(
        bucket.queries_CQ.to(device),
        bucket.keys_CW.to(device),
        bucket.flat.to(device),
        bucket.rows.to(device),
        None if mask is None else mask.to(device),
    )


def _by_length(items: Sequence[Item]) -> list[list[Item]]:
    """Buckets of items of similar length, their first entry: padding stays under `MAX_PADDING`."""
    buckets: list[list[Item]] = []
    used = 0
    for item in sorted(items, key=lambda item: item[0]):
        n = item[0]
        if buckets and used + n >= (1 - MAX_PADDING) * n * (len(buckets[-1]) + 1):
            buckets[-1].append(item)
            used += n
        else:
            buckets.append([item])
            used = n
    return buckets


def _padded_index(pieces: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Row indices of every piece padded to the longest (with a valid one), and which are real."""
    longest = max(map(len, pieces))
    index = torch.stack([torch.cat([p, p[:1].expand(longest - len(p))]) for p in pieces])
    lengths = torch.tensor([len(p) for p in pieces])[:, None]
    return index, torch.arange(longest)[None] < lengths


def _causal_bucket(spans: Sequence[Span]) -> _Bucket:
    # Padding lies at the end, where a causal query never looks.
    index, valid = _padded_index([torch.arange(*span) for span in spans])
    return _Bucket(index, index, torch.nonzero(valid.flatten()).flatten(), index[valid], None)


def _shared_bucket(segments: Sequence[tuple[Span, list[Span]]]) -> _Bucket:
    """Segments with what they continue."""
    own, own_valid = _padded_index([torch.arange(*span) for span, _ in segments])
    before, before_valid = _padded_index(
        [torch.cat([torch.arange(*span) for span in spans]) for _, spans in segments]
    )
    n_queries, n_before = own.shape[1], before.shape[1]
    causal = torch.ones(n_queries, n_queries, dtype=torch.bool).tril()
    # A padded query sees what the first query sees, which keeps its (unused) softmax finite.
    seen = torch.cat(
        [
            before_valid[:, None, :].expand(-1, n_queries, n_before),
            (causal[None] & own_valid[:, None, :]),
        ],
        dim=2,
    )
    flat = torch.nonzero(own_valid.flatten()).flatten()
    return _Bucket(own, torch.cat([before, own], dim=1), flat, own[own_valid], seen[:, None])
