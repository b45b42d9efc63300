"""Builds an RL run from its configuration and drives it."""

from __future__ import annotations

from verl.config import PPOConfig, to_dict
from verl.data.dataset import PromptDataset
from verl.models.loader import load_adapter, load_tokenizer
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer import launch
from verl.trainer.checkpoints import Checkpoints
from verl.trainer.ray_trainer import Parts, RayPPOTrainer
from verl.trainer.sampling import Sampler
from verl.trainer.validation import file_label
from verl.workers.fsdp_workers import ActorRolloutRefWorker
from verl.workers.reward import RewardManager


def run(config: PPOConfig) -> None:
    """Builds the parts, resumes if there is something to resume, trains or validates."""
    model, data, trainer = config.worker.actor.model, config.data, config.trainer
    device = launch.resolve_device(trainer.device, trainer.n_gpus_per_node)
    tokenizer, adapter = load_tokenizer(model), load_adapter(model)
    loader = launch.train_loader(
        PromptDataset(data, tokenizer, adapter), data, data.rollout_batch_size
    )
    validation = {
        file_label(f): launch.validation_loader(
            PromptDataset(data, tokenizer, adapter, files=[f]), data
        )
        for f in data.val_files
    }
    steps = launch.total_steps(trainer, len(loader))
    optimizer_steps = steps * config.derived().optimizer_steps_per_rollout_batch
    checkpoints = Checkpoints(trainer, to_dict(config))
    with (
        launch.ray_for(trainer.n_gpus_per_node, device),
        RewardManager(config.worker.reward) as reward,
        launch.tracker_for(trainer, to_dict(config)) as tracker,
        WorkerGroup(
            ActorRolloutRefWorker,
            trainer.world_size,
            device=device,
            init_kwargs={"config": config, "total_steps": optimizer_steps},
        ) as workers,
    ):
        workers.init_model()
        skip = config.worker.reward.skip_special_tokens
        sampler = Sampler(workers, tokenizer, data.max_response_length, skip_special_tokens=skip)
        parts = Parts(workers, sampler, reward, loader, validation, tracker, checkpoints)
        drive(RayPPOTrainer(config, parts, steps))


def drive(trainer: RayPPOTrainer) -> None:
    """Resumes, validates and trains as the configuration says."""
    settings = trainer.config.trainer
    trainer.resume()
    trainer.parts.tracker.resume(trainer.step)
    trainer.parts.workers.sync_weights()
    if settings.val_only or (settings.val_before_train and trainer.step == 0):
        trainer.log_validation()
    if not settings.val_only:
        trainer.fit()
