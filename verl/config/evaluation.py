"""The root of an evaluation: `python3 -m verl.evaluation.main`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from verl.config.base import Count
from verl.config.checks import eval_problems
from verl.config.data import DataConfig
from verl.config.problems import Problem
from verl.config.trainer import Device
from verl.config.worker import RolloutConfig


@dataclass(frozen=True)
class EvalSizes:
    """What an evaluation generates."""

    samples_per_prompt: int
    """rollout.n"""
    passes_over_the_files: int
    """number of entries of variants"""
    devices: int
    """nnodes * n_gpus_per_node"""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Everything an evaluation can be told. The questions are those of `data.val_files`."""

    UNUSED: ClassVar[dict[str, str]] = {
        "data.train_files": "an evaluation reads data.val_files",
        "data.reasoning_key": "an evaluation does not read the written chain of thought",
        "data.rollout_batch_size": "an evaluation generates data.val_batch_size prompts at once",
        "data.shuffle": "an evaluation reads the files in order",
        "data.group_by_video": "an evaluation reads the files in order",
        "data.seed": "an evaluation reads the files in order; rollout.seed seeds the sampling",
        "rollout.val_override_config": "set rollout.temperature, rollout.n, ... themselves",
    }

    NEUTRAL: ClassVar[tuple[str, ...]] = (
        "name",
        "output",
        "nnodes",
        "n_gpus_per_node",
        "device",
        "data.val_batch_size",
        "data.num_workers",
        "data.prefetch_gib",
        "data.cache_*",
        "rollout.max_num_batched_tokens",
        "rollout.tensor_parallel_size",
        "rollout.gpu_memory_utilization",
        "rollout.max_num_seqs",
        "rollout.max_model_len",
        "rollout.enforce_eager",
        "rollout.enable_chunked_prefill",
        "rollout.limit_images",
        "cached_embeds_dir",
    )

    model_path: str = ""
    """Folder in Hugging Face layout (config.json, safetensors, tokenizer), or a hub id."""
    tokenizer_path: str | None = None
    """Folder or hub id of the tokenizer, and of the processor files where it holds any (else those
    of `model_path` count); null means `model_path`."""
    cached_embeds_dir: str | None = None
    """Folder with the embeddings of all media, made beforehand by `python3 -m
    verl.utils.cache_video_embeds_vila` (it prints the setting): the vision tower is not loaded, and
    no video or image is decoded or needs to be there. Media that it lacks are unusable rows. null:
    the tower makes what `data.cache_dir` lacks."""
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(n=1, temperature=0.0))
    variants: list[str] = field(default_factory=lambda: ["full"])
    """Passes to make: full (as configured), blind (every frame blank), frames:<k> (only k frames
    of each video), temperature:<t> (sampled at that temperature)."""
    name: str = ""
    """Prefix of the names in the output, such as `sft`."""
    output: str | None = None
    """JSON file the results are written to; null means they are only printed."""
    nnodes: Count = 1
    """Machines that take part."""
    n_gpus_per_node: Count = 1
    """Worker processes a machine: one a GPU, or just processes when `device=cpu`."""
    device: Device = "auto"
    """auto: CUDA when there is a GPU, otherwise the CPU."""

    @property
    def world_size(self) -> int:
        """Worker processes over all machines."""
        return self.nnodes * self.n_gpus_per_node

    def derived(self, world_size: int | None = None) -> EvalSizes:
        """Counts that follow from the keys."""
        return EvalSizes(
            samples_per_prompt=self.rollout.n,
            passes_over_the_files=len(self.variants),
            devices=world_size or self.world_size,
        )

    def problems(self) -> list[Problem]:
        """Everything that keeps this configuration from running; reads files, starts nothing."""
        return eval_problems(self)
