"""How far the rollout engine's log-probs are from the trainer's. Letters: T response tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def mismatch_metrics(
    trainer_logp_T: Tensor, rollout_logp_T: Tensor, sequence_T: Tensor
) -> dict[str, Tensor]:
    """Disagreement of two engines on the same weights, scalars by name.

    mean_abs and max_abs of the per-token difference d = trainer - rollout; k3 = mean(e^d - 1 - d),
    an estimate of KL(rollout || trainer); ess, the effective sample size of the sequences' importance
    weights w = exp(sum d) as a share of their number, (sum w)^2 / (n sum w^2): 1 when they agree.
    """
    d_T = (trainer_logp_T - rollout_logp_T).double()
    if len(d_T) == 0:
        zero = d_T.sum()
        return {"mean_abs": zero, "max_abs": zero, "k3": zero, "ess": zero + 1}
    n = int(sequence_T.max()) + 1
    log_w = torch.zeros(n, dtype=d_T.dtype).index_add(0, sequence_T, d_T)
    w = (log_w - log_w.max()).exp()
    return {
        "mean_abs": d_T.abs().mean(),
        "max_abs": d_T.abs().max(),
        "k3": (torch.expm1(d_T) - d_T).mean(),
        "ess": w.sum() ** 2 / (n * (w**2).sum()),
    }
