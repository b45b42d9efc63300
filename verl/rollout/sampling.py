"""Draws words by inverse transform from one uniform number a row. Letters: B rows, V vocab."""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(x: int) -> int:
    """A 64-bit pattern as the signed number that torch stores."""
    return (x + 2**63) % 2**64 - 2**63


_GOLDEN = 0x9E3779B97F4A7C15
_MIX1, _MIX2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def uniform(seeds_B: Tensor, step: int) -> Tensor:
    """A number in [0, 1) for each (seed, step), (B,) int64 -> (B,) float64.

    SplitMix64 (Steele et al. 2014) as a counter-based generator: no state, so the draw of one
    sample does not depend on what else is in the batch.
    """
    z = seeds_B + _signed((step + 1) * _GOLDEN)
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    z = z ^ _shift(z, 31)
    return _shift(z, 11).double() * 2.0**-53


def _shift(z: Tensor, n: int) -> Tensor:
    """Logical right shift of signed 64-bit numbers."""
    return (z >> n) & ((1 << (64 - n)) - 1)


def draw(
    logits_BV: Tensor, uniform_B: Tensor, *, temperature: float, top_p: float, top_k: int
) -> Tensor:
    """One word a row, (B,). `logits_BV` are already divided by a positive temperature."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    if top_k > 0:
        kth = logits_BV.topk(min(top_k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, float("-inf"))
    probs_BV = torch.softmax(logits_BV.double(), dim=-1)
    if top_p < 1.0:
        probs_BV = _nucleus(probs_BV, top_p)
    total_BV = probs_BV.cumsum(-1)
    # Scaling the draw by the last sum keeps it inside the range whatever rounding did.
    target_B1 = (uniform_B.to(total_BV.device) * total_BV[:, -1])[:, None]
    word_B = torch.searchsorted(total_BV, target_B1, right=True).squeeze(1)
    return word_B.clamp(max=logits_BV.shape[-1] - 1)


def _nucleus(probs_BV: Tensor, top_p: float) -> Tensor:
    """Zeroes all words but the likeliest that reach `top_p` together. arXiv:1904.09751."""
    ordered, order = probs_BV.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probs_BV).scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))
