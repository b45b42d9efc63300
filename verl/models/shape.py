"""The size of a decoder, and what follows from it: parameters and floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextShape:
    """Widths and counts of a language model with gated MLPs and grouped-query attention."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    is_tied: bool
    """Whether the head is the embedding."""

    @classmethod
    def of(cls, text_config: Any, *, tied: bool | None = None) -> TextShape:
        """From a transformers text configuration; `tied` where another part of it says so."""
        heads, hidden = text_config.num_attention_heads, text_config.hidden_size
        return cls(
            layers=text_config.num_hidden_layers,
            hidden=hidden,
            heads=heads,
            kv_heads=text_config.num_key_value_heads,
            head_dim=getattr(text_config, "head_dim", None) or hidden // heads,
            mlp=text_config.intermediate_size,
            vocab=text_config.vocab_size,
            is_tied=bool(text_config.tie_word_embeddings if tied is None else tied),
        )

    @property
    def layer_weights(self) -> int:
        """Weights of a layer's matrices."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.mlp

    @property
    def parameters(self) -> int:
        """Weights of all matrices, embedding and head included."""
        words = self.vocab * self.hidden * (1 if self.is_tied else 2)
        return self.layers * self.layer_weights + words

    def forward_flops(self, tokens: int, pairs: int) -> float:
        """Of the layers, for so many tokens and pairs of a query and a key that it sees.

        2 for each weight and token; 4 D for each head and pair (scores, and their sum of values).
        Backward takes twice as many.
        """
        per_layer = 2 * self.layer_weights * tokens + 4 * self.head_dim * self.heads * pairs
        return float(self.layers * per_layer)
