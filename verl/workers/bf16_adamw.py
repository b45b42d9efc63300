"""AdamW with moments in bf16: half their memory, rounded so that small changes are not lost.

A second moment changes by a thousandth a step, which is less than bf16 can tell: rounded to the
nearest it would stand still. Rounded up or down at random, with the odds of the distance, its mean
is right (stochastic rounding, arXiv:2010.06192).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

PIECE = 2**24
"""Weights that are updated at a time; the float32 copies of more would take memory."""
LOW_BITS = 16
"""Of a float32, beyond those of a bf16."""


class BF16MomentsAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) on float32 weights with both moments in bf16.

    A step depends on nothing but state and gradients: the random bits follow from the step's number
    and the place of the parameter.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        place = 0
        for group in self.param_groups:
            for p in group["params"]:
                place += 1
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(p, dtype=torch.bfloat16)
                state["step"] += 1
                _update(p, state, group, place)
        return None


def _update(p: Tensor, state: dict[str, Tensor], group: dict[str, Any], place: int) -> None:
    step = int(state["step"])
    assert p.grad is not None
    of_all = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
    pieces = [_local(t).view(-1).split(PIECE) for t in of_all]
    g = torch.Generator(pieces[0][0].device) if pieces[0] else None
    for number, (weight, grad, first, second) in enumerate(zip(*pieces, strict=True)):
        assert g is not None
        # Through a hash, since generators look at 32 bits of a seed.
        name = f"{step} {place} {number}".encode()
        g.manual_seed(int.from_bytes(hashlib.blake2b(name, digest_size=4).digest()))
        _update_piece(weight, grad, first, second, group, step, g)


def _update_piece(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor,
    group: dict[str, Any], step: int, g: torch.Generator,
) -> None:  # fmt: skip
    beta1, beta2 = group["betas"]
    grad = grad.float()
    mean = first.float().lerp_(grad, 1 - beta1)
    square = second.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    spread = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    weight.addcdiv_(mean, spread, value=-group["lr"] / (1 - beta1**step))
    first.copy_(_rounded(mean, g))
    second.copy_(_rounded(square, g))


def _rounded(values: Tensor, g: torch.Generator) -> Tensor:
    """Values that bf16 has, up or down at random; their mean is `values`."""
    bits = values.view(torch.int32)
    noise = torch.randint(
        2**LOW_BITS, bits.shape, generator=g, dtype=torch.int32, device=bits.device
    )
    # Added to the magnitude, it carries into the bits that stay with the odds of what is cut off.
    return (bits + noise).bitwise_and_(-(2**LOW_BITS)).view(torch.float32)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
