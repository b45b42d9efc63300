"""Supervised fine-tuning on written reasoning.

Writes checkpoints like RL does, and at the end a Hugging Face folder that RL starts from.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from verl.config import SFTConfig, to_dict
from verl.data.loader import PromptLoader
from verl.data.sft_dataset import SFTDataset, SFTSample
from verl.models.loader import load_adapter, load_tokenizer
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer import launch
from verl.trainer.checkpoints import Checkpoints
from verl.trainer.timing import PhaseTimer
from verl.trainer.validation import file_label
from verl.utils.logger import Tracker
from verl.workers.fsdp_workers import SFTWorker

logger = logging.getLogger(__name__)


@dataclass
class SFTParts:
    """What the trainer drives; built by `run`."""

    workers: Any
    loader: PromptLoader[SFTSample]
    validation: dict[str, PromptLoader[SFTSample]]
    tracker: Tracker
    checkpoints: Checkpoints


class SFTTrainer:
    """Cross-entropy on assistant tokens, over a Ray worker group."""

    def __init__(self, config: SFTConfig, parts: SFTParts, total_steps: int) -> None:
        self.config = config
        self.parts = parts
        self.total_steps = total_steps
        self.step = 0
        self.phase = PhaseTimer()

    def fit(self) -> None:
        """Trains until `total_steps`; each line is a phase."""
        batches = self.parts.loader.batches(self.config.trainer.total_epochs)
        steps = range(self.step + 1, self.total_steps + 1)
        for self.step, samples in zip(steps, batches, strict=False):
            with self.phase("update"):
                metrics = self.train_step(target_batch(samples))
            if self.is_due(self.config.trainer.val_freq):
                with self.phase("validation"):
                    metrics |= self.validate()
            if self.is_due(self.config.trainer.save_freq):
                with self.phase("checkpoint"):
                    self.parts.checkpoints.save(self.step, self.parts.workers, self.state_dict())
            self.log(metrics)

    def is_due(self, freq: int) -> bool:
        """True every `freq` steps and at the last one."""
        return self.step == self.total_steps or (freq > 0 and self.step % freq == 0)

    def train_step(self, batch: DataProto) -> dict[str, float]:
        """One optimizer step over all workers."""
        n_tokens = sum(int(mask[1:].sum()) for mask in batch["loss_mask"])
        ranks = self.parts.workers.train_step(batch.with_meta(n_tokens=n_tokens))
        same = {k: ranks[0][k] for k in ("grad_norm", "lr", "skipped_steps")}
        return {
            "train/loss": sum(r["loss"] for r in ranks),
            "train/target_tokens": float(n_tokens),
            "train/tokens": float(sum(len(ids) for ids in batch["input_ids"])),
        } | {f"train/{k}": v for k, v in same.items()}

    def validate(self) -> dict[str, float]:
        """Mean -log p of target tokens on every validation file."""
        metrics = {}
        for name, loader in self.parts.validation.items():
            sums, tokens = 0.0, 0.0
            for samples in loader:
                for rank in self.parts.workers.validation_loss(target_batch(samples)):
                    sums += rank["loss_sum"]
                    tokens += rank["n_tokens"]
            metrics[f"val/{name}/loss"] = sums / max(1.0, tokens)
        return metrics

    def log(self, metrics: dict[str, float]) -> None:
        """Sends the step's numbers to the loggers."""
        seconds = self.phase.take()
        memory = self.parts.workers.memory()
        metrics |= {f"timing_s/{k}": v for k, v in seconds.items()}
        metrics |= {f"memory/{k}": max(m[k] for m in memory) for k in memory[0]}
        tokens = metrics.get("train/tokens", 0.0)
        metrics["perf/tokens_per_second"] = tokens / max(seconds.get("update", 0.0), 1e-9)
        metrics["epoch"] = float(self.parts.loader.epoch)
        self.parts.tracker.log(metrics, self.step)

    def state_dict(self) -> dict[str, Any]:
        """The driver's own state; weights and optimizer are the workers'."""
        return {"step": self.step, "loader": self.parts.loader.state_dict()}

    def resume(self) -> None:
        """Continues from the last checkpoint, if there is one."""
        state = self.parts.checkpoints.resume(self.parts.workers)
        if state is not None:
            self.step = state["step"]
            self.parts.loader.load_state_dict(state["loader"])


def target_batch(samples: Sequence[SFTSample]) -> DataProto:
    """One row a sequence: its tokens, which of them are targets, its media."""
    return DataProto(
        {
            "input_ids": [torch.tensor(s.input_ids) for s in samples],
            "loss_mask": [torch.tensor(s.loss_mask, dtype=torch.bool) for s in samples],
            "media": [s.media for s in samples],
        }
    )


def run(config: SFTConfig) -> None:
    """Builds the parts, resumes if there is something to resume, trains, exports."""
    model, data, trainer = config.model, config.data, config.trainer
    device = launch.resolve_device(trainer.device, trainer.n_gpus_per_node)
    tokenizer, adapter = load_tokenizer(model), load_adapter(model)
    loader = launch.train_loader(
        SFTDataset(data, tokenizer, adapter), data, config.batch.global_batch_size
    )
    validation = {
        file_label(f): launch.validation_loader(
            SFTDataset(data, tokenizer, adapter, files=[f]), data
        )
        for f in data.val_files
    }
    steps = launch.total_steps(trainer, len(loader))
    checkpoints = Checkpoints(trainer, to_dict(config))
    with (
        launch.ray_for(trainer.n_gpus_per_node, device),
        launch.tracker_for(trainer, to_dict(config)) as tracker,
        WorkerGroup(
            SFTWorker,
            trainer.world_size,
            device=device,
            init_kwargs={"config": config, "total_steps": steps},
        ) as workers,
    ):
        workers.init_model()
        parts = SFTParts(workers, loader, validation, tracker, checkpoints)
        fine_tuning = SFTTrainer(config, parts, steps)
        fine_tuning.resume()
        tracker.resume(fine_tuning.step)
        if trainer.val_only or (trainer.val_before_train and fine_tuning.step == 0):
            fine_tuning.log(fine_tuning.validate())
        if not trainer.val_only:
            fine_tuning.fit()
