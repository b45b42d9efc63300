"""Attention of a vision tower within chunks of its rows, all chunks in one call a layer.

A tower's layer attends within windows of a frame or within whole frames. transformers calls its
attention once a chunk, in a Python loop, unless the attention's name holds `flash`; then it hands
over all rows with the places where chunks begin. The attention registered here takes them so and
needs no package. On a GPU it is one call of torch's variable-length FlashAttention a layer;
elsewhere, chunks of equal length share one `scaled_dot_product_attention`, exact in every dtype.
Letters: S rows (patches) of a call, N heads, D head dim, C chunks, X chunks of one length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from verl.utils.torch_functional import to_device

TOWER_ATTENTION = "verl_tower_flash"
"""For `set_attn_implementation` of a built model, under its `vision_config`.

A model built from a config that names it already would look for a package that has this name.
"""
_LEAST_CAPABILITY = 8
"""First number of the capability of GPUs that FlashAttention runs on: Ampere and later."""


@dataclass(frozen=True)
class _Groups:
    """Chunks sorted by length: `order` lists rows, `places` says where each row then stands.

    Both are None where they would change nothing.
    """

    sizes: tuple[tuple[int, int], ...]
    """(chunks, rows a chunk) of each length."""
    order_S: Tensor | None
    places_S: Tensor | None


class Chunks:
    """Consecutive chunks of a call's rows; a row attends to all rows of its own chunk."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = tuple(lengths)
        self.longest = max(self.lengths)
        self._device = device
        self.starts = to_device(F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).int(), device)
        """Row at which each chunk begins, and the end: (C + 1,) int32, `cu_seqlens` elsewhere."""
        self._groups: _Groups | None = None

    def by_length(self) -> _Groups:
        """Made once, when it is first asked for: FlashAttention does without."""
        if self._groups is None:
            self._groups = self._grouped()
        return self._groups

    def _grouped(self) -> _Groups:
        sizes = tuple((n, length) for length, n in sorted(Counter(self.lengths).items()))
        if len(sizes) == 1:
            return _Groups(sizes, None, None)
        lengths_C = torch.tensor(self.lengths)
        order_S = lengths_C.repeat_interleave(lengths_C).argsort(stable=True)
        places_S = torch.empty_like(order_S)
        places_S[order_S] = torch.arange(len(order_S))
        return _Groups(sizes, to_device(order_S, self._device), to_device(places_S, self._device))


@dataclass(frozen=True)
class TowerChunks:
    """The kinds of chunks of one call of a tower, handed to every layer as `tower_chunks`.

    So lengths are known on the host: no layer has to ask the device for them.
    """

    kinds: tuple[Chunks, ...]

    def starting_at(self, starts: Tensor) -> Chunks | None:
        """The kind that a layer was given the `starts` of; None for a tensor of somebody else."""
        return next((kind for kind in self.kinds if kind.starts is starts), None)


def register_tower_attention() -> None:
    """Makes `TOWER_ATTENTION` known to transformers."""
    AttentionInterface.register(TOWER_ATTENTION, _registered_attention)


def _registered_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    tower_chunks: TowerChunks | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Adapts transformers' attention signature: (1, N, S, D) in, (1, S, N, D) out."""
    q_SND, k_SND, v_SND = (x[0].transpose(0, 1) for x in (query, key, value))
    if runs_flash(q_SND):
        out_SND = _flash(q_SND, k_SND, v_SND, cu_seq_lens_q, max_length_q, scaling)
        return out_SND[None], None
    chunks = None if tower_chunks is None else tower_chunks.starting_at(cu_seq_lens_q)
    if chunks is None:  # A caller that let transformers find the chunks.
        chunks = Chunks(cu_seq_lens_q.diff().tolist(), query.device)
    return attend_within(chunks, q_SND, k_SND, v_SND, scaling)[None], None


def runs_flash(q_SND: Tensor) -> bool:
    """Whether torch's FlashAttention takes rows like these."""
    return (
        q_SND.device.type == "cuda"
        and q_SND.dtype in (torch.bfloat16, torch.float16)
        and q_SND.shape[-1] % 8 == 0
        and torch.cuda.get_device_properties(q_SND.device).major >= _LEAST_CAPABILITY
    )


def _flash(
    q_SND: Tensor, k_SND: Tensor, v_SND: Tensor, starts: Tensor, longest: int, scale: float
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out_SND = varlen_attn(
        q_SND, k_SND, v_SND, starts, starts, longest, longest, scale=scale, window_size=(-1, -1)
    )
    assert isinstance(out_SND, Tensor)
    return out_SND


def attend_within(
    chunks: Chunks, q_SND: Tensor, k_SND: Tensor, v_SND: Tensor, scale: float
) -> Tensor:
    """Exact attention within chunks on any device, (S, N, D); one call for each length."""
    groups = chunks.by_length()
    rows = [q_SND, k_SND, v_SND]
    if groups.order_S is not None:
        rows = [x_SND.index_select(0, groups.order_S) for x_SND in rows]
    parts = []
    counts = [n * length for n, length in groups.sizes]
    for (n, _), *qkv in zip(groups.sizes, *(x.split(counts) for x in rows), strict=True):
        q, k, v = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in qkv)
        out_XNLD = F.scaled_dot_product_attention(q, k, v, scale=scale)
        parts.append(out_XNLD.transpose(1, 2).flatten(0, 1))
    out_SND = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out_SND if groups.places_S is None else out_SND.index_select(0, groups.places_S)
