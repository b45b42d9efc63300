"""Work is spread by what it costs, whole groups at a time where that is possible."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.models.shape import TextShape
from verl.protocol import DataProto
from verl.trainer.shares import CostModel, deal, imbalance, in_order

SHAPE = TextShape(
    layers=36, hidden=2048, heads=16, kv_heads=2, head_dim=128, mlp=11008, vocab=151936,
    is_tied=True,
)  # fmt: skip
COST = CostModel(SHAPE, shared_prefix=True)


def batch_of(groups: list[tuple[int, list[int]]], media: list[tuple] | None = None) -> DataProto:
    """A batch of prompts with responses, by their lengths."""
    media = media or [()] * len(groups)
    rows = [
        (f"u{g}", torch.empty(n_prompt), media[g], torch.empty(n))
        for g, (n_prompt, responses) in enumerate(groups)
        for n in responses
    ]
    uid, prompts, shown, responses = map(list, zip(*rows, strict=True))
    columns = {"uid": uid, "prompt_ids": prompts, "media": shown, "response_ids": responses}
    return DataProto(columns)


def film(name: str, n_tokens: int) -> tuple:
    return (SimpleNamespace(ref=SimpleNamespace(key=name), n_tokens=n_tokens),)


def uids(batch: DataProto, shares: list[list[int]]) -> list[list[str]]:
    return [sorted({batch["uid"][i] for i in share}) for share in shares]


def test_a_pair_costs_what_attention_takes_and_a_token_what_the_matrices_take():
    pairs, tokens = 1000 * 1001 // 2 + 2 * (10 * 11 // 2 + 10 * 1000), 1020
    weights = 36 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 11008)
    expected = 2 * weights * tokens + 36 * 4 * 16 * 128 * pairs
    batch = batch_of([(1000, [10, 10])])
    assert COST.of(batch, [0, 1]) == expected
    alone = CostModel(SHAPE, shared_prefix=False)
    assert alone.of(batch, [0, 1]) == 2 * alone.of(batch, [0]) > 1.9 * expected
    assert SHAPE.parameters == weights // 1 + 151936 * 2048


def test_long_prompts_weigh_more_than_their_tokens():
    # By tokens, one prompt of 200k would weigh as much as four of 50k.
    batch = batch_of([(200_000, [8] * 4)] + [(50_000, [8] * 4)] * 6)
    shares = deal(batch, [0] * len(batch), 2, COST)
    assert uids(batch, shares)[0] == ["u0"] and len(uids(batch, shares)[1]) == 6
    assert imbalance(batch, shares, COST) < imbalance(batch, [[*range(12)], [*range(12, 28)]], COST)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 3000), st.lists(st.integers(0, 200), min_size=1, max_size=6)),
        min_size=1, max_size=12,
    ),
    workers=st.integers(1, 5),
    n_minis=st.integers(1, 3),
)  # fmt: skip
def test_every_sample_goes_to_one_worker_in_order_and_no_worse_than_whole_groups(
    groups, workers, n_minis
):
    batch = batch_of(groups)
    size = -(-len(groups) // n_minis)
    minis = [int(uid[1:]) // size for uid in batch["uid"]]
    shares = deal(batch, minis, workers, COST)
    assert len(shares) == workers and shares == [sorted(share) for share in shares]
    assert sorted(i for share in shares for i in share) == list(range(len(batch)))
    assert in_order([i for share in shares for i in share], shares) == list(range(len(batch)))
    # Whole groups, largest first, as the bound that cutting must not exceed.
    for m in set(minis):
        works = [0.0] * workers
        members = [i for i in range(len(batch)) if minis[i] == m]
        names = dict.fromkeys(batch["uid"][i] for i in members)
        costs = [COST.of(batch, [i for i in members if batch["uid"][i] == n]) for n in names]
        for cost in sorted(costs, reverse=True):
            works[works.index(min(works))] += cost
        got = [COST.of(batch, [i for i in share if minis[i] == m]) for share in shares]
        assert max(got) <= max(works) * (1 + 1e-9)


def test_a_single_group_is_cut_so_that_no_worker_waits_for_nothing():
    batch = batch_of([(100, [900] * 8)])
    shares = deal(batch, [0] * 8, 4, COST)
    assert [len(share) for share in shares] == [2, 2, 2, 2]


def test_a_long_prompt_is_not_computed_twice_where_that_saves_nothing():
    batch = batch_of([(250_000, [8] * 4)] * 3)
    shares = deal(batch, [0] * 12, 2, COST)
    assert sorted(map(len, shares)) == [4, 8]


def test_questions_about_one_video_stay_together():
    media = [film("a", 9000), film("a", 9000), film("b", 9000), film("b", 9000)]
    batch = batch_of([(9100, [50] * 3)] * 4, media)
    shares = deal(batch, [0] * 12, 2, COST)
    assert sorted(uids(batch, shares)) == [["u0", "u1"], ["u2", "u3"]]
    together = COST.of(batch, range(6))
    assert together < 1.2 * COST.of(batch, range(3))


@pytest.mark.parametrize("workers", [1, 3])
def test_nothing_is_dealt_to_all(workers):
    nothing = batch_of([(5, [1])]).take([])
    assert deal(nothing, [], workers, COST) == [[]] * workers
    assert imbalance(nothing, [[]] * workers, COST) == 1.0
