"""What a user did wrong ends a run with one message, not with a traceback."""

from __future__ import annotations

from tests.e2e.jobs import SECONDS_TO_WORK, rl_job

RESUMES = (
    "The same command goes on from the newest checkpoint, if trainer.find_last_checkpoint is true."
)


def test_a_bad_row_ends_the_start_with_its_place_and_code_2(tmp_path):
    job = rl_job(tmp_path)
    with (tmp_path / "train" / "train_rows.jsonl").open("a") as file:
        file.write("{no json}\n")
    process = job.start()
    assert process.wait(SECONDS_TO_WORK) == 2
    assert "error: " in process.text() and "train_rows.jsonl:10" in process.text()
    assert "Traceback" not in process.text() and RESUMES not in process.text()
    assert {p.name for p in process.out.iterdir()} <= {"run.lock"}  # nothing was begun


def test_a_reward_that_raises_ends_the_run_with_its_sample_and_code_1(tmp_path):
    job = rl_job(tmp_path)
    (tmp_path / "reward.py").write_text("def score(samples, per_word):\n    return 1 / 0\n")
    process = job.start("trainer.n_gpus_per_node=1", "trainer.val_before_train=false")
    assert process.wait(SECONDS_TO_WORK) == 1
    text = process.text()
    assert "reward.py:score" in text and "ZeroDivisionError" in text
    assert "ground_truth" in text  # the sample that it was given
    assert "Traceback (most recent call last):\n  File" not in text.partition("error: ")[0]
    assert text.rstrip().endswith(RESUMES)
    assert f"The traceback is in {process.out}/error.txt." in text
    kept = (process.out / "error.txt").read_text()
    assert "Traceback" in kept and "in fit" in kept and "ZeroDivisionError" in kept
