"""Supervised fine-tuning on written reasoning.

Writes checkpoints like RL does, and at the end a Hugging Face folder that RL starts from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from verl.config import SFTConfig, to_dict
from verl.data.media import MediaCache
from verl.data.sft_dataset import SFTDataset, SFTSample
from verl.models.adapter import Adapter
from verl.models.loader import load_adapter, load_tokenizer
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer import launch
from verl.trainer.checkpoints import Checkpoints
from verl.trainer.loop import LoopParts, TrainingLoop
from verl.trainer.media_ledger import MediaLedger
from verl.trainer.validation import file_labels
from verl.utils.exits import advising
from verl.utils.logger import progress
from verl.workers.fsdp_workers import SFTWorker
from verl.workers.media_stores import media_cache


class SFTTrainer(TrainingLoop[SFTSample]):
    """Cross-entropy on assistant tokens, over a Ray worker group."""

    def fit(self) -> None:
        """Trains until `total_steps`; each line is a phase."""
        for samples in self.remaining_steps():
            with self.updating():
                self.metrics |= self.train_step(target_batch(samples))
            self.validate_if_due()
            self.measure(sum(len(s.input_ids) for s in samples))
            self.save_if_due()
            self.log()

    def train_step(self, batch: DataProto) -> dict[str, float]:
        """One optimizer step over all workers."""
        n_tokens = sum(int(mask[1:].sum()) for mask in batch["loss_mask"])
        ranks = self.workers.train_step(batch.with_meta(n_tokens=n_tokens))
        same = {k: ranks[0][k] for k in ("grad_norm", "lr", "skipped_steps")}
        return {
            "train/loss": sum(r["loss"] for r in ranks),
            "train/target_tokens": float(n_tokens),
            "train/tokens": float(sum(len(ids) for ids in batch["input_ids"])),
        } | {f"train/{k}": v for k, v in same.items()}

    def validate(self) -> dict[str, float]:
        """Mean -log p of target tokens on every validation file."""
        with self.phase("validation"):
            return {
                f"val/{name}/loss": self.loss(progress(loader, f"validation on {name}"))
                for name, loader in self.validation.items()
            }

    def loss(self, batches: Iterable[Sequence[SFTSample]]) -> float:
        """Mean -log p over all target tokens of some batches."""
        sums, tokens = 0.0, 0.0
        for samples in batches:
            for rank in self.workers.validation_loss(target_batch(samples)):
                sums += rank["loss_sum"]
                tokens += rank["n_tokens"]
        return sums / max(1.0, tokens)


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
    """Builds the parts, resumes if there is something to resume, trains or validates."""
    with ExitStack() as stack:
        with launch.starting():
            trainer = build(config, stack)
            trainer.resume()
        trainer.run()


def build(config: SFTConfig, stack: ExitStack) -> SFTTrainer:
    """The trainer with its parts; what has to be closed at the end goes on `stack`."""
    trainer = config.trainer
    device = launch.resolve_device(trainer.device, trainer.n_gpus_per_node)
    launch.check_attention(config.model, device, "model")
    launch.check_compiler(config.model, device, "model")
    tokenizer, adapter = load_tokenizer(config.model), load_adapter(config.model)
    cache = media_cache(config.data)
    loader, validation = loaders(config, tokenizer, adapter, cache)
    launch.check_media([loader, *validation.values()])
    # After the data: a run that is refused because of them leaves no folder behind.
    checkpoints = Checkpoints(trainer, to_dict(config))
    stack.enter_context(advising(checkpoints.how_to_go_on))
    steps = launch.total_steps(trainer, len(loader)) if loader else checkpoints.last_step
    if loader:
        checkpoints.check_order(loader)
        launch.warn_of_short_epochs(trainer, len(loader))
        checkpoints.warn_of_bent_schedule(
            config.optim, "optim", lambda settings: launch.total_steps(settings, len(loader))
        )
    stack.enter_context(launch.ray_for(trainer.n_gpus_per_node, device))
    tracker = stack.enter_context(
        launch.tracker_for(trainer, to_dict(config), checkpoints.last_step)
    )
    group = WorkerGroup(
        SFTWorker,
        trainer.world_size,
        device=device,
        init_kwargs={"config": config, "total_steps": steps},
        sequence_group_size=config.ulysses_size,
    )
    workers: Any = stack.enter_context(group)
    workers.init_model()
    media = MediaLedger(cache, [*validation.values(), *([loader] if loader else [])], workers)
    media.skip_encoded(adapter, config.data, config.cached_embeds_dir)
    parts = LoopParts(workers, loader, validation, tracker, checkpoints, media)
    return SFTTrainer(trainer, parts, steps)


def loaders(
    config: SFTConfig, tokenizer: Any, adapter: Adapter, cache: MediaCache
) -> tuple[Any, dict[str, Any]]:
    """Training batches, None where the run only validates, and a loader a validation file."""
    data = config.data
    train = None
    if not config.trainer.val_only:
        rows = SFTDataset(data, tokenizer, adapter)
        size = config.batch.global_batch_size
        train = launch.train_loader(rows, data, cache, size, "batch.global_batch_size")
    validation = {
        label: launch.validation_loader(
            SFTDataset(data, tokenizer, adapter, files=[f]), data, cache
        )
        for label, f in file_labels(data.val_files).items()
    }
    return train, validation
