"""Builds a model from a Hugging Face folder, or with random weights from its config alone."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from verl.config import ModelConfig
from verl.models.adapter import Adapter, get_adapter

logger = logging.getLogger(__name__)
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)


def load_config(model: ModelConfig) -> Any:
    """The transformers configuration with `override_config` applied.

    Raises ValueError for a key of `override_config` that the configuration does not have.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model.model_path, trust_remote_code=model.trust_remote_code)
    for dotted, value in _flatten(model.override_config).items():
        *path, name = dotted.split(".")
        target = config
        for part in path:
            target = getattr(target, part, None)
        if target is None or not hasattr(target, name):
            raise ValueError(
                f"worker.actor.model.override_config.{dotted}={value!r}: "
                f"{type(config).__name__} has no such key"
            )
        setattr(target, name, value)
    return config


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def load_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer, with a chat template; raises ValueError where it has none."""
    from transformers import AutoTokenizer

    path = model.tokenizer_path or model.model_path
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    if not tokenizer.chat_template:
        raise ValueError(
            f"worker.actor.model.tokenizer_path={path}: the tokenizer has no chat template; "
            "put chat_template.jinja beside tokenizer.json"
        )
    return tokenizer


def load_adapter(model: ModelConfig) -> Adapter:
    """The adapter of the model's family."""
    return get_adapter(load_config(model))


def build_model(
    model: ModelConfig, *, dtype: torch.dtype, attention: str, materialize: bool, seed: int = 0
) -> nn.Module:
    """A transformers model on the CPU, or on the meta device with `materialize=False`.

    `attention` is the registered attention of the language tower. Buffers are always real, since
    they are computed and not stored. `init=random` draws the weights from `seed`.
    """
    config = load_config(model)
    cls: Any = get_adapter(config).model_class()
    hf: Any
    if not materialize:
        with init_empty_weights(include_buffers=False):
            hf = cls._from_config(config, dtype=dtype)
        hf.tie_weights()  # accelerate registers a parameter of its own at every place
    elif model.init == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hf = cls._from_config(config, dtype=dtype)
    else:
        hf = _from_pretrained(cls, model, config, dtype)
    hf.set_attn_implementation({"text_config": attention})
    hf.config.use_cache = False
    return hf


def _from_pretrained(cls: Any, model: ModelConfig, config: Any, dtype: torch.dtype) -> nn.Module:
    hf, info = cls.from_pretrained(
        model.model_path,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
    )
    wrong = {k: sorted(info[k])[:5] for k in ("missing_keys", "mismatched_keys") if info.get(k)}
    if wrong:
        raise ValueError(
            f"worker.actor.model.model_path={model.model_path}: the weights do not fit the config: "
            f"{wrong}; check that config.json belongs to the safetensors files"
        )
    if info.get("unexpected_keys"):
        logger.warning("weights without a place: %s", sorted(info["unexpected_keys"])[:5])
    return hf


def materialize(module: nn.Module, device: torch.device) -> None:
    """Allocates meta parameters on `device`, uninitialised; tied ones stay tied, buffers real.

    On the CPU untouched pages cost no memory, so a rank may do this before it shards.
    """
    made: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, p in list(child.named_parameters(recurse=False, remove_duplicate=False)):
            if not p.is_meta:
                continue
            if id(p) not in made:
                empty = torch.empty_like(p, device=device)
                made[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
            setattr(child, name, made[id(p)])


def save_assets(model: ModelConfig, target: Path) -> None:
    """Writes what a Hugging Face folder needs beside weights: config, tokenizer, processor."""
    from transformers import GenerationConfig

    target.mkdir(parents=True, exist_ok=True)
    load_config(model).save_pretrained(target)
    load_tokenizer(model).save_pretrained(target)
    source = Path(model.model_path)
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(source).save_pretrained(target)
