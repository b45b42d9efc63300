"""How far the rollout engine's log-probs are from the trainer's. Letters: T response tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from verl.algorithms.losses import require_flat


def mismatch_metrics(
    trainer_logp_T: Tensor, rollout_logp_T: Tensor, sequence_T: Tensor
) -> dict[str, Tensor]:
    """Disagreement of two engines on the same weights and samples, scalars by name.

    mean_abs and max_abs of the per-token difference d = trainer - rollout, in nats;
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
        "k3": (torch.expm1(d_T) - d_T).mean(),
        "ess": w_B.sum() ** 2 / (len(w_B) * (w_B**2).sum()),
    }
