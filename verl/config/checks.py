"""Combinations that cannot run. Pure functions of the configs, each with the way out."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from verl.config.coerce import Mismatch, coerce
from verl.config.engine_checks import (
    activation_problems,
    checkpointing_problems,
    flash_problems,
    pass_problems,
    reference_problems,
    sft_pass_problems,
    ulysses_problems,
    video_group_problems,
)
from verl.config.file_checks import (
    cached_embeds_problems,
    checkpoint_problems,
    data_file_problems,
    format_prompt_problems,
    media_dir_problems,
    model_problems,
    output_problems,
    reward_function_problems,
)
from verl.config.problems import Problem, did_you_mean, without_consequences
from verl.config.rollout_checks import correction_problems, engine_problems, law_problems
from verl.config.weight_checks import disk_problems

if TYPE_CHECKING:
    from verl.config.algorithm import AlgorithmConfig
    from verl.config.data import DataConfig
    from verl.config.evaluation import EvalConfig
    from verl.config.ppo import PPOConfig
    from verl.config.sft import SFTConfig
    from verl.config.trainer import TrainerConfig
    from verl.config.worker import (
        OptimConfig,
        RewardConfig,
        RolloutConfig,
    )

_VARIANT = re.compile(r"full|blind|frames:[1-9][0-9]*|temperature:[0-9]+(\.[0-9]+)?")
_PACKAGES = {
    "decord": "decord",
    "torchcodec": "'long-rl[torchcodec]'",
    "tensorboard": "tensorboard",
    "wandb": "'long-rl[wandb]'",
    "mlflow": "'long-rl[mlflow]'",
    "swanlab": "'long-rl[swanlab]'",
}
"""What pip is told for a choice that is named like the module it needs."""
_SAMPLING_TYPES = ("temperature", "top_p", "top_k", "n")


def ppo_problems(cfg: PPOConfig) -> list[Problem]:
    """Everything that keeps an RL run from starting."""
    actor = cfg.worker.actor
    found = [
        *batch_problems(cfg),
        *group_problems(cfg.algorithm, cfg.worker.rollout),
        *ulysses_problems(
            actor.sequence_size,
            actor.model,
            cfg.trainer,
            "worker.actor.",
            "worker.actor.model.model_path",
        ),
        *kl_problems(cfg.algorithm),
        *flash_problems(actor.model, actor.fsdp, cfg.trainer, "worker.actor."),
        *activation_problems(actor.model, actor.offload, "worker.actor."),
        *checkpointing_problems(
            actor.model, "worker.actor.", has_reference=cfg.algorithm.needs_reference
        ),
        *video_group_problems(cfg),
        *pass_problems(cfg),
        *reference_problems(cfg),
        *media_problems(cfg.data),
        *optim_problems(actor.optim, "worker.actor.optim."),
        *sampling_override_problems(cfg.worker.rollout),
        *engine_problems(
            cfg.worker.rollout, actor.model, cfg.data, cfg.trainer.world_size, "worker.rollout."
        ),
        *law_problems(cfg.worker.rollout, "worker.rollout."),
        *correction_problems(cfg.algorithm.rollout_correction, cfg.worker.rollout),
        *package_problems(cfg.data, cfg.trainer),
        *validation_problems(cfg.data, cfg.trainer),
        *data_file_problems(cfg.data.train_files, "data.train_files", not cfg.trainer.val_only),
        *data_file_problems(cfg.data.val_files, "data.val_files", required=False),
        *media_dir_problems(cfg.data, actor.cached_embeds_dir),
        *cached_embeds_problems(actor.cached_embeds_dir, actor.model, "worker.actor."),
        *format_prompt_problems(cfg.data.format_prompt),
        *model_problems(actor.model, "worker.actor.model."),
        *reward_function_problems(cfg.worker.reward.reward_function),
        *reward_process_problems(cfg.worker.reward),
        *checkpoint_problems(cfg.trainer),
        *output_problems(cfg.trainer, cfg.data.cache_dir),
        *disk_problems(cfg.trainer, actor.model),
    ]
    return without_consequences(found, "worker.actor.ulysses_size")


def sft_problems(cfg: SFTConfig) -> list[Problem]:
    """Everything that keeps a supervised fine-tuning run from starting."""
    found = [
        *sft_batch_problems(cfg),
        *ulysses_problems(cfg.ulysses_size, cfg.model, cfg.trainer, "", "model.model_path"),
        *flash_problems(cfg.model, cfg.fsdp, cfg.trainer, ""),
        *activation_problems(cfg.model, cfg.offload, ""),
        *checkpointing_problems(cfg.model, ""),
        *sft_pass_problems(cfg),
        *media_problems(cfg.data),
        *optim_problems(cfg.optim, "optim."),
        *package_problems(cfg.data, cfg.trainer),
        *validation_problems(cfg.data, cfg.trainer),
        *data_file_problems(cfg.data.train_files, "data.train_files", not cfg.trainer.val_only),
        *data_file_problems(cfg.data.val_files, "data.val_files", required=False),
        *media_dir_problems(cfg.data, cfg.cached_embeds_dir),
        *cached_embeds_problems(cfg.cached_embeds_dir, cfg.model, ""),
        *format_prompt_problems(cfg.data.format_prompt),
        *model_problems(cfg.model, "model."),
        *checkpoint_problems(cfg.trainer),
        *output_problems(cfg.trainer, cfg.data.cache_dir),
        *disk_problems(cfg.trainer, cfg.model),
    ]
    return without_consequences(found, "ulysses_size")


def eval_problems(cfg: EvalConfig) -> list[Problem]:
    """Everything that keeps an evaluation from starting."""
    from verl.config.worker import ModelConfig

    model = ModelConfig(model_path=cfg.model_path, tokenizer_path=cfg.tokenizer_path)
    return [
        *variant_problems(cfg.variants, cfg.cached_embeds_dir),
        *greedy_problems(cfg.rollout, "rollout."),
        *engine_problems(cfg.rollout, model, cfg.data, cfg.world_size, "rollout."),
        *media_problems(cfg.data),
        *package_problems(cfg.data, None),
        *data_file_problems(cfg.data.val_files, "data.val_files", required=True),
        *media_dir_problems(cfg.data, cfg.cached_embeds_dir),
        *cached_embeds_problems(cfg.cached_embeds_dir, model, ""),
        *format_prompt_problems(cfg.data.format_prompt),
        *model_problems(model, ""),
        *output_problems(None, cfg.data.cache_dir, cfg.output),
    ]


def reward_process_problems(reward: RewardConfig) -> Iterator[Problem]:
    """A batch function runs in one process, since it may compare all samples of its call."""
    if reward.reward_type == "batch" and reward.num_cpus > 1:
        yield Problem(
            ("worker.reward.num_cpus", "worker.reward.reward_type"),
            f"worker.reward.num_cpus={reward.num_cpus}: with worker.reward.reward_type=batch the "
            "function sees all samples together, in one process; use worker.reward.num_cpus=1, or "
            "worker.reward.reward_type=sequential with a function of one sample",
        )


def nearest_legal(value: int, legal: Callable[[int], bool], limit: int) -> str:
    """The nearest values below and above `value` that are legal, in words."""
    below = next((v for v in range(value - 1, 0, -1) if legal(v)), None)
    above = next((v for v in range(value + 1, value + limit + 1) if legal(v)), None)
    return " or ".join(str(v) for v in (below, above) if v is not None)


def batch_problems(cfg: PPOConfig) -> Iterator[Problem]:
    """Every optimizer step must take as many prompts, and every device as many samples."""
    actor, n = cfg.worker.actor, cfg.worker.rollout.n
    prompts, mini, world = cfg.data.rollout_batch_size, actor.global_batch_size, _devices(cfg)
    step = world // math.gcd(n, world)
    if mini % step:
        words = nearest_legal(mini, lambda v: v % step == 0, step)
        yield Problem(
            ("worker.actor.global_batch_size", "worker.rollout.n", *_DEVICE_KEYS),
            f"worker.actor.global_batch_size={mini}: {mini} prompts * {n} responses = "
            f"{_division(mini * n, world)} samples an optimizer step do not divide over {world} "
            f"devices; use {words}",
        )
    if prompts % mini:
        both = math.lcm(mini, step)
        words = nearest_legal(prompts, lambda v: v % both == 0, both)
        yield Problem(
            ("data.rollout_batch_size", "worker.actor.global_batch_size"),
            f"data.rollout_batch_size={prompts} is not a multiple of worker.actor."
            f"global_batch_size: {_division(prompts, mini)}; use {words}",
        )
    elif prompts % step:
        words = nearest_legal(prompts, lambda v: v % step == 0, step)
        yield Problem(
            ("data.rollout_batch_size", "worker.rollout.n", *_DEVICE_KEYS),
            f"data.rollout_batch_size={prompts}: {prompts} prompts * {n} responses = "
            f"{_division(prompts * n, world)} samples a step do not divide over {world} devices; "
            f"use {words}",
        )


def _division(total: int, by: int) -> str:
    """`100 = 1 * 64 + 36`."""
    return f"{total} = {total // by} * {by} + {total % by}"


def sft_batch_problems(cfg: SFTConfig) -> Iterator[Problem]:
    """Every device must take as many samples an optimizer step."""
    size, world = cfg.batch.global_batch_size, cfg.trainer.world_size
    if world % cfg.ulysses_size == 0:
        world //= cfg.ulysses_size
    if size % world:
        words = nearest_legal(size, lambda v: v % world == 0, world)
        yield Problem(
            (
                "batch.global_batch_size",
                "trainer.nnodes",
                "trainer.n_gpus_per_node",
                "ulysses_size",
            ),
            f"batch.global_batch_size={size}: {size} samples an optimizer step do not divide over "
            f"{world} devices ({_division(size, world)}); use {words}",
        )


def group_problems(algorithm: AlgorithmConfig, rollout: RolloutConfig) -> Iterator[Problem]:
    """A group needs several responses that differ."""
    if algorithm.adv_estimator == "grpo" and rollout.n < 2:
        yield Problem(
            ("worker.rollout.n", "algorithm.adv_estimator"),
            f"worker.rollout.n={rollout.n}: GRPO compares the responses to one prompt, and with "
            "one response the advantage is always 0; use 2 or more, such as 5",
        )
    if rollout.temperature == 0:
        yield Problem(
            ("worker.rollout.temperature",),
            "worker.rollout.temperature=0: greedy responses to one prompt are all the same, so "
            "the advantage is always 0; use 1.0, and for validation "
            "worker.rollout.val_override_config.temperature=0",
        )


def greedy_problems(rollout: RolloutConfig, prefix: str) -> Iterator[Problem]:
    """Greedy decoding gives the same response however often it is asked for."""
    if rollout.temperature == 0 and rollout.n > 1:
        yield Problem(
            (f"{prefix}n", f"{prefix}temperature"),
            f"{prefix}n={rollout.n}: at {prefix}temperature=0 all {rollout.n} responses are the "
            f"same; use {prefix}n=1 or a temperature such as 1.0",
        )


def kl_problems(algorithm: AlgorithmConfig) -> Iterator[Problem]:
    """KL settings that would train on nothing."""
    if algorithm.disable_kl:
        return
    if algorithm.use_kl_loss and algorithm.kl_penalty == "k1":
        yield Problem(
            ("algorithm.kl_penalty", "algorithm.use_kl_loss"),
            "algorithm.kl_penalty=k1 cannot be a loss: the expected gradient of the log ratio is 0,"
            " so it would not hold the policy back; use k2 (its gradient is that of the KL) or "
            "k3, or algorithm.use_kl_loss=false to take k1 off the reward",
        )
    if algorithm.kl_type == "adaptive" and algorithm.kl_coef == 0:
        yield Problem(
            ("algorithm.kl_coef", "algorithm.kl_type"),
            "algorithm.kl_coef=0: the adaptive weight is multiplied step by step and would stay "
            "0; use a start such as 0.01, or algorithm.disable_kl=true",
        )


def media_problems(data: DataConfig) -> Iterator[Problem]:
    """Bounds of pixels in the right order."""
    for low_key, high_key in (
        ("min_pixels", "max_pixels"),
        ("video_min_pixels", "video_max_pixels"),
    ):
        low, high = getattr(data, low_key), getattr(data, high_key)
        if low is not None and high is not None and low > high:
            yield Problem(
                (f"data.{low_key}", f"data.{high_key}"),
                f"data.{low_key}={low} is larger than data.{high_key}={high}; "
                "lower the first or raise the second",
            )


def optim_problems(optim: OptimConfig, prefix: str) -> Iterator[Problem]:
    """Schedules that contradict themselves."""
    if optim.lr == 0:
        yield Problem((f"{prefix}lr",), f"{prefix}lr=0: nothing would be learned; use 1e-6 or so")
    if optim.lr_warmup_steps is not None and optim.lr_warmup_ratio > 0:
        yield Problem(
            (f"{prefix}lr_warmup_steps", f"{prefix}lr_warmup_ratio"),
            f"{prefix}lr_warmup_steps={optim.lr_warmup_steps} and {prefix}lr_warmup_ratio="
            f"{optim.lr_warmup_ratio} both set the warm-up; keep one, and set the ratio to 0 or "
            "the steps to null",
        )
    if optim.warmup_style == "constant" and optim.min_lr_ratio > 0:
        yield Problem(
            (f"{prefix}min_lr_ratio", f"{prefix}warmup_style"),
            f"{prefix}min_lr_ratio={optim.min_lr_ratio}: with {prefix}warmup_style=constant the "
            "learning rate never falls; use cosine or linear, or min_lr_ratio=0",
        )
    for name, beta in zip(("first", "second"), optim.betas, strict=True):
        if beta == 1:
            yield Problem(
                (f"{prefix}betas",),
                f"{prefix}betas: the {name} is 1, so the moment "
                "would never move; use 0.9 and 0.999",
            )


def sampling_override_problems(rollout: RolloutConfig) -> Iterator[Problem]:
    """Only sampling settings can differ in validation, and they keep their types."""
    from verl.config.schema import settings

    key, known = "worker.rollout.val_override_config", settings(type(rollout))
    for name, value in rollout.val_override_config.items():
        if name not in _SAMPLING_TYPES:
            hint = did_you_mean(name, _SAMPLING_TYPES)
            if "did you mean" not in hint:
                hint = f"legal are {', '.join(_SAMPLING_TYPES)}"
            yield Problem((key,), f"{key}.{name}: unknown key; {hint}")
            continue
        try:
            coerce(value, known[name].type)
        except Mismatch as error:
            yield Problem((key,), f"{key}.{name}: {error}")
    merged = {**asdict(rollout), **rollout.val_override_config}
    if merged["temperature"] == 0 and "temperature" in rollout.val_override_config:
        n = merged["n"]
        if isinstance(n, int) and n > 1:
            yield Problem(
                (key, "worker.rollout.n"),
                f"{key}.temperature=0 gives {n} equal responses a prompt in validation; "
                f"add {key}.n=1",
            )


def validation_problems(data: DataConfig, trainer: TrainerConfig) -> Iterator[Problem]:
    """Validation that is asked for needs rows."""
    if data.val_files:
        return
    for key, asked, off in (
        ("trainer.val_freq", trainer.val_freq > 0, "trainer.val_freq=-1"),
        ("trainer.val_before_train", trainer.val_before_train, "trainer.val_before_train=false"),
        ("trainer.val_only", trainer.val_only, "trainer.val_only=false"),
    ):
        if asked:
            value = str(getattr(trainer, key.rpartition(".")[2])).lower()
            yield Problem(
                ("data.val_files", key),
                f"data.val_files is empty, but {key}={value} asks for validation; "
                f"set data.val_files, or {off}",
            )


def variant_problems(
    variants: list[str], cached_embeds_dir: str | None = None
) -> Iterator[Problem]:
    """Each variant must be known, be there once, and find what it shows."""
    if cached_embeds_dir is not None and "blind" in variants:
        yield Problem(
            ("cached_embeds_dir", "variants"),
            f"cached_embeds_dir={cached_embeds_dir}: without a vision tower there is nothing to "
            "show blank frames to; leave blind out of variants, or cached_embeds_dir out",
        )
    if not variants:
        yield Problem(
            ("variants",), "variants is empty; use full, blind, frames:<k> or temperature:<t>"
        )
    for variant in variants:
        if not _VARIANT.fullmatch(variant):
            yield Problem(
                ("variants",),
                "variants: expected full, blind, frames:<k> such as frames:4 or temperature:<t> "
                f"such as temperature:1, got {variant!r}",
            )
    for variant in sorted({v for v in variants if variants.count(v) > 1}):
        yield Problem(("variants",), f"variants: {variant!r} is there twice; keep one")


def package_problems(data: DataConfig, trainer: TrainerConfig | None) -> Iterator[Problem]:
    """Optional packages that a choice needs. Found, never imported."""
    asked = [("data.video_decoder", data.video_decoder, "pyav")]
    if trainer is not None:
        asked += [
            ("trainer.logger", name, "console,file") for name in dict.fromkeys(trainer.logger)
        ]
    for key, choice, instead in asked:
        if choice in _PACKAGES and importlib.util.find_spec(choice) is None:
            yield Problem(
                (key,),
                f"{key}={choice} needs the package {choice}, which is not installed; "
                f"run `pip install {_PACKAGES[choice]}`, or use {key}={instead}",
            )


_DEVICE_KEYS = ("trainer.nnodes", "trainer.n_gpus_per_node", "worker.actor.ulysses_size")


def _devices(cfg: PPOConfig) -> int:
    """Groups of workers that each take their own samples."""
    world, size = cfg.trainer.world_size, cfg.worker.actor.sequence_size
    return world // size if world % size == 0 else world
