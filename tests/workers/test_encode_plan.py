"""Plans hold every temporal step once, evenly, whatever the number of ranks."""

from __future__ import annotations

import random

import pytest

from verl.workers.encode_plan import cut, micro_batches, plan_slices, rounds, steps_a_block

GRIDS = [(5, 4, 4), (1, 4, 2), (3, 2, 4), (1, 6, 4), (7, 2, 2)]


@pytest.mark.parametrize("block", [1, 30, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9, 40])
def test_every_step_is_planned_once_and_in_order(world_size, block):
    plan = plan_slices(GRIDS, world_size, block)
    steps = [(s.item, t) for part in plan for s in part for t in range(s.start, s.stop)]
    assert len(plan) == world_size
    assert steps == [(i, t) for i, grid in enumerate(GRIDS) for t in range(grid[0])]


@pytest.mark.parametrize("block", [1, 200])
def test_no_share_is_further_from_even_than_the_largest_block(block):
    draw = random.Random(0)
    for _ in range(100):
        grids = [
            (draw.randint(1, 30), 2 * draw.randint(1, 5), 2 * draw.randint(1, 5))
            for _ in range(draw.randint(1, 8))
        ]
        world = draw.randint(1, 8)
        even = sum(t * h * w for t, h, w in grids) / world
        largest = max(min(g[0], steps_a_block(g, block)) * g[1] * g[2] for g in grids)
        for part in plan_slices(grids, world, block):
            share = sum((s.stop - s.start) * grids[s.item][1] * grids[s.item][2] for s in part)
            assert abs(share - even) <= largest


def test_without_media_no_rank_has_anything():
    assert plan_slices([], 3, 1) == [[], [], []]
    assert rounds([], 10) == []
    assert list(micro_batches([], [], 1, 10)) == []


@pytest.mark.parametrize("budget", [1, 16, 40, 1000])
def test_micro_batches_keep_to_the_budget_and_lose_nothing(budget):
    slices = plan_slices(GRIDS, 2, 1)[0]
    groups = list(micro_batches(slices, GRIDS, 1, budget))
    for group in groups:
        sizes = [(s.stop - s.start) * GRIDS[s.item][1] * GRIDS[s.item][2] for s in group]
        steps = sum(s.stop - s.start for s in group)
        assert sum(sizes) <= budget or steps == 1
    flat = [(s.item, t) for g in groups for s in g for t in range(s.start, s.stop)]
    assert flat == [(s.item, t) for s in slices for t in range(s.start, s.stop)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_tower_sees_the_same_blocks_for_any_number_of_ranks(world_size):
    alone = [group for part in plan_slices(GRIDS, 1, 30) for group in calls(part)]
    shared = [group for part in plan_slices(GRIDS, world_size, 30) for group in calls(part)]
    assert shared == alone
    assert [len(group) for group in shared] == [1] * len(shared)
    assert (0, 0, 1) in [(s.item, s.start, s.stop) for group in alone for s in group]  # 16 patches
    assert (2, 0, 3) in [(s.item, s.start, s.stop) for group in alone for s in group]  # 24 patches


def calls(slices):
    return list(micro_batches(slices, GRIDS, 30, budget=0))


def test_rounds_hold_neighbours_up_to_the_budget():
    assert rounds([(1, 2, 2), (1, 2, 2), (9, 2, 2), (1, 2, 2)], 8) == [
        range(2), range(2, 3), range(3, 4)
    ]  # fmt: skip


def test_a_range_is_cut_into_parts_none_of_which_is_empty():
    assert cut(3, 6, 8) == [(3, 4), (4, 5), (5, 6)]
    assert cut(0, 10, 3) == [(0, 3), (3, 6), (6, 10)]
    assert cut(4, 4, 2) == []
