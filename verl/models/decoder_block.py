"""The decoder block of Llama, Qwen2 and Qwen2.5-VL over a packed row, on transformers' modules.

It computes what transformers' block does, with joined pointwise operations; and the last block may
compute queries and MLP for only those tokens whose output is wanted: for a long prompt that is the
last token and the responses, while keys and values are needed of all.
Letters: S packed tokens, R of them whose output is wanted, E hidden size, N heads, K key-value
heads, D head dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from verl.models.adapter import ModelError
from verl.models.pointwise import Pointwise


def use_packed_blocks(text_model: Any, ops: Pointwise) -> None:
    """Makes a text model's blocks run `packed_block`; parameters, names and hooks stay.

    Raises ModelError for an activation other than SiLU.
    """
    if text_model.config.hidden_act != "silu":
        raise ModelError(
            f"config.json: hidden_act={text_model.config.hidden_act!r}, but the MLP of this family "
            "is gated by silu"
        )
    *_, last = text_model.layers
    # On the instances: hooks of sharding and checkpointing wrap what is called here.
    for layer in text_model.layers:
        layer.mlp.forward = partial(_mlp, layer.mlp, ops)
        layer.forward = partial(packed_block, layer, ops, is_last=layer is last)
    text_model.norm.forward = partial(_norm, text_model.norm, ops)


def refuse_sliding_window(config: Any, section: str = "") -> None:
    """A window that no sequence outgrows is none; packed attention has no other.

    `section` is where `config` stands in config.json. Raises ModelError.
    """
    is_sliding = "sliding_attention" in config.layer_types
    if is_sliding and config.sliding_window < config.max_position_embeddings:
        raise ModelError(
            f"config.json: {section}use_sliding_window=true with sliding_window="
            f"{config.sliding_window}, but packed attention looks at the whole sequence, which is "
            "another model than was trained. Use a model without a sliding window, or, if full "
            "attention is what you want, write use_sliding_window=false there and remove "
            "layer_types"
        )


def packed_block(
    layer: Any,
    ops: Pointwise,
    hidden_states: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    attention_context: Any,
    is_last: bool,
    tail_R: Tensor | None = None,
    **_: object,
) -> Tensor:
    """Hidden states after the block, (1, S, E); of the last block with `tail_R`, (1, R, E)."""
    # With the leading one all along: compiled operations would be compiled again for views.
    x_1SE, attention, dim = hidden_states, layer.self_attn, layer.self_attn.head_dim
    cos_1SD, sin_1SD = position_embeddings
    normed_1SE = _norm(layer.input_layernorm, ops, x_1SE)
    k_SKD = ops.rotate(attention.k_proj(normed_1SE), cos_1SD, sin_1SD)[0]
    v_SKD = attention.v_proj(normed_1SE)[0].unflatten(1, (-1, dim))
    if is_last and tail_R is not None:
        wanted = (t.index_select(1, tail_R) for t in (x_1SE, normed_1SE, cos_1SD, sin_1SD))
        x_1SE, normed_1SE, cos_1SD, sin_1SD = wanted
    q_SND = ops.rotate(attention.q_proj(normed_1SE), cos_1SD, sin_1SD)[0]
    qkv = (t.transpose(0, 1) for t in (q_SND, k_SKD, v_SKD))
    out_SND = attention_context(int(attention.layer_idx), *qkv, attention.scaling)
    norm = layer.post_attention_layernorm
    x_1SE, normed_1SE = ops.add_norm(
        x_1SE, attention.o_proj(out_SND.flatten(1)[None]), norm.weight, norm.variance_epsilon
    )
    return x_1SE + layer.mlp(normed_1SE)


def _norm(module: Any, ops: Pointwise, x: Tensor) -> Tensor:
    return ops.norm(x, module.weight, module.variance_epsilon)


def _mlp(module: Any, ops: Pointwise, x: Tensor) -> Tensor:
    found: Tensor = module.down_proj(ops.gate(module.gate_proj(x), module.up_proj(x)))
    return found
