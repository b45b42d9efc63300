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
from verl.trainer.shares import CostModel, deal, imbalance, in_order
from verl.trainer.validation import AnswerReport, answer_report
from verl.utils.logger import progress
from verl.workers.reward import RewardManager

logger = logging.getLogger(__name__)
MEMORY_ERROR = 1.15
"""How far an update's measured peak may be above its estimate before the log says so."""


@dataclass
class Parts(LoopParts[Sample]):
    """What the trainer drives; built by `verl.trainer.build`."""

    sampler: Sampler
    reward: RewardManager
    cost: CostModel
    """Of training on samples: by it they are spread over the workers."""


class RayPPOTrainer(TrainingLoop[Sample]):
    """Group-relative policy optimisation (GRPO, arXiv:2402.03300) over a Ray worker group."""

    def __init__(self, config: PPOConfig, parts: Parts, total_steps: int) -> None:
        super().__init__(config.trainer, parts, total_steps)
        self.config = config
        self.sampler = parts.sampler
        self.reward = parts.reward
        self.cost = parts.cost
        self.told_memory = False
        self.n_flat_steps = 0
        """Steps of this process that taught nothing."""
        self.kl = make_kl_controller(config.algorithm)

    def fit(self) -> None:
        """Trains until `total_steps`; each line is a phase."""
        logger.info("passes of a step: %s", self.passes())
        if advice := self.cut_groups():
            logger.info(advice)
        for samples in self.remaining_steps():
            with self.phase("generation"):
                batch = self.generate(samples)
            with self.phase("reward"):
                batch = self.score(batch)
            batch, trained = self.prepare(batch)
            with self.updating():
                self.update(trained, batch)
            with self.phase("weight_sync"):
                self.workers.sync_weights()
            self.validate_if_due()
            self.add_metrics(batch)
            self.save_if_due()
            self.log()

    def passes(self) -> str:
        """Which passes a step makes over its samples, and why others are left out, in words."""
        old, reference = "old log-probs", "reference log-probs"
        made = ["update"]
        left_out = []
        if self.needs_old_log_probs:
            made.append(old)
        else:
            left_out.append(f"{old} (one optimizer step a rollout batch: the update has them)")
        if self.config.algorithm.needs_reference:
            made.append(reference)
        else:
            left_out.append(f"{reference} (no KL term)")
        if self.skips_flat_groups:
            left_out.append("update of groups without an advantage (no other term has a gradient)")
        return f"{', '.join(made)}; left out: {', '.join(left_out) or 'none'}"

    def cut_groups(self) -> str:
        """What to set where passes cut groups and so compute prompts again; empty: they do not.

        Also where that is not known beforehand: passes that are filled by tokens cut the groups
        that do not fit, which depends on the data.
        """
        actor, sizes = self.config.worker.actor, self.config.derived()
        key = "worker.actor.micro_batch_size_per_device_for_update"
        samples = actor.micro_batch_size_per_device_for_update
        if not actor.shares_prompts or actor.max_tokens_per_device is not None:
            return ""
        # Where workers outnumber groups, each gets a part of one.
        part = min(self.config.worker.rollout.n, sizes.samples_per_device)
        times = -(-part // samples)
        if times == 1:
            return ""
        return (
            f"{key}={samples} is less than the {part} samples of a prompt that a worker gets, so "
            f"it computes the prompt {times} times an optimizer step; where memory allows, use "
            f"{key}={part}, or fill passes by worker.actor.max_tokens_per_device"
        )

    def generate(self, samples: Sequence[Sample]) -> DataProto:
        """Consumes prompts; produces n samples each with the rollout engine's log-probs."""
        return self.sampler(samples, self.config.worker.rollout, self.step)

    def score(self, batch: DataProto) -> DataProto:
        """Adds the reward of every sample."""
        scores = self.reward.score(reward_rows(batch))
        self.metrics |= reward_metrics(scores, batch["problem_type"])
        return batch.with_columns(reward=[s["overall"] for s in scores])

    def prepare(self, batch: DataProto) -> tuple[DataProto, DataProto]:
        """Adds advantages, and log-probs where they are needed; the batch, and what is trained on.

        Log-probs come last, for no more samples than the update computes, unless the KL is part of
        the rewards and so of the advantages.
        """
        if self.kl_is_in_reward:
            with self.phase("log_probs"):
                batch = self.add_log_probs(batch)
        with self.phase("advantage"):
            batch = self.add_advantages(batch)
            trained = self.with_gradient(batch)
        if not self.kl_is_in_reward:
            with self.phase("log_probs"):
                trained = self.add_log_probs(trained)
        return batch, trained

    def add_log_probs(self, batch: DataProto) -> DataProto:
        """Adds log-probs of the old policy, where they are needed, and of the reference.

        With one optimizer step a rollout batch the old policy is the current one: the ratio is 1 by
        construction, and the update's own forward pass serves.
        """
        request = batch.select(["uid", "prompt_ids", "media", "response_ids"])
        request.meta["temperature"] = self.config.worker.rollout.temperature
        passes = {}
        if self.needs_old_log_probs:
            passes["old_logp"] = self.workers.log_probs
        if self.config.algorithm.needs_reference:
            passes["ref_logp"] = self.workers.ref_log_probs
        shares = self.deal(request)
        for column, run in passes.items():
            found = run([request.take(own) for own in shares])[column] if len(request) else []
            batch = batch.with_columns(**{column: in_order(found, shares)})
        return batch

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether the old policy's log-probs are computed apart from the update."""
        is_always = self.config.worker.actor.old_log_probs == "always"
        return is_always or self.optimizer_steps > 1 or self.kl_is_in_reward

    @property
    def skips_flat_groups(self) -> bool:
        """Whether groups without an advantage are left out: the policy loss is all there is."""
        has_kl_loss = self.config.algorithm.needs_reference and not self.kl_is_in_reward
        return self.config.worker.actor.zero_advantage_groups == "auto" and not has_kl_loss

    def with_gradient(self, batch: DataProto) -> DataProto:
        """The samples that the update computes, each with its mini-batch in column mini."""
        n_minis = self.config.derived().mini_batches_per_rollout_batch
        size = len(batch) // n_minis
        batch = batch.with_columns(mini=[i // size for i in range(len(batch))])
        if not self.skips_flat_groups:
            return batch
        worth = {u for u, a in zip(batch["uid"], batch["advantage"], strict=True) if a != 0}
        kept = batch.take(i for i, uid in enumerate(batch["uid"]) if uid in worth)
        self.metrics["actor/skipped_share"] = 1 - len(kept) / len(batch)
        return kept

    def deal(self, batch: DataProto) -> list[list[int]]:
        """Indices of samples for each data-parallel group of workers, by the cost of training."""
        minis = batch["mini"] if "mini" in batch else [0] * len(batch)
        return deal(batch, minis, self.workers.dp_size, self.cost)

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

    def update(self, trained: DataProto, batch: DataProto) -> None:
        """Consumes the samples that have a gradient, of a batch; produces new actor weights.

        One optimizer step a mini-batch; its means are over all of the batch's samples.
        """
        wanted = ["uid", "prompt_ids", "media", "response_ids", "advantage", "mini", "old_logp"]
        if not self.kl_is_in_reward:
            wanted.append("ref_logp")  # makes the actor add the KL loss
        correction = self.config.algorithm.rollout_correction
        if correction.is_on:
            wanted.append("rollout_logp")
        request = trained.select([c for c in wanted if c in trained])
        n_minis = self.config.derived().mini_batches_per_rollout_batch
        computed = [0] * n_minis
        for mini, response in zip(request["mini"], request["response_ids"], strict=True):
            computed[mini] += len(response)
        request.meta.update(
            temperature=self.config.worker.rollout.temperature,
            kl_coef=self.kl.value,
            totals=[
                (sum(len(r) for r in mini["response_ids"]), len(mini), n)
                for mini, n in zip(batch.split(n_minis), computed, strict=True)
            ],
        )
        shares = self.deal(request)
        ranks = self.workers.update_actor([request.take(own) for own in shares])
        of_steps = [n > 0 for n in computed] * self.config.worker.actor.ppo_epochs
        self.metrics |= merge_rank_metrics([r["metrics"] for r in ranks], of_steps)
        self.add_memory([r["memory"] for r in ranks])
        self.metrics["perf/imbalance"] = imbalance(request, shares, self.cost)
        logps = in_order([logp for r in ranks for logp in r["log_probs"]], shares)
        if logps:
            known = trained.with_columns(trainer_logp=logps)
            self.metrics |= rollout_mismatch(known, correction.mismatch_threshold)
        if "actor/kl_loss" in self.metrics:
            self.adapt_kl(self.metrics["actor/kl_loss"], len(batch))

    def add_memory(self, ranks: Sequence[dict[str, float]]) -> None:
        """Peak memory of the update against its estimate, of the worker with the highest."""
        if not ranks[0]:
            return
        worst = max(ranks, key=lambda r: r["update_peak_gib"])
        self.metrics |= {f"memory/{name}": value for name, value in worst.items()}
        measured, expected = worst["update_peak_gib"], worst["update_estimated_gib"]
        if measured > MEMORY_ERROR * expected and not self.told_memory:
            self.told_memory = True
            logger.warning(
                "step %d: the update took %.1f GiB at its peak and was estimated to take %.1f: "
                "worker.actor.ulysses_size=auto may choose too small a size for longer rows",
                self.step, measured, expected,
            )  # fmt: skip

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
