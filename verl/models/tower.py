"""The vision tower without its language model: for whoever only encodes.

A checkpoint's tower is found in its safetensors files by name, so that a model of many GB costs
the memory and the reading of its tower alone.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn

from verl.config import ModelConfig
from verl.models.adapter import ModelError, get_adapter
from verl.models.loader import build_model, drop_tower

logger = logging.getLogger(__name__)

StoredTensor = tuple[Path, str]
"""A safetensors file and the name of a tensor in it."""


def load_tower(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """A transformers model whose vision tower is loaded, frozen, on `device`.

    The language model stays on the meta device; `Adapter.encode` works, nothing else does. Where
    the files do not hold the tower under its own names, the whole model is built on the host for a
    moment. Raises ModelError for a family without a tower and for weights that do not fit.
    """
    hf: Any = build_model(model, dtype=dtype, attention="sdpa", materialize=False)
    tower = _tower_of(model, hf)
    stored = find_stored(model, [name for name, _ in tower.named_parameters()])
    weights: dict[str, Tensor] = {}
    if stored is None:
        whole = build_model(model, dtype=dtype, attention="sdpa", materialize=True)
        weights.update(_tower_of(model, whole).named_parameters())
    else:
        weights.update((name, load_stored(*at)) for name, at in stored.items())
    for name, parameter in tower.named_parameters():
        if weights[name].shape != parameter.shape:
            raise ModelError(
                f"model.model_path={model.model_path}: {name} of the vision tower has the shape "
                f"{tuple(weights[name].shape)}, its config says {tuple(parameter.shape)}; check "
                "that config.json belongs to the safetensors files"
            )
        weights[name] = weights[name].detach().to(device, parameter.dtype)
    tower.load_state_dict(weights, assign=True, strict=False)
    # Buffers are computed and not stored; they keep their types, as in any other loading.
    tower.to(device).requires_grad_(False).eval()
    return hf


def tower_names(model: ModelConfig) -> frozenset[str]:
    """Names of the tower's tensors in the `state_dict` of the whole model."""
    hf: Any = build_model(model, dtype=torch.float32, attention="sdpa", materialize=False)
    every = set(hf.state_dict())
    drop_tower(get_adapter(hf.config), hf)
    return frozenset(every - set(hf.state_dict()))


def tower_weights(model: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of `tower_names`, on the host. Raises ModelError like `load_tower`."""
    state = load_tower(model, dtype, torch.device("cpu")).state_dict()
    return {name: state[name] for name in tower_names(model)}


def _tower_of(model: ModelConfig, hf: nn.Module) -> nn.Module:
    config: Any = hf.config
    tower = get_adapter(config).vision_tower(hf)
    if tower is None:
        raise ModelError(
            f"model.model_path={model.model_path}: {config.model_type} has no vision tower"
        )
    return tower


def find_stored(model: ModelConfig, names: list[str]) -> dict[str, StoredTensor] | None:
    """Where every parameter of the tower is stored; None when they are not all found.

    `names` are those within the tower; what stands before them in the files is found out.
    """
    if model.init == "random":
        return None
    try:
        places = _places(_folder_of(model.model_path))
    except LocalEntryNotFoundError:  # A hub id whose weights come when the model is loaded.
        return None
    for prefix in sorted({p.removesuffix(names[0]) for p in places if p.endswith(names[0])}):
        if all(prefix + name in places for name in names):
            return {name: (places[prefix + name], prefix + name) for name in names}
    logger.info("%s holds the tower under other names: the model is loaded", model.model_path)
    return None


def load_stored(path: Path, name: str) -> Tensor:
    """A tensor as it is stored."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _folder_of(model_path: str) -> Path:
    folder = Path(model_path)
    return folder if folder.is_dir() else Path(snapshot_download(model_path, local_files_only=True))


def _places(folder: Path) -> dict[str, Path]:
    """File of every tensor of a Hugging Face folder, in the order in which transformers looks.

    A folder that was saved again may hold an index of shards, or shards, of older weights beside
    the whole file. Empty where a listed shard is missing: transformers says what to do about that.
    """
    whole = folder / "model.safetensors"
    if whole.is_file():
        with safe_open(whole, framework="pt") as file:
            return dict.fromkeys(file.keys(), whole)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    listed = json.loads(index.read_text())["weight_map"]
    found = {name: folder / file for name, file in listed.items()}
    return found if all(path.is_file() for path in set(found.values())) else {}
