"""Policy losses over the flat response tokens of a micro-batch.

Every loss is a sum divided by a count of the whole optimizer step, over all ranks and micro-batches,
which the caller passes in: neither micro-batching nor data parallelism changes a gradient.
Letters: B samples of the micro-batch, T their response tokens one after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Averaging = Literal["token", "seq"]


@dataclass(frozen=True)
class ClipRange:
    """Bounds of the probability ratio."""

    low: float = 0.2
    """The ratio is clipped below at 1 - low."""
    high: float = 0.2
    """The ratio is clipped above at 1 + high."""
    dual: float = 3.0
    """Largest multiple of a negative advantage that counts."""


@dataclass(frozen=True)
class PolicyLoss:
    """A micro-batch's share of the loss and of each metric; shares add up over micro-batches."""

    loss: Tensor
    metrics: dict[str, Tensor]


def average(
    values_T: Tensor,
    sequence_T: Tensor,
    averaging: Averaging,
    *,
    n_tokens: int,
    n_sequences: int,
) -> Tensor:
    """This micro-batch's share of a mean over the whole optimizer step, scalar.

    `token`: sum of values / n_tokens. `seq`: each sequence's own mean, summed, / n_sequences.
    `sequence_T` tells which sequence a token belongs to; a sequence lies in one micro-batch whole.
    """
    if averaging == "token":
        return values_T.sum() / n_tokens
    if averaging != "seq":
        raise ValueError(f"worker.actor.loss_avg_mode={averaging!r}: use token or seq")
    length_T = torch.bincount(sequence_T)[sequence_T]
    return (values_T / length_T).sum() / n_sequences


def policy_loss(
    logp_T: Tensor,
    old_logp_T: Tensor,
    advantage_B: Tensor,
    sequence_T: Tensor,
    *,
    clip: ClipRange,
    averaging: Averaging,
    n_tokens: int,
    n_sequences: int,
) -> PolicyLoss:
    """PPO's clipped surrogate with separate bounds and a dual clip, scalar.

    With ratio r = exp(logp - old_logp) and advantage A:
    L = max(-A r, -A clip(r, 1 - low, 1 + high)), and for A < 0 at most -A dual.
    PPO arXiv:1707.06347 eq. 7; clip-higher DAPO arXiv:2503.14476 eq. 10; dual clip
    arXiv:1912.09729 eq. 5.
    """
    advantage_T = advantage_B[sequence_T]
    # Beyond e^20 the clip decides anyway, and infinity times zero is not a number.
    gap_T = (logp_T - old_logp_T).clamp(-20.0, 20.0)
    ratio_T = gap_T.exp()
    free_T = -advantage_T * ratio_T
    clipped_T = -advantage_T * ratio_T.clamp(1 - clip.low, 1 + clip.high)
    single_T = torch.maximum(free_T, clipped_T)
    bound_T = -advantage_T * clip.dual
    loss_T = torch.where(advantage_T < 0, torch.minimum(single_T, bound_T), single_T)
    with torch.no_grad():
        at_bound_T = clipped_T > free_T
        shares = {
            "clip_fraction_low": at_bound_T & (advantage_T < 0),
            "clip_fraction_high": at_bound_T & (advantage_T > 0),
            "clip_fraction_dual": (advantage_T < 0) & (single_T > bound_T),
            "ppo_kl": -gap_T,
        }
        metrics = {name: value.float().sum() / n_tokens for name, value in shares.items()}
    loss = average(loss_T, sequence_T, averaging, n_tokens=n_tokens, n_sequences=n_sequences)
    return PolicyLoss(loss, metrics)
