"""Ranks that share a row find what one rank finds alone, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conftest import run_gloo
from tests.sequence_parallel.oracle import LAYOUTS, dense_attention, dense_mask, random_layout
from verl.sequence_parallel.attention import TreeAttention
from verl.sequence_parallel.layout import ROOT, Layout
from verl.sequence_parallel.topology import SequenceGroup
from verl.sequence_parallel.ulysses import UlyssesAttention

HEADS = [(16, 2), (28, 4), (4, 4), (4, 1)]
SCALE = 0.3
ROWS = [*LAYOUTS, *(random_layout(seed) for seed in range(8))]


def padded(layout: Layout, multiple: int) -> Layout:
    n = -layout.size % multiple
    return Layout((*layout.lengths, n), (*layout.parents, ROOT)) if n else layout


def inputs(layout: Layout, heads: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(n, layout.size, 4) for n in (heads[0], heads[1], heads[1])]
    shapes.append((layout.size, heads[0], 4))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def collect(rank: int, world_size: int) -> dict[Any, list[torch.Tensor]]:
    """This rank's piece of output and gradients, for every row, heads and dtype."""
    sequence = SequenceGroup.of_neighbours(world_size, "cpu")
    found = {}
    for i, original in enumerate(ROWS):
        layout = padded(original, world_size)
        length = layout.size // world_size
        mine = slice(rank * length, (rank + 1) * length)
        for heads in HEADS:
            for dtype in (torch.float64, torch.float32):
                *qkv, weight = inputs(layout, heads, dtype)
                own = [x[:, mine].clone().requires_grad_() for x in qkv]
                attention = UlyssesAttention(TreeAttention(layout), sequence)
                out = attention(0, *own, SCALE)
                gradients = torch.autograd.grad((out * weight[mine]).sum(), own)
                found[i, heads, dtype] = [out.detach().transpose(0, 1), *gradients]
    return found


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[Any, list[torch.Tensor]]]:
    return run_gloo(collect, request.param)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("i", range(len(ROWS)))
def test_pieces_of_a_row_are_those_of_the_whole(ranks, i, heads, dtype):
    layout = padded(ROWS[i], len(ranks))
    *qkv, weight = inputs(layout, heads, torch.float64)
    qkv = [x.requires_grad_() for x in qkv]
    out = dense_attention(*qkv, dense_mask(layout), SCALE)
    gradients = torch.autograd.grad((out * weight).sum(), qkv)
    pieces = zip(*(r[i, heads, dtype] for r in ranks), strict=True)
    rounding = 1e-12 if dtype == torch.float64 else 2e-5
    for found, expected in zip(pieces, (out.transpose(0, 1), *gradients), strict=True):
        torch.testing.assert_close(
            torch.cat(found, 1).double(), expected, rtol=rounding, atol=rounding
        )
