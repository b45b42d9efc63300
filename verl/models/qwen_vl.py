"""Qwen2.5-VL (arXiv:2502.13923) on transformers >= 5.18."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

from verl.data.media import MediaItem
from verl.data.preprocess import VisionSpec
from verl.models.adapter import register_adapter, scatter_features
from verl.models.decoder_block import refuse_sliding_window, use_packed_blocks
from verl.models.pointwise import Pointwise
from verl.models.positions import VisualSpan, mrope_positions
from verl.models.shape import TextShape
from verl.models.tower_attention import TOWER_ATTENTION, Chunks, TowerChunks
from verl.utils.torch_functional import to_device


@register_adapter("qwen2_5_vl")
class Qwen25VL:
    """Adapter of the Qwen2.5-VL family; see `verl.models.adapter.Adapter` for the contract."""

    image_token = "<|vision_start|><|image_pad|><|vision_end|>"
    video_token = "<|vision_start|><|video_pad|><|vision_end|>"
    tower_attention = TOWER_ATTENTION

    def __init__(self, config: Any) -> None:
        refuse_sliding_window(config.text_config, "text_config.")
        self.shape = TextShape.of(config.text_config, tied=config.tie_word_embeddings)
        self._visual_ids = torch.tensor([config.image_token_id, config.video_token_id])
        self._image_id, self._video_id = config.image_token_id, config.video_token_id
        self.forbidden_ids = (config.image_token_id, config.video_token_id)
        tower = config.vision_config
        self.tower_parameters = _tower_parameters(tower)
        self._merge = tower.spatial_merge_size
        self._window_size, self._patch_size = tower.window_size, tower.patch_size
        self._tokens_per_second = tower.tokens_per_second
        factor = tower.patch_size * tower.spatial_merge_size
        self.vision = VisionSpec(
            patch_size=tower.patch_size,
            merge_size=tower.spatial_merge_size,
            temporal_patch_size=tower.temporal_patch_size,
            min_pixels=4 * factor**2,
            max_pixels=16384 * factor**2,
            video_min_pixels=128 * factor**2,
            video_max_pixels=768 * factor**2,
        )

    def expand(self, ids: Sequence[int], media: Sequence[MediaItem]) -> list[int]:
        pads = {"image": self._image_id, "video": self._video_id}
        expanded: list[int] = []
        queue = list(media)
        for token in ids:
            if token not in self.forbidden_ids:
                expanded.append(token)
                continue
            if not queue or pads[queue[0].ref.kind] != token:
                raise ValueError(
                    f"placeholder {token} does not match the media of the row "
                    f"({[m.ref.kind for m in media]})"
                )
            expanded.extend([token] * queue.pop(0).n_tokens)
        if queue:
            raise ValueError(f"{len(queue)} pieces of media have no placeholder in the prompt")
        return expanded

    def positions(self, ids_S: Tensor, media: Sequence[MediaItem]) -> Tensor:
        spans = [
            VisualSpan(m.grid_thw, m.seconds_per_grid if m.ref.kind == "video" else 0.0)
            for m in media
        ]
        return mrope_positions(
            torch.isin(ids_S, self._visual_ids),
            spans,
            merge_size=self._merge,
            tokens_per_second=self._tokens_per_second,
        )

    def model_class(self) -> type:
        from transformers import Qwen2_5_VLForConditionalGeneration

        return Qwen2_5_VLForConditionalGeneration

    def vision_tower(self, model: Any) -> nn.Module | None:
        return model.model.visual

    def tower_blocks(self, model: Any) -> Sequence[nn.Module]:
        return list(model.model.visual.blocks)

    def decoder_layers(self, model: Any) -> nn.ModuleList:
        return model.model.language_model.layers

    def mlp(self, layer: Any) -> nn.Module:
        return layer.mlp

    def head(self, model: Any) -> nn.Linear:
        return model.lm_head

    def encode(self, model: Any, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        grid = torch.tensor(grids)
        known = self._known_of(grid, pixels.device)
        return model.model.visual(pixels, grid_thw=grid, **known).pooler_output

    def _known_of(self, grid: Tensor, device: torch.device) -> dict[str, Any]:
        """What the tower computes from the grids, made on the host.

        The tower would make it on the device and then wait for it there, some of it in every layer.
        """
        window_index, window_starts = get_vision_window_index(
            grid, self._merge, self._window_size, self._patch_size
        )
        frames, windows = (
            Chunks(starts.diff().tolist(), device)
            for starts in (get_vision_cu_seqlens(grid), window_starts)
        )
        return {
            "position_ids": to_device(get_vision_position_ids(grid, self._merge), device),
            "window_index": to_device(window_index, device),
            "cu_seqlens": frames.starts,
            "max_seqlen": frames.longest,
            "cu_window_seqlens": windows.starts,
            "max_window_seqlen": windows.longest,
            "tower_chunks": TowerChunks((frames, windows)),
        }

    def embed(self, model: Any, ids_S: Tensor, features_ME: Tensor | None) -> Tensor:
        embeds_SE = model.model.language_model.embed_tokens(ids_S)
        if features_ME is None:
            return embeds_SE
        is_visual_S = torch.isin(ids_S, self._visual_ids.to(ids_S.device))
        return scatter_features(embeds_SE, is_visual_S, features_ME)

    def use_packed_blocks(self, model: Any, ops: Pointwise) -> bool:
        use_packed_blocks(model.model.language_model, ops)
        return True

    def hidden(
        self, model: Any, embeds_SE: Tensor, positions_3S: Tensor, attention_context: Any,
        tail_R: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        output = model.model.language_model(
            # No view: compiled operations would be compiled again for it.
            inputs_embeds=embeds_SE[None].clone(),
            position_ids=positions_3S[:, None],
            use_cache=False,
            attention_context=attention_context,
            tail_R=tail_R,
        )
        return output.last_hidden_state[0]


def _tower_parameters(tower: Any) -> int:
    """Weights of the matrices of blocks, patch embedding and merger."""
    wide, merged = tower.hidden_size, tower.hidden_size * tower.spatial_merge_size**2
    block = 4 * wide**2 + 3 * wide * tower.intermediate_size
    patch = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2 * wide
    return tower.depth * block + patch + merged * (merged + tower.out_hidden_size)
