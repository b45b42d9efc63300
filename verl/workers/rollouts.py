"""Builds the rollout engine that the configuration names, and asks it for samples.

With tensor parallelism neighbouring ranks hold one model together: each of them asks for the
prompts of all.
"""

from __future__ import annotations

import json
import logging
import tempfile
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from verl.config import DataConfig, ModelConfig, RolloutConfig
from verl.config.rollout_checks import DEFAULT_BATCHED_TOKENS, DEFAULT_SHARE
from verl.models.adapter import Adapter
from verl.models.loader import build_model, save_assets
from verl.models.processor_files import COMBINED_FILE, IMAGE_FILE, VIDEO_FILE
from verl.protocol import DataProto
from verl.rollout import Rollout
from verl.rollout.hf_rollout import HFRollout
from verl.rollout.vllm_rollout import EngineSettings, VLLMRollout
from verl.sequence_parallel.attention import ATTENTION
from verl.sequence_parallel.topology import SequenceGroup
from verl.workers.encoder import MediaEncoder
from verl.workers.generation import generate

logger = logging.getLogger(__name__)


def build_rollout(
    config: RolloutConfig, model: ModelConfig, data: DataConfig, adapter: Adapter,
    dtype: torch.dtype, device: torch.device, hf: Any = None,
) -> Rollout:  # fmt: skip
    """An engine that waits for weights; a collective with vllm.

    `hf` is a whole model to use where the engine is transformers itself, which then has weights.
    """
    if config.name == "vllm":
        return _build_vllm(config, model, data, adapter, dtype, device)
    budget = config.tokens_at_once(data.max_prompt_length, data.max_response_length)
    if hf is not None:
        return HFRollout(hf, adapter, device, budget)
    empty = build_model(model, dtype=dtype, attention=ATTENTION, materialize=False)
    return HFRollout.with_empty_weights(empty, adapter, device, budget)


def _build_vllm(
    config: RolloutConfig, model: ModelConfig, data: DataConfig, adapter: Adapter,
    dtype: torch.dtype, device: torch.device,
) -> VLLMRollout:  # fmt: skip
    longest = data.max_prompt_length + data.max_response_length
    run = [uuid.uuid4().hex]
    dist.broadcast_object_list(run)
    with tempfile.TemporaryDirectory(prefix="verl_engine_") as folder:
        # With the trainer's changes to the configuration, and the tokenizer it uses.
        save_assets(model, Path(folder))
        if adapter.vision is not None:
            _complete_processor(Path(folder))
        settings = EngineSettings(
            model_path=folder,
            dtype=dtype,
            max_model_len=config.max_model_len or longest,
            max_num_batched_tokens=config.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS,
            max_num_seqs=config.max_num_seqs,
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization or DEFAULT_SHARE,
            enforce_eager=config.enforce_eager,
            enable_chunked_prefill=config.enable_chunked_prefill,
            limit_images=config.limit_images,
            trust_remote_code=model.trust_remote_code,
        )
        engine = VLLMRollout(
            settings, adapter, device,
            rank=dist.get_rank(), world_size=dist.get_world_size(), run=run[0],
        )  # fmt: skip
    parts = ", ".join(f"{name} {s:.1f} s" for name, s in engine.start_up_seconds().items())
    logger.info("the rollout engine has started: %s", parts)
    return engine


def _complete_processor(folder: Path) -> None:
    """Processor files, where a model has none: vLLM reads them though it never makes pixels."""
    for name, entry, kind in (
        (IMAGE_FILE, "image_processor_type", "Qwen2VLImageProcessor"),
        (VIDEO_FILE, "video_processor_type", "Qwen2VLVideoProcessor"),
    ):
        if not any((folder / found).exists() for found in (name, COMBINED_FILE)):
            (folder / name).write_text(json.dumps({entry: kind}))


def generate_together(
    prompts: DataProto, adapter: Adapter, encoder: MediaEncoder, rollout: Rollout,
    group: SequenceGroup,
) -> DataProto:  # fmt: skip
    """`generate` for this rank's prompts; all ranks of `group` hold one engine together."""
    if group.size == 1:
        return generate(prompts, adapter, encoder, rollout)
    shares: list[Any] = [None] * group.size
    dist.all_gather_object(shares, prompts, group=group.group)
    samples = [sum(map(len, share["seeds"])) for share in shares]
    found = generate(DataProto.concat(shares), adapter, encoder, rollout)
    first = sum(samples[: group.rank])
    return found.take(range(first, first + samples[group.rank]))
