"""Attention over a row of segments by an explicit mask, and random rows to try it on."""

from __future__ import annotations

import random

import torch
from hypothesis import strategies as st
from torch import Tensor

from verl.sequence_parallel.layout import ROOT, Layout

LAYOUTS = [
    Layout.of_groups((5,), ((),)),
    Layout.of_groups((3, 9, 4), ((), (), ())),
    Layout.of_groups((6,), ((4, 1, 3),)),
    Layout.of_groups((2, 17, 5), ((3, 2), (1,), (8, 8, 8, 1))),
    Layout.of_groups((4, 1), ((0, 2), (1, 1))),
    # A video with two questions, then a prompt without branches, then a chain of four.
    Layout(
        (7, 2, 3, 1, 4, 2, 5, 5, 1, 2, 1, 1, 3),
        (ROOT, 0, 1, 1, 0, 4, 4, ROOT, 7, ROOT, 9, 10, 11),
    ),
]


def dense_mask(layout: Layout) -> Tensor:
    """Which key each query sees, (S, S) bool."""
    segment = torch.repeat_interleave(
        torch.arange(len(layout.lengths)), torch.tensor(layout.lengths)
    )
    place = torch.arange(layout.size)
    sees = torch.zeros(layout.size, layout.size, dtype=torch.bool)
    for i, parent in enumerate(layout.parents):
        rows = segment == i
        sees[rows] |= (segment == i) & (place <= place[rows, None])
        while parent != ROOT:
            sees[rows] |= segment == parent
            parent = layout.parents[parent]
    return sees


def dense_attention(q_NSD: Tensor, k_KSD: Tensor, v_KSD: Tensor, mask: Tensor, scale: float):
    """Output (S, N, D)."""
    k_NSD, v_NSD = (x.repeat_interleave(len(q_NSD) // len(x), 0) for x in (k_KSD, v_KSD))
    scores = (q_NSD @ k_NSD.transpose(1, 2) * scale).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v_NSD).transpose(0, 1)


def random_qkv(layout: Layout, heads: int, kv_heads: int, dim: int = 8, dtype=torch.float64):
    """Queries, keys and values of a row, (heads, S, D) each, and a weight (S, heads, D)."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(n, layout.size, dim, generator=g, dtype=dtype, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    return q, k, v, torch.randn(layout.size, heads, dim, generator=g, dtype=dtype)


def random_layout(seed: int) -> Layout:
    """A row that follows from its seed, the same in every process: to ten segments, four deep."""
    rng = random.Random(seed)
    lengths, parents, path = [rng.randint(1, 20)], [ROOT], [0]
    for i in range(1, rng.randint(2, 10)):
        path = path[: rng.randint(0, min(len(path), 3))]
        parents.append(path[-1] if path else ROOT)
        lengths.append(rng.randint(0 if path else 1, 9))
        path.append(i)
    return Layout(tuple(lengths), tuple(parents))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any row of up to a dozen segments, some of them empty, at most four deep."""
    lengths: list[int] = [draw(st.integers(1, 9))]
    parents = [ROOT]
    path = [0]
    for i in range(1, draw(st.integers(1, 12))):
        depth = draw(st.integers(0, min(len(path), 3)))
        path = path[:depth]
        parents.append(path[-1] if path else ROOT)
        path.append(i)
        lengths.append(draw(st.integers(0 if depth else 1, 9)))
    return Layout(tuple(lengths), tuple(parents))
