"""Who encodes which part of which media: pure arithmetic, the same on every rank.

A tower whose attention never leaves one temporal step of the grid (Qwen2.5-VL: windows and full
attention alike) gives the same features for a video in parts as for the whole. Parts are whole
blocks: a fixed number of steps that follows from the size of the frames alone. So the tower sees
the same blocks for any number of ranks and any neighbours in a batch, and where a block is a call
of its own the features are the same bit for bit.
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


def steps_a_block(grid: Grid, block_patches: int) -> int:
    """Temporal steps of a block: as many as `block_patches` hold, at least one."""
    return max(1, block_patches // (grid[1] * grid[2]))


def plan_slices(grids: Sequence[Grid], world_size: int, block_patches: int) -> list[list[Slice]]:
    """For each rank its slices, in order; together they hold every temporal step exactly once.

    Blocks stand in one line, item after item, and a rank takes those whose middle lies in its share
    of the patches: no rank is further from an even share than the largest block.
    """
    total = sum(t * h * w for t, h, w in grids)
    plan: list[list[Slice]] = [[] for _ in range(world_size)]
    before = 0
    whole = [Slice(i, 0, grid[0]) for i, grid in enumerate(grids)]
    for block in blocks(whole, grids, block_patches):
        _, h, w = grids[block.item]
        size = (block.stop - block.start) * h * w
        own = plan[(2 * before + size) * world_size // (2 * total)]
        if own and own[-1].item == block.item:
            own[-1] = Slice(block.item, own[-1].start, block.stop)
        else:
            own.append(block)
        before += size
    return plan


def blocks(slices: Iterable[Slice], grids: Sequence[Grid], block_patches: int) -> Iterator[Slice]:
    """The blocks that slices hold; each slice begins where a block of its item begins."""
    for whole in slices:
        step = steps_a_block(grids[whole.item], block_patches)
        for start in range(whole.start, whole.stop, step):
            yield Slice(whole.item, start, min(whole.stop, start + step))


def micro_batches(
    slices: Iterable[Slice], grids: Sequence[Grid], block_patches: int, budget: int
) -> Iterator[list[Slice]]:
    """Blocks grouped to at most `budget` patches; one that is larger goes alone."""
    group: list[Slice] = []
    used = 0
    for block in blocks(slices, grids, block_patches):
        _, h, w = grids[block.item]
        size = (block.stop - block.start) * h * w
        if group and used + size > budget:
            yield group
            group, used = [], 0
        group.append(block)
        used += size
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
