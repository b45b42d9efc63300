"""The root of supervised fine-tuning: `python3 -m verl.trainer.sft`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from verl.config.base import Count, Positive
from verl.config.checks import sft_problems
from verl.config.data import DataConfig
from verl.config.problems import Problem
from verl.config.trainer import TrainerConfig
from verl.config.worker import FSDPConfig, ModelConfig, OffloadConfig, OptimConfig


@dataclass(frozen=True, kw_only=True)
class SFTOptimConfig(OptimConfig):
    """Optimizer, learning-rate schedule and bound of the gradient."""

    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""


@dataclass(frozen=True, kw_only=True)
class SFTBatchConfig:
    """How samples are grouped into optimizer steps and forward passes."""

    global_batch_size: Count = 64
    """Samples an optimizer step, over all workers."""
    max_tokens_per_micro_batch: Count = 8192
    """Most tokens in one forward and backward pass on one worker, or on the workers that share a
    sequence; bounds memory. With `batch.packing`; at least `data.max_prompt_length` +
    `data.max_response_length`, the longest sample."""
    packing: bool = True
    """true: samples are packed end to end up to the token limit; false: each sample alone.
    The result is the same."""


@dataclass(frozen=True)
class SFTSizes:
    """What the batch keys of an SFT run mean together."""

    samples_per_optimizer_step: int
    """batch.global_batch_size"""
    devices: int
    """trainer.nnodes * trainer.n_gpus_per_node / ulysses_size"""
    samples_per_device: int
    """in an optimizer step: batch.global_batch_size / devices"""
    longest_sample_tokens: int
    """data.max_prompt_length + data.max_response_length"""
    most_micro_batches_per_device: int
    """in an optimizer step, when every sample has the longest length; with batch.packing=false one
    for each sample"""


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Everything a supervised fine-tuning run can be told."""

    UNUSED: ClassVar[dict[str, str]] = {
        "data.group_by_video": "rows of SFT do not share prompts",
        "data.rollout_batch_size": "SFT has no rollout; set batch.global_batch_size (samples)",
        "data.val_batch_size": "SFT batches validation by batch.max_tokens_per_micro_batch",
        "trainer.val_generations_to_log": "SFT validates by loss and generates nothing",
    }
    WORDS: ClassVar[dict[str, str]] = {
        "ulysses_size=auto": "SFT does not choose it, only RL does; write a number that divides "
        "the model's attention heads and trainer.nnodes * trainer.n_gpus_per_node, such as 1",
    }
    """What RL takes for a key and SFT does not, with what to type instead."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(freeze_vision_tower=False))
    optim: SFTOptimConfig = field(
        default_factory=lambda: SFTOptimConfig(lr=1e-5, warmup_style="cosine", lr_warmup_ratio=0.03)
    )
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    ulysses_size: Count = 1
    """Workers that share each sequence (Ulysses), for sequences that do not fit one device; must
    divide the model's attention heads and the number of workers."""
    cached_embeds_dir: str | None = None
    """Folder with the embeddings of all media, made beforehand by `python3 -m
    verl.utils.cache_video_embeds_vila` (it prints the setting): the vision tower is not loaded, and
    no video or image is decoded or needs to be there. Media that it lacks are unusable rows. null:
    the tower makes what `data.cache_dir` lacks."""
    batch: SFTBatchConfig = field(default_factory=SFTBatchConfig)
    trainer: TrainerConfig = field(
        default_factory=lambda: TrainerConfig(
            total_epochs=1, experiment_name="sft", val_before_train=False
        )
    )

    def derived(self, world_size: int | None = None) -> SFTSizes:
        """Batch sizes that follow from the keys; `world_size` is by default the configured one."""
        devices = (world_size or self.trainer.world_size) // self.ulysses_size
        per_device = self.batch.global_batch_size // devices
        longest = self.data.max_prompt_length + self.data.max_response_length
        per_pass = 1
        if self.batch.packing:
            per_pass = max(1, self.batch.max_tokens_per_micro_batch // longest)
        return SFTSizes(
            samples_per_optimizer_step=self.batch.global_batch_size,
            devices=devices,
            samples_per_device=per_device,
            longest_sample_tokens=longest,
            most_micro_batches_per_device=-(-per_device // per_pass),
        )

    def problems(self) -> list[Problem]:
        """Everything that keeps this configuration from running; reads files, starts nothing."""
        return sft_problems(self)
