"""How far the rollout engine's log-probs are from the trainer's, and what is done about it.

Letters: B samples, T their response tokens one after another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from verl.algorithms.losses import require_flat
from verl.config import RolloutCorrectionConfig


@dataclass(frozen=True)
class Correction:
    """Weights of a micro-batch's tokens in the policy loss, and what was done to them."""

    weight_T: Tensor
    """float32, without gradient; 0 where a token is left out."""
    counts: dict[str, Tensor]
    """Sums over tokens, scalars: of the weights (`mean`), of those that were truncated
    (`clipped_share`) and of tokens that were left out (`masked_share`); to be divided by the
    optimizer step's tokens."""


def rollout_correction(
    trainer_logp_T: Tensor,
    rollout_logp_T: Tensor,
    sequence_T: Tensor,
    config: RolloutCorrectionConfig,
) -> Correction:
    """Importance weights of samples that the rollout engine drew.

    The trainer's log-probs are those of the policy that sampled, whatever it became since: PPO's
    ratio accounts for that. With d = trainer - rollout, ratios are e^d for each token, e^(sum d)
    for each sequence or e^(mean d), their geometric mean. Truncation at C, min(ratio, C): Ionides
    2008, "Truncated importance sampling"; a token at a time, Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training". Rejection of ratios out of bounds, a
    token at a time: IcePop (Ling team 2025, "Small leak can sink a great ship"); a sequence at a
    time with the geometric mean: Li and Liu 2025, "When speed kills stability".

    `rollout_is="auto"` is not for here: ValueError, as for shapes that differ.
    """
    require_flat(trainer_logp_T, rollout_logp_T, sequence_T)
    if config.rollout_is == "auto":
        raise ValueError("algorithm.rollout_correction.rollout_is=auto was not resolved")
    d_T = (trainer_logp_T - rollout_logp_T).detach().double()
    weight_T, is_cut_T = torch.ones_like(d_T), torch.zeros_like(d_T, dtype=torch.bool)
    if config.rollout_is is not None:
        ratio_T, most = _log_ratio(d_T, sequence_T, config.rollout_is), config.rollout_is_threshold
        # Bounded before the exponential, which so cannot overflow.
        weight_T, is_cut_T = ratio_T.clamp(max=math.log(most)).exp(), ratio_T > math.log(most)
    is_out_T = torch.zeros_like(is_cut_T)
    if config.rollout_rs is not None:
        low, high = config.bounds
        ratio_T = _log_ratio(d_T, sequence_T, config.rollout_rs)
        least = math.log(low) if low > 0 else -math.inf
        is_out_T = (ratio_T < least) | (ratio_T > math.log(high))
        weight_T = weight_T.masked_fill(is_out_T, 0.0)
    counts = {"mean": weight_T, "clipped_share": is_cut_T & ~is_out_T, "masked_share": is_out_T}
    return Correction(weight_T.float(), {name: v.double().sum() for name, v in counts.items()})


def _log_ratio(d_T: Tensor, sequence_T: Tensor, level: str) -> Tensor:
    """Logarithm of the ratio that decides about each token, (T,)."""
    if level == "token":
        return d_T
    n_B = torch.bincount(sequence_T)
    log_B = d_T.new_zeros(len(n_B)).index_add(0, sequence_T, d_T)
    return (log_B / n_B.clamp(min=1) if level == "geometric" else log_B)[sequence_T]


def mismatch_metrics(
    trainer_logp_T: Tensor, rollout_logp_T: Tensor, sequence_T: Tensor, threshold: float
) -> dict[str, Tensor]:
    """Disagreement of two engines on the same weights and samples, scalars by name.

    mean_abs and max_abs of the per-token difference d = trainer - rollout, in nats, and
    beyond_share, the share of tokens where it is more than `threshold`;
    k3 = mean(e^d - 1 - d), an estimate of KL(rollout || trainer), never negative;
    ess, the effective sample size of the sequences' importance weights w = exp(sum d) as a share of
    their number, (sum w)^2 / (n sum w^2) (Kong 1992): 1 when the engines agree, 1/n when one
    sequence would carry all the weight.

    Raises ValueError when shapes differ, or when there is no token to compare.
    """
    require_flat(trainer_logp_T, rollout_logp_T, sequence_T)
    if len(sequence_T) == 0:
        raise ValueError("no response token to compare log-probs of")
    d_T = (trainer_logp_T - rollout_logp_T).double()
    n_B = torch.bincount(sequence_T)
    log_w_B = d_T.new_zeros(len(n_B)).index_add(0, sequence_T, d_T)[n_B > 0]
    # Only the ratios of weights matter; the largest as 1 cannot overflow.
    w_B = (log_w_B - log_w_B.max()).exp()
    return {
        "mean_abs": d_T.abs().mean(),
        "max_abs": d_T.abs().max(),
        "beyond_share": (d_T.abs() > threshold).double().mean(),
        "k3": (torch.expm1(d_T) - d_T).mean(),
        "ess": w_B.sum() ** 2 / (len(w_B) * (w_B**2).sum()),
    }
