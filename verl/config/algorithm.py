"""The `algorithm.*` section: advantage estimator and KL control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from verl.config.base import Alias, Count, NonNegative, Positive

KLPenalty = Annotated[
    Literal["k1", "k2", "k3", "abs"],
    Alias((("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3"))),
]


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """How rewards become advantages, and how far the policy may move from the reference."""

    adv_estimator: Literal["grpo"] = "grpo"
    """Advantage estimator. `grpo`: reward against the mean and spread of its own prompt's group."""
    disable_kl: bool = False
    """true: no KL term at all, and no reference model is loaded."""
    use_kl_loss: bool = True
    """true: KL is a term of the loss; false: KL is taken off the reward."""
    kl_penalty: KLPenalty = "k3"
    """KL estimator: k1 (log ratio), k2 (half its square), k3 (unbiased, low variance) or abs.
    The EasyR1 names kl, mse and low_var_kl mean k1, k2 and k3."""
    kl_coef: NonNegative = 0.01
    """Weight of the KL term; the starting weight when `algorithm.kl_type=adaptive`."""
    reference_log_probs: Literal["auto", "always"] = "auto"
    """auto: with `algorithm.kl_coef=0` no reference model is loaded, and the KL is neither computed
    nor logged; always: it is, without an effect on training."""
    kl_type: Literal["fixed", "adaptive"] = "fixed"
    """Whether the weight stays, or follows the measured KL towards `algorithm.kl_target`."""
    kl_horizon: Count = 10000
    """Samples over which the adaptive weight reacts; larger is slower."""
    kl_target: Positive = 0.1
    """KL a token that the adaptive weight steers towards."""

    @property
    def needs_reference(self) -> bool:
        """True when some term of the loss or reward reads the reference model's log-probs."""
        is_wanted = self.kl_coef > 0 or self.reference_log_probs == "always"
        return not self.disable_kl and is_wanted
