"""The `algorithm.*` section: advantage estimator, KL control and rollout correction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from verl.config.base import Alias, Count, NonNegative, Positive, Range, Share

KLPenalty = Annotated[
    Literal["k1", "k2", "k3", "abs"],
    Alias((("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3"))),
]


AtLeastOne = Annotated[float, Range(ge=1)]


@dataclass(frozen=True, kw_only=True)
class RolloutCorrectionConfig:
    """What is done about log-probs that differ between the trainer and the rollout engine.

    Samples come from the engine's law, and gradients are of the trainer's: the ratio of the two,
    trainer / engine, is the importance weight of a sample. It multiplies the policy loss outside of
    its clipping, and leaves a KL loss alone.
    """

    rollout_is: Literal["auto", "token", "sequence"] | None = "auto"
    """Importance weights, truncated at `rollout_is_threshold`. token: each token's own ratio;
    sequence: the product of a response's ratios, for all of its tokens; null: none; auto: token
    with vllm, none with hf, whose log-probs are the trainer's."""
    rollout_is_threshold: AtLeastOne = 2.0
    """Highest weight; larger ones are set to it."""
    rollout_rs: Literal["token", "sequence", "geometric"] | None = None
    """Rejection of what the two laws disagree on: outside of its bounds a ratio takes the policy
    loss away. token: of one token, by its own ratio; sequence: of a whole response, by the product
    of its ratios; geometric: of a whole response, by their geometric mean; null: nothing is taken
    away. What is taken away counts in means all the same."""
    rollout_rs_threshold: AtLeastOne | None = None
    """Highest ratio that is kept; null: 2, or 1.01 with geometric."""
    rollout_rs_threshold_lower: Share | None = None
    """Lowest ratio that is kept; null: 1 / `rollout_rs_threshold`."""
    mismatch_threshold: Positive = 0.1
    """Difference of log-probs, in nats, from which on a token counts in `mismatch/beyond_share`."""

    @property
    def is_on(self) -> bool:
        """Whether the policy loss is changed at all; not to be asked while `rollout_is` is auto."""
        return self.rollout_is is not None or self.rollout_rs is not None

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest ratio that `rollout_rs` keeps."""
        high = self.rollout_rs_threshold or (1.01 if self.rollout_rs == "geometric" else 2.0)
        low = self.rollout_rs_threshold_lower
        return (1 / high if low is None else low), high


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
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)

    @property
    def needs_reference(self) -> bool:
        """True when some term of the loss or reward reads the reference model's log-probs."""
        is_wanted = self.kl_coef > 0 or self.reference_log_probs == "always"
        return not self.disable_kl and is_wanted
