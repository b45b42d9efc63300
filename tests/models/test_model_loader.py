"""Models, tokenizers and their messages, from folders that lack something."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from tests.tiny import EOS_ID, write_tiny_model
from verl.config import ModelConfig
from verl.models.adapter import ModelError
from verl.models.loader import (
    _find,
    build_model,
    load_adapter,
    load_config,
    load_tokenizer,
    materialize,
    save_assets,
)
from verl.sequence_parallel.attention import ATTENTION, register_attention

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path) -> ModelConfig:
    return ModelConfig(model_path=str(write_tiny_model(tmp_path / "tiny")), init="random")


def build(model: ModelConfig, **kwargs: Any) -> Any:
    settings = {"dtype": torch.float32, "attention": "sdpa", "materialize": True} | kwargs
    return build_model(model, **settings)


def weights_of(hf: Any) -> dict[str, torch.Tensor]:
    return dict(hf.named_parameters())


def test_overrides_reach_nested_entries(model):
    nested = {"text_config": {"num_hidden_layers": 1}, "vision_config.depth": 1}
    config = load_config(replace(model, override_config=nested))
    assert config.text_config.num_hidden_layers == 1
    assert config.vision_config.depth == 1
    hf = build(replace(model, override_config=nested))
    assert len(load_adapter(model).decoder_layers(hf)) == 1


@pytest.mark.parametrize(
    "key", ["num_hiden_layers", "text_config.num_hiden_layers", "txt_config.num_hidden_layers"]
)
def test_an_override_that_the_model_does_not_have_is_named(model, key):
    with pytest.raises(ModelError, match=rf"override_config\.{key}=3: Qwen2_5_VLConfig has no"):
        load_config(replace(model, override_config={key: 3}))


def test_missing_weights_say_which_folder_lacks_them(model):
    with pytest.raises(ModelError) as error:
        build(replace(model, init="pretrained"))
    assert f"model.model_path={model.model_path}" in str(error.value)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("change", ["missing", "other shape"])
def test_weights_that_do_not_fit_the_config_are_named(model, change):
    weights = {k: p.detach().clone() for k, p in build(model).named_parameters()}
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del weights[name]
    else:
        weights[name] = weights[name][:-1].clone()
    save_file(weights, f"{model.model_path}/model.safetensors")
    with pytest.raises(ModelError) as error:
        build(replace(model, init="pretrained"))
    assert "do not fit the config" in str(error.value)
    assert name in str(error.value)


def test_stored_weights_are_loaded_exactly_and_surplus_ones_are_logged(model, caplog):
    weights = {k: p.detach().clone() for k, p in build(model, seed=5).named_parameters()}
    save_file(weights | {"extra.weight": torch.ones(2)}, f"{model.model_path}/model.safetensors")
    with caplog.at_level("WARNING"):
        loaded = weights_of(build(replace(model, init="pretrained"), seed=9))
    assert all(torch.equal(loaded[k], v) for k, v in weights.items())
    assert "weights without a place: ['extra.weight']" in caplog.text


@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_a_hub_id_that_is_not_on_disk_says_so_when_offline(monkeypatch, load):
    monkeypatch.setattr("verl.models.loader.is_offline_mode", lambda: True)
    with pytest.raises(ModelError) as error:
        load(ModelConfig(model_path="Qwen/Qwen2.5-VL-99B-Instruct"))
    message = str(error.value)
    assert "_path=Qwen/Qwen2.5-VL-99B-Instruct: there is no such folder" in message
    assert "HF_HUB_OFFLINE is set" in message
    assert "hf download Qwen/Qwen2.5-VL-99B-Instruct" in message
    assert "\n" not in message


def test_a_folder_of_an_unknown_kind_keeps_the_reason_of_transformers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(ModelError, match=rf"model_path={tmp_path}: .*model_type"):
        load_config(ModelConfig(model_path=str(tmp_path)))


def test_a_tokenizer_without_a_chat_template_is_refused_with_what_to_add(model):
    folder = model.model_path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder + "-plain")
    bare = replace(model, tokenizer_path=folder + "-plain")
    with pytest.raises(ModelError, match=r"-plain: the tokenizer has no chat template; put chat_"):
        load_tokenizer(bare)
    assert load_tokenizer(model).chat_template


def test_random_weights_follow_from_the_seed_and_leave_the_generator_alone(model):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (weights_of(build(model, seed=s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[k], again[k]) for k in first)
    changed = [k for k in first if not torch.equal(first[k], other[k])]
    assert "model.language_model.embed_tokens.weight" in changed
    assert "model.visual.blocks.0.attn.qkv.weight" in changed


def test_random_weights_in_bf16_are_the_float32_ones_rounded(model):
    exact, rounded = build(model), build(model, dtype=torch.bfloat16)
    for name, p in exact.named_parameters():
        assert torch.equal(rounded.get_parameter(name), p.to(torch.bfloat16)), name
    for name, b in exact.named_buffers():
        assert torch.equal(rounded.get_buffer(name), b), name


def test_a_model_without_memory_becomes_real_with_ties_kept(model):
    hf = build(model, materialize=False)
    assert all(p.is_meta for p in hf.parameters())
    assert not any(b.is_meta for b in hf.buffers())
    materialize(hf, CPU)
    assert not any(p.is_meta for p in hf.parameters())
    assert hf.lm_head.weight is hf.model.language_model.embed_tokens.weight
    assert hf.state_dict().keys() == build(model).state_dict().keys()


def test_only_the_language_model_gets_the_packed_attention(model):
    register_attention()
    hf = build(model, attention=ATTENTION)
    assert hf.config.text_config._attn_implementation == ATTENTION
    assert hf.config.vision_config._attn_implementation != ATTENTION


def test_assets_make_a_folder_that_loads_without_the_project(model, tmp_path):
    changed = replace(model, override_config={"text_config.max_position_embeddings": 123})
    source, target = tmp_path / "tiny", tmp_path / "out" / "assets"
    (source / "preprocessor_config.json").write_text('{"patch_size": 14}')
    (source / "generation_config.json").write_text('{"top_k": 7}')
    save_assets(changed, target)
    config = AutoConfig.from_pretrained(target)
    assert config.text_config.max_position_embeddings == 123
    assert config.architectures == ["Qwen2_5_VLForConditionalGeneration"]
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.chat_template == load_tokenizer(model).chat_template
    assert tokenizer.eos_token_id == EOS_ID
    assert json.loads((target / "preprocessor_config.json").read_text()) == {"patch_size": 14}
    assert json.loads((target / "generation_config.json").read_text()) == {"top_k": 7}


def test_assets_take_the_processor_from_where_the_tokenizer_is(model, tmp_path):
    other = write_tiny_model(tmp_path / "other")
    (other / "preprocessor_config.json").write_text('{"patch_size": 28}')
    (tmp_path / "tiny" / "preprocessor_config.json").write_text('{"patch_size": 14}')
    save_assets(replace(model, tokenizer_path=str(other)), tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert kept == {"patch_size": 28}


def test_a_tokenizer_folder_without_processor_files_leaves_them_to_the_model(model, tmp_path):
    other = write_tiny_model(tmp_path / "other")
    bounds = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    (tmp_path / "tiny" / "preprocessor_config.json").write_text(json.dumps(bounds))
    apart = replace(model, tokenizer_path=str(other))
    spec = load_adapter(apart).vision
    assert spec is not None and (spec.min_pixels, spec.max_pixels) == (28 * 28, 56 * 56)
    save_assets(apart, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == bounds
    # Where the tokenizer has any of its own, they count alone: files of two models do not mix.
    (other / "video_preprocessor_config.json").write_text('{"max_pixels": 123456}')
    spec = load_adapter(apart).vision
    assert spec is not None and spec.video_max_pixels == 123456
    assert spec.max_pixels == 16384 * 28 * 28


def test_a_file_that_the_hub_could_not_be_asked_for_is_told_apart_from_one_that_is_not_there(
    monkeypatch, caplog
):
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    known = {"preprocessor_config.json"}

    def download(repo: str, name: str) -> str:
        raise (EntryNotFoundError if name in known else LocalEntryNotFoundError)(name)

    monkeypatch.setattr("verl.models.loader.hf_hub_download", download)
    monkeypatch.setattr("verl.models.loader.is_offline_mode", lambda: True)
    assert _find("some/unheard-of", "preprocessor_config.json") is None
    assert not caplog.records
    for _ in range(2):
        assert _find("some/unheard-of", "video_preprocessor_config.json") is None
    (record,) = caplog.records
    message = record.getMessage()
    assert "video_preprocessor_config.json of some/unheard-of has not been downloaded" in message
    assert "HF_HUB_OFFLINE is set" in message and "hf download some/unheard-of" in message


def test_assets_of_a_hub_id_come_from_what_was_downloaded(model, tmp_path, monkeypatch):
    cached = {"generation_config.json": tmp_path / "cached.json"}
    cached["generation_config.json"].write_text('{"top_k": 9}')
    monkeypatch.setattr("verl.models.loader.load_config", lambda _: load_config(model))
    monkeypatch.setattr("verl.models.loader.load_tokenizer", lambda _: load_tokenizer(model))

    def download(repo: str, name: str) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        assert repo == "some/model"
        if name not in cached:
            raise LocalEntryNotFoundError(name)
        return str(cached[name])

    monkeypatch.setattr("verl.models.loader.hf_hub_download", download)
    save_assets(replace(model, model_path="some/model"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"top_k": 9}
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()
