"""A language model with its vision tower, as the trainer calls it: packed rows in, log-probs out.

Letters: S packed tokens, T predicted tokens, M visual tokens, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from verl.models.adapter import Adapter
from verl.models.logprobs import token_log_probs


@dataclass(frozen=True)
class VisionInput:
    """Pixels to be encoded inside the forward pass, where the vision tower is trained."""

    pixels: Tensor
    grids: Sequence[tuple[int, int, int]]
    is_dummy: bool = False
    """True on ranks without media: the tower runs so that collectives match, and adds zero."""


class PolicyModel(nn.Module):
    """Wraps a transformers model; the parameters live under `hf` with transformers' own names."""

    def __init__(self, hf: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.hf = hf
        self.adapter = adapter
        forbidden = torch.tensor(adapter.forbidden_ids, dtype=torch.long)
        self.forbidden_ids: Tensor
        self.register_buffer("forbidden_ids", forbidden, persistent=False)

    def forward(
        self,
        ids_S: Tensor,
        positions_3S: Tensor,
        predict_T: Tensor,
        labels_T: Tensor,
        *,
        features_ME: Tensor | None,
        vision: VisionInput | None,
        attention_context: Any,
        temperature: float,
        tokens: slice | None = None,
        tail_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each label and entropy of its distribution, both (T,) float32.

        With `tokens`, the layers get that piece of the row alone, and `predict_T` counts within it;
        ids, positions and media are those of the whole row. With `tail_R`, the last layer
        computes those tokens alone, and `predict_T` counts within them.
        """
        extra = None
        if vision is not None:
            encoded = self.vision_features(vision.pixels, vision.grids)
            if vision.is_dummy:
                extra = encoded.sum() * 0.0
            else:
                features_ME = encoded
        embeds_SE = self.adapter.embed(self.hf, ids_S, features_ME)
        if extra is not None:
            embeds_SE = embeds_SE + extra.to(embeds_SE.dtype)
        if tokens is not None:
            embeds_SE, positions_3S = embeds_SE[tokens], positions_3S[:, tokens]
        hidden_SE = self.adapter.hidden(self.hf, embeds_SE, positions_3S, attention_context, tail_R)
        return token_log_probs(
            hidden_SE[predict_T],
            self.adapter.head(self.hf).weight,
            labels_T,
            temperature=temperature,
            forbidden_ids=self.forbidden_ids,
        )

    def encode(self, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """`vision_features` as a forward pass of its own.

        Sharding hooks are attached to it, so it is a collective, and `forward` must not call it.
        """
        return self.vision_features(pixels, grids)

    def vision_features(self, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """Visual features of several pieces of media, concatenated, (M, E)."""
        tower = self.adapter.vision_tower(self.hf)
        assert tower is not None
        dtype = next(tower.parameters()).dtype
        return self.adapter.encode(self.hf, pixels.to(dtype), grids)
