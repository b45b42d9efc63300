"""What entry points share: devices, the length of a run, and errors of a start."""

from __future__ import annotations

import pytest
import torch

from verl.config import TrainerConfig
from verl.data.media_files import BadMedia
from verl.data.sources import DataError
from verl.models.adapter import ModelError
from verl.single_controller.failures import WorkerDied
from verl.trainer import launch
from verl.utils.exits import Explained
from verl.utils.manifest import CheckpointError
from verl.workers.reward import RewardError

WRONG = [
    launch.StartError("too few GPUs"),
    DataError("rows.jsonl:3: bad JSON"),
    BadMedia("empty", "clip.mp4", "the file has no bytes"),
    ModelError("no such family"),
    CheckpointError("checkpoint global_step_2 is damaged"),
    RewardError("reward.py cannot be loaded"),
]


@pytest.mark.parametrize("error", WRONG, ids=lambda e: type(e).__name__)
def test_wrong_input_ends_a_start_with_code_2_and_a_run_with_code_1(error):
    assert isinstance(error, Explained) and error.user_message == str(error)
    assert error.exit_code == 1
    with pytest.raises(type(error)) as caught, launch.starting():
        raise error
    assert caught.value.exit_code == 2


def test_a_worker_that_dies_during_the_start_is_no_wrong_input():
    with pytest.raises(WorkerDied) as caught, launch.starting():
        raise WorkerDied(1, "init_model", "out of memory")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"), [(3, None, 12), (3, 5, 5), (1, 5, 4), (2, 8, 8)]
)
def test_the_smaller_of_epochs_and_max_steps_ends_a_run(epochs, max_steps, steps):
    trainer = TrainerConfig(total_epochs=epochs, max_steps=max_steps)
    assert launch.total_steps(trainer, batches_per_epoch=4) == steps


def test_fewer_rows_than_a_batch_name_the_setting():
    with pytest.raises(launch.StartError, match=r"data\.rollout_batch_size"):
        launch.total_steps(TrainerConfig(), batches_per_epoch=0)


def gpus(monkeypatch, n: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)


@pytest.mark.parametrize(
    ("wanted", "there", "device"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda"), ("cpu", 2, "cpu"), ("cuda", 4, "cuda")],
)
def test_auto_takes_the_gpus_where_there_are_any(monkeypatch, wanted, there, device):
    gpus(monkeypatch, there)
    assert launch.resolve_device(wanted, n_devices=2) == device


def test_missing_gpus_are_told_with_what_to_type(monkeypatch):
    gpus(monkeypatch, 1)
    with pytest.raises(launch.StartError, match=r"has 1 GPUs; set trainer\.n_gpus_per_node=1"):
        launch.resolve_device("auto", n_devices=2)
    gpus(monkeypatch, 0)
    with pytest.raises(launch.StartError, match=r"has 0 GPUs; set trainer\.device=cpu"):
        launch.resolve_device("cuda", n_devices=2)
