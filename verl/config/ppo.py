"""The root of an RL run: `python3 -m verl.trainer.main`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from verl.config.algorithm import AlgorithmConfig
from verl.config.checks import ppo_problems
from verl.config.data import DataConfig
from verl.config.problems import Problem
from verl.config.trainer import TrainerConfig
from verl.config.worker import WorkerConfig


@dataclass(frozen=True)
class PPOSizes:
    """What the batch keys of an RL run mean together. A sample is a prompt with one response."""

    prompts_per_step: int
    """data.rollout_batch_size"""
    samples_per_step: int
    """data.rollout_batch_size * worker.rollout.n"""
    mini_batches_per_rollout_batch: int
    """data.rollout_batch_size / worker.actor.global_batch_size"""
    optimizer_steps_per_rollout_batch: int
    """data.rollout_batch_size / worker.actor.global_batch_size * worker.actor.ppo_epochs"""
    prompts_per_optimizer_step: int
    """worker.actor.global_batch_size"""
    samples_per_optimizer_step: int
    """worker.actor.global_batch_size * worker.rollout.n"""
    devices: int
    """trainer.nnodes * trainer.n_gpus_per_node / worker.actor.ulysses_size (1 while it is auto)"""
    samples_per_device: int
    """in an optimizer step, on average: worker.actor.global_batch_size * worker.rollout.n /
    devices"""
    micro_batches_per_device: int | None
    """in an optimizer step, on average: the samples per device, at most
    worker.actor.micro_batch_size_per_device_for_update at a time, groups not cut where they fit; 1
    at a time with worker.actor.padding_free=false; known only from the data with
    worker.actor.max_tokens_per_device or data.group_by_video"""


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Everything an RL run can be told."""

    UNUSED: ClassVar[dict[str, str]] = {
        "worker.ref.fsdp.mp_reduce": "the reference model has no gradients",
        "worker.ref.offload.offload_optimizer": "the reference model has no optimizer",
    }

    data: DataConfig = field(default_factory=DataConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def derived(self, world_size: int | None = None) -> PPOSizes:
        """Batch sizes that follow from the keys; `world_size` is by default the configured one.

        Assumes the checks passed. Workers that share a sequence count as one device.
        """
        actor, n = self.worker.actor, self.worker.rollout.n
        devices = (world_size or self.trainer.world_size) // actor.sequence_size
        prompts, mini = self.data.rollout_batch_size, actor.global_batch_size
        per_device = mini * n // devices
        return PPOSizes(
            prompts_per_step=prompts,
            samples_per_step=prompts * n,
            mini_batches_per_rollout_batch=prompts // mini,
            optimizer_steps_per_rollout_batch=prompts // mini * actor.ppo_epochs,
            prompts_per_optimizer_step=mini,
            samples_per_optimizer_step=mini * n,
            devices=devices,
            samples_per_device=per_device,
            micro_batches_per_device=self._micro_batches(per_device),
        )

    def _micro_batches(self, samples: int) -> int | None:
        """Passes of an update over so many samples; None where they depend on the data."""
        actor, n = self.worker.actor, self.worker.rollout.n
        if actor.max_tokens_per_device is not None or self.data.group_by_video > 1:
            return None
        if not actor.padding_free:
            return samples
        size = actor.micro_batch_size_per_device_for_update
        if not actor.shared_prefix:
            return -(-samples // size)
        return passes_of([*[n] * (samples // n), samples % n], size)

    def problems(self) -> list[Problem]:
        """Everything that keeps this configuration from running; reads files, starts nothing."""
        return ppo_problems(self)


def passes_of(groups: Iterable[int], size: int) -> int:
    """Passes of `size` samples over groups of which none is begun where it does not fit whole."""
    passes = room = 0
    for samples in groups:
        if samples <= room:
            room -= samples
        else:
            passes += -(-samples // size)
            room = -samples % size
    return passes
