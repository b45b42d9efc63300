"""Who encodes which part of which media: pure arithmetic, the same on every rank.

A tower whose attention never leaves one temporal step of the grid (Qwen2.5-VL: windows and full
attention alike) gives the same features for a video in parts as for the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Slice:
    """Temporal steps `start` to `stop` of the piece of media number `item`."""

    item: int
    start: int
    stop: int


def plan_slices(grids: Sequence[Grid], world_size: int) -> list[list[Slice]]:
    """For each rank its slices, in order; together they hold every temporal step exactly once.

    Steps stand in one line, item after item, and a rank takes those whose middle lies in its share
    of the patches: no rank is further from an even share than the largest step.
    """
    total = sum(t * h * w for t, h, w in grids)
    plan: list[list[Slice]] = [[] for _ in range(world_size)]
    before = 0
    for item, (t, h, w) in enumerate(grids):
        size, start = h * w, 0
        ranks = [(2 * (before + i * size) + size) * world_size // (2 * total) for i in range(t)]
        for stop in range(1, t + 1):
            if stop == t or ranks[stop] != ranks[start]:
                plan[ranks[start]].append(Slice(item, start, stop))
                start = stop
        before += t * size
    return plan


def micro_batches(
    slices: Iterable[Slice], grids: Sequence[Grid], budget: int
) -> Iterator[list[Slice]]:
    """Slices cut and grouped to at most `budget` patches; one step that is larger goes alone."""
    group: list[Slice] = []
    used = 0
    for whole in slices:
        _, h, w = grids[whole.item]
        start = whole.start
        while start < whole.stop:
            fit = (budget - used) // (h * w)
            if fit < 1 and group:
                yield group
                group, used = [], 0
                continue
            stop = min(whole.stop, start + max(1, fit))
            group.append(Slice(whole.item, start, stop))
            used += (stop - start) * h * w
            start = stop
    if group:
        yield group


def rounds(grids: Sequence[Grid], budget: int) -> list[range]:
    """Consecutive media of at most `budget` patches together; a larger one has its own round."""
    found: list[range] = []
    first, used = 0, 0
    for i, (t, h, w) in enumerate(grids):
        if i > first and used + t * h * w > budget:
            found.append(range(first, i))
            first, used = i, 0
        used += t * h * w
    return found + [range(first, len(grids))] * (first < len(grids))


def cut(start: int, stop: int, n_chunks: int) -> list[tuple[int, int]]:
    """A range in at most `n_chunks` parts of nearly equal length, none of them empty."""
    n = stop - start
    edges = [start + n * i // n_chunks for i in range(n_chunks + 1)]
    return [(a, b) for a, b in pairwise(edges) if a < b]
