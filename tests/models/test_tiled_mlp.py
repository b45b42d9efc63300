"""An MLP over tiles equals the MLP, and its second forward pass costs nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from verl.models.tiled_mlp import tile_mlps
from verl.utils.recompute import checkpoint_contexts


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(4, 9),
            nn.Linear(4, 9),
            nn.Linear(9, 4, bias=False),
        )
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(x.shape[-2])
        return self.down(self.gate(x).sigmoid() * self.up(x))


def gradients(mlp: nn.Module, x: torch.Tensor, *, checkpointed: bool = False) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + mlp(x.cos())

    if checkpointed:
        out = checkpoint(layer, x, use_reentrant=False, context_fn=checkpoint_contexts)
    else:
        out = layer(x)
    trained = [p for p in mlp.parameters() if p.requires_grad]
    loss = (out * torch.arange(out.numel()).view(out.shape).cos()).sum()
    return [out.detach(), *torch.autograd.grad(loss, (x, *trained))]


@pytest.fixture
def mlp() -> GatedMLP:
    torch.manual_seed(0)
    return GatedMLP().double()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("shape", [(1, 11, 4), (11, 4), (1, 12, 4), (1, 3, 4)])
@pytest.mark.parametrize("frozen", [False, True])
def test_values_and_gradients_are_those_of_the_whole(mlp, checkpointed, shape, frozen):
    mlp.up.requires_grad_(not frozen)
    x = torch.randn(shape, dtype=torch.float64)
    expected = gradients(mlp, x)
    tile_mlps([mlp], 4)
    torch.testing.assert_close(gradients(mlp, x, checkpointed=checkpointed), expected)


def test_no_more_than_a_tile_is_seen_and_the_second_pass_leaves_it_out(mlp):
    tile_mlps([mlp], 4)
    gradients(mlp, torch.randn(1, 11, 4, dtype=torch.float64), checkpointed=True)
    # Once forward, and once in backward.
    assert mlp.sizes == [4, 4, 3] * 2


def test_without_gradients_tiles_serve_as_well(mlp):
    x = torch.randn(1, 11, 4, dtype=torch.float64)
    expected = mlp(x)
    tile_mlps([mlp], 4)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected)


def test_names_of_parameters_stay(mlp):
    names = [name for name, _ in mlp.named_parameters()]
    tile_mlps([mlp], 4)
    assert [name for name, _ in mlp.named_parameters()] == names == list(mlp.state_dict())


def test_a_layer_that_uses_the_output_otherwise_fails_in_the_open(mlp):
    tile_mlps([mlp], 4)
    x = torch.randn(1, 11, 4, dtype=torch.float64, requires_grad=True)
    out = checkpoint(lambda x: mlp(x) ** 2, x, use_reentrant=False, context_fn=checkpoint_contexts)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.isnan().all()
