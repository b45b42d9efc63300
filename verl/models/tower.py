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
from verl.models.loader import build_model, drop_tower, load_config

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
    places = stored_tensors(tower)
    stored = find_stored(model, list(places))
    if stored is None:
        whole = build_model(model, dtype=dtype, attention="sdpa", materialize=True)
        weights = stored_tensors(_tower_of(model, whole))
    else:
        weights = {name: load_stored(*at).to(places[name].dtype) for name, at in stored.items()}
    for name, place in places.items():
        if weights[name].shape != place.shape:
            raise ModelError(
                f"model.model_path={model.model_path}: {name} of the vision tower has the shape "
                f"{tuple(weights[name].shape)}, its config says {tuple(place.shape)}; check "
                "that config.json belongs to the safetensors files"
            )
    weights = {name: tensor.detach().to(device) for name, tensor in weights.items()}
    tower.load_state_dict(weights, assign=True, strict=False)
    if empty := [name for name, p in tower.named_parameters() if p.is_meta]:
        raise ModelError(
            f"model.model_path={model.model_path}: the vision tower has no weights for {empty[:5]}"
        )
    # Other buffers are computed and not stored; they keep their types, as in any other loading.
    tower.to(device).requires_grad_(False).eval()
    return hf


def stored_tensors(tower: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a tower, by name: parameters, and buffers that are persistent."""
    kept = tower.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in tower.named_buffers() if name in kept}
    return dict(tower.named_parameters()) | buffers


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
    """Where every tensor of the tower is stored; None when only loading the model can tell.

    `names` are those of `stored_tensors`, within the tower; what stands before them in the files is
    found out. Where several towers could be meant, or a tensor is not found, transformers must say
    what it takes, or what is missing.
    """
    # A configuration may name a file of weights; that is left to transformers.
    if model.init == "random" or getattr(load_config(model), "transformers_weights", None):
        return None
    try:
        places = _places(_folder_of(model.model_path))
    except LocalEntryNotFoundError:  # A hub id whose weights come when the model is loaded.
        return None
    prefixes = {place.removesuffix(names[0]) for place in places if place.endswith(names[0])}
    towers = sorted(p for p in prefixes if all(p + name in places for name in names))
    if len(towers) == 1:
        return {name: (places[towers[0] + name], towers[0] + name) for name in names}
    found = f"several towers ({', '.join(towers)})" if towers else "no tower under its own names"
    logger.info("%s holds %s: the whole model is loaded for it", model.model_path, found)
    return None


def load_stored(path: Path, name: str) -> Tensor:
    """A tensor as it is stored."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _folder_of(model_path: str) -> Path:
    folder = Path(model_path)
    return folder if folder.is_dir() else Path(snapshot_download(model_path, local_files_only=True))


def _places(folder: Path) -> dict[str, Path]:
    """File of every tensor that transformers would read; empty where it would find files missing.

    As there, one whole file goes before an index: beside it, the index is left from an older save.
    """
    whole = folder / "model.safetensors"
    if whole.is_file():
        with safe_open(whole, framework="pt") as file:
            return dict.fromkeys(file.keys(), whole)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    listed = json.loads(index.read_text())["weight_map"]
    places = {name: folder / file for name, file in listed.items()}
    return places if all(file.is_file() for file in set(places.values())) else {}
