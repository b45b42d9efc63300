"""What a user did wrong ends a run with one message, not with a traceback."""

from __future__ import annotations

from tests.e2e.jobs import SECONDS_TO_WORK, metrics, rl_job

RESUMES = "the same command"
SECOND_TIME = """
from pathlib import Path

def score(samples, per_word):
    mark = Path(__file__).with_name("called")
    if {fails} and mark.exists():
        raise ZeroDivisionError("the second time")
    mark.touch()
    return [dict(overall=per_word * len(set(s["response"].split()))) for s in samples]
"""


def test_a_bad_row_ends_the_start_with_its_place_and_code_2(tmp_path):
    job = rl_job(tmp_path)
    with (tmp_path / "train" / "train_rows.jsonl").open("a") as file:
        file.write("{no json}\n")
    process = job.start()
    assert process.wait(SECONDS_TO_WORK) == 2
    assert "error: " in process.text() and "train_rows.jsonl:10" in process.text()
    assert "Traceback" not in process.text() and RESUMES not in process.text().lower()
    assert not process.out.exists()  # nothing was begun


def test_files_that_are_missing_are_told_together_before_workers_start(tmp_path):
    job = rl_job(tmp_path)
    for clip in (tmp_path / "train").glob("clip*.mp4"):
        clip.unlink()
    process = job.start()
    assert process.wait(SECONDS_TO_WORK) == 2
    assert "error: 6 rows cannot be used" in process.text()
    assert process.text().count("data.video_dir") == 6 and "starting" not in process.text()
    assert not process.out.exists()


def test_a_reward_that_raises_ends_the_run_with_its_sample_and_code_1(tmp_path):
    job = rl_job(tmp_path)
    (tmp_path / "reward.py").write_text("def score(samples, per_word):\n    return 1 / 0\n")
    process = job.start("trainer.n_gpus_per_node=1", "trainer.val_before_train=false")
    assert process.wait(SECONDS_TO_WORK) == 1
    text = process.text()
    assert "reward.py:score" in text and "ZeroDivisionError" in text
    assert "ground_truth" in text  # the sample that it was given
    assert "Traceback (most recent call last):\n  File" not in text.partition("error: ")[0]
    last = "No checkpoint was written yet: the same command starts from scratch."
    assert text.rstrip().endswith(last)
    assert f"The traceback is in {process.out}/error.txt." in text
    kept = (process.out / "error.txt").read_text()
    assert "Traceback" in kept and "in fit" in kept and "ZeroDivisionError" in kept


def test_a_reward_that_raises_later_loses_no_step_that_was_done(tmp_path):
    job = rl_job(tmp_path)
    settings = ("trainer.n_gpus_per_node=1", "trainer.val_freq=-1", "trainer.save_freq=-1")
    settings += ("trainer.max_steps=2", "trainer.val_before_train=false")
    (tmp_path / "reward.py").write_text(SECOND_TIME.format(fails=True))
    process = job.start(*settings, "worker.reward.num_cpus=1")
    assert process.wait(SECONDS_TO_WORK) == 1
    assert "ZeroDivisionError: the second time" in process.text()
    assert process.text().rstrip().endswith("The same command goes on from global_step_1.")

    (tmp_path / "reward.py").write_text(SECOND_TIME.format(fails=False))
    again = job.finish(*settings, "worker.reward.num_cpus=1")
    assert "RESUMED from" in again.text()
    whole = job.finish(*settings, "worker.reward.num_cpus=1", out=tmp_path / "whole")
    assert metrics(again.out) == metrics(whole.out)
