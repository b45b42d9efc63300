"""Multi-modal rotary positions (mRoPE), equal to vLLM's rule.

transformers 5.17 to 5.19 continues the text after a Qwen2.5-VL video at a position that lies inside
the video (its issue 45381), so positions are computed here and always passed explicitly.
Letters: S tokens of one sequence; M tokens of one piece of media.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisualSpan:
    """One piece of media as the language model sees it."""

    grid_thw: tuple[int, int, int]
    """Patches over time, height and width, before spatial merging."""
    seconds_per_grid: float
    """Seconds between two temporal patches; 0 for an image, whose tokens share one time."""


def mrope_positions(
    is_visual_S: Tensor, spans: Sequence[VisualSpan], *, merge_size: int, tokens_per_second: float
) -> Tensor:
    """Time, height and width position of every token, (S,) bool -> (3, S) int64.

    Text counts on by one on all three axes. A visual span starts at the next free position `p` and
    covers p + floor(t * seconds_per_grid * tokens_per_second), p + h, p + w; the text after it
    starts at one more than the span's largest position. Qwen2.5-VL, arXiv:2502.13923 sec. 2.1.2.

    Raises ValueError when the spans do not account for exactly the visual tokens.
    """
    pieces: list[Tensor] = []
    start = next_position = 0
    for span, first in zip(spans, _span_starts(is_visual_S, spans, merge_size), strict=True):
        if first > start:
            pieces.append(_text(first - start, next_position))
            next_position += first - start
        visual_3M = _visual(span, merge_size, tokens_per_second) + next_position
        pieces.append(visual_3M)
        next_position = int(visual_3M.max()) + 1
        start = first + visual_3M.shape[1]
    pieces.append(_text(len(is_visual_S) - start, next_position))
    return torch.cat(pieces, dim=1)


def _text(n: int, start: int) -> Tensor:
    return torch.arange(start, start + n).expand(3, n)


def _visual(span: VisualSpan, merge_size: int, tokens_per_second: float) -> Tensor:
    t, h, w = span.grid_thw
    # The product is taken in double precision and then floored, as vLLM does.
    time_t = (
        torch.arange(t, dtype=torch.float64) * (span.seconds_per_grid * tokens_per_second)
    ).long()
    axes = (time_t, torch.arange(h // merge_size), torch.arange(w // merge_size))
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(3, -1)


def _span_starts(is_visual_S: Tensor, spans: Sequence[VisualSpan], merge_size: int) -> list[int]:
    """Index of the first token of every span; two spans may touch."""
    index = torch.nonzero(is_visual_S).flatten()
    sizes = [t * h * w // merge_size**2 for t, h, w in (s.grid_thw for s in spans)]
    if sum(sizes) != len(index):
        raise ValueError(
            f"the prompt holds {len(index)} visual tokens, but its {len(spans)} pieces of media "
            f"account for {sum(sizes)} ({sizes}); a visual span must never be cut"
        )
    starts, seen = [], 0
    for size in sizes:
        first, last = int(index[seen]), int(index[seen + size - 1])
        if last - first != size - 1:
            raise ValueError(f"the visual tokens from index {first} are interrupted by text")
        starts.append(first)
        seen += size
    return starts
