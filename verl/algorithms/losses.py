"""Policy losses over the flat response tokens of a micro-batch.

Every loss is a sum divided by a count of the whole optimizer step, over all ranks and
micro-batches, which the caller passes in: neither micro-batching nor data parallelism changes a
gradient. (FSDP averages over ranks; the engine undoes that factor.)
Letters: B samples of the micro-batch, T their response tokens one after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Averaging = Literal["token", "seq"]

MAX_LOG_RATIO = 20.0
"""Beyond e^20 the clip decides anyway, and infinity times zero is not a number."""


@dataclass(frozen=True)
class ClipRange:
    """Bounds of the probability ratio. Raises ValueError for impossible ones."""

    low: float = 0.2
    """The ratio is clipped below at 1 - low."""
    high: float = 0.2
    """The ratio is clipped above at 1 + high."""
    dual: float = 3.0
    """Largest ratio that counts where the advantage is negative."""

    def __post_init__(self) -> None:
        if not 0 <= self.low <= 1:
            raise ValueError(f"worker.actor.clip_ratio_low={self.low} must be in 0 to 1")
        if self.high < 0:
            raise ValueError(f"worker.actor.clip_ratio_high={self.high} must not be negative")
        if self.dual <= 1:
            raise ValueError(f"worker.actor.clip_ratio_dual={self.dual} must be above 1")


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
    `sequence_T` tells which sequence a token belongs to, as 0..B-1 in any order; a sequence lies in
    one micro-batch whole. `n_tokens` and `n_sequences` count the optimizer step's tokens, and its
    sequences that have any, over all ranks and micro-batches.

    Raises ValueError for another averaging, shapes that differ, or counts below 1.
    """
    if n_tokens < 1 or n_sequences < 1:
        raise ValueError(f"nothing to average: n_tokens={n_tokens}, n_sequences={n_sequences}")
    require_flat(values_T, sequence_T)
    if averaging == "token":
        return values_T.sum() / n_tokens
    if averaging != "seq":
        raise ValueError(f"worker.actor.loss_avg_mode={averaging!r} is unknown; use token or seq")
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
    weight_T: Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate with separate bounds and a dual clip, scalar.

    With ratio r = exp(logp - old_logp) and advantage A:
    L = max(-A r, -A clip(r, 1 - low, 1 + high)), and for A < 0 at most -A dual.
    PPO arXiv:1707.06347 eq. 7; clip-higher DAPO arXiv:2503.14476 eq. 10; dual clip
    arXiv:1912.09729 eq. 5. `weight_T` multiplies each token's loss after that (see
    `correction.rollout_correction`). Gradient flows through `logp_T` only. Counts are as in
    `average`.

    Metrics are shares of means over all tokens: `clip_fraction_low` and `_high` (tokens held by a
    bound, without gradient), `clip_fraction_dual`, and KL(old || new) as `ppo_kl` (k1, may be
    negative) and `ppo_kl_k3` (never negative).

    Raises ValueError as `average` does.
    """
    require_flat(logp_T, old_logp_T, sequence_T)
    advantage_T = advantage_B.detach()[sequence_T]
    gap_T = (logp_T - old_logp_T.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_T = gap_T.exp()
    free_T = -advantage_T * ratio_T
    clipped_T = -advantage_T * ratio_T.clamp(1 - clip.low, 1 + clip.high)
    single_T = torch.maximum(free_T, clipped_T)
    bound_T = -advantage_T * clip.dual
    loss_T = torch.where(advantage_T < 0, torch.minimum(single_T, bound_T), single_T)
    with torch.no_grad():
        held_T = clipped_T > free_T
        values = {
            "clip_fraction_low": held_T & (advantage_T < 0),
            "clip_fraction_high": held_T & (advantage_T > 0),
            "clip_fraction_dual": (advantage_T < 0) & (single_T > bound_T),
            "ppo_kl": -gap_T,
            "ppo_kl_k3": torch.expm1(gap_T) - gap_T,
        }
        metrics = {name: value.to(gap_T.dtype).sum() / n_tokens for name, value in values.items()}
    if weight_T is not None:
        require_flat(loss_T, weight_T)
        loss_T = loss_T * weight_T.detach()
    loss = average(loss_T, sequence_T, averaging, n_tokens=n_tokens, n_sequences=n_sequences)
    return PolicyLoss(loss, metrics)


def require_flat(*tensors_T: Tensor) -> None:
    """Raises ValueError unless all are (T,): otherwise broadcasting would pair wrong tokens."""
    shapes = [tuple(t.shape) for t in tensors_T]
    if len(shapes[0]) != 1 or len(set(shapes)) > 1:
        raise ValueError(f"expected one value a response token from each tensor, got {shapes}")
