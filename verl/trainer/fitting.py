"""What an RL run's longest row takes of a GPU, said before it starts; `ulysses_size=auto`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from verl.config import PPOConfig
from verl.config.rollout_checks import DEFAULT_SHARE
from verl.config.schema import with_values
from verl.models.shape import TextShape
from verl.trainer.launch import StartError
from verl.workers.media_stores import GIB
from verl.workers.memory_plan import MemoryPlan, longest_row, plan_memory

logger = logging.getLogger(__name__)
LEAST_SHARE = 0.1
"""Of a GPU, for an engine."""
KEY = "worker.actor.ulysses_size"
SHARE = "worker.rollout.gpu_memory_utilization"
USABLE = 0.92
"""Share of a GPU's memory that an update may be estimated to take: the rest is fragments, kernels'
scratch memory, and the estimate's error."""


def fitted(
    config: PPOConfig, shape: TextShape, gpu_bytes: int | None, tower_parameters: int = 0
) -> PPOConfig:
    """The configuration with numbers for `ulysses_size` and vLLM's share of a GPU.

    `gpu_bytes` is the memory of a GPU, None on CPUs, and `tower_parameters` those of a vision tower
    that is loaded. Lines about memory go to the log. Raises StartError for auto where no size fits.
    """
    actor = config.worker.actor
    if gpu_bytes is None:
        if actor.ulysses_size == "auto":
            logger.info(
                "%s=auto: 1, since it is chosen by the memory of GPUs and this run has none; to "
                "share sequences all the same, set a number", KEY,
            )  # fmt: skip
        return with_values(config, {KEY: actor.sequence_size})
    legal = sizes = legal_sizes(shape, config.trainer.world_size)
    if actor.ulysses_size != "auto":
        sizes = [actor.ulysses_size]
    elif actor.max_tokens_per_device is not None:
        longest = config.data.max_prompt_length + config.data.max_response_length
        sizes = [size for size in sizes if size * actor.max_tokens_per_device >= longest]
        if not sizes:
            raise StartError(
                f"worker.actor.max_tokens_per_device={actor.max_tokens_per_device}: no legal size "
                f"of {KEY} (they divide {shape.heads} heads and {config.trainer.world_size} "
                f"workers) holds a sequence of {longest} tokens; raise it"
            )
    plans = {size: plan_of(config, shape, size, tower_parameters) for size in sizes}
    fits = [size for size, plan in plans.items() if plan.peak <= USABLE * gpu_bytes]
    size = fits[0] if fits else sizes[-1]
    told = (
        f"{KEY}={size}: an update's longest row takes an estimated {_parts(plans[size])} of a GPU "
        f"with {gpu_bytes / GIB:.1f} GiB"
    )
    if fits:
        logger.info(told)
    elif actor.ulysses_size == "auto":
        raise StartError(f"{told}; no larger size is legal. {remedy(config)}")
    else:
        larger = {v: plan_of(config, shape, v, tower_parameters).peak for v in legal if v > size}
        words = remedy(config, better_size(larger, plans[size].peak, USABLE * gpu_bytes))
        logger.warning("%s: it may not fit. %s", told, words)
    config = with_engine_share(config, plans[size], gpu_bytes)
    return with_values(config, {KEY: size})


def with_engine_share(config: PPOConfig, plan: MemoryPlan, gpu_bytes: int) -> PPOConfig:
    """The configuration with a number for vLLM's share of a GPU; a warning where it may not fit.

    The engine's memory is its own while it generates, beside weights and optimizer, and while it
    takes new weights. Raises StartError where training leaves no room for an engine.
    """
    rollout, kept = config.worker.rollout, plan.weights + plan.optimizer
    if rollout.name != "vllm":
        return config
    left = math.floor(100 * (USABLE - kept / gpu_bytes)) / 100
    wanted = rollout.gpu_memory_utilization
    if wanted is None and left >= LEAST_SHARE:
        share = min(DEFAULT_SHARE, left)
        logger.info("%s=null: %g, beside %.1f GiB of training", SHARE, share, kept / GIB)
        return with_values(config, {SHARE: share})
    if wanted is not None and wanted <= left:
        return config
    ways = [f"{SHARE}={left:g} or less"] if wanted is not None and left >= LEAST_SHARE else []
    if plan.optimizer:
        ways.append("worker.actor.offload.offload_optimizer=true")
    elif not config.worker.actor.offload.offload_params:
        ways.append("worker.actor.offload.offload_params=true")
    told = (
        f"{SHARE}={'null' if wanted is None else f'{wanted:g}'} of {gpu_bytes / GIB:.1f} GiB: "
        f"beside the {kept / GIB:.1f} GiB that training keeps while vLLM generates, there is "
        f"{'no room for it' if wanted is None else 'too little room for that'}; set "
        f"{' or '.join(ways) or 'trainer.n_gpus_per_node higher'}"
    )
    if wanted is None:
        raise StartError(told)
    logger.warning(told)
    return config


def better_size(larger: Mapping[int, float], peak: float, usable: float) -> int | None:
    """The smallest of larger sizes with which a row fits, or with which it takes least; or None.

    `larger` holds what a row takes with each of them, and `peak` is what it takes now. With passes
    that are filled up to a number of tokens a device, more workers take no less.
    """
    less = {size: taken for size, taken in larger.items() if taken < peak}
    fitting = [size for size, taken in less.items() if taken <= usable]
    return min(fitting) if fitting else min(less, key=less.__getitem__, default=None)


def legal_sizes(shape: TextShape, world: int) -> list[int]:
    """Sizes that divide both the heads and the workers, the smallest first."""
    return [v for v in range(1, world + 1) if world % v == 0 and shape.heads % v == 0]


def plan_of(
    config: PPOConfig, shape: TextShape, size: int, tower_parameters: int = 0
) -> MemoryPlan:
    """Of the longest row, shared by `size` workers."""
    worker, data = config.worker, config.data
    actor = replace(worker.actor, ulysses_size=size)
    lengths = worker.rollout.n, data.max_prompt_length, data.max_response_length
    row, forward = longest_row(actor, *lengths), 0
    reference = worker.ref.offload if config.algorithm.needs_reference else None
    several = config.derived().optimizer_steps_per_rollout_batch > 1
    if reference is not None or several or actor.old_log_probs == "always":
        samples = actor.micro_batch_size_per_device_for_experience
        forward = longest_row(actor, *lengths, samples=samples)
    return plan_memory(
        shape, worker.actor.model, worker.actor.fsdp, worker.actor.offload,
        world=config.trainer.world_size, tokens=-(-row // size),
        forward_tokens=-(-forward // size), moment_bytes=worker.actor.optim.moment_bytes,
        reference=reference, tower_parameters=tower_parameters,
    )  # fmt: skip


def remedy(config: PPOConfig, larger_size: int | None = None) -> str:
    """What takes less memory and is not in use yet; `larger_size` is a legal one that does."""
    actor = config.worker.actor
    offload, on_device = actor.offload, not actor.offload.offload_params
    checkpoints, prefix = actor.model.enable_gradient_checkpointing, "worker.actor."
    ways: Sequence[tuple[bool, str]] = (
        (not checkpoints, f"{prefix}model.enable_gradient_checkpointing=true"),
        (on_device and not offload.offload_optimizer, f"{prefix}offload.offload_optimizer=true"),
        # It moves what checkpointing keeps, and is refused without it.
        (checkpoints and not offload.offload_activations,
         f"{prefix}offload.offload_activations=true"),
        (on_device, f"{prefix}offload.offload_params=true"),
        (on_device and actor.optim.moment_dtype == "fp32", f"{prefix}optim.moment_dtype=bf16"),
        (larger_size is not None, f"{KEY}={larger_size}"),
    )  # fmt: skip
    unused = [f"set {words}" for helps, words in ways if helps]
    rows = "worker.actor.micro_batch_size_per_device_for_update and _for_experience"
    if actor.max_tokens_per_device is not None:
        rows = "worker.actor.max_tokens_per_device"
    return "To take less: " + ", or ".join([*unused, f"lower {rows} or data.max_prompt_length"])


def _parts(plan: MemoryPlan) -> str:
    parts = {
        "weights": plan.weights, "optimizer": plan.optimizer, "gradients": plan.gradients,
        "checkpoints": plan.kept, "a layer's work": plan.working,
        "log-prob passes": plan.forward,
    }  # fmt: skip
    words = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
    return f"{plan.peak / GIB:.1f} GiB ({words})"
