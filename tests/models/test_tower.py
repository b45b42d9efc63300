"""A vision tower alone: the same numbers as in the whole model, and nothing else in memory."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import write_tiny_model
from verl.config import ModelConfig
from verl.models import tower as tower_module
from verl.models.adapter import ModelError
from verl.models.fingerprint import checkpoint_fingerprint, tower_fingerprint
from verl.models.loader import build_model, load_adapter
from verl.models.tower import load_tower

CPU = torch.device("cpu")


@pytest.fixture
def random_model(tmp_path) -> ModelConfig:
    return ModelConfig(model_path=str(write_tiny_model(tmp_path / "tiny")), init="random")


@pytest.fixture
def saved(random_model) -> ModelConfig:
    """Weights on disk, in bf16, as released models are."""
    hf: Any = build_model(random_model, dtype=torch.bfloat16, attention="sdpa", materialize=True)
    hf.save_pretrained(random_model.model_path)
    return replace(random_model, init="pretrained")


def encoded(hf: Any, model: ModelConfig, dtype: torch.dtype) -> torch.Tensor:
    pixels = torch.randn(2 * 4 * 6, 1176, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return load_adapter(model).encode(hf, pixels.to(dtype), [(2, 4, 6)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tower_alone_encodes_as_in_the_whole_model_bit_for_bit(saved, dtype, monkeypatch):
    whole = build_model(saved, dtype=dtype, attention="sdpa", materialize=True)
    real = tower_module.build_model

    def build(*args: Any, materialize: bool, **kwargs: Any) -> Any:
        assert not materialize, "the language model was loaded"
        return real(*args, materialize=materialize, **kwargs)

    monkeypatch.setattr(tower_module, "build_model", build)
    hf = load_tower(saved, dtype, CPU)
    assert torch.equal(encoded(hf, saved, dtype), encoded(whole, saved, dtype))
    tower = load_adapter(saved).vision_tower(hf)
    assert tower is not None and tower_fingerprint(tower) == checkpoint_fingerprint(saved, dtype)


def test_the_language_model_stays_on_the_meta_device(saved):
    hf = load_tower(saved, torch.float32, CPU)
    tower = load_adapter(saved).vision_tower(hf)
    assert tower is not None
    own = {id(p) for p in tower.parameters()}
    others = [p for p in hf.parameters() if id(p) not in own]
    assert others and all(p.is_meta for p in others)
    assert own and not any(p.is_meta or p.requires_grad for p in tower.parameters())
    assert not tower.training


def test_weights_under_unknown_names_are_loaded_with_the_whole_model(random_model):
    whole = build_model(random_model, dtype=torch.float32, attention="sdpa", materialize=True)
    hf = load_tower(random_model, torch.float32, CPU)
    assert torch.equal(
        encoded(hf, random_model, torch.float32), encoded(whole, random_model, torch.float32)
    )
    assert hf.lm_head.weight.is_meta


def test_weights_of_another_shape_are_named(saved):
    other = replace(saved, override_config={"vision_config.intermediate_size": 48})
    with pytest.raises(ModelError, match=r"blocks\.0\.mlp.* has the shape .*32.*config says .*48"):
        load_tower(other, torch.float32, CPU)


def other_tower(model: ModelConfig) -> Any:
    hf: Any = build_model(model, dtype=torch.bfloat16, attention="sdpa", materialize=True)
    tower = load_adapter(model).vision_tower(hf)
    assert tower is not None
    with torch.no_grad():
        next(tower.parameters()).add_(1.0)
    return hf


def test_the_tower_is_that_of_the_file_which_transformers_loads(saved):
    """A folder that was saved in shards, and then again in one file, keeps the old index."""
    folder = Path(saved.model_path)
    other_tower(saved).save_pretrained(folder / "old", max_shard_size="10KB")
    for old in (folder / "old").glob("model*"):
        shutil.copy(old, folder / old.name)
    whole = build_model(saved, dtype=torch.float32, attention="sdpa", materialize=True)
    tower = load_adapter(saved).vision_tower(whole)
    assert tower is not None
    assert (folder / "model.safetensors.index.json").exists()
    assert checkpoint_fingerprint(saved, torch.float32) == tower_fingerprint(tower)


def test_an_index_whose_shards_are_gone_is_answered_as_transformers_does(saved):
    folder = Path(saved.model_path)
    other_tower(saved).save_pretrained(folder, max_shard_size="10KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    with pytest.raises(ModelError, match="model_path"):
        checkpoint_fingerprint(saved, torch.float32)
