"""Advantage estimators, found by name. Letters: B samples, P prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Estimator = Callable[[Tensor, Tensor], Tensor]
"""(rewards_B, prompt_B) -> advantages_B"""
_Registered = TypeVar("_Registered", bound=Estimator)
_ESTIMATORS: dict[str, Estimator] = {}


def register_advantage(name: str) -> Callable[[_Registered], _Registered]:
    """Decorator that makes an estimator known as `algorithm.adv_estimator=name`.

    Raises ValueError when the name is taken by another function.
    """

    def register(estimator: _Registered) -> _Registered:
        if _ESTIMATORS.setdefault(name, estimator) is not estimator:
            raise ValueError(f"there is an advantage estimator {name!r} already; choose a new name")
        return estimator

    return register


def get_advantage(name: str) -> Estimator:
    """The estimator of that name; raises ValueError with the known names."""
    if name not in _ESTIMATORS:
        raise ValueError(
            f"algorithm.adv_estimator={name!r} is unknown; use one of {sorted(_ESTIMATORS)}"
        )
    return _ESTIMATORS[name]


@register_advantage("grpo")
def grpo(rewards_B: Tensor, prompt_B: Tensor, eps: float = 1e-6) -> Tensor:
    """Advantage of each sample within its prompt's group, (B,) -> (B,) float32.

    A_i = (r_i - mean r) / (std r + eps), std unbiased. GRPO, arXiv:2402.03300 sec. 4.1.2.
    `prompt_B` holds 0..P-1 in any order, so callers may shuffle rows. A group whose std is at most
    `eps`, or that share of its mean, has advantage exactly 0: rounding noise must not be scaled up
    to a signal.

    Raises ValueError for a prompt with a single sample, whose advantage would always be 0, and for
    a reward that is not finite, which would spoil or silence its whole group.
    """
    if not rewards_B.isfinite().all():
        raise ValueError(f"rewards {rewards_B[~rewards_B.isfinite()].tolist()} are not finite")
    n_P = torch.bincount(prompt_B)
    if (n_P == 1).any():
        raise ValueError("GRPO needs at least 2 samples a prompt; set worker.rollout.n >= 2")
    rewards_B = rewards_B.double()
    zero_P = rewards_B.new_zeros(len(n_P))
    mean_P = zero_P.index_add(0, prompt_B, rewards_B) / n_P
    gap_B = rewards_B - mean_P[prompt_B]
    std_B = (zero_P.index_add(0, prompt_B, gap_B**2) / (n_P - 1)).sqrt()[prompt_B]
    noise_B = eps * mean_P[prompt_B].abs().clamp(min=1.0)
    return torch.where(std_B > noise_B, gap_B / (std_B + eps), 0.0).float()
