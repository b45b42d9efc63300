"""Attention of a group of responses that share one prompt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from verl.sequence_parallel.layout import Layout
from verl.sequence_parallel.tree import tree_attention


def shared_prefix_attention(
    q_SND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    prefix_len: int,
    response_lens: Sequence[int],
    softmax_scale: float | None = None,
) -> Tensor:
    """Exact attention over one row `[prefix | r1 | ... | rG]`, (S, N, D), with gradients.

    The prefix sees itself causally; a response all of the prefix, and itself causally. The result
    and the gradients are those of G rows `[prefix | r]`, the prefix computed once. On CUDA in bf16
    or fp16 it runs on FlashAttention, elsewhere on exact matrix products.

    Args:
        q_SND: queries, S = prefix_len + sum(response_lens) tokens, N heads, D head dim.
        k_SKD, v_SKD: keys and values; N must be a multiple of their K heads.
        prefix_len: tokens of the prefix.
        response_lens: tokens of each response; zero is allowed.
        softmax_scale: factor of the scores; None means D ** -0.5.

    Raises ValueError for lengths that do not add up to S, and for heads that do not divide.
    """
    size, n_heads, head_dim = q_SND.shape
    if prefix_len < 0 or prefix_len + sum(response_lens) != size:
        raise ValueError(
            f"a prefix of {prefix_len} tokens and responses of {list(response_lens)} are not the "
            f"{size} tokens of the row"
        )
    if k_SKD.shape != v_SKD.shape or len(k_SKD) != size or n_heads % k_SKD.shape[1]:
        raise ValueError(
            f"queries {tuple(q_SND.shape)} do not fit keys {tuple(k_SKD.shape)} and values "
            f"{tuple(v_SKD.shape)}: tokens must be as many, and heads a multiple"
        )
    layout = Layout.of_groups([prefix_len], [response_lens])
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    return tree_attention(q_SND, k_SKD, v_SKD, layout, scale)
