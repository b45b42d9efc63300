"""The family that docs/add_a_model.md adds, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from tests.tiny import EOS_ID, tiny_tokenizer
from tests.workers.tiny_runs import (
    largest_gap,
    lone_rank,
    tiny_actor,
    tiny_encoder,
    tiny_engine,
    totals_of,
    whole_weights,
)
from verl.config import ModelConfig
from verl.models import adapter as registry
from verl.models import qwen_vl, text_only  # noqa: F401  they register for good, not in a test
from verl.models.loader import build_model
from verl.protocol import DataProto
from verl.rollout import SamplingParams
from verl.rollout.hf_rollout import HFRollout
from verl.sequence_parallel.attention import ATTENTION
from verl.workers.generation import generate

DOCUMENT = Path(__file__).parents[2] / "docs" / "add_a_model.md"


@pytest.fixture
def model(tmp_path, monkeypatch) -> ModelConfig:
    """A tiny Qwen3 whose adapter comes from the document."""
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {"__name__": "documented"})
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, eos_token_id=EOS_ID,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    # A text-only model has no tower to freeze, and this must not matter.
    return ModelConfig(model_path=str(tmp_path), init="random", freeze_vision_tower=False)


def prompts() -> DataProto:
    ids = [torch.tensor([10, 13, 14]), torch.tensor([20, 21, 22, 23, 24, 25])]
    return DataProto(
        {"uid": ["a", "b"], "prompt_ids": ids, "media": [(), ()], "seeds": [(1, 2), (3, 4)]},
        {"sampling": SamplingParams(max_tokens=6, stop_ids=(EOS_ID,)), "kl_coef": 0.0},
    )


def test_the_documented_family_samples_scores_and_learns(model):
    with lone_rank():
        engine = tiny_engine(model.model_path, model)
        empty = build_model(model, dtype=torch.float32, attention=ATTENTION, materialize=False)
        rollout = HFRollout.with_empty_weights(empty, engine.adapter, engine.device, 64)
        rollout.load_weights(engine.named_full_tensors())
        samples = generate(prompts(), engine.adapter, tiny_encoder(engine), rollout)
        batch = prompts().repeat(2).with_columns(response_ids=samples["response_ids"])
        actor = tiny_actor(engine)
        log_probs = actor.log_probs(batch, 1.0)
        for got, expected in zip(log_probs, samples["rollout_logp"], strict=True):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
        before = whole_weights(engine)
        actor.update(batch.with_columns(advantage=[1.0, -1.0, 1.0, -1.0]), totals_of(batch), 1.0)
        assert largest_gap(before, whole_weights(engine)) > 0


def test_its_log_probs_equal_transformers(model):
    hf: Any = build_model(model, dtype=torch.float32, attention="sdpa", materialize=True)
    ids = torch.tensor([10, 13, 14, 40, 41, 42])
    with torch.no_grad():
        expected = hf(input_ids=ids[None]).logits[0].log_softmax(-1)
    with lone_rank():
        engine = tiny_engine(model.model_path, model)
        columns = {"uid": ["a"], "prompt_ids": [ids[:3]], "media": [()], "response_ids": [ids[3:]]}
        (got,) = tiny_actor(engine).log_probs(DataProto(columns), 1.0)
    torch.testing.assert_close(got, expected[[2, 3, 4], ids[3:]], atol=1e-5, rtol=0)


def test_a_configuration_that_packed_attention_cannot_run_is_refused(model):
    with pytest.raises(ValueError, match="no sliding window"):
        from verl.models.loader import load_config

        config = load_config(model)
        config.use_sliding_window = True
        registry.get_adapter(config)
