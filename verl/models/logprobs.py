"""Log-probabilities and entropy of given tokens without full-vocabulary logits of the sequence.

At 260k tokens and 152k words the logits alone are 158 GB. Only the rows that predict a response
token are projected, a chunk at a time, and a chunk's logits are made again in backward.
Letters: T predicted tokens, E hidden, V vocab.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ROWS = 1024


def token_log_probs(
    hidden_TE: Tensor,
    head_VE: Tensor,
    labels_T: Tensor,
    *,
    temperature: float = 1.0,
    forbidden_ids: Tensor | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of each row, both (T,) float32 (float64 of such).

    log p = z_y - logsumexp(z) with z = hidden @ head.T / temperature. `forbidden_ids` (visual
    placeholders) are left out of the distribution, as they are when sampling.
    """
    if len(labels_T) == 0:
        # Keeps the graph connected, so that every rank runs the same backward collectives.
        # A copy: what a sharded module returns must not be a view.
        zero = (hidden_TE.sum() + head_VE.sum()).reshape(1)[:0].clone()
        zero = zero.to(torch.promote_types(zero.dtype, torch.float32))
        return zero, zero.detach()
    logp, entropy = [], []
    for start in range(0, len(labels_T), chunk_rows):
        rows = slice(start, start + chunk_rows)
        args = (hidden_TE[rows], head_VE, labels_T[rows], temperature, forbidden_ids)
        if torch.is_grad_enabled():
            chunk = checkpoint(_chunk, *args, use_reentrant=False)
        else:
            chunk = _chunk(*args)
        logp.append(chunk[0])
        entropy.append(chunk[1])
    return torch.cat(logp), torch.cat(entropy)


def logits_of(
    hidden_TE: Tensor, head_VE: Tensor, temperature: float, forbidden_ids: Tensor | None
) -> Tensor:
    """Scaled logits with forbidden words at minus infinity, (T, V); float32, or float64 of such."""
    logits_TV = torch.nn.functional.linear(hidden_TE, head_VE)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    if temperature != 1.0:
        logits_TV = logits_TV / temperature
    if forbidden_ids is not None and len(forbidden_ids):
        logits_TV = logits_TV.index_fill(1, forbidden_ids, float("-inf"))
    return logits_TV


def _chunk(
    hidden_TE: Tensor,
    head_VE: Tensor,
    labels_T: Tensor,
    temperature: float,
    forbidden_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    logits_TV = logits_of(hidden_TE, head_VE, temperature, forbidden_ids)
    norm_T = torch.logsumexp(logits_TV, dim=1)
    logp_T = logits_TV.gather(1, labels_T[:, None]).squeeze(1) - norm_T
    with torch.no_grad():
        log_p_TV = logits_TV - norm_T[:, None]
        # 0 * log 0 = 0: forbidden words carry no entropy.
        entropy_T = -(log_p_TV.exp() * log_p_TV.clamp(min=-1e30)).sum(1)
    return logp_T, entropy_T
