import math

import pytest
import torch
from torch import Tensor

from verl.algorithms.kl import (
    AdaptiveKL,
    FixedKL,
    kl_in_reward,
    kl_loss,
    kl_penalty,
    make_kl_controller,
)
from verl.config import AlgorithmConfig

POLICY_LOGITS = torch.tensor([0.3, -1.2, 0.8, 2.0, 0.1], dtype=torch.float64)
REF_LOGP = torch.tensor([1.0, 0.2, -0.7, 0.4, 0.0], dtype=torch.float64).log_softmax(0)


def policy() -> tuple[Tensor, Tensor]:
    """Logits of a 5-way categorical with gradient, and its log-probs."""
    logits = POLICY_LOGITS.clone().requires_grad_()
    return logits, logits.log_softmax(0)


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits)[0]


def gradient_as_loss(kind: str) -> Tensor:
    """Gradient of the penalty of a sampled token, in expectation over the policy's samples."""
    logits, logp = policy()
    return gradient((logp.detach().exp() * kl_penalty(logp, REF_LOGP, kind)).sum(), logits)


def true_gradient(forward: bool = False) -> Tensor:
    logits, logp = policy()
    kl = REF_LOGP.exp() * (REF_LOGP - logp) if forward else logp.exp() * (logp - REF_LOGP)
    return gradient(kl.sum(), logits)


def test_penalties_equal_their_formulas():
    d = torch.tensor([-1.5, -0.1, 0.0, 0.7, 3.0], dtype=torch.float64)
    ref = torch.tensor([-2.0, -1.0, -3.0, -4.0, -5.0], dtype=torch.float64)
    formulas = {
        "k1": lambda x: x,
        "k2": lambda x: x * x / 2,
        "k3": lambda x: math.exp(-x) - 1 + x,
        "abs": abs,
    }
    for kind, formula in formulas.items():
        expected = torch.tensor([formula(x) for x in d.tolist()], dtype=torch.float64)
        torch.testing.assert_close(kl_penalty(ref + d, ref, kind), expected)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_equal_policies_have_no_penalty(kind: str):
    assert not kl_penalty(REF_LOGP, REF_LOGP, kind).any()


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    _, logp = policy()
    true = (logp.exp() * (logp - REF_LOGP)).sum()
    mean = {k: (logp.exp() * kl_penalty(logp, REF_LOGP, k)).sum() for k in ("k1", "k2", "k3")}
    torch.testing.assert_close(mean["k1"], true)
    torch.testing.assert_close(mean["k3"], true)
    assert abs(mean["k2"] - true) > 0.005


def test_k1_as_a_loss_has_no_expected_gradient():
    torch.testing.assert_close(
        gradient_as_loss("k1"), torch.zeros(5, dtype=torch.float64), atol=1e-15, rtol=0
    )


def test_k2_as_a_loss_has_the_gradient_of_the_kl():
    torch.testing.assert_close(gradient_as_loss("k2"), true_gradient())


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl():
    torch.testing.assert_close(gradient_as_loss("k3"), true_gradient(forward=True))
    assert (gradient_as_loss("k3") - true_gradient()).abs().max() > 0.05


def test_k1_in_the_reward_has_the_gradient_of_the_kl():
    logits, logp = policy()
    reward = kl_in_reward(torch.zeros(5), kl_penalty(logp.detach(), REF_LOGP, "k1"), coef=1.0)
    policy_gradient = gradient((logp.detach().exp() * logp * reward).sum(), logits)
    torch.testing.assert_close(-policy_gradient, true_gradient())


def test_outliers_stay_finite_and_keep_their_gradient():
    logp = torch.tensor([-30.0, 0.0], requires_grad=True)
    ref = torch.tensor([0.0, -30.0])
    for kind in ("k2", "k3", "abs"):
        values = kl_penalty(logp, ref, kind)
        (grad,) = torch.autograd.grad(values.sum(), logp)
        assert values.isfinite().all() and grad.isfinite().all()
        assert grad[1] > 0, "a token far too likely is pushed down"
        assert grad[0] < 0, "a token far too unlikely is pushed up"
    assert (kl_penalty(logp, ref, "k2") == 450).all()


@pytest.mark.parametrize("averaging", ["token", "seq"])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_kl_loss_and_its_gradient_equal_a_loop_at_any_micro_batch_size(averaging, micro: int):
    rng = torch.Generator().manual_seed(0)
    logp = [torch.randn(n, generator=rng, dtype=torch.float64).requires_grad_() for n in (1, 5, 2)]
    ref = [torch.randn(len(x), generator=rng, dtype=torch.float64) for x in logp]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(0, 3, micro):
        part, part_ref = logp[i : i + micro], ref[i : i + micro]
        sequence_T = torch.arange(len(part)).repeat_interleave(torch.tensor([len(x) for x in part]))
        total = total + kl_loss(
            torch.cat(part), torch.cat(part_ref), sequence_T,
            kind="k3", averaging=averaging, n_tokens=8, n_sequences=3,
        )  # fmt: skip
    gradients = torch.autograd.grad(total, logp)
    expected = 0.0
    for x, y, grad in zip(logp, ref, gradients, strict=True):
        n = 8 if averaging == "token" else 3 * len(x)
        d = (x - y).tolist()
        expected += sum(math.exp(-v) - 1 + v for v in d) / n
        slopes = torch.tensor([(1 - math.exp(-v)) / n for v in d], dtype=torch.float64)
        torch.testing.assert_close(grad, slopes)
    assert total.item() == pytest.approx(expected)


def test_k1_as_a_loss_is_refused_with_the_reason_and_the_way_out():
    zero = torch.zeros(1)
    with pytest.raises(ValueError, match=r"no expected gradient.*use_kl_loss=false"):
        kl_loss(
            zero, zero, torch.tensor([0]),
            kind="k1", averaging="token", n_tokens=1, n_sequences=1,
        )  # fmt: skip


def test_an_unknown_penalty_lists_those_there_are():
    with pytest.raises(ValueError, match="kl_penalty='k4' is unknown; use k1, k2, k3 or abs"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k4")


def test_no_gradient_reaches_the_reference():
    ref = torch.zeros(3, requires_grad=True)
    kl_penalty(torch.ones(3, requires_grad=True), ref, "k3").sum().backward()
    assert ref.grad is None


def test_adaptive_controller_follows_the_formula_of_ziegler():
    controller = AdaptiveKL(0.2, target=0.1, horizon=1000)
    controller.update(0.11, n_samples=100)  # error 0.1, a tenth of the horizon
    assert controller.value == pytest.approx(0.2 * 1.01)
    controller.update(5.0, n_samples=100)  # error clipped to 0.2
    assert controller.value == pytest.approx(0.2 * 1.01 * 1.02)
    controller.update(0.0, n_samples=100)  # error clipped to -0.2
    assert controller.value == pytest.approx(0.2 * 1.01 * 1.02 * 0.98)


def test_adaptive_coefficient_stays_positive_for_a_batch_of_many_horizons():
    controller = AdaptiveKL(0.2, target=0.1, horizon=100)
    controller.update(0.0, n_samples=2560)
    assert controller.value == pytest.approx(0.16)


def test_adaptive_controller_ignores_a_step_that_had_no_finite_kl():
    controller = AdaptiveKL(0.2, target=0.1, horizon=1000)
    controller.update(float("nan"), n_samples=100)
    assert controller.value == 0.2


def test_adaptive_coefficient_survives_a_checkpoint_and_the_fixed_one_follows_the_config():
    before = AdaptiveKL(0.2, target=0.1, horizon=1000)
    before.update(1.0, n_samples=500)
    after = AdaptiveKL(0.2, target=0.1, horizon=1000)
    after.load_state_dict(before.state_dict())
    assert after.value == before.value != 0.2
    fixed = FixedKL(0.05)
    fixed.update(9.0, n_samples=500)
    fixed.load_state_dict(before.state_dict())
    assert fixed.value == 0.05


def test_controllers_follow_the_configuration():
    assert isinstance(make_kl_controller(AlgorithmConfig(kl_type="adaptive")), AdaptiveKL)
    assert make_kl_controller(AlgorithmConfig(kl_coef=0.3)).value == 0.3
    assert make_kl_controller(AlgorithmConfig(kl_coef=0.3, disable_kl=True)).value == 0.0
