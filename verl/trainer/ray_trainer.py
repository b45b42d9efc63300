"""The driver: the order of phases in RL. `RayPPOTrainer.fit` is the whole algorithm."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from verl.algorithms.advantages import get_advantage
from verl.algorithms.kl import kl_in_reward, kl_penalty, make_kl_controller
from verl.config import PPOConfig
from verl.data.dataset import Sample
from verl.data.loader import PromptLoader
from verl.protocol import DataProto
from verl.trainer.loop import LoopParts, TrainingLoop
from verl.trainer.metrics import (
    flat_groups,
    length_metrics,
    merge_rank_metrics,
    reward_metrics,
    rollout_mismatch,
    why_flat,
)
from verl.trainer.sampling import Sampler, reward_rows
from verl.trainer.validation import AnswerReport, answer_report
from verl.utils.logger import progress
from verl.workers.reward import RewardManager

logger = logging.getLogger(__name__)


@dataclass
class Parts(LoopParts[Sample]):
    """What the trainer drives; built by `verl.trainer.build`."""

    sampler: Sampler
    reward: RewardManager


class RayPPOTrainer(TrainingLoop[Sample]):
    """Group-relative policy optimisation (GRPO, arXiv:2402.03300) over a Ray worker group."""

    def __init__(self, config: PPOConfig, parts: Parts, total_steps: int) -> None:
        super().__init__(config.trainer, parts, total_steps)
        self.config = config
        self.sampler = parts.sampler
        self.reward = parts.reward
        self.n_flat_steps = 0
        """Steps of this process that taught nothing."""
        self.kl = make_kl_controller(config.algorithm)

    def fit(self) -> None:
        """Trains until `total_steps`; each line is a phase."""
        for samples in self.remaining_steps():
            with self.phase("generation"):
                batch = self.generate(samples)
            with self.phase("reward"):
                batch = self.score(batch)
            with self.phase("log_probs"):
                batch = self.add_log_probs(batch)
            with self.phase("advantage"):
                batch = self.add_advantages(batch)
            with self.updating():
                self.update(batch)
            with self.phase("weight_sync"):
                self.workers.sync_weights()
            self.validate_if_due()
            self.add_metrics(batch)
            self.save_if_due()
            self.log()

    def generate(self, samples: Sequence[Sample]) -> DataProto:
        """Consumes prompts; produces n samples each with the rollout engine's log-probs."""
        return self.sampler(samples, self.config.worker.rollout, self.step)

    def score(self, batch: DataProto) -> DataProto:
        """Adds the reward of every sample."""
        scores = self.reward.score(reward_rows(batch))
        self.metrics |= reward_metrics(scores, batch["problem_type"])
        return batch.with_columns(reward=[s["overall"] for s in scores])

    def add_log_probs(self, batch: DataProto) -> DataProto:
        """Adds log-probs of the old policy, where they are needed, and of the reference.

        With one optimizer step a rollout batch the old policy is the current one: the ratio is 1 by
        construction, and the update's own forward pass serves.
        """
        request = batch.select(["uid", "prompt_ids", "media", "response_ids"])
        request.meta["temperature"] = self.config.worker.rollout.temperature
        if self.optimizer_steps > 1 or self.kl_is_in_reward:
            old = self.workers.log_probs(request)
            batch = batch.union(old.select(["old_logp"]))
        if self.config.algorithm.needs_reference:
            batch = batch.union(self.workers.ref_log_probs(request))
        return batch

    @property
    def kl_is_in_reward(self) -> bool:
        """Whether distance from the reference lowers rewards, instead of being a loss."""
        algorithm = self.config.algorithm
        return algorithm.needs_reference and not algorithm.use_kl_loss

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps a rollout batch."""
        return self.config.derived().optimizer_steps_per_rollout_batch

    def add_advantages(self, batch: DataProto) -> DataProto:
        """Adds the advantage of every sample within its group."""
        rewards_B = torch.tensor(batch["reward"], dtype=torch.float32)
        if self.kl_is_in_reward:
            rewards_B = self.penalised(rewards_B, batch)
        first_seen = {uid: i for i, uid in enumerate(dict.fromkeys(batch["uid"]))}
        prompt_B = torch.tensor([first_seen[uid] for uid in batch["uid"]])
        if flat_groups(rewards_B, prompt_B):
            self.n_flat_steps += 1
            if self.n_flat_steps.bit_count() == 1:  # the 1st, 2nd, 4th, 8th, ...
                logger.warning("step %d: %s", self.step, why_flat(batch, len(first_seen)))
        advantages_B = get_advantage(self.config.algorithm.adv_estimator)(rewards_B, prompt_B)
        self.metrics["reward/zero_advantage_share"] = float((advantages_B == 0).float().mean())
        return batch.with_columns(advantage=advantages_B.tolist())

    def penalised(self, rewards_B: torch.Tensor, batch: DataProto) -> torch.Tensor:
        """Rewards less the KL penalty against the reference, (B,); feeds the KL controller."""
        kind = self.config.algorithm.kl_penalty
        per_sample = [
            kl_penalty(logp, ref, kind)
            for logp, ref in zip(batch["old_logp"], batch["ref_logp"], strict=True)
        ]
        tokens = sum(len(p) for p in per_sample)
        mean = float(sum(p.sum() for p in per_sample)) / max(1, tokens)
        penalty_B = torch.stack([p.sum() for p in per_sample])
        lowered_B = kl_in_reward(rewards_B, penalty_B, self.kl.value)
        self.adapt_kl(mean, len(batch))
        return lowered_B

    def adapt_kl(self, kl: float, n_samples: int) -> None:
        """Records KL and the coefficient that was used, then adapts the coefficient."""
        self.metrics |= {"kl/ref": kl, "kl/coef": self.kl.value}
        self.kl.update(kl, n_samples)

    def update(self, batch: DataProto) -> None:
        """Consumes the batch; produces new actor weights, one optimizer step a mini-batch."""
        sizes = self.config.derived()
        n_minis = sizes.prompts_per_step // sizes.prompts_per_optimizer_step
        order = share_order(len(batch), n_minis, self.workers.dp_size)
        wanted = ["uid", "prompt_ids", "media", "response_ids", "advantage", "old_logp"]
        if not self.kl_is_in_reward:
            wanted.append("ref_logp")  # makes the actor add the KL loss
        request = batch.select([c for c in wanted if c in batch]).take(order)
        request.meta.update(
            temperature=self.config.worker.rollout.temperature,
            kl_coef=self.kl.value,
            totals=[
                (sum(len(r) for r in mini["response_ids"]), len(mini))
                for mini in batch.split(n_minis)
            ],
        )
        ranks = self.workers.update_actor(request)
        self.metrics |= merge_rank_metrics([r["metrics"] for r in ranks])
        logps = [logp for r in ranks for logp in r["log_probs"]]
        back = sorted(range(len(order)), key=order.__getitem__)
        measured = batch.with_columns(trainer_logp=[logps[i] for i in back])
        self.metrics |= rollout_mismatch(measured)
        if "actor/kl_loss" in self.metrics:
            self.adapt_kl(self.metrics["actor/kl_loss"], len(batch))

    def validate(self) -> dict[str, float]:
        """Accuracy on every validation file; some generations go to the loggers."""
        metrics: dict[str, float] = {}
        with self.phase("validation"):
            for name, loader in self.validation.items():
                report = self.answers(name, loader)
                metrics |= {f"val/{name}/{k}": v for k, v in report.metrics.items()}
                self.write_answers(name, report.rows)
                shown = report.rows[: self.settings.val_generations_to_log]
                self.tracker.log_generations([r | {"file": name} for r in shown], self.step)
        return metrics

    def answers(self, name: str, loader: PromptLoader[Sample]) -> AnswerReport:
        """Samples and scores an answer to every question of a validation file."""
        rollout = self.config.worker.rollout.for_validation()
        shown = progress(loader, f"validation on {name}", total=len(loader))
        batch = DataProto.concat([self.sampler(samples, rollout, step=0) for samples in shown])
        return answer_report(batch, self.reward.score(reward_rows(batch)))

    def write_answers(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Keeps every validation answer, one line each, for reports and comparisons."""
        folder = self.tracker.output_dir / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}_step_{self.step}.jsonl").write_text(lines, encoding="utf-8")

    def add_metrics(self, batch: DataProto) -> None:
        """Adds lengths, times, memory and speed to the step's numbers."""
        self.metrics |= length_metrics(batch)
        self.measure(sum(len(ids) for ids in batch["prompt_ids"] + batch["response_ids"]))

    def own_state(self) -> dict[str, Any]:
        return {"kl": self.kl.state_dict()}

    def load_own_state(self, state: dict[str, Any]) -> None:
        self.kl.load_state_dict(state["kl"])


def share_order(n_samples: int, n_minis: int, dp_size: int) -> list[int]:
    """Order in which a contiguous split gives every rank its share of every mini-batch.

    A mini-batch then holds the same samples for any number of ranks, and so does its gradient.
    """
    mini, share = n_samples // n_minis, n_samples // n_minis // dp_size
    return [
        m * mini + rank * share + i
        for rank in range(dp_size)
        for m in range(n_minis)
        for i in range(share)
    ]
