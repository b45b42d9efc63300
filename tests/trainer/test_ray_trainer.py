"""What the RL driver asks of its workers, and what it makes of their answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl.config import AlgorithmConfig, DataConfig, PPOConfig, TrainerConfig, WorkerConfig
from verl.config.worker import ActorConfig
from verl.models.shape import TextShape
from verl.protocol import DataProto
from verl.trainer.ray_trainer import Parts, RayPPOTrainer
from verl.trainer.shares import CostModel

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
        self.memory: dict[str, float] = {}
        self.shares: list[DataProto] = []
        self.request: Any = None

    def log_probs(self, shares: list[DataProto]) -> DataProto:
        self.calls.append("log_probs")
        return self._answer(shares, "old_logp", 0.0)

    def ref_log_probs(self, shares: list[DataProto]) -> DataProto:
        self.calls.append("ref_log_probs")
        return self._answer(shares, "ref_logp", 0.5)

    def _answer(self, shares: list[DataProto], column: str, less: float) -> DataProto:
        assert len(shares) == self.dp_size
        logps = [logp_of(r) - less for share in shares for r in share["response_ids"]]
        return DataProto({column: logps})

    def update_actor(self, shares: list[DataProto]) -> list[dict[str, Any]]:
        self.shares, self.request = shares, DataProto.concat(shares)
        metrics: dict[str, list[float]] = {"pg_loss": [0.5]}
        if "ref_logp" in self.request:
            metrics["kl_loss"] = [self.kl_loss / self.dp_size]
        return [
            {
                "metrics": metrics,
                "log_probs": [logp_of(r) for r in share["response_ids"]],
                "memory": self.memory,
            }
            for share in shares
        ]


SHAPE = TextShape(
    layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, mlp=16, vocab=32, is_tied=True
)


def trainer(
    *,
    mini: int = 4,
    dp_size: int = 1,
    kl_loss: float = 0.2,
    actor: dict[str, Any] | None = None,
    **algorithm: Any,
) -> RayPPOTrainer:
    config = PPOConfig(
        data=DataConfig(rollout_batch_size=4),
        algorithm=AlgorithmConfig(**{"kl_coef": 0.1, **algorithm}),
        worker=WorkerConfig(actor=ActorConfig(global_batch_size=mini, **actor or {})),
        trainer=TrainerConfig(n_gpus_per_node=dp_size),
    )
    nothing: Any = SimpleNamespace()
    workers = Workers(dp_size, kl_loss)
    parts = Parts(
        workers, nothing, {}, nothing, nothing, nothing, sampler=nothing, reward=nothing,
        cost=CostModel(SHAPE, shared_prefix=True),
    )  # fmt: skip
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
    batch, trained = ppo.prepare(sampled(rewards))
    ppo.update(trained, batch)
    return batch


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
    assert ppo.workers.request.meta["totals"] == [(first, 4, first), (second, 4, second)]


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


def test_old_log_probs_can_be_asked_for_always():
    ppo = trainer(actor={"old_log_probs": "always"}, disable_kl=True)
    step(ppo)
    assert ppo.workers.calls == ["log_probs"] and "old_logp" in ppo.workers.request


@pytest.mark.parametrize(("wanted", "calls"), [("auto", []), ("always", ["ref_log_probs"])])
def test_a_reference_without_a_weight_is_asked_only_where_the_settings_want_it(wanted, calls):
    ppo = trainer(kl_coef=0.0, reference_log_probs=wanted)
    step(ppo)
    assert ppo.workers.calls == calls


FLAT = [1.0, 0.0, 0.5, 0.5, 0.3, 0.3, 0.2, 0.4]
"""Rewards of which the second and third group teach nothing."""


@pytest.mark.parametrize("dp_size", [1, 2])
@pytest.mark.parametrize("mini", [2, 4])
def test_groups_without_an_advantage_are_left_out_but_count(mini, dp_size):
    ppo = trainer(mini=mini, dp_size=dp_size, disable_kl=True)
    step(ppo, FLAT)
    request = ppo.workers.request
    assert sorted(set(request["uid"])) == ["u0", "u3"]
    assert ppo.metrics["actor/skipped_share"] == 0.5
    lengths = torch.tensor(LENGTHS)
    whole = [(int(n.sum()), 4) for n in lengths.split(4)] if mini == 2 else [(sum(LENGTHS), 8)]
    computed = [4, 8] if mini == 2 else [12]
    totals = [(*counts, n) for counts, n in zip(whole, computed, strict=True)]
    assert request.meta["totals"] == totals
    expected = [0, 0, 1, 1] if mini == 2 else [0] * 4
    assert sorted(zip(request["uid"], request["mini"], strict=True)) == list(
        zip(["u0", "u0", "u3", "u3"], expected, strict=True)
    )
    assert ppo.metrics["mismatch/max_abs"] == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"use_kl_loss": True},
        {"disable_kl": True, "actor": {"zero_advantage_groups": "train"}},
        {"kl_coef": 0.0, "reference_log_probs": "always"},
    ],
    ids=["a KL loss", "asked for", "a KL that is measured"],
)
def test_groups_without_an_advantage_are_computed_where_they_are_wanted(settings):
    ppo = trainer(**settings)
    step(ppo, FLAT)
    assert len(ppo.workers.request) == 8
    assert "actor/skipped_share" not in ppo.metrics


def test_a_batch_without_any_advantage_still_takes_its_optimizer_step():
    ppo = trainer(dp_size=2, disable_kl=True)
    step(ppo, [0.5] * 8)
    assert [len(share) for share in ppo.workers.shares] == [0, 0]
    assert ppo.workers.request.meta["totals"] == [(sum(LENGTHS), 8, 0)]
    several = trainer(mini=2, dp_size=2, disable_kl=True)
    step(several, [0.5] * 8)
    # Without anything to compute no pass is asked for, but the update still finds the column.
    assert several.workers.calls == [] and several.workers.request["old_logp"] == []


def test_an_update_that_takes_more_memory_than_was_estimated_is_told_once(caplog):
    ppo = trainer(dp_size=2)
    ppo.workers.memory = {"update_peak_gib": 11.0, "update_estimated_gib": 10.0}
    step(ppo)
    assert ppo.metrics["memory/update_peak_gib"] == 11.0 and not caplog.text
    ppo.workers.memory = {"update_peak_gib": 12.0, "update_estimated_gib": 10.0}
    for _ in range(2):
        step(ppo)
    said = [m for m in caplog.messages if "12.0 GiB at its peak and was estimated" in m]
    assert len(said) == 1


def test_the_log_says_which_passes_a_step_makes():
    assert trainer(mini=2).passes() == (
        "update, old log-probs, reference log-probs; left out: none"
    )
    assert trainer(disable_kl=True).passes() == (
        "update; left out: old log-probs (one optimizer step a rollout batch: the update has them),"
        " reference log-probs (no KL term), update of groups without an advantage (no other term "
        "has a gradient)"
    )


def test_groups_that_passes_cut_are_told_with_what_to_set():
    key = "worker.actor.micro_batch_size_per_device_for_update"
    said = trainer().cut_groups()  # the defaults: groups of 5, 4 samples a pass
    assert f"{key}=4 is less than the 5 samples of a prompt that a worker gets" in said
    assert (
        f"computes the prompt 2 times an optimizer step; where memory allows, use {key}=5" in said
    )
    for settings in (
        {"micro_batch_size_per_device_for_update": 10},
        {"max_tokens_per_device": 9000},
        {"shared_prefix": False},
        {"padding_free": False},
    ):
        assert trainer(actor=settings).cut_groups() == ""


def test_groups_that_workers_share_are_not_cut_again_by_passes_that_hold_a_part():
    # A mini-batch of 2 groups of 5 over 5 workers: 2 samples each.
    assert trainer(mini=2, dp_size=5).cut_groups() == ""
    said = trainer(
        mini=2, dp_size=5, actor={"micro_batch_size_per_device_for_update": 1}
    ).cut_groups()
    assert "_for_update=1 is less than the 2 samples of a prompt that a worker gets" in said
    assert "the prompt 2 times" in said and "_for_update=2, or fill" in said


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
