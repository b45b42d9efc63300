"""What the RL driver asks of its workers, and what it makes of their answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl.config import AlgorithmConfig, DataConfig, PPOConfig, WorkerConfig
from verl.config.worker import ActorConfig
from verl.protocol import DataProto
from verl.trainer.ray_trainer import Parts, RayPPOTrainer, share_order

LENGTHS = (1, 3, 2, 4, 2, 1, 5, 3)
"""Tokens of 8 samples: 4 prompts with 2 each."""


def logp_of(response: torch.Tensor) -> torch.Tensor:
    """A log-probability for each token that tells its sample."""
    return -response.float() / 10


class Workers:
    """Answers like a worker group whose model gives a token t the log-probability -t/10."""

    def __init__(self, dp_size: int, kl_loss: float) -> None:
        self.dp_size = dp_size
        self.kl_loss = kl_loss
        self.calls: list[str] = []
        self.request: DataProto | None = None

    def log_probs(self, batch: DataProto) -> DataProto:
        self.calls.append("log_probs")
        logps = [logp_of(r) for r in batch["response_ids"]]
        return DataProto({"old_logp": logps})

    def ref_log_probs(self, batch: DataProto) -> DataProto:
        self.calls.append("ref_log_probs")
        return DataProto({"ref_logp": [logp_of(r) - 0.5 for r in batch["response_ids"]]})

    def update_actor(self, batch: DataProto) -> list[dict[str, Any]]:
        self.request = batch
        metrics: dict[str, list[float]] = {"pg_loss": [0.5]}
        if "ref_logp" in batch:
            metrics["kl_loss"] = [self.kl_loss / self.dp_size]
        return [
            {"metrics": metrics, "log_probs": [logp_of(r) for r in share["response_ids"]]}
            for share in batch.split(self.dp_size)
        ]


def trainer(
    *, mini: int = 4, dp_size: int = 1, kl_loss: float = 0.2, **algorithm: Any
) -> RayPPOTrainer:
    config = PPOConfig(
        data=DataConfig(rollout_batch_size=4),
        algorithm=AlgorithmConfig(kl_coef=0.1, **algorithm),
        worker=WorkerConfig(actor=ActorConfig(global_batch_size=mini)),
    )
    nothing: Any = SimpleNamespace()
    workers = Workers(dp_size, kl_loss)
    parts = Parts(workers, nothing, {}, nothing, nothing, nothing, sampler=nothing, reward=nothing)
    return RayPPOTrainer(config, parts, total_steps=1)


def sampled(rewards: list[float]) -> DataProto:
    tokens = torch.arange(sum(LENGTHS)).split(LENGTHS)
    return DataProto(
        {
            "uid": [f"u{i // 2}" for i in range(8)],
            "prompt_ids": [torch.tensor([i // 2]) for i in range(8)],
            "media": [()] * 8,
            "response_ids": list(tokens),
            "rollout_logp": [logp_of(t) for t in tokens],
            "response_text": ["<answer>A</answer>"] + ["hm"] * 7,
            "finish_reason": ["length", "length"] + ["stop"] * 6,
            "question": ["which ?"] * 8,
            "answer": ["A"] * 8,
            "options": [("A. red", "B. blue")] * 8,
            "reward": rewards,
        }
    )


REWARDS = [1.0, 0.0, 0.5, 0.5, 0.0, 1.0, 0.2, 0.4]


def step(ppo: RayPPOTrainer, rewards: list[float] = REWARDS) -> DataProto:
    batch = ppo.add_advantages(ppo.add_log_probs(sampled(rewards)))
    ppo.update(batch)
    return batch


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("n_minis", [1, 2])
def test_every_rank_gets_its_share_of_each_mini_batch(n_minis, dp_size):
    order = DataProto({"sample": share_order(16, n_minis, dp_size)})
    shares = [rank.split(n_minis) for rank in order.split(dp_size)]
    for m in range(n_minis):
        mini = [i for rank in shares for i in rank[m]["sample"]]
        assert mini == list(range(16))[m * 16 // n_minis : (m + 1) * 16 // n_minis]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("mini", [2, 4])
def test_log_probs_of_ranks_come_back_to_their_samples(mini, dp_size):
    ppo = trainer(mini=mini, dp_size=dp_size)
    step(ppo)
    assert ppo.metrics["mismatch/max_abs"] == 0


def test_losses_are_normalised_by_the_counts_of_the_whole_mini_batch():
    ppo = trainer(mini=2, dp_size=2)
    step(ppo)
    first, second = sum(LENGTHS[:4]), sum(LENGTHS[4:])
    assert ppo.workers.request.meta["totals"] == [(first, 4), (second, 4)]


def test_old_log_probs_are_computed_only_where_the_policy_changes_in_a_step():
    for mini, calls in ((4, ["ref_log_probs"]), (2, ["log_probs", "ref_log_probs"])):
        ppo = trainer(mini=mini)
        step(ppo)
        assert ppo.workers.calls == calls


def test_kl_as_a_loss_goes_to_the_actor_with_the_coefficient_in_force():
    ppo = trainer(kl_type="adaptive", kl_horizon=8, kl_target=0.1)
    batch = step(ppo)
    request = ppo.workers.request
    assert "ref_logp" in request and request.meta["kl_coef"] == 0.1
    assert ppo.metrics["kl/coef"] == 0.1  # what was used, not what the next step will use
    assert ppo.metrics["kl/ref"] == pytest.approx(0.2)
    assert ppo.kl.value > 0.1
    plain = trainer(disable_kl=True)
    torch.testing.assert_close(
        torch.tensor(batch["advantage"]), torch.tensor(step(plain)["advantage"])
    )


def test_kl_in_the_reward_is_no_loss_as_well_and_uses_the_policys_own_log_probs():
    settings = {"use_kl_loss": False, "kl_penalty": "k1"}
    ppo = trainer(**settings, kl_type="adaptive", kl_horizon=8, kl_target=0.1)
    batch = step(ppo)
    assert ppo.workers.calls == ["log_probs", "ref_log_probs"]
    assert "ref_logp" not in ppo.workers.request
    assert "actor/kl_loss" not in ppo.metrics
    assert ppo.metrics["kl/ref"] == pytest.approx(0.5) and ppo.metrics["kl/coef"] == 0.1
    # Each token costs 0.1 * 0.5, with the coefficient from before it was adapted.
    lowered = [r - 0.05 * n for r, n in zip(REWARDS, LENGTHS, strict=True)]
    plain = trainer(disable_kl=True)
    expected = plain.add_advantages(sampled(lowered))["advantage"]
    torch.testing.assert_close(torch.tensor(batch["advantage"]), torch.tensor(expected))


def test_without_kl_no_reference_is_asked_and_no_coefficient_reported():
    ppo = trainer(disable_kl=True)
    step(ppo)
    assert ppo.workers.calls == []
    assert not any(name.startswith("kl/") for name in ppo.metrics)


def test_a_batch_whose_samples_are_all_worth_the_same_has_no_advantage():
    ppo = trainer()
    batch = step(ppo, [0.5] * 8)
    assert batch["advantage"] == [0.0] * 8
    assert ppo.metrics["reward/zero_advantage_share"] == 1.0


def test_a_step_that_teaches_nothing_is_told_the_first_time_and_then_rarely(caplog):
    ppo = trainer()
    step(ppo)
    one_group_differs = [0.5] * 7 + [0.4]
    step(ppo, one_group_differs)
    assert "teaches nothing" not in caplog.text
    equal_in_groups = [1.0, 1.0, 0.7, 0.7, 0.0, 0.0, 0.5, 0.5]
    for _ in range(8):
        step(ppo, equal_in_groups)
    said = [m for m in caplog.messages if "teaches nothing" in m]
    assert len(said) == 4  # the 1st, 2nd, 4th and 8th
    assert (
        "all 4 groups have equal rewards: this step teaches nothing; 12% of responses had a "
        "readable answer, 25% were cut at data.max_response_length"
    ) in said[0]


def test_the_kl_coefficient_is_part_of_the_drivers_state():
    ppo = trainer(kl_type="adaptive", kl_horizon=8)
    step(ppo)
    other = trainer(kl_type="adaptive", kl_horizon=8)
    other.load_own_state(ppo.own_state())
    assert other.kl.value == ppo.kl.value != 0.1
