"""What entry points share: devices, the length of a run, and errors of a start."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch

from tests.trainer.loops import Numbers
from verl.config import DataConfig, ModelConfig, PPOConfig, RolloutConfig, TrainerConfig
from verl.config.schema import with_values
from verl.data.media_files import BadMedia
from verl.data.sources import DataError
from verl.models.adapter import ModelError
from verl.single_controller.failures import WorkerDied
from verl.trainer import launch
from verl.utils.exits import Explained, Interrupted, UserError
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


@pytest.mark.parametrize("setting", ["data.rollout_batch_size", "batch.global_batch_size"])
def test_fewer_rows_than_a_batch_name_the_setting_of_this_program_alone(tmp_path, setting):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"problem": "?", "answer": "A"}\n')
    data = DataConfig(train_files=[str(file)])
    rows, cache = Numbers(data, data.train_files, lambda row: ("problem",)), Any
    with pytest.raises(launch.StartError) as caught:
        launch.train_loader(rows, data, cache, 64, setting)
    text = str(caught.value)
    assert text.startswith(f"{setting}=64, but ") and f"set {setting} to at most 1" in text
    assert ("global_batch_size" in text) != ("rollout_batch_size" in text)


@pytest.mark.parametrize(("max_steps", "said"), [(20, True), (15, False), (None, False)])
def test_epochs_that_end_before_max_steps_are_told(caplog, max_steps, said):
    launch.warn_of_short_epochs(TrainerConfig(max_steps=max_steps, total_epochs=1), 15)
    text = "trainer.max_steps=20, but trainer.total_epochs=1 gives 15 steps"
    assert (text in caplog.text) == said


def test_a_run_that_a_signal_stops_is_stopped_and_has_not_failed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trainer = TrainerConfig(output_dir=str(tmp_path), logger=["console"])
    for error, status in ((Interrupted(2), "stopped"), (ValueError(), "failed")):
        with pytest.raises(type(error)), launch.tracker_for(trainer, {}, 0) as tracker:
            tracker.resume(0)
            raise error
        assert caplog.messages[-1] == f"run {status}"


def test_workers_are_announced_before_the_wait_for_them(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(launch, "ray_session", lambda **_: None)
    launch.ray_for(2, "cpu")
    assert "starting 2 workers on cpu" in caplog.text


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


@pytest.mark.parametrize("kernel", ["flash", "flash_attn"])
def test_flash_attention_on_a_machine_without_a_gpu_names_the_setting(kernel):
    flash = ModelConfig(attn_implementation=kernel)
    launch.check_attention(flash, "cuda", "model")
    launch.check_attention(ModelConfig(), "cpu", "model")
    with pytest.raises(
        launch.StartError, match=rf"^model\.attn_implementation={kernel} needs CUDA"
    ):
        launch.check_attention(flash, "cpu", "model")


def fail_in(folder, error: Exception) -> list[str]:
    """Ends a run in `folder` with an error; the notes that it has then."""
    trainer = TrainerConfig(output_dir=str(folder), logger=["file"])
    with pytest.raises(type(error)) as caught, launch.tracker_for(trainer, {}, 0):
        raise error
    return caught.value.__notes__


def test_the_traceback_of_a_failed_run_is_kept_without_secrets(tmp_path):
    error = UserError("too much for hf_" + "a" * 20)
    error.add_note("Raised by worker rank 1 in update().\n  File deep.py, line 7")
    assert fail_in(tmp_path / "out", error)[-1] == f"The traceback is in {tmp_path}/out/error.txt."
    text = (tmp_path / "out" / "error.txt").read_text()
    assert "Traceback" in text and "in fail_in" in text and "deep.py, line 7" in text
    assert "hf_a" not in text


def test_a_run_that_ends_well_leaves_no_error_of_an_earlier_attempt(tmp_path):
    fail_in(tmp_path, ValueError("first attempt"))
    with launch.tracker_for(TrainerConfig(output_dir=str(tmp_path), logger=["file"]), {}, 0):
        pass
    assert not (tmp_path / "error.txt").exists()


def test_a_traceback_that_cannot_be_written_does_not_hide_the_error(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    error = UserError("the disk is full")
    trainer = TrainerConfig(output_dir=str(tmp_path / "file" / "out"), logger=["console"])
    with pytest.raises(UserError, match="the disk is full"), launch.tracker_for(trainer, {}, 0):
        raise error
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize(
    ("device", "installed", "settings", "engine", "why"),
    [
        ("cpu", True, {}, "hf", "this run has no GPU"),
        ("cuda", False, {}, "hf", "vLLM is not installed"),
        ("cuda", True, {"top_p": 0.9}, "hf", "worker.rollout.top_p=0.9 leaves words out"),
        ("cuda", True, {}, "vllm", "vLLM is installed"),
        ("cpu", False, {"name": "vllm"}, "vllm", None),
    ],
)
def test_auto_is_vllm_on_gpus_where_it_is_installed(
    device, installed, settings, engine, why, monkeypatch, caplog
):
    monkeypatch.setattr(
        launch.importlib.util, "find_spec", lambda name: object() if installed else None
    )
    with caplog.at_level("INFO"):
        found = launch.resolve_rollout(RolloutConfig(**settings), device, "worker.rollout.")
    assert found.name == engine
    said = f"worker.rollout.name=auto: {engine}, since {why}"
    assert (said in caplog.text) == (why is not None)


@pytest.mark.parametrize(("engine", "level"), [("hf", None), ("vllm", "token")])
def test_only_another_engines_samples_are_weighed_by_default(engine, level):
    config = with_values(PPOConfig(), {"worker.rollout.name": engine})
    found = launch.resolve_correction(config).algorithm.rollout_correction
    assert found.rollout_is == level and found.is_on == (level is not None)
    key = "algorithm.rollout_correction.rollout_is"
    for said in (None, "sequence"):
        kept = launch.resolve_correction(with_values(config, {key: said}))
        assert kept.algorithm.rollout_correction.rollout_is == said


@pytest.mark.parametrize(
    ("settings", "device", "said"),
    [
        ({"temperature": 0.005}, "cuda", "worker.rollout.temperature=0.005: vllm takes 0, or "),
        (
            {"val_override_config": {"temperature": 3}},
            "cuda",
            "worker.rollout.val_override_config.temperature=3: vllm takes",
        ),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 9},
            "cuda",
            "worker.rollout.enable_chunked_prefill=false needs",
        ),
        ({"tensor_parallel_size": 3}, "cuda", "worker.rollout.tensor_parallel_size=3 must divide"),
        ({}, "cpu", "compile_pointwise=on with worker.rollout.name=vllm on CPUs"),
    ],
)
def test_what_auto_stands_for_is_checked_like_a_name(settings, device, said):
    model, data = ModelConfig(compile_pointwise="on"), DataConfig()
    vllm = RolloutConfig(name="vllm", **settings)
    with pytest.raises(launch.StartError, match=re.escape(said)):
        launch.check_engine(vllm, model, data, 2, device, "worker.rollout.")
    for fine in (RolloutConfig(name="vllm"), RolloutConfig(name="hf", temperature=0.005)):
        launch.check_engine(fine, ModelConfig(), data, 2, device, "worker.rollout.")
