"""A tower's blocks with fewer passes over memory, without a compiler: what that would gain.

Norms are torch's own, one pass each; queries and keys are rotated together in two passes, in
float32 as before. For inference only. Letters: S patches, N heads, D head dim, E hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from verl.models.tower_attention import TOWER_ATTENTION


def fuse(tower: Any) -> None:
    """Puts other modules with the same weights into a tower's blocks."""
    for block in tower.blocks:
        block.norm1, block.norm2 = FusedNorm(block.norm1), FusedNorm(block.norm2)
        block.attn = FusedAttention(block.attn)


class FusedNorm(nn.Module):
    """RMS norm in one pass; rounds once, where transformers rounds before the weight as well."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self._eps = norm.weight, norm.variance_epsilon

    def forward(self, x_SE: Tensor) -> Tensor:
        return F.rms_norm(x_SE, self.weight.shape, self.weight, self._eps)


class FusedAttention(nn.Module):
    """The attention of a block with the same projections and another rotation."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self._heads, self._scale = attention.num_heads, attention.scaling
        self._attend: Any = AttentionInterface()[TOWER_ATTENTION]

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        max_seqlen: int,
        **kwargs: Any,
    ) -> Tensor:
        qkv_S3ND = self.qkv(hidden_states).unflatten(-1, (3, self._heads, -1))
        q_SND, k_SND = rotated(qkv_S3ND[:, :2], *position_embeddings).unbind(1)
        q, k, v = (x.transpose(0, 1)[None] for x in (q_SND, k_SND, qkv_S3ND[:, 2]))
        out, _ = self._attend(
            self, q, k, v, None, scaling=self._scale,
            cu_seq_lens_q=cu_seqlens, max_length_q=max_seqlen, **kwargs,
        )  # fmt: skip
        return self.proj(out[0].flatten(1))


def rotated(qk_S2ND: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Queries and keys turned by their positions; both halves of D turn by the same angles."""
    half = qk_S2ND.shape[-1] // 2
    cos, sin = (x[:, None, None, :half].float() for x in (cos_SD, sin_SD))
    first, second = qk_S2ND[..., :half], qk_S2ND[..., half:]
    out_S2ND = torch.empty(qk_S2ND.shape, dtype=qk_S2ND.dtype, device=qk_S2ND.device)
    torch.addcmul(first * cos, second, sin, value=-1, out=out_S2ND[..., :half])
    torch.addcmul(second * cos, first, sin, out=out_S2ND[..., half:])
    return out_S2ND
