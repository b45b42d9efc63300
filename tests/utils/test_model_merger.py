"""The merged folder loads in transformers with nothing missing and the very same numbers."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
from transformers import Qwen2_5_VLForConditionalGeneration as Qwen

from tests.tiny import tiny_config, tiny_tokenizer
from verl.utils.checkpoint import CheckpointDir, CheckpointError, write_shards

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "model_merger.py"
spec = importlib.util.spec_from_file_location("model_merger", SCRIPT)
assert spec is not None and spec.loader is not None
merger = importlib.util.module_from_spec(spec)
spec.loader.exec_module(merger)


def make(root: Path, *, tie: bool, dtype: str | None = None) -> tuple[Path, Qwen]:
    torch.manual_seed(0)
    model = Qwen(tiny_config(tie=tie))
    with CheckpointDir(root, 5) as checkpoint:
        actor = checkpoint.path / "actor"
        write_shards(actor, {"model": model})
        assets = actor / "huggingface"
        config = tiny_config(tie=tie)
        config.dtype = dtype
        config.save_pretrained(assets)
        tiny_tokenizer().save_pretrained(assets)
        (assets / "preprocessor_config.json").write_text('{"patch_size": 14}')
        GenerationConfig(temperature=0.25, do_sample=True).save_pretrained(assets)
        return checkpoint.commit({"step": 5}, config={}) / "actor", model


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def trained(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("run"), tie=request.param)


def load(folder: Path, **kwargs):
    loaded, info = Qwen.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return loaded


def names_in(folder: Path) -> set[str]:
    names = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            names |= set(content.keys())
    return names


def test_transformers_loads_the_same_numbers_with_nothing_missing(trained, tmp_path):
    actor, model = trained
    folder = merger.merge(actor, tmp_path / "merged")
    state = load(folder).state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert isinstance(AutoModelForImageTextToText.from_pretrained(folder), Qwen)


def test_names_are_those_of_published_checkpoints(trained, tmp_path):
    actor, model = trained
    model.save_pretrained(tmp_path / "by_transformers")
    folder = merger.merge(actor, tmp_path / "merged")
    assert names_in(folder) == names_in(tmp_path / "by_transformers")
    assert "visual.patch_embed.proj.weight" in names_in(folder)
    assert ("lm_head.weight" in names_in(folder)) != model.config.tie_word_embeddings


def test_large_models_are_written_in_shards_with_an_index(trained, tmp_path):
    actor, model = trained
    folder = merger.merge(actor, tmp_path / "merged", shard_bytes=80_000)
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(files) >= 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == names_in(folder)
    assert max((folder / f).stat().st_size for f in files) < 90_000
    state = load(folder).state_dict()
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    merger.merge(actor, folder)
    assert [p.name for p in folder.glob("model*")] == ["model.safetensors"]


def test_tokenizer_template_processor_and_generation_config_come_along(trained, tmp_path):
    folder = merger.merge(trained[0], tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    message = [{"role": "user", "content": "what is red"}]
    assert "<|im_start|> user what is red" in tokenizer.apply_chat_template(message, tokenize=False)
    assert GenerationConfig.from_pretrained(folder).temperature == 0.25
    assert json.loads((folder / "preprocessor_config.json").read_text()) == {"patch_size": 14}
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert config["dtype"] == "float32"


def test_the_dtype_of_config_json_is_the_default_and_can_be_overridden(tmp_path):
    actor, model = make(tmp_path, tie=True, dtype="bfloat16")
    folder = merger.merge(actor)
    assert folder == actor / "huggingface"
    loaded = load(folder, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    weight = loaded.model.language_model.embed_tokens.weight
    assert torch.equal(weight, model.model.language_model.embed_tokens.weight.bfloat16())
    merger.merge(actor, dtype=torch.float32)
    assert load(folder, dtype="auto").dtype == torch.float32
    assert merger.main(["--local_dir", str(actor.parent), "--dtype", "bf16"]) == 0
    assert load(folder, dtype="auto").dtype == torch.bfloat16


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained[0].parent, tmp_path / "global_step_5")
    return tmp_path / "global_step_5" / "actor"


@pytest.mark.parametrize(
    "name", ["__0_0.distcp", ".metadata", "huggingface/tokenizer.json", "manifest.json"]
)
def test_a_damaged_file_is_named_and_nothing_is_written(copied, tmp_path, name, capsys):
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 2
    (copied / name).write_bytes(content)
    arguments = ["--local_dir", str(copied), "--output", str(tmp_path / "merged")]
    assert merger.main(arguments) == 2
    assert name.split("/")[-1] in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_folder_that_is_no_checkpoint_says_what_to_give(tmp_path, capsys):
    assert merger.main(["--local_dir", str(tmp_path)]) == 2
    assert "global_step_N/actor" in capsys.readouterr().err


def test_a_config_of_another_size_is_named(copied, tmp_path):
    path = copied / "huggingface" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["vocab_size"] = 65
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has shape \(64, 32\)"):
        merger.merge(copied, tmp_path / "merged")


class FakeHub:
    def __init__(self, existing_is_private: bool | None) -> None:
        self.private, self.uploaded = existing_is_private, False

    def create_repo(self, repo_id, *, private, exist_ok):
        self.private = private if self.private is None else self.private

    def repo_info(self, repo_id):
        return types.SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id, folder_path):
        self.uploaded = True
        return f"hub/{repo_id}"


@pytest.mark.parametrize(
    ("exists", "public", "uploaded", "private"),
    [(None, False, True, True), (None, True, True, False), (True, False, True, True),
     (False, False, False, False), (False, True, True, False)],
)  # fmt: skip
def test_uploads_are_private_unless_public_is_asked_for(
    monkeypatch, tmp_path, exists, public, uploaded, private
):
    hub = FakeHub(exists)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=lambda: hub))
    if uploaded:
        assert merger.upload(tmp_path, "me/model", public=public) == "hub/me/model"
    else:
        with pytest.raises(CheckpointError, match="exists and is public: nothing was uploaded"):
            merger.upload(tmp_path, "me/model", public=public)
    assert (hub.uploaded, hub.private) == (uploaded, private)


def test_a_folder_that_does_not_exist_names_those_that_do(tmp_path):
    for name in ("global_step_10", "global_step_2", "global_step_4.tmp-1"):
        (tmp_path / "run" / name).mkdir(parents=True)
    missing = tmp_path / "run" / "global_step_N" / "actor"
    with pytest.raises(CheckpointError) as caught:
        merger.checkpoint_folder(missing)
    expected = f"{missing}: there is no such folder; there are: global_step_2, global_step_10"
    assert str(caught.value).endswith(expected)
    with pytest.raises(CheckpointError, match="run holds no global_step_N; give checkpoints/"):
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").mkdir()
        merger.checkpoint_folder(missing)
