"""What a model family must offer; everything else in the project is written against this.

A new family is a new file with one class, registered under its `config.model_type`.
Letters: S tokens of a row, M visual tokens, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from verl.data.media import MediaItem
from verl.data.preprocess import VisionSpec
from verl.models.pointwise import Pointwise
from verl.models.shape import TextShape
from verl.utils.exits import Explained


class ModelError(Explained, ValueError):
    """A model folder that cannot be used; the message says what to change."""


class Adapter(Protocol):
    """One model family: token layout, positions, vision tower and language model.

    An adapter holds a configuration, never weights, ranks or devices; models are arguments.
    """

    shape: TextShape
    """Size of the language model."""
    tower_parameters: int
    """Weights of the vision tower, about; 0 without one."""
    vision: VisionSpec | None
    """Pixel preprocessing; None for a text-only model."""
    image_token: str
    video_token: str
    """Text that stands for one image or video in a prompt, holding exactly one pad token."""
    tower_attention: str | None
    """Attention registered for the vision tower; None: what transformers chooses."""
    forbidden_ids: tuple[int, ...]
    """Token ids that must never be sampled, since they stand for media."""

    def __init__(self, config: Any) -> None: ...

    def expand(self, ids: Sequence[int], media: Sequence[MediaItem]) -> list[int]:
        """Repeats each single pad token as often as its piece of media has tokens."""
        ...

    def positions(self, ids_S: Tensor, media: Sequence[MediaItem]) -> Tensor:
        """Rotary positions of an expanded prompt, (3, S)."""
        ...

    def model_class(self) -> type:
        """The transformers class that holds the weights."""
        ...

    def vision_tower(self, model: nn.Module) -> nn.Module | None:
        """The module that is called apart from the language model and may be frozen."""
        ...

    def tower_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The vision tower's blocks, the unit of compilation."""
        ...

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The language model's blocks, the unit of sharding and recomputation."""
        ...

    def mlp(self, layer: nn.Module) -> nn.Module:
        """A block's MLP: maps each token alone, and only a sum takes its output."""
        ...

    def head(self, model: nn.Module) -> nn.Linear:
        """The output projection."""
        ...

    def encode(
        self, model: nn.Module, pixels: Tensor, grids: Sequence[tuple[int, int, int]]
    ) -> Tensor:
        """Visual features of several pieces of media, concatenated, (M, E)."""
        ...

    def embed(self, model: nn.Module, ids_S: Tensor, features_ME: Tensor | None) -> Tensor:
        """Token embeddings with visual features in their places, (S, E)."""
        ...

    def use_packed_blocks(self, model: nn.Module, ops: Pointwise) -> bool:
        """Makes the language model's blocks use `ops`, and `hidden` able to keep a tail alone.

        False for a family whose blocks stay as they are: `hidden` never gets a tail then.
        """
        ...

    def hidden(
        self, model: nn.Module, embeds_SE: Tensor, positions_3S: Tensor, attention_context: Any,
        tail_R: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Last hidden states of the language model, (S, E).

        With the places of some tokens, `tail_R`, those of these tokens alone, (R, E): the last
        layer computes only keys and values of the others. `attention_context` then takes R queries.
        """
        ...


AdapterClass = TypeVar("AdapterClass", bound=type)
_ADAPTERS: dict[str, type] = {}


def register_adapter(model_type: str) -> Callable[[AdapterClass], AdapterClass]:
    """Class decorator that makes a family known under its `config.model_type`."""

    def register(cls: AdapterClass) -> AdapterClass:
        _ADAPTERS[model_type] = cls
        return cls

    return register


def get_adapter(config: Any) -> Adapter:
    """The adapter of a transformers configuration.

    Raises ModelError for a family that has no adapter, with the families that have one.
    """
    from verl.models import qwen_vl, text_only  # noqa: F401  they register their families

    if config.model_type not in _ADAPTERS:
        raise ModelError(
            f"model.model_path: model type {config.model_type!r} has no adapter; "
            f"use one of {sorted(_ADAPTERS)} or add one (docs/add_a_model.md)"
        )
    return _ADAPTERS[config.model_type](config)


def scatter_features(embeds_SE: Tensor, is_visual_S: Tensor, features_ME: Tensor) -> Tensor:
    """Embeddings with the rows of visual tokens replaced by features, in order.

    Raises ValueError when the counts differ: a prompt was cut or a visual token was sampled.
    """
    rows = torch.nonzero(is_visual_S).flatten()
    if len(rows) != len(features_ME):
        raise ValueError(
            f"{len(rows)} visual tokens in the row but {len(features_ME)} rows of visual features"
        )
    return embeds_SE.index_copy(0, rows, features_ME.to(embeds_SE.dtype))
