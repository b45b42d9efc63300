"""A vision tower alone: the same numbers as in the whole model, and nothing else in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from verl.config import ModelConfig
from verl.models import tower as tower_module
from verl.models.adapter import ModelError
from verl.models.fingerprint import checkpoint_fingerprint, tower_fingerprint
from verl.models.loader import build_model, load_adapter
from verl.models.tower import load_tower

CPU = torch.device("cpu")


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


def tower_that_transformers_loads(model: ModelConfig) -> str:
    hf = build_model(model, dtype=torch.float32, attention="sdpa", materialize=True)
    tower = load_adapter(model).vision_tower(hf)
    assert tower is not None
    return tower_fingerprint(tower)


def tower_alone(model: ModelConfig) -> str:
    tower = load_adapter(model).vision_tower(load_tower(model, torch.float32, CPU))
    assert tower is not None
    return tower_fingerprint(tower)


def save(model: ModelConfig, seed: int, **how: Any) -> None:
    """Weights of their own into the folder of a model, beside whatever is there."""
    hf: Any = build_model(
        replace(model, init="random"), dtype=torch.float32, attention="sdpa", materialize=True,
        seed=seed,
    )  # fmt: skip
    hf.save_pretrained(model.model_path, **how)


@pytest.mark.parametrize("left", ["index", "index and shards"])
def test_a_stale_index_beside_a_whole_file_is_not_believed(random_model, left):
    model, folder = replace(random_model, init="pretrained"), Path(random_model.model_path)
    save(model, 0, max_shard_size="20KB")
    stale = tower_alone(model)
    older = {path: path.read_bytes() for path in folder.glob("model*.safetensors*")}
    save(model, 1)
    for path, content in older.items():
        if left == "index and shards" or path.suffix == ".json":
            path.write_bytes(content)
    assert (folder / "model.safetensors.index.json").exists()
    expected = tower_that_transformers_loads(model)
    assert expected != stale
    assert tower_alone(model) == checkpoint_fingerprint(model, torch.float32) == expected


def test_a_file_of_weights_that_the_config_names_goes_before_others(random_model):
    model, folder = replace(random_model, init="pretrained"), Path(random_model.model_path)
    save(model, 0)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    save(model, 1)
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (folder / "config.json").write_text(json.dumps(config))
    assert tower_alone(model) == tower_that_transformers_loads(model)


def test_a_missing_shard_is_named_as_in_any_loading(random_model):
    model = replace(random_model, init="pretrained")
    save(model, 0, max_shard_size="20KB")
    lost = sorted(Path(model.model_path).glob("model-*.safetensors"))[-1]
    lost.unlink()
    with pytest.raises(ModelError, match=lost.name):
        load_tower(model, torch.float32, CPU)
    with pytest.raises(ModelError, match=lost.name):
        checkpoint_fingerprint(model, torch.float32)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_of_several_towers_in_a_file_the_one_that_transformers_loads_is_taken(saved, seed):
    """The order of a set of names depends on the seed of hashes, so other names are tried."""
    path = f"{saved.model_path}/model.safetensors"
    tensors = load_file(path)
    others = {
        f"{prefix}.{name}": tensor + 1
        for name, tensor in tensors.items()
        for prefix in ("a", "ema", "zz", f"copy{seed}")
        if "visual." in name
    }
    save_file(tensors | others, path, {"format": "pt"})
    expected = tower_that_transformers_loads(saved)
    assert tower_alone(saved) == checkpoint_fingerprint(saved, torch.float32) == expected


@pytest.fixture
def with_buffer(monkeypatch) -> None:
    """A family whose tower keeps a buffer in its checkpoints."""
    cls = modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel
    real = cls.__init__

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self.register_buffer("scale", torch.ones(3))

    monkeypatch.setattr(cls, "__init__", build)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_that_a_checkpoint_holds_are_loaded(with_buffer, random_model, dtype):
    model = replace(random_model, init="pretrained")
    hf: Any = build_model(random_model, dtype=torch.float32, attention="sdpa", materialize=True)
    hf.model.visual.scale.copy_(torch.tensor([2.0, 3.0, 4.0]))
    hf.save_pretrained(model.model_path)
    tower: Any = load_adapter(model).vision_tower(load_tower(model, dtype, CPU))
    assert tower.scale.tolist() == [2, 3, 4]
    whole: Any = build_model(model, dtype=dtype, attention="sdpa", materialize=True)
    expected = tower_fingerprint(whole.model.visual)
    assert tower_fingerprint(tower) == checkpoint_fingerprint(model, dtype) == expected


def test_a_buffer_that_a_checkpoint_lacks_is_named(saved, with_buffer):
    with pytest.raises(ModelError, match=r"visual\.scale"):
        load_tower(saved, torch.float32, CPU)


def test_random_buffers_are_those_of_the_whole_model(random_model, with_buffer):
    assert tower_alone(random_model) == checkpoint_fingerprint(random_model, torch.float32)
