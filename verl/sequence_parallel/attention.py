"""Attention over packed rows, registered with transformers under our own name.

The model is loaded with `attn_implementation=ATTENTION` for its language tower. Every layer then
calls the `AttentionContext` that the caller passes to the forward pass as `attention_context`.
Letters: N heads, K key-value heads, S packed tokens, D head dim, C sequences of a bucket, Q queries
and W keys of a padded sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from verl.sequence_parallel.flash import FlashRow, VarlenKernel, torch_varlen
from verl.sequence_parallel.packing import Layout

ATTENTION = "verl_packed"
# Sequences of a bucket are padded to the longest; a bucket closes before this share is wasted.
MAX_PADDING = 0.25
Span = TypeVar("Span", bound=tuple[int, ...])


class AttentionContext(Protocol):
    """What a layer attends to; one object a forward pass."""

    def __call__(
        self, layer: int, q_NSD: Tensor, k_KSD: Tensor, v_KSD: Tensor, scale: float
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


class PackedAttention:
    """Exact causal attention over a packed row with shared prompts.

    Prompt tokens attend causally within their prompt; response tokens to their whole prompt and
    causally to themselves. Works on any device and dtype. The keys of a prompt are gathered once a
    response, which bounds the length of prompts until the log-sum-exp form lands. Padded buckets
    go through torch's `scaled_dot_product_attention`; with a kernel as `flash` (True: torch's
    own), the whole row is one call of it (`verl.sequence_parallel.flash`).
    """

    def __init__(
        self, layout: Layout, device: torch.device, *, flash: VarlenKernel | bool | None = None
    ) -> None:
        self._flash: FlashRow | None = None
        self._buckets: list[_Bucket] = []
        if flash:
            self._flash = FlashRow(layout, device, torch_varlen if flash is True else flash)
            return
        prompts, responses = layout.spans()
        causal = [_causal_bucket(b) for b in _by_length(prompts, lambda p: p[1] - p[0])]
        shared = [
            _response_bucket(bucket, prompts)
            for bucket in _by_length(
                [r for r in responses if r[1] > r[0]],
                # A response is padded with its prompt: buckets are by the length of both.
                lambda r: r[1] - r[0] + layout.prompt_lens[r[2]],
            )
        ]
        self._buckets = [_to(bucket, device) for bucket in causal + shared]

    def __call__(
        self, layer: int, q_NSD: Tensor, k_KSD: Tensor, v_KSD: Tensor, scale: float
    ) -> Tensor:
        if self._flash is not None:
            return self._flash(q_NSD, k_KSD, v_KSD, scale)
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


def _by_length(spans: Sequence[Span], length: Callable[[Span], int]) -> list[list[Span]]:
    """Buckets of spans of similar length, so that padding stays under `MAX_PADDING`."""
    buckets: list[list[Span]] = []
    used = 0
    for span in sorted(spans, key=length):
        n = length(span)
        if buckets and used + n >= (1 - MAX_PADDING) * n * (len(buckets[-1]) + 1):
            buckets[-1].append(span)
            used += n
        else:
            buckets.append([span])
            used = n
    return buckets


def _padded_index(spans: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Row indices of every span padded to the longest (with a valid index), and which are real."""
    starts = torch.tensor([s[0] for s in spans])[:, None]
    lengths = torch.tensor([s[1] - s[0] for s in spans])[:, None]
    offsets = torch.arange(int(lengths.max()))[None]
    valid = offsets < lengths
    return torch.where(valid, starts + offsets, starts), valid


def _causal_bucket(prompts: Sequence[tuple[int, int]]) -> _Bucket:
    # Padding lies at the end, where a causal query never looks.
    index, valid = _padded_index(prompts)
    return _Bucket(index, index, torch.nonzero(valid.flatten()).flatten(), index[valid], None)


def _response_bucket(
    responses: Sequence[tuple[int, int, int]], prompts: Sequence[tuple[int, int]]
) -> _Bucket:
    own, own_valid = _padded_index(responses)
    prompt, prompt_valid = _padded_index([prompts[group] for _, _, group in responses])
    n_queries, n_prompt = own.shape[1], prompt.shape[1]
    causal = torch.ones(n_queries, n_queries, dtype=torch.bool).tril()
    # A padded query sees what the first query sees, which keeps its (unused) softmax finite.
    seen = torch.cat(
        [
            prompt_valid[:, None, :].expand(-1, n_queries, n_prompt),
            (causal[None] & own_valid[:, None, :]),
        ],
        dim=2,
    )
    flat = torch.nonzero(own_valid.flatten()).flatten()
    return _Bucket(own, torch.cat([prompt, own], dim=1), flat, own[own_valid], seen[:, None])
