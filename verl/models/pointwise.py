"""What a decoder block computes beside its matrix products: norms, rotation, gates and sums.

Each is a few passes over memory when torch runs it operation by operation; `compiled` joins them
into one. Values are those of transformers' modules, up to the rounding that joining leaves out.
Letters: S tokens, E hidden size, N heads, D head dim, H = N D, F width of the MLP. Of norms and
gates the last dimension alone is named.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from verl.utils.exits import UserError
from verl.utils.torch_functional import compiler_missing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pointwise:
    """The operations, either plain or compiled."""

    norm: Callable[[Tensor, Tensor, float], Tensor]
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    gate: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def chosen(cls, how: str, device: torch.device) -> Pointwise:
        """As `model.compile_pointwise` says: auto compiles on CUDA where a compiler is found.

        Raises UserError where it is on and there is no compiler.
        """
        if how == "off" or (how == "auto" and device.type != "cuda"):
            return cls.plain()
        missing = compiler_missing(device)
        if missing and how == "on":
            raise UserError(
                f"compile_pointwise=on: {missing}; install one, or use "
                "worker.actor.model.compile_pointwise=auto (of SFT: model.compile_pointwise=auto)"
            )
        if missing:
            logger.warning(
                "norms and gates of the language model run uncompiled, which makes training of "
                "long rows slower: %s; install it, or set compile_pointwise=off", missing,
            )  # fmt: skip
        return cls.plain() if missing else cls.compiled()

    @classmethod
    def plain(cls) -> Pointwise:
        """Operation by operation."""
        return cls(_norm, _add_norm, _rotate, _gate)

    @classmethod
    @functools.cache
    def compiled(cls) -> Pointwise:
        """By `torch.compile`, for rows of any length; compiled when first called."""
        # Grad mode, views of sharding's hooks, tails and tiles: each is compiled once.
        torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
        join: Callable[[Any], Any] = functools.partial(torch.compile, dynamic=True)
        return cls(join(_norm), join(_add_norm), join(_rotate), join(_gate))


def _norm(x_E: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """Root mean square norm (arXiv:1910.07467), computed in float32 or wider."""
    wide = x_E.float() if x_E.dtype != torch.float64 else x_E
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight_E * wide.to(x_E.dtype)


def _add_norm(x_E: Tensor, y_E: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A sum, and its norm."""
    total_E = x_E + y_E
    return total_E, _norm(total_E, weight_E, eps)


def _rotate(x_1SH: Tensor, cos_1SD: Tensor, sin_1SD: Tensor) -> Tensor:
    """Heads with rotary positions (arXiv:2104.09864), (1, S, N, D), from their flat form.

    A pair is an element of a head's first half with its counterpart in the second.
    """
    x_1SND = x_1SH.unflatten(-1, (-1, cos_1SD.shape[-1]))
    first, second = x_1SND.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_1SND * cos_1SD.unsqueeze(2) + turned * sin_1SD.unsqueeze(2)


def _gate(gate_F: Tensor, up_F: Tensor) -> Tensor:
    """SwiGLU (arXiv:2002.05202) without its matrix products."""
    return F.silu(gate_F) * up_F
