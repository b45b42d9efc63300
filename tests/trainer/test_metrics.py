"""Numbers of a step: means of what was sampled, shares of ranks added up."""

from __future__ import annotations

import pytest
import torch

from verl.protocol import DataProto
from verl.trainer.metrics import (
    length_metrics,
    merge_rank_metrics,
    reward_metrics,
    rollout_mismatch,
)


def test_shares_of_ranks_add_up_and_steps_are_averaged():
    ranks = [
        {"pg_loss": [1.0, 2.0], "grad_norm": [3.0, 5.0], "lr": [0.1, 0.2], "skipped_steps": [0, 1]},
        {"pg_loss": [4.0, 8.0], "grad_norm": [3.0, 5.0], "lr": [0.1, 0.2], "skipped_steps": [0, 1]},
    ]
    merged = merge_rank_metrics(ranks)
    assert merged == {
        "actor/pg_loss": (1 + 2 + 4 + 8) / 2,
        "actor/grad_norm": 4.0,  # one optimizer, seen by both ranks
        "actor/lr": pytest.approx(0.15),
        "actor/skipped_steps": 1,  # a count since the start of the run
    }


def test_a_metric_does_not_depend_on_the_number_of_ranks():
    one = merge_rank_metrics([{"entropy": [0.75, 1.5]}])
    three = merge_rank_metrics([{"entropy": [0.25, 0.5]}] * 3)
    assert one == three == {"actor/entropy": 1.125}


def test_entropy_is_that_of_steps_that_computed_samples():
    ranks = [{"entropy": [0.5, 0.0, 1.0], "pg_loss": [1.0, 0.0, 2.0]}] * 2
    assert merge_rank_metrics(ranks, [True, False, True]) == {
        "actor/entropy": 1.5,
        "actor/pg_loss": 2.0,
    }
    assert merge_rank_metrics(ranks, [False] * 3) == {"actor/pg_loss": 2.0}


def test_rewards_are_reported_by_part_and_by_type_of_problem():
    scores = [
        {"overall": 1.0, "accuracy": 1.0},
        {"overall": 0.0, "accuracy": 0.0},
        {"overall": 0.5, "accuracy": 0.0},
        {"overall": 0.1, "accuracy": 0.0},
    ]
    assert reward_metrics(scores, ["first", "last", "first", ""]) == {
        "reward/overall": pytest.approx(0.4),
        "reward/accuracy": 0.25,
        "reward/by_type/first": 0.75,
        "reward/by_type/last": 0.0,
        "reward/by_type/none": 0.1,
    }


def test_lengths_count_tokens_and_responses_that_were_cut():
    batch = DataProto(
        {
            "prompt_ids": [torch.zeros(7, dtype=torch.long), torch.zeros(9, dtype=torch.long)],
            "response_ids": [torch.zeros(2, dtype=torch.long), torch.zeros(6, dtype=torch.long)],
            "finish_reason": ["stop", "length"],
        }
    )
    assert length_metrics(batch) == {
        "response_length/mean": 4.0,
        "response_length/max": 6.0,
        "response_length/min": 2.0,
        "response_length/clip_ratio": 0.5,
        "prompt_length/mean": 8.0,
        "prompt_length/max": 9.0,
    }


def test_the_mismatch_of_equal_log_probs_is_zero_and_of_others_is_not():
    logp = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])]
    shifted = [x + 0.25 for x in logp]
    columns = {"response_ids": [torch.tensor([1, 2]), torch.tensor([3])], "rollout_logp": logp}
    same = rollout_mismatch(DataProto(columns | {"trainer_logp": logp}), 0.2)
    assert same["mismatch/mean_abs"] == same["mismatch/max_abs"] == same["mismatch/k3"] == 0
    assert same["mismatch/beyond_share"] == 0
    assert same["mismatch/ess"] == pytest.approx(1)
    other = rollout_mismatch(DataProto(columns | {"trainer_logp": shifted}), 0.2)
    assert other["mismatch/mean_abs"] == other["mismatch/max_abs"] == pytest.approx(0.25)
    assert other["mismatch/beyond_share"] == 1
