"""A name for the weights that make visual features, so that stored features fit or are missed.

What is hashed is what the tower computes with: every parameter and buffer in its present dtype,
under its name within the tower, and the tower's configuration (window size and number of heads
change features, too). bf16 weights and the float32 master they were rounded from therefore have
different names, as do their features. A frozen tower has the same name in every process, whether
it was loaded (`tower_fingerprint`) or only its files were read (`checkpoint_fingerprint`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from verl.config import ModelConfig
from verl.models.adapter import Adapter, get_adapter
from verl.models.loader import build_model, load_config
from verl.models.tower import find_stored, load_stored, stored_tensors

_NOT_NUMERIC = ("dtype", "torch_dtype", "transformers_version", "name_or_path")
"""Entries of a configuration that say where it comes from, or what the tensors say themselves."""
_MAX_THREADS = 16


class FeatureName(NamedTuple):
    """What names a frozen tower's features, beside the media they are of."""

    family: str
    """`config.model_type`."""
    weights: str
    """The tower's fingerprint."""
    dtype: torch.dtype
    """What the tower computes in."""


def feature_name(
    model: ModelConfig, adapter: Adapter, hf: Any, dtype: torch.dtype, *, has_tower: bool
) -> FeatureName:
    """The name of what a model's frozen tower makes; of a tower that is not loaded, by its files.

    Raises what `tower_fingerprint` and `checkpoint_fingerprint` raise.
    """
    tower = adapter.vision_tower(hf) if has_tower else None
    weights = (
        tower_fingerprint(tower) if tower is not None else checkpoint_fingerprint(model, dtype)
    )
    return FeatureName(hf.config.model_type, weights, dtype)


def tower_fingerprint(tower: nn.Module) -> str:
    """Name of a loaded tower's weights, projector included; 32 hexadecimal digits.

    `tower` is what `Adapter.vision_tower` gives; where a family keeps its projector elsewhere, a
    module that holds both. Raises ValueError for sharded or unallocated weights.
    """
    tensors = _tensors_of(tower)
    return weights_fingerprint(tensors, _config_of(tower))


def weights_fingerprint(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """Name of full tensors and the configuration they are used with."""
    for name, tensor in tensors.items():
        if tensor.is_meta or hasattr(tensor, "full_tensor"):
            raise ValueError(f"{name} is not whole on this rank: give full tensors, gathered first")
    return _combined({name: lambda t=tensor: t for name, tensor in tensors.items()}, config)


def checkpoint_fingerprint(model: ModelConfig, dtype: torch.dtype) -> str:
    """What `tower_fingerprint` gives once `model` is loaded in `dtype`; loads no tower.

    Reads the tower's part of the safetensors files. Random weights, and files in which the tower
    does not stand under its own names, cost building the model. Raises ModelError, and ValueError
    for a family without a tower.
    """
    config = load_config(model)
    adapter = get_adapter(config)

    def tower_of(*, materialize: bool) -> nn.Module:
        hf = build_model(model, dtype=dtype, attention="sdpa", materialize=materialize)
        tower = adapter.vision_tower(hf)
        if tower is None:
            raise ValueError(f"{model.model_path}: {config.model_type} has no vision tower")
        return tower

    tower = tower_of(materialize=False)
    stored = find_stored(model, list(stored_tensors(tower)))
    if stored is None:
        return tower_fingerprint(tower_of(materialize=True))
    sources: dict[str, Callable[[], Tensor]] = {}
    for name, tensor in _tensors_of(tower).items():
        if name in stored:
            sources[name] = lambda at=stored[name], dtype=tensor.dtype: load_stored(*at).to(dtype)
        else:
            sources[name] = lambda t=tensor: t  # Computed from the configuration, not stored.
    return _combined(sources, _config_of(tower))


def _tensors_of(tower: nn.Module) -> dict[str, Tensor]:
    return dict(tower.named_parameters()) | dict(tower.named_buffers())


def _config_of(tower: nn.Module) -> dict[str, Any]:
    config: Any = getattr(tower, "config", None)
    return {} if config is None else config.to_dict()


def _combined(sources: Mapping[str, Callable[[], Tensor]], config: Mapping[str, Any]) -> str:
    names = sorted(sources)
    # The hash lets go of the interpreter; a tower of 0.7 billion weights takes a second or less.
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        hashed = list(pool.map(lambda name: _described(sources[name]()), names))
    kept = {k: v for k, v in config.items() if k not in _NOT_NUMERIC and not k.startswith("_")}
    described = {"tensors": list(zip(names, hashed, strict=True)), "config": kept}
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _described(tensor: Tensor) -> tuple[str, list[int], str]:
    """Type, shape and hash of a tensor's bytes."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    digest = hashlib.blake2b(data.data, digest_size=16)
    return str(tensor.dtype), list(tensor.shape), digest.hexdigest()
