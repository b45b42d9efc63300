import statistics

import pytest
import torch

from verl.algorithms.advantages import get_advantage, grpo, register_advantage


def grpo_by_hand(rewards: list[float], prompts: list[int], eps: float = 1e-6) -> list[float]:
    groups = {p: [r for r, q in zip(rewards, prompts, strict=True) if q == p] for p in prompts}
    return [
        (r - statistics.fmean(groups[p])) / (statistics.stdev(groups[p]) + eps)
        for r, p in zip(rewards, prompts, strict=True)
    ]


def test_grpo_equals_the_formula_sample_by_sample_for_groups_of_unequal_size():
    rng = torch.Generator().manual_seed(0)
    prompts = [0] * 2 + [1] * 3 + [2] * 8
    rewards = torch.rand(len(prompts), generator=rng, dtype=torch.float64)
    expected = torch.tensor(grpo_by_hand(rewards.tolist(), prompts))
    torch.testing.assert_close(grpo(rewards, torch.tensor(prompts)), expected)


def test_grpo_does_not_depend_on_row_order():
    rewards, prompts = torch.tensor([1.0, 0.0, 3.0, 5.0, 0.5]), torch.tensor([0, 0, 1, 1, 0])
    order = torch.tensor([2, 4, 0, 3, 1])
    torch.testing.assert_close(grpo(rewards[order], prompts[order]), grpo(rewards, prompts)[order])


def test_grpo_of_right_and_wrong_answers_is_plus_and_minus():
    advantages = grpo(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    torch.testing.assert_close(advantages, torch.tensor([0.5, -0.5]) / 0.5**0.5, atol=1e-5, rtol=0)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, -7.3, 1e6])
def test_a_group_of_equal_rewards_has_advantage_exactly_zero(reward: float):
    rewards, prompts = torch.full((7,), reward), torch.zeros(7, dtype=torch.long)
    assert torch.equal(grpo(rewards, prompts), torch.zeros(7))


def test_rounding_noise_of_a_group_is_not_scaled_up():
    rewards = torch.tensor([0.3, 0.1 + 0.2, 0.3, 0.9], dtype=torch.float64)
    assert rewards[1] != rewards[0]
    advantages = grpo(rewards, torch.tensor([0, 0, 1, 1]))
    assert torch.equal(advantages[:2], torch.zeros(2))
    assert (advantages[2:].abs() > 0.7).all()


def test_rounding_noise_of_large_rewards_is_not_scaled_up_either():
    rewards = torch.tensor([100.0, 100.00001, 100.0], dtype=torch.float32)
    assert rewards[1] != rewards[0]
    assert torch.equal(grpo(rewards, torch.zeros(3, dtype=torch.long)), torch.zeros(3))


def test_rewards_of_a_kl_that_differ_a_little_are_told_apart():
    rewards = torch.tensor([0.9 - 1e-4, 0.9 - 2e-4], dtype=torch.float64)
    assert (grpo(rewards, torch.tensor([0, 0])).abs() > 0.6).all()


def test_a_lone_sample_names_the_setting_to_change():
    with pytest.raises(ValueError, match=r"worker\.rollout\.n >= 2"):
        grpo(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_refused_instead_of_silencing_its_group(bad: float):
    with pytest.raises(ValueError, match="not finite"):
        grpo(torch.tensor([1.0, bad]), torch.tensor([0, 0]))


def test_estimators_are_found_by_name_and_an_unknown_name_lists_those_there_are():
    assert get_advantage("grpo") is grpo
    with pytest.raises(ValueError, match=r"adv_estimator='gpro' is unknown; use one of \['grpo'"):
        get_advantage("gpro")


def test_a_name_cannot_be_taken_twice():
    with pytest.raises(ValueError, match="already"):
        register_advantage("grpo")(lambda rewards_B, prompt_B: rewards_B)
    assert get_advantage("grpo") is grpo
