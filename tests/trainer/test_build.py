"""What RL and SFT look at before Ray starts."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from tests.e2e.jobs import Job, rl_job, sft_job
from tests.trainer.loops import OneNumber
from verl.config import PPOConfig, SFTConfig, load, to_dict
from verl.data.sources import DataError
from verl.trainer import build, launch, sft_trainer
from verl.trainer.checkpoints import Checkpoints
from verl.utils import torch_functional

PROGRAMS = {"rl": (build, PPOConfig, rl_job), "sft": (sft_trainer, SFTConfig, sft_job)}


class RayStarts(Exception):
    """The checks are over."""


@pytest.fixture(params=PROGRAMS)
def program(request, tmp_path, monkeypatch) -> tuple[Any, Any, Job]:
    """(module with `build`, root of the config, job); `build` raises RayStarts where it ends."""
    module, root, make = PROGRAMS[request.param]

    def ray_for(*_args: Any) -> None:
        raise RayStarts

    monkeypatch.setattr(launch, "ray_for", ray_for)
    return module, root, make(tmp_path)


def start(program: tuple[Any, Any, Job], *changes: str) -> None:
    module, root, job = program
    with ExitStack() as stack:
        module.build(load([f"config={job.config}", *changes], root), stack)


def test_a_changed_length_of_the_run_is_compared_in_steps(program, monkeypatch):
    asked = []

    def note(_self: Checkpoints, optim: Any, section: str, steps_of: Any) -> None:
        asked.append((optim.lr, section, steps_of))

    monkeypatch.setattr(Checkpoints, "warn_of_bent_schedule", note)
    out = f"trainer.save_checkpoint_path={program[2].out}"
    with pytest.raises(RayStarts):
        start(program, out)
    ((lr, section, steps_of),) = asked
    trainer = load([f"config={program[2].config}", "trainer.max_steps=3"], program[1]).trainer
    assert lr == 1e-2 and section in ("optim", "worker.actor.optim") and steps_of(trainer) == 3


def test_flash_attention_without_a_gpu_is_refused(program, monkeypatch):
    monkeypatch.setattr(launch, "resolve_device", lambda *_: "cpu")
    prefix = "worker.actor." if program[1] is PPOConfig else ""
    with pytest.raises(launch.StartError, match=f"^{prefix}model.attn_implementation=flash needs"):
        start(program, f"{prefix}model.attn_implementation=flash", "trainer.device=auto")


def test_compiling_on_a_cpu_without_a_compiler_is_refused_before_ray(program, monkeypatch):
    monkeypatch.setattr(torch_functional.shutil, "which", lambda name: None)
    key = "worker.actor.model" if program[1] is PPOConfig else "model"
    with pytest.raises(launch.StartError) as caught:
        start(program, f"{key}.compile_pointwise=on")
    text = str(caught.value)
    assert text.startswith(f"{key}.compile_pointwise=on: there is no C++ compiler")
    assert text.endswith(f"install one, or use {key}.compile_pointwise=auto")


def test_compiling_on_a_cpu_is_asked_for_where_there_is_a_compiler(program, monkeypatch):
    monkeypatch.setattr(torch_functional.shutil, "which", lambda name: f"/usr/bin/{name}")
    key = "worker.actor.model" if program[1] is PPOConfig else "model"
    with pytest.raises(RayStarts):
        start(
            program,
            f"{key}.compile_pointwise=on",
            f"trainer.save_checkpoint_path={program[2].out}",
        )


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_video_is_found_before_ray_and_leaves_no_folder(program, split):
    folder = program[2].folder / split
    for clip in folder.glob("clip*.mp4"):
        clip.unlink()
    out = f"trainer.save_checkpoint_path={program[2].out}"
    with pytest.raises(DataError, match=r"rows cannot be used.*") as caught:
        start(program, out)
    assert f"{split}_rows.jsonl:1: missing" in str(caught.value)
    assert f"{split}_rows.jsonl:2: missing" in str(caught.value)
    assert not program[2].out.exists()


def test_another_order_of_rows_than_the_checkpoints_is_refused_before_ray(program):
    out = f"trainer.save_checkpoint_path={program[2].out}"
    config = load([f"config={program[2].config}", out], program[1])
    order = {"epoch": 0, "cursor": 4, "seed": 1, "shuffle": True, "group_by_video": 1}
    Checkpoints(config.trainer, to_dict(config)).save(
        2, OneNumber(), {"step": 2, "loader": order | {"rows": "theirs", "quarantine": {}}}
    )
    of_rl = ["data.group_by_video=2"] if program[1] is PPOConfig else []
    for change in ["data.seed=2", "data.shuffle=false", *of_rl]:
        key = change.partition("=")[0]
        with pytest.raises(DataError, match=rf"^{key} changed since the checkpoint .* restore it"):
            start(program, out, change)


def test_more_rows_a_batch_than_there_are_name_the_setting_of_the_program(program):
    rl = program[1] is PPOConfig
    key = "data.rollout_batch_size" if rl else "batch.global_batch_size"
    with pytest.raises(launch.StartError, match=f"^{key}=64, but .* holds 9 rows"):
        start(program, f"{key}=64", *(["worker.actor.global_batch_size=64"] if rl else []))
