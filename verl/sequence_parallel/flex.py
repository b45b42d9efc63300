"""The same attention over a row of segments through torch's flex attention, to compare with.

A key is seen by the queries from its own place to the end of the last segment that continues its
segment, which depth-first order makes one interval. Compiled on CUDA; elsewhere it holds the scores
of the whole row. Source: torch.nn.attention.flex_attention (arXiv:2412.05496).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from verl.sequence_parallel.layout import Layout


def flex_tree_attention(
    q_SND: Tensor, k_SKD: Tensor, v_SKD: Tensor, layout: Layout, scale: float
) -> Tensor:
    """Attention output of a row, (S, N, D); see `verl.sequence_parallel.tree.tree_attention`."""
    mask = _block_mask(layout, q_SND.device)
    heads = [x.transpose(0, 1)[None] for x in (q_SND, k_SKD, v_SKD)]
    attend: Any = _compiled() if q_SND.is_cuda else flex_attention
    out_1NSD = attend(*heads, block_mask=mask, scale=scale, enable_gqa=True)
    return out_1NSD[0].transpose(0, 1)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    # Without dynamic shapes every new length would be compiled anew.
    return torch.compile(flex_attention, dynamic=True)


@lru_cache(maxsize=2)
def _block_mask(layout: Layout, device: torch.device) -> BlockMask:
    lengths = torch.tensor(layout.lengths)
    seen_until_S = torch.repeat_interleave(torch.tensor(layout.branch_ends), lengths).to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < seen_until_S[key])

    compiled = {"_compile": True} if device.type == "cuda" else {}
    return create_block_mask(
        sees, None, None, layout.size, layout.size, device=str(device), **compiled
    )
