"""Builds an RL run from its configuration and drives it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from verl.config import PPOConfig, to_dict
from verl.config.schema import with_values
from verl.data.dataset import PromptDataset
from verl.data.media import MediaCache
from verl.models.adapter import Adapter
from verl.models.loader import load_adapter, load_tokenizer
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer import launch
from verl.trainer.checkpoints import Checkpoints
from verl.trainer.fitting import fitted
from verl.trainer.media_ledger import MediaLedger
from verl.trainer.ray_trainer import Parts, RayPPOTrainer
from verl.trainer.sampling import Sampler
from verl.trainer.shares import CostModel
from verl.trainer.validation import file_labels
from verl.utils.exits import advising
from verl.workers.fsdp_workers import ActorRolloutRefWorker
from verl.workers.media_stores import media_cache
from verl.workers.reward import RewardManager


def run(config: PPOConfig) -> None:
    """Builds the parts, resumes if there is something to resume, trains or validates."""
    with ExitStack() as stack:
        with launch.starting():
            trainer = build(config, stack)
            trainer.resume()
            trainer.workers.sync_weights()
        trainer.run()


def build(config: PPOConfig, stack: ExitStack) -> RayPPOTrainer:
    """The trainer with its parts; what has to be closed at the end goes on `stack`."""
    model, data, trainer = config.worker.actor.model, config.data, config.trainer
    device = launch.resolve_device(trainer.device, trainer.n_gpus_per_node)
    launch.check_attention(model, device, "worker.actor.model")
    launch.check_compiler(model, device, "worker.actor.model")
    rollout = launch.resolve_rollout(config.worker.rollout, device, "worker.rollout.")
    launch.check_engine(rollout, model, data, trainer.world_size, device, "worker.rollout.")
    config = with_values(config, {"worker.rollout.name": rollout.name})
    config = launch.resolve_correction(config)
    tokenizer, adapter = load_tokenizer(model), load_adapter(model)
    has_tower = config.worker.actor.cached_embeds_dir is None
    config = fitted(
        config,
        adapter.shape,
        launch.gpu_bytes(config, device),
        adapter.tower_parameters if has_tower else 0,
    )
    cache = media_cache(data)
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
            config.worker.actor.optim,
            "worker.actor.optim",
            lambda settings: launch.total_steps(settings, len(loader)),
        )
    stack.enter_context(launch.ray_for(trainer.n_gpus_per_node, device))
    reward = stack.enter_context(RewardManager(config.worker.reward))
    tracker = stack.enter_context(
        launch.tracker_for(trainer, to_dict(config), checkpoints.last_step)
    )
    optimizer_steps = steps * config.derived().optimizer_steps_per_rollout_batch
    group = WorkerGroup(
        ActorRolloutRefWorker,
        trainer.world_size,
        device=device,
        init_kwargs={"config": config, "total_steps": optimizer_steps},
        sequence_group_size=config.worker.actor.sequence_size,
    )
    workers: Any = stack.enter_context(group)
    workers.init_model()
    media = MediaLedger(cache, [*validation.values(), *([loader] if loader else [])], workers)
    media.skip_encoded(adapter, data, config.worker.actor.cached_embeds_dir)
    skip = config.worker.reward.skip_special_tokens
    sampler = Sampler(workers, tokenizer, data.max_response_length, skip_special_tokens=skip)
    parts = Parts(
        workers=workers, loader=loader, validation=validation, tracker=tracker,
        checkpoints=checkpoints, media=media, sampler=sampler, reward=reward,
        cost=CostModel(adapter.shape, shared_prefix=config.worker.actor.shares_prompts),
    )  # fmt: skip
    return RayPPOTrainer(config, parts, steps)


def loaders(
    config: PPOConfig, tokenizer: Any, adapter: Adapter, cache: MediaCache
) -> tuple[Any, dict[str, Any]]:
    """Training batches, None where the run only validates, and a loader a validation file."""
    data = config.data
    train = None
    if not config.trainer.val_only:
        rows = PromptDataset(data, tokenizer, adapter)
        size = data.rollout_batch_size
        train = launch.train_loader(rows, data, cache, size, "data.rollout_batch_size")
    validation = {
        label: launch.validation_loader(
            PromptDataset(data, tokenizer, adapter, files=[f]), data, cache
        )
        for label, f in file_labels(data.val_files).items()
    }
    return train, validation
