"""A checkpoint knows its frozen tower: features stored under one name are never another's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_config, write_tiny_model
from tests.workers.tiny_runs import MODEL, lone_rank, tiny_engine
from verl.models.adapter import get_adapter
from verl.utils.manifest import CheckpointError
from verl.utils.shards import read_shards, write_shards
from verl.workers.fsdp_engine import FSDPEngine

TRAINED = replace(MODEL, init="pretrained")


def write_weights(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    write_tiny_model(folder)
    get_adapter(tiny_config()).model_class()(tiny_config()).save_pretrained(folder)
    return folder


def save(engine: FSDPEngine, folder: Path) -> Path:
    write_shards(folder, engine.checkpoint_state(), engine.rank_state())
    return folder


def load(engine: FSDPEngine, folder: Path) -> None:
    engine.restore(read_shards(folder, engine.checkpoint_state()))


@pytest.mark.parametrize("has_tower", [True, False])
def test_a_checkpoint_of_another_tower_than_the_model_folders_is_refused(tmp_path, has_tower):
    model = write_weights(tmp_path / "model", seed=0)
    with lone_rank():
        checkpoint = save(tiny_engine(model, TRAINED), tmp_path / "checkpoint")
        load(tiny_engine(model, TRAINED, has_tower=has_tower), checkpoint)
        write_weights(model, seed=1)  # the stage before was run again, into the same folder
        with pytest.raises(CheckpointError, match=r"vision tower .* is not that of model_path="):
            load(tiny_engine(model, TRAINED, has_tower=has_tower), checkpoint)


def test_checkpoints_with_and_without_a_tower_are_the_same(tmp_path):
    model = write_weights(tmp_path / "model", seed=0)
    with lone_rank():
        whole, bare = (tiny_engine(model, TRAINED, has_tower=has) for has in (True, False))
        assert not [n for n, _ in bare.policy.hf.named_parameters() if "visual" in n]
        assert whole.feature_name == bare.feature_name
        tables = [
            dict(torch_tensors(save(engine, tmp_path / name)))
            for engine, name in ((whole, "whole"), (bare, "bare"))
        ]
        assert tables[0].keys() == tables[1].keys()
        for name, tensor in tables[0].items():
            assert torch.equal(tensor, tables[1][name]), name
        load(whole, tmp_path / "bare")
        load(bare, tmp_path / "whole")


def torch_tensors(folder: Path):
    from verl.utils.safe_dcp import load_tensors, read_metadata, tensor_table

    metadata = read_metadata(folder)
    tensors = {
        name: torch.empty(shape, dtype=dtype)
        for name, (dtype, shape) in tensor_table(metadata).items()
        if name.startswith("model.")
    }
    load_tensors(folder, tensors, metadata)
    return tensors.items()
