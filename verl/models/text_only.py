"""Decoders that read text alone, on transformers' classes: Llama (arXiv:2302.13971) and Qwen2.

Their block is that of Qwen2.5-VL's language model (`verl.models.decoder_block`); what differs is
that there is no tower, no media and one axis of positions.
Letters: S tokens of a row, R of them, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from verl.data.media import MediaItem
from verl.models.adapter import ModelError, register_adapter
from verl.models.decoder_block import refuse_sliding_window, use_packed_blocks
from verl.models.pointwise import Pointwise
from verl.models.shape import TextShape

_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose frequencies follow from the configuration alone."""


class TextOnly:
    """Adapter of a decoder without media; see `verl.models.adapter.Adapter` for the contract."""

    vision = None
    tower_parameters = 0
    tower_attention = None
    image_token = video_token = ""
    forbidden_ids: tuple[int, ...] = ()

    def __init__(self, config: Any) -> None:
        _refuse_moving_frequencies(config)
        self.shape = TextShape.of(config)

    def expand(self, ids: Sequence[int], media: Sequence[MediaItem]) -> list[int]:
        if media:
            raise ValueError(f"{len(media)} pieces of media, but the model reads text alone")
        return list(ids)

    def positions(self, ids_S: Tensor, media: Sequence[MediaItem]) -> Tensor:
        # Three equal rows though one is used: rows of packing, sharding and sampling are those of
        # text in a model that sees, so that nothing there asks for the family.
        return torch.arange(len(ids_S)).expand(3, -1)

    def model_class(self) -> type:
        raise NotImplementedError

    def vision_tower(self, model: Any) -> nn.Module | None:
        return None

    def tower_blocks(self, model: Any) -> Sequence[nn.Module]:
        return []

    def decoder_layers(self, model: Any) -> nn.ModuleList:
        return model.model.layers

    def mlp(self, layer: Any) -> nn.Module:
        return layer.mlp

    def head(self, model: Any) -> nn.Linear:
        return model.lm_head

    def encode(self, model: Any, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        raise ValueError("the model reads text alone and has no tower to encode with")

    def embed(self, model: Any, ids_S: Tensor, features_ME: Tensor | None) -> Tensor:
        if features_ME is not None:
            raise ValueError(f"{len(features_ME)} rows of features for a model of text alone")
        return model.model.embed_tokens(ids_S)

    def use_packed_blocks(self, model: Any, ops: Pointwise) -> bool:
        use_packed_blocks(model.model, ops)
        return True

    def hidden(
        self, model: Any, embeds_SE: Tensor, positions_3S: Tensor, attention_context: Any,
        tail_R: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        output = model.model(
            # No view: compiled operations would be compiled again for it.
            inputs_embeds=embeds_SE[None].clone(),
            position_ids=positions_3S[:1],
            use_cache=False,
            attention_context=attention_context,
            tail_R=tail_R,
        )
        return output.last_hidden_state[0]


@register_adapter("llama")
class Llama(TextOnly):
    """Llama 1 to 3, SmolLM2 and others of its kind."""

    def model_class(self) -> type:
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM


@register_adapter("qwen2")
class Qwen2(TextOnly):
    """Qwen2 and Qwen2.5 of text alone."""

    def __init__(self, config: Any) -> None:
        refuse_sliding_window(config)
        super().__init__(config)

    def model_class(self) -> type:
        from transformers import Qwen2ForCausalLM

        return Qwen2ForCausalLM


def _refuse_moving_frequencies(config: Any) -> None:
    """Frequencies that follow the longest sequence of a batch would be others in a packed row."""
    kind = config.rope_parameters["rope_type"]
    if kind not in _FIXED_ROPE:
        raise ModelError(
            f"config.json: rope_parameters.rope_type={kind!r}: rotary frequencies that depend on "
            "the length of a batch are not those of each sequence in a packed row; use a model "
            f"with one of {', '.join(_FIXED_ROPE)}"
        )
