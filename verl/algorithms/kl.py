"""KL penalties against a reference and their coefficient. Letters: B samples, T response tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from verl.algorithms.losses import MAX_LOG_RATIO, Averaging, average, require_flat
from verl.config import AlgorithmConfig


def kl_penalty(logp_T: Tensor, ref_logp_T: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the policy's own samples, (T,) -> (T,).

    With d = logp - ref_logp: k1 = d (unbiased), k2 = d^2 / 2 (biased value; as a loss its expected
    gradient is that of the KL), k3 = e^-d - 1 + d (unbiased, never negative; as a loss its expected
    gradient is that of the forward KL(reference || policy)), abs = |d|. Schulman 2020,
    "Approximating KL divergence", http://joschu.net/blog/kl-approx.html. EasyR1 calls k1 `kl`, k2
    `mse` and k3 `low_var_kl`. Gradient flows through `logp_T` only.

    Raises ValueError for another kind, or when shapes differ.
    """
    require_flat(logp_T, ref_logp_T)
    d_T = logp_T - ref_logp_T.detach()
    if kind == "k1":
        return d_T
    if kind == "k2":
        return 0.5 * d_T**2
    if kind == "k3":
        # Beyond e^20 the exponential goes on as its tangent: it cannot overflow, and a token that
        # is far off keeps a gradient.
        bounded_T = (-d_T).clamp(max=MAX_LOG_RATIO)
        return torch.expm1(bounded_T) + bounded_T.exp() * (-d_T - bounded_T) + d_T
    if kind == "abs":
        return d_T.abs()
    raise ValueError(f"algorithm.kl_penalty={kind!r} is unknown; use k1, k2, k3 or abs")


def kl_loss(
    logp_T: Tensor,
    ref_logp_T: Tensor,
    sequence_T: Tensor,
    *,
    kind: str,
    averaging: Averaging,
    n_tokens: int,
    n_sequences: int,
) -> Tensor:
    """This micro-batch's share of the mean penalty, scalar; counts are as in `losses.average`.

    Raises ValueError for k1: E[grad k1] = E[grad log p] = 0, so it would not hold the policy.
    """
    if kind == "k1":
        raise ValueError(
            "algorithm.kl_penalty=k1 has no expected gradient as a loss; use k2 or k3, or put it "
            "into the reward with algorithm.use_kl_loss=false"
        )
    values_T = kl_penalty(logp_T, ref_logp_T, kind)
    return average(values_T, sequence_T, averaging, n_tokens=n_tokens, n_sequences=n_sequences)


def kl_in_reward(rewards_B: Tensor, penalty_B: Tensor, coef: float) -> Tensor:
    """Rewards less the summed penalty of each sample, r - coef * KL, (B,).

    Ziegler et al., arXiv:1909.08593 sec. 2, where R = r - coef * log(policy / reference).
    """
    return rewards_B - coef * penalty_B


class KLController(Protocol):
    """Decides the coefficient of the KL term."""

    value: float

    def update(self, measured: float, n_samples: int) -> None:
        """Takes the mean penalty a token of a step with `n_samples` samples."""
        ...

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        ...

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Takes back what `state_dict` gave."""
        ...


class FixedKL:
    """A constant coefficient."""

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, measured: float, n_samples: int) -> None:
        """Changes nothing."""

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """A fixed coefficient follows the configuration, so that it can be changed on resume."""


class AdaptiveKL:
    """Steers the measured KL to a target: coef *= 1 + clip(kl / target - 1, +-0.2) * n / horizon.

    n / horizon counts as at most 1: a batch above 5 horizons would make the coefficient negative.
    Ziegler et al., arXiv:1909.08593 sec. 2.2, where n / horizon is the constant 0.1.
    """

    def __init__(self, value: float, target: float, horizon: int) -> None:
        self.value = value
        self._target = target
        self._horizon = horizon

    def update(self, measured: float, n_samples: int) -> None:
        """A measurement that is not finite, of a step that was skipped, changes nothing."""
        if not math.isfinite(measured):
            return
        error = min(max(measured / self._target - 1, -0.2), 0.2)
        self.value *= 1 + error * min(1.0, n_samples / self._horizon)

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.value = state["value"]


def make_kl_controller(config: AlgorithmConfig) -> KLController:
    """The controller that `algorithm.kl_type` names; 0 where there is no reference."""
    if not config.needs_reference:
        return FixedKL(0.0)
    if config.kl_type == "adaptive":
        return AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
    return FixedKL(config.kl_coef)
