"""Attention over packed rows by buckets equals an explicit mask."""

import pytest
import torch

from tests.sequence_parallel.oracle import LAYOUTS, dense_attention, dense_mask, random_qkv
from verl.sequence_parallel.attention import PackedAttention, TreeAttention


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_of_a_row_equals_dense_attention_in_value_and_gradient(layout, kv_heads):
    q, k, v, weight = random_qkv(layout, 4, kv_heads)
    expected = dense_attention(q, k, v, dense_mask(layout), 0.3)
    gradients = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for attention in (PackedAttention(layout, torch.device("cpu")), TreeAttention(layout)):
        out = attention(0, q, k, v, 0.3)
        got = torch.autograd.grad((out * weight).sum(), (q, k, v))
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(got, gradients)
