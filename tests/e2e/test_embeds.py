"""Videos are decoded and encoded once over passes, ranks, epochs and runs, or never."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.e2e.jobs import (
    ROOT,
    SECONDS_TO_WORK,
    Job,
    Process,
    metrics,
    rl_job,
    sft_job,
)
from tests.tiny import tiny_config

N_VIDEOS = 8
"""Six of the nine training rows and two of the three validation rows have one."""
STEPS = ("trainer.max_steps=4", "trainer.save_freq=-1")


def counters(process: Process) -> dict[str, float]:
    return json.loads((process.out / "media.json").read_text())["counters"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """An RL run of a model whose weights are files."""
    job = rl_job(tmp_path_factory.mktemp("embeds"))
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(tiny_config()).save_pretrained(job.folder / "model")
    job.config.write_text(job.config.read_text().replace("init: random", "init: pretrained"))
    return job


@pytest.fixture(scope="module")
def first(job: Job) -> Process:
    """The run that finds nothing stored."""
    return job.finish(*STEPS)


def test_every_video_is_decoded_and_encoded_once_and_a_second_run_does_neither(job, first):
    assert counters(first) == {
        "video/distinct": N_VIDEOS, "video/decoded": N_VIDEOS, "video/encoded": N_VIDEOS,
    }  # fmt: skip
    again = job.finish(*STEPS, out=job.folder / "again")
    assert counters(again) == {
        "video/distinct": N_VIDEOS, "video/decoded": 0, "video/encoded": 0,
    }  # fmt: skip
    assert metrics(again.out) == metrics(first.out)
    logged = json.loads((again.out / "metrics.jsonl").read_text().splitlines()[-1])["metrics"]
    assert logged["video/distinct"] == N_VIDEOS and logged["video/decoded"] == 0


def test_a_run_that_may_store_nothing_and_encodes_at_each_use_learns_the_same_bits(job, first):
    nothing = (f"data.cache_dir={job.folder / 'nothing'}", "data.cache_gib=0")
    live = job.finish(*STEPS, *nothing, out=job.folder / "live")
    assert counters(live)["video/encoded"] > 4 * N_VIDEOS
    assert metrics(live.out) == metrics(first.out)


def test_supervised_runs_store_and_read_the_same_bits(tmp_path):
    job = sft_job(tmp_path)
    frozen = ("model.freeze_vision_tower=true", "trainer.n_gpus_per_node=2")
    stored = job.finish(*frozen)
    nothing = (f"data.cache_dir={tmp_path / 'nothing'}", "data.cache_gib=0")
    live = job.finish(*frozen, *nothing, out=tmp_path / "live")
    assert metrics(live.out) == metrics(stored.out)
    found = counters(stored)
    assert found["video/distinct"] == found["video/decoded"] == found["video/encoded"]
    assert found["video/distinct"] == N_VIDEOS


def cache_offline(job: Job, out: Path) -> str:
    data = job.folder / "train"
    files = [str(data / "train_rows.jsonl"), str(job.folder / "val" / "val_rows.jsonl")]
    settings = ["--num_video_frames", "4", "--video_min_pixels", "3136"]
    settings += ["--video_max_pixels", "3136", "--device", "cpu", "--output_dir", str(out)]
    command = [sys.executable, "-m", "verl.utils.cache_video_embeds_vila", *settings]
    command += ["--model_path", str(job.folder / "model"), "--data_file", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_with_embeddings_made_before_neither_videos_nor_tower_are_touched(job, first):
    offline = job.folder / "offline"
    said = cache_offline(job, offline)
    settings = (f"data.cache_dir={offline}", f"worker.actor.cached_embeds_dir={offline / 'embeds'}")
    assert all(setting in said for setting in settings)
    for clip in job.folder.rglob("clip*.mp4"):
        clip.unlink()

    process = job.finish(*settings, "trainer.max_steps=4", out=job.folder / "from_offline")
    assert metrics(process.out) == metrics(first.out)
    assert counters(process)["video/decoded"] == counters(process)["video/encoded"] == 0

    # The checkpoint is whole: it merges, and a run with a tower goes on from it.
    merged = merge(process.out / "global_step_4" / "actor", job.folder / "merged")
    before = Qwen2_5_VLForConditionalGeneration.from_pretrained(job.folder / "model")
    for name, tensor in before.model.visual.state_dict().items():
        assert torch.equal(merged.model.visual.state_dict()[name], tensor), name
    process = job.finish(settings[0], "trainer.max_steps=5", out=job.folder / "from_offline")
    assert list(metrics(process.out)) == [0, 1, 2, 3, 4, 5]


def merge(checkpoint: Path, output: Path) -> Any:
    command = [sys.executable, "scripts/model_merger.py", "--local_dir", str(checkpoint)]
    subprocess.run([*command, "--output", str(output)], cwd=ROOT, check=True, capture_output=True)
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(output)


def test_media_without_embeddings_are_rows_that_cannot_be_used(job):
    embeds = job.folder / "offline" / "embeds"
    cached = f"worker.actor.cached_embeds_dir={embeds}"
    process = job.start(
        f"data.cache_dir={job.folder / 'offline'}", cached, "data.num_video_frames=2",
        out=job.folder / "other_frames",
    )  # fmt: skip
    assert process.wait(SECONDS_TO_WORK) != 0
    text = process.text()
    assert "does not know it either" in text
    assert ".mp4" in text
