"""Settings of the engine that cannot run, or would do nothing: kernels, memory, sequences."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

from verl.config.file_checks import heads_of
from verl.config.problems import Problem

if TYPE_CHECKING:
    from verl.config.ppo import PPOConfig
    from verl.config.sft import SFTConfig
    from verl.config.trainer import TrainerConfig
    from verl.config.worker import FSDPConfig, ModelConfig, OffloadConfig


def ulysses_problems(
    size: int, model: ModelConfig, trainer: TrainerConfig, prefix: str, model_key: str
) -> Iterator[Problem]:
    """Attention heads are split over the workers of one sequence, and workers over sequences."""
    key, world, heads = f"{prefix}ulysses_size", trainer.world_size, heads_of(model)
    legal = [v for v in range(1, world + 1) if world % v == 0 and (heads or v) % v == 0]
    if size in legal:
        return
    wrong = []
    if heads is not None and heads % size:
        wrong.append(f"the {heads} attention heads of {model.model_path}")
    if world % size:
        wrong.append(
            f"the {world} devices (trainer.nnodes={trainer.nnodes} * "
            f"trainer.n_gpus_per_node={trainer.n_gpus_per_node})"
        )
    use = "use 1" if legal == [1] else f"use one of {', '.join(map(str, legal))}"
    if heads is None and legal != [1]:
        use += f" that also divides the attention heads of {model.model_path}"
    yield Problem(
        (key, model_key, "trainer.nnodes", "trainer.n_gpus_per_node"),
        f"{key}={size} must divide {' and '.join(wrong)}; {use}",
    )


def flash_problems(
    model: ModelConfig, fsdp: FSDPConfig, trainer: TrainerConfig, prefix: str
) -> Iterator[Problem]:
    """FlashAttention exists on CUDA, and not in float32; one of its kernels is a package."""
    name = model.attn_implementation
    if name in ("auto", "sdpa"):
        return
    key = f"{prefix}model.attn_implementation"
    if name == "flash_attn" and importlib.util.find_spec(name) is None:
        yield Problem(
            (key,),
            f"{key}={name} needs the package flash-attn, which is not installed; "
            f"run `pip install 'long-rl[flash-attn]'`, or use {key}=auto",
        )
    for other, value in (
        ("trainer.device", trainer.device),
        (f"{prefix}fsdp.mp_param", fsdp.mp_param),
    ):
        if value in ("cpu", "fp32"):
            yield Problem(
                (key, other),
                f"{key}={name} needs CUDA and bf16 compute, but {other}={value}; use auto or sdpa",
            )


def activation_problems(
    model: ModelConfig, offload: OffloadConfig, prefix: str
) -> Iterator[Problem]:
    """Only what is checkpointed can wait on the host."""
    key, other = f"{prefix}offload.offload_activations", "enable_gradient_checkpointing"
    if offload.offload_activations and not model.enable_gradient_checkpointing:
        yield Problem(
            (key, f"{prefix}model.{other}"),
            f"{key}=true moves what checkpointing keeps, but {prefix}model.{other}=false; set that "
            f"to true, or {key}=false",
        )


def pass_problems(cfg: PPOConfig) -> Iterator[Problem]:
    """A pass must have room for a sequence; what sizes it must be in use."""
    actor, data = cfg.worker.actor, cfg.data
    key, tokens = "worker.actor.max_tokens_per_device", cfg.worker.actor.max_tokens_per_device
    if tokens is None:
        return
    longest = data.max_prompt_length + data.max_response_length
    # What auto can choose from is known when the model is (`verl.trainer.fitting`).
    if actor.ulysses_size != "auto" and tokens * actor.sequence_size < longest:
        yield Problem(
            (
                key,
                "data.max_prompt_length",
                "data.max_response_length",
                "worker.actor.ulysses_size",
            ),
            f"{key}={tokens} on each of {actor.sequence_size} workers of a sequence is less than "
            f"data.max_prompt_length + data.max_response_length = {longest}; use "
            f"{key}={-(-longest // actor.sequence_size)} or more",
        )
    if not actor.padding_free:
        yield Problem(
            (key, "worker.actor.padding_free"),
            f"{key}={tokens} fills rows, but with worker.actor.padding_free=false every sequence "
            "is a pass of its own; remove one of the two",
        )


def sft_pass_problems(cfg: SFTConfig) -> Iterator[Problem]:
    """A packed row must have room for a sample."""
    key, tokens = "batch.max_tokens_per_micro_batch", cfg.batch.max_tokens_per_micro_batch
    longest = cfg.data.max_prompt_length + cfg.data.max_response_length
    if cfg.batch.packing and tokens < longest:
        yield Problem(
            (key, "data.max_prompt_length", "data.max_response_length"),
            f"{key}={tokens} is less than data.max_prompt_length + "
            f"data.max_response_length = {longest}, the longest sample; use {key}={longest} or "
            "more, or lower these two",
        )


def checkpointing_problems(
    model: ModelConfig, prefix: str, *, has_reference: bool = False
) -> Iterator[Problem]:
    """What checkpointing keeps cannot be chosen where there is none.

    A default is no choice. A reference model, which has no backward pass, computes by tiles always.
    """
    if model.enable_gradient_checkpointing:
        return
    other = f"{prefix}model.enable_gradient_checkpointing"
    chosen = []
    if not model.keep_attention:
        chosen.append(("keep_attention", "false", "true"))
    default = type(model)().mlp_tile_tokens
    if model.mlp_tile_tokens not in (default, -1) and not has_reference:
        chosen.append(("mlp_tile_tokens", str(model.mlp_tile_tokens), "-1"))
    for name, value, whole in chosen:
        key = f"{prefix}model.{name}"
        yield Problem(
            (key, other),
            f"{key}={value} has no effect: {other}=false keeps all that backward needs; set that "
            f"to true, or {key}={whole}",
        )


def video_group_problems(cfg: PPOConfig) -> Iterator[Problem]:
    """Questions about one video are put together to share it, and within a step."""
    key, together = "data.group_by_video", cfg.data.group_by_video
    if together == 1:
        return
    actor, prompts = cfg.worker.actor, cfg.data.rollout_batch_size
    if not actor.shares_prompts:
        other = "padding_free" if actor.shared_prefix else "shared_prefix"
        yield Problem(
            (key, f"worker.actor.{other}"),
            f"{key}={together} puts questions about one video together so that they share it, but "
            f"worker.actor.{other}=false computes it for each of them; set that to true, or "
            f"{key}=1",
        )
    if together > prompts:
        yield Problem(
            (key, "data.rollout_batch_size"),
            f"{key}={together} is more than the data.rollout_batch_size={prompts} prompts of a "
            f"step; use {key}={prompts} or less",
        )


def reference_problems(cfg: PPOConfig) -> Iterator[Problem]:
    """The reference model has no backward pass, and may not be there at all."""
    algorithm = cfg.algorithm
    if algorithm.disable_kl and algorithm.reference_log_probs == "always":
        keys = "algorithm.disable_kl", "algorithm.reference_log_probs"
        yield Problem(
            keys,
            f"{keys[0]}=true loads no reference model, but {keys[1]}=always wants its log-probs; "
            f"use {keys[1]}=auto, or {keys[0]}=false with algorithm.kl_coef=0",
        )
    if cfg.worker.ref.offload.offload_activations:
        key = "worker.ref.offload.offload_activations"
        yield Problem(
            (key,),
            f"{key}=true: the reference model keeps no activations; remove the key (that of the "
            "actor is worker.actor.offload.offload_activations)",
        )
