"""What a vLLM engine is asked for one prompt: token ids, stored features, names, checked first.

A request with wrong shapes fails inside a step of vLLM's engine, which then answers nothing any
more; so everything is checked here, where the request can still be named.
Letters: P prompt tokens, M visual tokens, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verl.rollout import RequestMedia, RolloutRequest
from verl.utils.exits import UserError


@dataclass(frozen=True)
class RequestLimits:
    """What an engine takes."""

    max_model_len: int
    """Tokens of a prompt and its response."""
    hidden: int
    """Width of features."""
    placeholder_ids: tuple[int, ...]
    """Token ids that stand for media."""
    limit_images: int = 0
    """Most images of a prompt; 0: any number."""


def engine_prompt(
    request: RolloutRequest, limits: RequestLimits, max_tokens: int
) -> dict[str, Any]:
    """The prompt as vLLM takes it (`TokensPrompt` with embeddings and their names).

    Raises UserError for a request that the engine could not answer, with its name.
    """
    problem = problem_of(request, limits, max_tokens)
    if problem:
        raise UserError(f"prompt {request.name or '(unnamed)'}: {problem}")
    ids = collapsed(request.prompt_ids, request.media, limits.placeholder_ids)
    prompt: dict[str, Any] = {"prompt_token_ids": ids}
    if request.media:
        prompt["multi_modal_data"] = media_inputs(request)
        prompt["multi_modal_uuids"] = media_names(request.media)
    return prompt


def problem_of(request: RolloutRequest, limits: RequestLimits, max_tokens: int) -> str:
    """What would fail inside the engine, or be answered wrongly, in words; empty if nothing."""
    n_prompt, n_visual = len(request.prompt_ids), sum(m.n_tokens for m in request.media)
    features, images = request.features, sum(m.kind == "image" for m in request.media)
    n_features = 0 if features is None else len(features)
    if n_prompt + max_tokens > limits.max_model_len:
        return (
            f"a prompt of {n_prompt} tokens and a response of up to {max_tokens} are more than "
            f"worker.rollout.max_model_len={limits.max_model_len}; raise it, or lower "
            "data.max_prompt_length or data.max_response_length"
        )
    if limits.limit_images and images > limits.limit_images:
        return (
            f"{images} images are more than worker.rollout.limit_images={limits.limit_images}; "
            "raise it, or leave the row out"
        )
    if n_visual != n_features:
        return f"its media have {n_visual} tokens, but {n_features} rows of features came with them"
    if features is not None and features.shape[1:] != (limits.hidden,):
        return f"features of shape {tuple(features.shape)} do not fit a width of {limits.hidden}"
    if features is not None and not features.is_floating_point():
        return f"features are of type {features.dtype}"
    try:
        collapsed(request.prompt_ids, request.media, limits.placeholder_ids)
    except ValueError as error:
        return str(error)
    return ""


def collapsed(
    ids_P: Tensor, media: Sequence[RequestMedia], placeholder_ids: Sequence[int]
) -> list[int]:
    """Token ids with one placeholder a piece of media, as vLLM expands them again.

    Raises ValueError where placeholders and media do not fit.
    """
    ids, found, i = ids_P.tolist(), [], 0
    queue = list(media)
    while i < len(ids):
        found.append(ids[i])
        if ids[i] not in placeholder_ids:
            i += 1
            continue
        n = queue.pop(0).n_tokens if queue else 0
        if n == 0 or ids[i : i + n] != [ids[i]] * n:
            raise ValueError(f"its placeholders from token {i} on do not fit its media")
        i += n
    if queue:
        raise ValueError(f"{len(queue)} pieces of media have no placeholder in it")
    return found


def media_inputs(request: RolloutRequest) -> dict[str, dict[str, Tensor]]:
    """Features and geometry by kind, in the schema of vLLM's Qwen2-VL and Qwen2.5-VL classes."""
    assert request.features is not None
    parts = request.features.split([m.n_tokens for m in request.media])
    inputs: dict[str, dict[str, Tensor]] = {}
    for kind in ("image", "video"):
        own = [i for i, m in enumerate(request.media) if m.kind == kind]
        if not own:
            continue
        # One piece is passed on as it is: of a stored video, memory that is mapped and not copied.
        features = parts[own[0]] if len(own) == 1 else torch.cat([parts[i] for i in own])
        grids = torch.tensor([request.media[i].grid_thw for i in own])
        inputs[kind] = {f"{kind}_embeds": features, f"{kind}_grid_thw": grids}
        if kind == "video":
            seconds = [request.media[i].seconds_per_grid for i in own]
            inputs[kind]["second_per_grid_ts"] = torch.tensor(seconds, dtype=torch.float32)
    return inputs


def media_names(media: Sequence[RequestMedia]) -> dict[str, list[str]]:
    """By kind, the name under which vLLM caches each piece of media and the prompts that hold it.

    With everything that a prompt's keys and values depend on: vLLM takes what it cached under a
    name for what the name stands for, and hashes no features.
    """
    names: dict[str, list[str]] = {}
    for m in media:
        grid = "x".join(map(str, m.grid_thw))
        names.setdefault(m.kind, []).append(f"{m.name}:{grid}:{m.seconds_per_grid!r}")
    return names
