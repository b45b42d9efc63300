"""Builds a model from a Hugging Face folder, or with random weights from its config alone."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download, is_offline_mode
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn

from verl.config import ModelConfig
from verl.models.adapter import Adapter, ModelError, get_adapter
from verl.models.processor_files import PROCESSOR_FILES, vision_of
from verl.models.tower_attention import register_tower_attention

logger = logging.getLogger(__name__)


def load_config(model: ModelConfig) -> Any:
    """The transformers configuration with `override_config` applied.

    Raises ModelError where there is none, and for a key of `override_config` that it does not have.
    """
    from transformers import AutoConfig

    with _named("model.model_path", model.model_path):
        config = AutoConfig.from_pretrained(
            model.model_path, trust_remote_code=model.trust_remote_code
        )
    for dotted, value in _flatten(model.override_config).items():
        *path, name = dotted.split(".")
        target = config
        for part in path:
            target = getattr(target, part, None)
        if target is None or not hasattr(target, name):
            raise ModelError(
                f"model.override_config.{dotted}={value!r}: {type(config).__name__} has no such key"
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
    """The tokenizer, with a chat template; raises ModelError where there is none."""
    from transformers import AutoTokenizer

    path = model.tokenizer_path or model.model_path
    with _named("model.tokenizer_path", path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    if not tokenizer.chat_template:
        raise ModelError(
            f"model.tokenizer_path={path}: the tokenizer has no chat template; "
            "put chat_template.jinja beside tokenizer.json"
        )
    return tokenizer


@contextmanager
def _named(setting: str, path: str) -> Iterator[None]:
    """Turns what transformers says of a folder or hub id that it cannot read into what to do."""
    try:
        yield
    except (OSError, ValueError) as error:
        if Path(path).is_dir():
            raise ModelError(f"{setting}={path}: {error}") from error
        reason = str(error).partition("\n")[0]
        if is_offline_mode():
            reason = "the Hugging Face hub may not be asked (HF_HUB_OFFLINE is set)"
        raise ModelError(
            f"{setting}={path}: there is no such folder, it is not among the models downloaded "
            f"before, and {reason}. Name a folder that exists, or fetch the model once where there "
            f"is a network: hf download {path}"
        ) from error


def load_adapter(model: ModelConfig) -> Adapter:
    """The adapter of the model's family, with pixels as the model's processor files say.

    Raises ModelError for a value in them that pixels cannot be made by.
    """
    adapter = get_adapter(load_config(model))
    if adapter.vision is not None:
        path = _processor_path(model)
        adapter.vision = vision_of(adapter.vision, lambda name: _find(path, name))
    return adapter


def _processor_path(model: ModelConfig) -> str:
    """The folder or hub id whose processor files count: the tokenizer's where it holds any."""
    for path in (model.tokenizer_path, model.model_path):
        if path and any(_find(path, name) for name in PROCESSOR_FILES):
            return path
    return model.model_path


def build_model(
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    attention: str,
    materialize: bool,
    seed: int = 0,
    tower: bool = True,
) -> nn.Module:
    """A transformers model on the CPU, or on the meta device with `materialize=False`.

    `attention` is the registered attention of the language model; that of the vision tower is the
    adapter's. Buffers are always real, since they are computed and not stored. `init=random` draws
    the weights from `seed`. Without `tower` the vision tower is an empty shell, and its weights are
    not read.

    Raises ModelError where weights are missing or do not fit the configuration.
    """
    config = load_config(model)
    adapter = get_adapter(config)
    cls: Any = adapter.model_class() if tower else _without_tower(adapter)
    hf: Any
    if not materialize:
        with init_empty_weights(include_buffers=False):
            hf = cls._from_config(config, dtype=dtype)
        hf.tie_weights()  # accelerate registers a parameter of its own at every place
    elif model.init == "random":
        hf = _random(cls, config, dtype, seed)
    else:
        hf = _from_pretrained(cls, model, config, dtype)
    hf.set_attn_implementation(_attention_by_part(adapter, config, attention))
    hf.config.use_cache = False
    return hf


def _attention_by_part(adapter: Adapter, config: Any, attention: str) -> str | dict[str, str]:
    """Names of registered attentions as `set_attn_implementation` takes them."""
    if "text_config" not in config.sub_configs:
        return attention
    # A family whose tower does without chunks keeps what transformers chooses.
    if adapter.tower_attention is None:
        return {"text_config": attention}
    register_tower_attention()
    return {"text_config": attention, "vision_config": adapter.tower_attention}


def drop_tower(adapter: Adapter, hf: nn.Module) -> None:
    """Leaves a shell of the vision tower, for who gets visual features from elsewhere."""
    tower = adapter.vision_tower(hf)
    if tower is not None:
        for name, _ in list(tower.named_children()):
            delattr(tower, name)


def _without_tower(adapter: Adapter) -> type:
    """The family's class, of models whose tower is gone before weights are looked for."""
    family: Any = adapter.model_class()

    class Towerless(family):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            tower = adapter.vision_tower(self)
            names = [name.rpartition(".")[2] for name, m in self.named_modules() if m is tower]
            ignored = {rf"(^|\.){name}\." for name in names}
            self._keys_to_ignore_on_load_unexpected = ignored | set(
                self._keys_to_ignore_on_load_unexpected or ()
            )
            drop_tower(adapter, self)

    # transformers renames the weights of its own classes only, which it knows by their module.
    Towerless.__name__, Towerless.__module__ = family.__name__, family.__module__
    return Towerless


def _random(cls: Any, config: Any, dtype: torch.dtype, seed: int) -> nn.Module:
    """Weights that are the same but for rounding in every `dtype`: drawn in float32, then cast."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = cls._from_config(config, dtype=torch.float32)
    for p in hf.parameters():
        p.data = p.data.to(dtype)  # buffers, such as rotary frequencies, stay float32
    return hf


def _from_pretrained(cls: Any, model: ModelConfig, config: Any, dtype: torch.dtype) -> nn.Module:
    with _named("model.model_path", model.model_path):
        hf, info = cls.from_pretrained(
            model.model_path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below by name
            output_loading_info=True,
        )
    wrong = {k: sorted(info[k])[:5] for k in ("missing_keys", "mismatched_keys") if info.get(k)}
    if wrong:
        raise ModelError(
            f"model.model_path={model.model_path}: the weights do not fit the config: "
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
    target.mkdir(parents=True, exist_ok=True)
    config = load_config(model)
    # Loaders outside of transformers choose the class by this entry.
    config.architectures = [get_adapter(config).model_class().__name__]
    config.save_pretrained(target)
    load_tokenizer(model).save_pretrained(target)
    processor_path = _processor_path(model)
    for name in PROCESSOR_FILES:
        _copy(processor_path, name, target)
    _copy(model.model_path, "generation_config.json", target)


def _copy(path: str, name: str, target: Path) -> None:
    """Copies a file of a folder or hub id, if it is there."""
    source = _find(path, name)
    if source is not None:
        shutil.copyfile(source, target / name)


def _find(path: str, name: str) -> Path | None:
    """Where a file of a folder or hub id lies; None where it has none.

    A file of a hub id that is neither on this machine nor to be had now counts as not there, and a
    warning says so.
    """
    source = Path(path, name)
    if not Path(path).is_dir():
        try:
            source = Path(hf_hub_download(path, name))
        except LocalEntryNotFoundError:
            _warn_of_unknown(path, name)
            return None
        except EntryNotFoundError:
            return None
    return source if source.is_file() else None


@cache
def _warn_of_unknown(path: str, name: str) -> None:
    """Says once that nobody knows whether a hub id has a file: the hub could not be asked."""
    offline = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the network may be down"
    logger.warning(
        "%s of %s has not been downloaded to this machine, and the Hugging Face hub could not be "
        "asked for it (%s): going on as if the model had no such file. If it has one, fetch it "
        "where there is a network: hf download %s",
        name, path, offline, path,
    )  # fmt: skip
