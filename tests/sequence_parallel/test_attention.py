import pytest
import torch

from verl.sequence_parallel.attention import PackedAttention
from verl.sequence_parallel.packing import Layout

LAYOUTS = [
    Layout((5,), ((),)),
    Layout((3, 9, 4), ((), (), ())),
    Layout((6,), ((4, 1, 3),)),
    Layout((2, 17, 5), ((3, 2), (1,), (8, 8, 8, 1))),
    Layout((4, 1), ((0, 2), (1, 1))),
]


def dense_mask(layout: Layout) -> torch.Tensor:
    prompts, responses = layout.spans()
    size = max(end for _, end, *_ in [*prompts, *responses])
    mask = torch.zeros(size, size, dtype=torch.bool)
    for start, end in prompts:
        mask[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
    for start, end, group in responses:
        mask[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
        mask[start:end, slice(*prompts[group])] = True
    return mask


def dense_attention(q, k, v, mask, scale):
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_packed_attention_equals_dense_attention_in_value_and_gradient(layout, kv_heads):
    mask = dense_mask(layout)
    g = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(n, len(mask), 8, generator=g, dtype=torch.float64, requires_grad=True)
        for n in (4, kv_heads, kv_heads)
    )
    weight = torch.randn(len(mask), 4, 8, generator=g, dtype=torch.float64)
    out = PackedAttention(layout, torch.device("cpu"))(0, q, k, v, 0.3)
    got = torch.autograd.grad((out * weight).sum(), (q, k, v))
    expected = dense_attention(q, k, v, mask, 0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(got, torch.autograd.grad((expected * weight).sum(), (q, k, v)))
