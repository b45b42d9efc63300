import math

import pytest
import torch
from torch import nn

from verl.config import OptimConfig
from verl.workers.optimizer import build_optimizer, build_schedule

STEPS = 10


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv2d(4, 2, 1), nn.Embedding(5, 3))


def rates(config: OptimConfig, n_steps: int = STEPS) -> list[float]:
    """Learning rate of each step as a share of the peak."""
    optimizer = build_optimizer(net(), config)
    schedule = build_schedule(optimizer, config, STEPS)
    found = []
    for _ in range(n_steps):
        found.append(optimizer.param_groups[0]["lr"] / config.lr)
        assert len({g["lr"] for g in optimizer.param_groups}) == 1
        optimizer.step()
        schedule.step()
    return found


def config(style: str, **settings) -> OptimConfig:
    return OptimConfig(lr=2e-3, warmup_style=style, **settings)


def test_without_warm_up_a_constant_rate_is_the_peak_from_the_first_step():
    assert rates(config("constant")) == [1.0] * 10


def test_warm_up_rises_in_equal_steps_and_its_last_step_is_the_peak():
    got = rates(config("constant", lr_warmup_steps=4))
    assert got == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])


def test_linear_falls_from_the_peak_to_the_floor_by_equal_steps():
    got = rates(config("linear", lr_warmup_steps=2, min_lr_ratio=0.2), 13)
    down = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    assert got == pytest.approx([0.5, 1.0, *down, 0.2, 0.2, 0.2])


def test_cosine_falls_from_the_peak_to_zero_through_half_way():
    got = rates(config("cosine"), 12)
    assert got[0] == 1.0
    assert got[5] == pytest.approx(0.5)
    assert got[2] == pytest.approx((1 + math.cos(math.pi * 0.2)) / 2) == pytest.approx(0.9045085)
    assert got[10] == got[11] == pytest.approx(0.0)


def test_cosine_ends_at_the_floor():
    got = rates(config("cosine", min_lr_ratio=0.1), 11)
    assert got[5] == pytest.approx(0.55)
    assert got[10] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("ratio", "n_steps", "warm"), [(0.3, 10, 3), (0.25, 10, 3), (0.0, 10, 0), (0.07, 100, 7)]
)
def test_a_warm_up_ratio_is_rounded_up_to_whole_steps(ratio, n_steps, warm):
    settings = config("constant", lr_warmup_ratio=ratio)
    optimizer = build_optimizer(net(), settings)
    schedule = build_schedule(optimizer, settings, n_steps)
    shares = []
    for _ in range(n_steps):
        shares.append(optimizer.param_groups[0]["lr"] / settings.lr)
        optimizer.step()
        schedule.step()
    assert sum(s < 1 for s in shares) == max(0, warm - 1)


def test_a_number_of_warm_up_steps_wins_over_the_ratio():
    both = config("constant", lr_warmup_ratio=0.9, lr_warmup_steps=0)
    assert rates(both) == [1.0] * 10


def test_biases_and_norms_are_not_decayed():
    model = net()
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    found = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert {n for n, d in found.items() if d == 0.3} == {"0.weight", "2.weight", "3.weight"}
    assert {n for n, d in found.items() if d == 0} == {"0.bias", "1.weight", "1.bias", "2.bias"}


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = net()
    model[0].requires_grad_(False)
    only_matrices = build_optimizer(model[3], OptimConfig())
    assert [len(g["params"]) for g in only_matrices.param_groups] == [1]
    held = {id(p) for g in build_optimizer(model, OptimConfig()).param_groups for p in g["params"]}
    assert held == {id(p) for p in model[1:].parameters()}


def test_a_tied_weight_is_stepped_once():
    embed, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embed.weight
    groups = build_optimizer(nn.ModuleList([embed, head]), OptimConfig()).param_groups
    assert [len(g["params"]) for g in groups] == [1]


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="every parameter is frozen"):
        build_optimizer(net().requires_grad_(False), OptimConfig())


def test_a_step_is_adamw_with_decoupled_decay():
    p = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    model = nn.ParameterList([p])
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5, betas=(0.9, 0.99)))
    p.grad = torch.tensor([[3.0, -4.0]])
    optimizer.step()
    # The first step of Adam is lr * sign(gradient); decay takes lr * 0.5 of the weight before it.
    assert p.tolist()[0] == pytest.approx([1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1])


def after(optimizer_config: OptimConfig, gradients, n_steps: int) -> tuple[torch.Tensor, dict]:
    """Weights of a layer after some steps, and the optimizer's state of them."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    optimizer = build_optimizer(layer, optimizer_config)
    for i in range(n_steps):
        layer.weight.grad = gradients(i)
        optimizer.step()
    return layer.weight.detach(), optimizer.state[layer.weight]


def noisy(i: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(i)
    return torch.randn(64, 64, generator=g) * 0.3 + 0.1


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_moments_in_bf16_follow_those_in_float32(weight_decay):
    settings = {"lr": 1e-3, "weight_decay": weight_decay}
    exact, moments = after(OptimConfig(**settings), noisy, 300)
    half, halves = after(OptimConfig(**settings, moment_dtype="bf16"), noisy, 300)
    start, _ = after(OptimConfig(**settings), noisy, 0)
    assert halves["exp_avg"].dtype == halves["exp_avg_sq"].dtype == torch.bfloat16
    assert (half - exact).norm() < 0.02 * (exact - start).norm()
    for name in ("exp_avg", "exp_avg_sq"):
        assert (halves[name].float() - moments[name]).norm() < 0.1 * moments[name].norm()
        assert halves[name].float().mean() == pytest.approx(float(moments[name].mean()), rel=0.01)


def test_a_second_moment_that_changes_less_than_bf16_can_tell_still_moves():
    # From 1.0 on, each step takes off a thousandth: bf16's next value below is 0.0039 away.
    config = OptimConfig(lr=0.0, betas=(0.9, 0.999), moment_dtype="bf16")
    fading = {0: torch.full((64, 64), 1000**0.5)}
    _, state = after(config, lambda i: fading.get(i, torch.zeros(64, 64)), 1001)
    assert float(state["exp_avg_sq"].float().mean()) == pytest.approx(0.999**1000, rel=0.02)


def test_a_step_with_bf16_moments_is_the_same_whatever_was_drawn_before():
    config = OptimConfig(lr=1e-2, moment_dtype="bf16")

    def drawing(i: int) -> torch.Tensor:
        torch.rand(i + 1)
        return noisy(i)

    assert torch.equal(after(config, noisy, 20)[0], after(config, drawing, 20)[0])


def test_bf16_moments_take_half_the_bytes():
    assert OptimConfig().moment_bytes == 2 * OptimConfig(moment_dtype="bf16").moment_bytes == 8
