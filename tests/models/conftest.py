"""Tiny models with weights: drawn, and in files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.tiny import write_tiny_model
from verl.config import ModelConfig
from verl.models.loader import build_model


@pytest.fixture
def random_model(tmp_path) -> ModelConfig:
    return ModelConfig(model_path=str(write_tiny_model(tmp_path / "tiny")), init="random")


@pytest.fixture
def saved(random_model) -> ModelConfig:
    """Weights on disk, in bf16, as released models are."""
    hf: Any = build_model(random_model, dtype=torch.bfloat16, attention="sdpa", materialize=True)
    hf.save_pretrained(random_model.model_path)
    return replace(random_model, init="pretrained")
