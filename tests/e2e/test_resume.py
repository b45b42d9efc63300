"""Runs that are killed, stopped or crash go on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.e2e.jobs import (
    SECONDS_TO_END,
    Job,
    Process,
    kill,
    lines,
    metrics,
    rl_job,
    sft_job,
    undocumented,
)

RESUMES = "The same command goes on from global_step_"
FLAT = (1, 2, 3, 8)
"""Training rows that are all worth the same: those of the first step, with the default seed."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Process]:
    """An RL run of six steps on two workers that nothing interrupts."""
    job = rl_job(tmp_path_factory.mktemp("rl"), flat=FLAT)
    return job, job.finish()


def files(process: Process) -> dict[str, str]:
    """Answers and samples that a run leaves."""
    found = [*process.out.glob("validation/*"), process.out / "generations.jsonl"]
    return {path.name: path.read_text() for path in found}


def test_a_run_logs_every_step_once_and_tells_how_far_it_is(reference):
    _, process = reference
    by_step = metrics(process.out)
    assert list(by_step) == [0, 1, 2, 3, 4, 5, 6]
    validated = [s for s, m in by_step.items() if "val/val_rows/accuracy" in m]
    assert validated == [0, 2, 4, 6]
    assert "step 3/6: reward" in process.text()
    assert "timing_s/checkpoint" in lines(process.out / "metrics.jsonl")[1]["metrics"]
    assert len(lines(process.out / "validation" / "val_rows_step_6.jsonl")) == 3
    assert undocumented(process.out) == set()


def test_a_step_without_any_advantage_is_a_step_like_others(reference):
    _, process = reference
    shares = [m.get("reward/zero_advantage_share") for m in metrics(process.out).values()]
    assert 1.0 in shares, shares


def test_killed_between_steps_in_a_save_and_without_a_worker_it_ends_up_the_same(reference):
    job, uninterrupted = reference
    out = job.folder / "killed"

    process = job.start(out=out)
    process.wait_for_step(1)
    kill(process)

    process = job.start(out=out)
    process.wait_for_save(2)
    kill(process)
    assert list(out.glob("*.tmp-*")) and process.steps()[-1] < 2
    assert "RESUMED from" in process.text()

    process = job.start(out=out)
    process.wait_for_step(2)
    started = time.monotonic()
    os.kill(process.workers()[1].pid, signal.SIGKILL)
    assert process.wait() == 1
    assert time.monotonic() - started < SECONDS_TO_END
    assert "error: Worker rank" in process.text() and RESUMES in process.text()

    process = job.finish(out=out)
    assert "RESUMED from" in process.text() and not list(out.glob("*.tmp-*"))
    assert metrics(out) == metrics(uninterrupted.out)
    assert files(process) == files(uninterrupted)


def test_another_number_of_workers_goes_on_where_the_others_were(reference):
    job, two_workers = reference
    out = job.folder / "one_worker"
    job.finish(
        "trainer.n_gpus_per_node=1",
        f"trainer.load_checkpoint_path={two_workers.out / 'global_step_3'}",
        "trainer.max_steps=4",
        out=out,
    )
    expected, found = metrics(two_workers.out), metrics(out)
    assert found[3] == expected[3]
    assert found[4] == pytest.approx(expected[4], rel=1e-3, abs=1e-5)


def test_val_only_reports_the_checkpoint_and_leaves_its_run_alone(reference):
    job, trained = reference
    before = (trained.out / "metrics.jsonl").read_bytes()
    job.finish(
        "trainer.val_only=true",
        "data.train_files=[]",
        "trainer.n_gpus_per_node=1",
        f"trainer.load_checkpoint_path={trained.out / 'global_step_4'}",
        out=trained.out,
    )
    assert (trained.out / "metrics.jsonl").read_bytes() == before
    found, expected = metrics(trained.out / "val_only_step_4"), metrics(trained.out)
    assert list(found) == [4]
    assert found[4] == {k: v for k, v in expected[4].items() if k.startswith("val/")}


def test_fine_tuning_that_is_stopped_says_how_to_go_on_and_ends_up_the_same(tmp_path):
    job = sft_job(tmp_path)
    uninterrupted = job.finish()
    assert list(metrics(uninterrupted.out)) == [1, 2, 3, 4]
    assert undocumented(uninterrupted.out) == set()
    out = tmp_path / "stopped"
    for step, signum, code in ((1, signal.SIGINT, 130), (2, signal.SIGTERM, 143)):
        process = job.start(out=out)
        process.wait_for_step(step)
        # Ctrl-C reaches the whole foreground group, Ray's daemons included.
        process.signal(signum, group=signum == signal.SIGINT)
        assert process.wait() == code
        assert f"Stopped by {signal.Signals(signum).name}." in process.text()
        assert RESUMES in process.text()
    job.finish(out=out)
    assert metrics(out) == metrics(uninterrupted.out)
