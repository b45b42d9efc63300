"""The name of a tower's weights: the same wherever they are loaded, another once they move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from verl.config import ModelConfig
from verl.data.embed_store import EmbedKey, Embeds, EmbedStore
from verl.models import fingerprint
from verl.models.fingerprint import checkpoint_fingerprint, tower_fingerprint
from verl.models.loader import build_model, load_adapter


def tower_of(model: ModelConfig, dtype: torch.dtype = torch.float32) -> Any:
    hf = build_model(model, dtype=dtype, attention="sdpa", materialize=True)
    tower = load_adapter(model).vision_tower(hf)
    assert tower is not None
    return tower


def test_the_same_weights_have_the_same_name_in_every_process(random_model):
    assert tower_fingerprint(tower_of(random_model)) == tower_fingerprint(tower_of(random_model))


def test_any_moved_weight_gives_another_name(random_model):
    tower = tower_of(random_model)
    seen = {tower_fingerprint(tower)}
    parameters = list(tower.parameters())
    for parameter in parameters:
        value = parameter.data.view(-1)
        value[-1] = torch.nextafter(value[-1], torch.tensor(10.0))
        seen.add(tower_fingerprint(tower))
    assert len(seen) == 1 + len(parameters)


def test_once_the_tower_trains_its_stored_features_are_missed(random_model, tmp_path):
    tower = tower_of(random_model)
    store = EmbedStore(tmp_path / "store", 10**9)

    def key() -> EmbedKey:
        return EmbedKey(
            media="ab" * 16,
            family="qwen2_5_vl",
            weights=tower_fingerprint(tower),
            dtype=torch.float32,
        )

    kept = Embeds(
        torch.ones(4, 8), grid_thw=(1, 4, 4), seconds_per_grid=1.0, frame_times=[0.0], path="x"
    )
    store.put(key(), kept)
    assert store.get(key()) is not None
    optimizer = torch.optim.SGD(tower.parameters(), lr=1e-3)
    tower(torch.randn(16, 1176), grid_thw=torch.tensor([[1, 4, 4]])).pooler_output.sum().backward()
    optimizer.step()
    assert store.get(key()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_files_tell_the_name_of_the_tower_without_loading_it(saved, dtype, monkeypatch):
    expected = tower_fingerprint(tower_of(saved, dtype))
    real = fingerprint.build_model

    def build(*args: Any, materialize: bool, **kwargs: Any) -> Any:
        assert not materialize, "the tower was loaded"
        return real(*args, materialize=materialize, **kwargs)

    monkeypatch.setattr(fingerprint, "build_model", build)
    assert checkpoint_fingerprint(saved, dtype) == expected


def test_files_in_several_parts_and_older_names_are_the_same_tower(saved, tmp_path):
    expected = checkpoint_fingerprint(saved, torch.float32)
    path = f"{saved.model_path}/model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert any(name.startswith("visual.") for name in tensors) or any(
        name.startswith("model.visual.") for name in tensors
    )
    older = {name.replace("visual.", "vision.encoder.visual."): t for name, t in tensors.items()}
    save_file(older, path, {"format": "pt"})
    assert checkpoint_fingerprint(saved, torch.float32) == expected
    save_file(tensors, path, {"format": "pt"})
    hf: Any = build_model(saved, dtype=torch.bfloat16, attention="sdpa", materialize=True)
    hf.save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").exists()
    parts = replace(saved, model_path=str(tmp_path / "parts"))
    assert checkpoint_fingerprint(parts, torch.float32) == expected


def test_random_weights_are_named_as_built(random_model):
    expected = tower_fingerprint(tower_of(random_model))
    assert checkpoint_fingerprint(random_model, torch.float32) == expected


def test_precision_and_settings_of_the_tower_are_part_of_the_name(saved):
    other = replace(saved, override_config={"vision_config.window_size": 28})
    names = {
        checkpoint_fingerprint(saved, torch.float32),
        checkpoint_fingerprint(saved, torch.bfloat16),
        checkpoint_fingerprint(other, torch.float32),
    }
    assert len(names) == 3


def test_the_language_model_is_no_part_of_the_name(saved):
    hf: Any = build_model(saved, dtype=torch.float32, attention="sdpa", materialize=True)
    before = tower_fingerprint(hf.model.visual)
    hf.lm_head.weight.data.add_(1)
    assert tower_fingerprint(hf.model.visual) == before


def test_weights_that_are_not_whole_are_refused():
    with pytest.raises(ValueError, match=r"weight is not whole on this rank"):
        tower_fingerprint(nn.Linear(2, 2, device="meta"))


def test_rounded_rotary_frequencies_give_another_name(random_model):
    tower = tower_of(random_model, torch.bfloat16)
    before = tower_fingerprint(tower)
    frequencies = {name: b.dtype for name, b in tower.named_buffers() if "inv_freq" in name}
    assert set(frequencies.values()) == {torch.float32}
    tower.to(torch.bfloat16)  # Casts buffers, too, and so changes what the tower computes.
    assert tower_fingerprint(tower) != before
