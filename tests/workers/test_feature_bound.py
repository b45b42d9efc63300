"""Each bound is its own setting: `data.cache_gib` on disk, `data.cache_features_gib` in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_config, write_tiny_model
from tests.workers.tiny_runs import MODEL, lone_rank
from verl.config import ActorConfig, DataConfig, EvalConfig, PPOConfig, SFTConfig
from verl.config.worker import WorkerConfig
from verl.models.adapter import get_adapter
from verl.workers import eval_worker, fsdp_workers
from verl.workers.encoder import MediaEncoder

ALONE: dict[str, Any] = {"rank": 0, "world_size": 1, "device": "cpu", "dp_rank": 0, "dp_size": 1}
GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    get_adapter(tiny_config()).model_class()(tiny_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def bounds(monkeypatch) -> list[tuple[int, int]]:
    """Bytes of memory and of disk of every encoder that is built."""
    seen: list[tuple[int, int]] = []

    class Recorded(MediaEncoder):
        def __init__(self, engine: Any, cache: Any, limit_bytes: int, **kwargs: Any) -> None:
            super().__init__(engine, cache, limit_bytes, **kwargs)
            seen.append((limit_bytes, cache._store.limit_bytes))

    for module in (eval_worker, fsdp_workers):
        monkeypatch.setattr(module, "MediaEncoder", Recorded)
    return seen


def test_features_in_memory_and_frames_on_disk_are_bounded_apart(folder, bounds, tmp_path):
    data = DataConfig(cache_dir=str(tmp_path), cache_gib=3.0, cache_features_gib=0.5)
    model = replace(MODEL, model_path=str(folder))
    worker = WorkerConfig(actor=ActorConfig(model=model))
    with lone_rank():
        ppo = PPOConfig(data=data, worker=worker)
        fsdp_workers.ActorRolloutRefWorker(ppo, 1, **ALONE).init_model()
        sft = SFTConfig(data=data, model=model)
        fsdp_workers.SFTWorker(sft, 1, **ALONE).init_model()
    assert bounds == [(GIB // 2, 3 * GIB)] * 2


def test_the_two_encoders_of_an_evaluation_share_one_bound(folder, bounds, tmp_path):
    data = DataConfig(cache_dir=str(tmp_path), cache_gib=3.0, cache_features_gib=0.5)
    eval_worker.EvalWorker(EvalConfig(model_path=str(folder), data=data), **ALONE).init_model()
    assert bounds == [(GIB // 4, 3 * GIB)] * 2
