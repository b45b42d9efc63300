"""The driver: the order of phases in RL. `RayPPOTrainer.fit` is the whole algorithm."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from verl.algorithms.advantages import get_advantage
from verl.algorithms.kl import kl_in_reward, kl_penalty, make_kl_controller
from verl.config import PPOConfig
from verl.data.dataset import Sample
from verl.data.loader import PromptLoader
from verl.protocol import DataProto
from verl.trainer.checkpoints import Checkpoints
from verl.trainer.metrics import (
    length_metrics,
    merge_rank_metrics,
    reward_metrics,
    rollout_mismatch,
)
from verl.trainer.sampling import Sampler, reward_rows
from verl.trainer.timing import PhaseTimer
from verl.trainer.validation import answer_report
from verl.utils.logger import Tracker
from verl.workers.reward import RewardManager

logger = logging.getLogger(__name__)


@dataclass
class Parts:
    """What the trainer drives; built by `verl.trainer.main`."""

    workers: Any
    sampler: Sampler
    reward: RewardManager
    loader: PromptLoader[Sample]
    validation: dict[str, PromptLoader[Sample]]
    tracker: Tracker
    checkpoints: Checkpoints


class RayPPOTrainer:
    """Group-relative policy optimisation (GRPO, arXiv:2402.03300) over a Ray worker group."""

    def __init__(self, config: PPOConfig, parts: Parts, total_steps: int) -> None:
        self.config = config
        self.parts = parts
        self.total_steps = total_steps
        self.step = 0
        self.phase = PhaseTimer()
        self.kl = make_kl_controller(config.algorithm)
        self.metrics: dict[str, float] = {}

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
            with self.phase("update"):
                self.update(batch)
            with self.phase("weight_sync"):
                self.parts.workers.sync_weights()
            self.validate_if_due()
            self.log(batch)
            self.save_if_due()

    def remaining_steps(self) -> Iterator[list[Sample]]:
        """Prompts of each step that is left; `self.step` counts from 1."""
        batches = self.parts.loader.batches(self.config.trainer.total_epochs)
        while self.step < self.total_steps:
            with self.phase("data"):
                samples = next(batches, None)
            if samples is None:
                return  # rows found unusable made the epochs shorter
            self.step += 1
            yield samples

    def generate(self, samples: Sequence[Sample]) -> DataProto:
        """Consumes prompts; produces n samples each with the rollout engine's log-probs."""
        return self.parts.sampler(samples, self.config.worker.rollout, self.step)

    def score(self, batch: DataProto) -> DataProto:
        """Adds the reward of every sample."""
        scores = self.parts.reward.score(reward_rows(batch))
        self.metrics |= reward_metrics(scores, batch["problem_type"])
        return batch.with_columns(reward=[s["overall"] for s in scores])

    def add_log_probs(self, batch: DataProto) -> DataProto:
        """Adds log-probs of the old policy, where it is not the current one, and of the reference.

        With one optimizer step a rollout batch the old policy is the current one: the ratio is 1 by
        construction, and the update's own forward pass serves.
        """
        request = batch.select(["uid", "prompt_ids", "media", "response_ids"])
        request.meta["temperature"] = self.config.worker.rollout.temperature
        if self.optimizer_steps > 1:
            old = self.parts.workers.log_probs(request)
            batch = batch.union(old.select(["old_logp"]))
        if self.config.algorithm.needs_reference:
            batch = batch.union(self.parts.workers.ref_log_probs(request))
        return batch

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps a rollout batch."""
        return self.config.derived().optimizer_steps_per_rollout_batch

    def add_advantages(self, batch: DataProto) -> DataProto:
        """Adds the advantage of every sample within its group."""
        algorithm = self.config.algorithm
        rewards_B = torch.tensor(batch["reward"], dtype=torch.float32)
        if algorithm.needs_reference and not algorithm.use_kl_loss:
            penalty_B = self.kl_penalties(batch)
            rewards_B = kl_in_reward(rewards_B, penalty_B, self.kl.value)
        first_seen = {uid: i for i, uid in enumerate(dict.fromkeys(batch["uid"]))}
        prompt_B = torch.tensor([first_seen[uid] for uid in batch["uid"]])
        advantages_B = get_advantage(algorithm.adv_estimator)(rewards_B, prompt_B)
        self.metrics["reward/zero_advantage_share"] = float((advantages_B == 0).float().mean())
        return batch.with_columns(advantage=advantages_B.tolist())

    def kl_penalties(self, batch: DataProto) -> torch.Tensor:
        """Summed penalty of each sample against the reference, (B,); feeds the KL controller."""
        column = "old_logp" if "old_logp" in batch else "rollout_logp"
        kind = self.config.algorithm.kl_penalty
        per_sample = [
            kl_penalty(logp, ref, kind)
            for logp, ref in zip(batch[column], batch["ref_logp"], strict=True)
        ]
        tokens = sum(len(p) for p in per_sample)
        mean = float(sum(p.sum() for p in per_sample)) / max(1, tokens)
        self.metrics["kl/ref"] = mean
        self.kl.update(mean, len(batch))
        return torch.stack([p.sum() for p in per_sample])

    def update(self, batch: DataProto) -> None:
        """Consumes the batch; produces new actor weights, one optimizer step a mini-batch."""
        sizes = self.config.derived()
        n_minis = sizes.prompts_per_step // sizes.prompts_per_optimizer_step
        order = share_order(len(batch), n_minis, self.parts.workers.dp_size)
        wanted = ["uid", "prompt_ids", "media", "response_ids", "advantage", "old_logp", "ref_logp"]
        request = batch.select([c for c in wanted if c in batch]).take(order)
        request.meta.update(
            temperature=self.config.worker.rollout.temperature,
            kl_coef=self.kl.value,
            totals=[
                (sum(len(r) for r in mini["response_ids"]), len(mini))
                for mini in batch.split(n_minis)
            ],
        )
        ranks = self.parts.workers.update_actor(request)
        self.metrics |= merge_rank_metrics([r["metrics"] for r in ranks])
        logps = [logp for r in ranks for logp in r["log_probs"]]
        back = sorted(range(len(order)), key=order.__getitem__)
        measured = batch.with_columns(trainer_logp=[logps[i] for i in back])
        self.metrics |= rollout_mismatch(measured)
        if self.config.algorithm.needs_reference and self.config.algorithm.use_kl_loss:
            self.metrics["kl/ref"] = self.metrics["actor/kl_loss"]
            self.kl.update(self.metrics["actor/kl_loss"], len(batch))
        self.metrics["kl/coef"] = self.kl.value

    def validate_if_due(self) -> None:
        """Validates every `trainer.val_freq` steps and after the last one."""
        freq = self.config.trainer.val_freq
        if self.step == self.total_steps or (freq > 0 and self.step % freq == 0):
            self.metrics |= self.validate()

    def validate(self) -> dict[str, float]:
        """Accuracy on every validation file; some generations go to the loggers."""
        rollout = self.config.worker.rollout.for_validation()
        metrics: dict[str, float] = {}
        with self.phase("validation"):
            for name, loader in self.parts.validation.items():
                batch = DataProto.concat([self.parts.sampler(s, rollout, step=0) for s in loader])
                report = answer_report(batch, self.parts.reward.score(reward_rows(batch)))
                metrics |= {f"val/{name}/{k}": v for k, v in report.metrics.items()}
                self.write_answers(name, report.rows)
                shown = report.rows[: self.config.trainer.val_generations_to_log]
                self.parts.tracker.log_generations([r | {"file": name} for r in shown], self.step)
        return metrics

    def write_answers(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Keeps every validation answer, one line each, for reports and comparisons."""
        folder = self.config.trainer.resolved_output_dir / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}_step_{self.step}.jsonl").write_text(lines, encoding="utf-8")

    def log_validation(self) -> None:
        """Validates the current weights and logs the result under the current step."""
        self.metrics |= self.validate()
        self.metrics |= {f"timing_s/{k}": v for k, v in self.phase.take().items()}
        self.parts.tracker.log(self.metrics, self.step)
        self.metrics = {}

    def log(self, batch: DataProto) -> None:
        """Sends the step's numbers to the loggers and forgets them."""
        seconds = self.phase.take()
        total = sum(seconds.values())
        work = sum(v for k, v in seconds.items() if k not in ("validation", "checkpoint"))
        tokens = sum(len(ids) for ids in batch["prompt_ids"] + batch["response_ids"])
        memory = self.parts.workers.memory()
        self.metrics |= length_metrics(batch)
        self.metrics |= {f"timing_s/{name}": value for name, value in seconds.items()}
        self.metrics |= {f"memory/{k}": max(m[k] for m in memory) for k in memory[0]}
        self.metrics |= {
            "perf/step_s": total,
            "perf/tokens_per_second": tokens / max(work, 1e-9),
            "epoch": self.parts.loader.epoch,
        }
        self.parts.tracker.log(self.metrics, self.step)
        self.metrics = {}

    def save_if_due(self) -> None:
        """Saves every `trainer.save_freq` steps and after the last one."""
        freq = self.config.trainer.save_freq
        if self.step == self.total_steps or (freq > 0 and self.step % freq == 0):
            with self.phase("checkpoint"):
                self.parts.checkpoints.save(self.step, self.parts.workers, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The driver's own state; weights and optimizer are the workers'."""
        return {
            "step": self.step,
            "loader": self.parts.loader.state_dict(),
            "kl": self.kl.state_dict(),
        }

    def resume(self) -> None:
        """Continues from the last checkpoint, if there is one."""
        state = self.parts.checkpoints.resume(self.parts.workers)
        if state is not None:
            self.step = state["step"]
            self.parts.loader.load_state_dict(state["loader"])
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
