"""Steps of a run: counted, logged once, saved, and resumed wherever the run was killed."""

from __future__ import annotations

import json
import logging
import threading
import time

import pytest

from tests.trainer.loops import CountingLoop, Killed, Numbers, OneNumber, logged, run
from verl.data.rows import BadSample
from verl.data.sources import DataError
from verl.trainer import loop as loop_module
from verl.trainer.timing import PhaseTimer
from verl.workers.reward import RewardError


def killed_at(name: str, step: int):
    def moments(moment: str, loop: CountingLoop) -> None:
        if (moment, loop.step) == (name, step):
            raise Killed

    return moments


def fails_at(name: str, step: int, error: Exception):
    def moments(moment: str, loop: CountingLoop) -> None:
        if (moment, loop.step) == (name, step):
            raise error

    return moments


def test_epochs_and_max_steps_bound_the_run(tmp_path):
    assert run(tmp_path / "epochs").step == 6
    assert run(tmp_path / "steps", max_steps=4).step == 4
    assert run(tmp_path / "both", max_steps=40, total_epochs=2).step == 4


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("moment", ["work", "save", "log", "next"])
def test_a_run_killed_at_any_moment_ends_up_the_same(tmp_path, moment, step):
    expected = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", moments=killed_at(moment, step))
    found = run(tmp_path / "killed")
    assert found.workers.weight == expected.workers.weight
    for name in ("metrics.jsonl", "generations.jsonl"):
        assert logged(found.tracker.output_dir, name) == logged(expected.tracker.output_dir, name)


def test_a_run_killed_again_and_again_ends_up_the_same(tmp_path):
    expected = run(tmp_path / "whole", save_freq=1)
    for moment, step in (("next", 1), ("save", 3), ("log", 4), ("work", 5), ("log", 6)):
        with pytest.raises(Killed):
            run(tmp_path / "killed", save_freq=1, moments=killed_at(moment, step))
    found = run(tmp_path / "killed", save_freq=1)
    assert logged(found.tracker.output_dir) == logged(expected.tracker.output_dir)


def test_a_step_that_was_saved_keeps_its_numbers_when_killed_before_they_were_logged(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, moments=killed_at("log", 2))
    out = tmp_path / "out"
    assert [line["step"] for line in logged(out)] == [0, 1]
    assert [line["step"] for line in logged(run(tmp_path, max_steps=2).tracker.output_dir)] == [
        0, 1, 2
    ]  # fmt: skip
    assert set(logged(out)[2]["metrics"]) == {"weight", "val/rows/accuracy", "epoch"}


def test_a_finished_run_says_so_when_it_is_started_again(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(tmp_path)
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    caplog.clear()
    again = run(tmp_path)
    assert again.step == 6
    assert "all is done: step 6 was the last of 6; to go on, raise trainer.max_steps" in caplog.text
    new = f"for a new run set trainer.save_checkpoint_path (or remove {tmp_path / 'out'})"
    assert new in caplog.text
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_goes_on_from_the_edge_of_an_epoch_when_prolonged(tmp_path):
    expected = run(tmp_path / "whole")
    run(tmp_path / "prolonged", total_epochs=2)
    found = run(tmp_path / "prolonged")
    assert found.workers.loads == 1 and found.step == 6
    assert found.workers.weight == expected.workers.weight


def test_a_run_shortened_below_its_checkpoint_has_nothing_to_do(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(tmp_path)
    again = run(tmp_path, max_steps=3)
    assert again.step == 6
    assert "step 6 was the last of 6" in caplog.messages[-1]


@pytest.mark.parametrize("error", [DataError("no such file"), RewardError("1 / 0")])
def test_an_error_of_the_user_saves_the_steps_that_were_done_and_says_so(tmp_path, error):
    expected = run(tmp_path / "whole", save_freq=-1)
    with pytest.raises(type(error)) as caught:
        run(tmp_path / "failed", save_freq=-1, moments=fails_at("work", 4, error))
    assert vars(caught.value)["advice"] == "The same command goes on from global_step_3."
    out = tmp_path / "failed" / "out"
    assert (out / "global_step_3" / "manifest.json").exists()
    found = run(tmp_path / "failed", save_freq=-1)
    assert found.workers.weight == expected.workers.weight and found.workers.loads == 1
    assert logged(out) == logged(tmp_path / "whole" / "out")


def test_a_row_that_fails_while_a_batch_is_put_together_loses_no_step(tmp_path, monkeypatch):
    sample = Numbers.sample

    def broken(self: Numbers, index: int) -> object:
        raise BadSample("decode_error", self.rows[index], "nothing decodes")

    def break_files(moment: str, loop: CountingLoop) -> None:
        if (moment, loop.step) == ("next", 3):
            monkeypatch.setattr(Numbers, "sample", broken)

    with pytest.raises(DataError, match="decode_error"):
        run(tmp_path, save_freq=-1, moments=break_files)
    assert [p.name for p in (tmp_path / "out").glob("global_step_*")] == ["global_step_3"]
    monkeypatch.setattr(Numbers, "sample", sample)
    assert run(tmp_path, save_freq=-1).step == 6


@pytest.mark.parametrize(
    ("moment", "step", "error"),
    [
        ("work", 1, DataError("before any step")),
        ("work", 3, DataError("just after a checkpoint")),
        ("validate", 4, RewardError("the workers have left step 3")),
        ("work", 4, RuntimeError("who knows how the workers are")),
    ],
    ids=lambda value: str(value)[:30],
)
def test_nothing_is_saved_where_no_whole_step_is_at_hand(tmp_path, moment, step, error):
    with pytest.raises(type(error)):
        run(tmp_path, moments=fails_at(moment, step, error))
    saved = {p.name for p in (tmp_path / "out").glob("global_step_*")}
    assert saved == ({"global_step_2"} if step > 2 else set())


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_saving_that_fails_or_hangs_does_not_hide_the_error(tmp_path, monkeypatch, caplog, how):
    released = threading.Event()

    def save_shards(self: OneNumber, folder: str) -> None:
        if how == "hangs":
            released.wait(20)
        raise OSError("disk full")

    monkeypatch.setattr(loop_module, "SECONDS_TO_KEEP", 0.2 if how == "hangs" else 20)
    monkeypatch.setattr(OneNumber, "save_shards", save_shards)
    with pytest.raises(DataError, match="no such file") as caught:
        run(tmp_path, save_freq=-1, moments=fails_at("work", 3, DataError("no such file")))
    released.set()
    assert ("disk full" if how == "fails" else "given up") in caplog.text
    assert vars(caught.value)["advice"].startswith("No checkpoint was written yet")


def test_rows_left_out_end_the_run_early_but_never_without_its_checkpoint(tmp_path, caplog):
    # Five rows promise two batches of two; with two rows left out there is one.
    loop = run(tmp_path, bad=(0, 1), save_freq=-1, val_freq=-1)
    assert loop.step == 3 and loop.total_steps == 6
    assert "the run ends after step 3 instead of 6" in caplog.text
    assert (tmp_path / "out" / "global_step_3" / "manifest.json").exists()
    last = logged(tmp_path / "out")[-1]
    assert last == {"step": 3, "metrics": {"val/rows/accuracy": float(loop.workers.weight)}}
    again = run(tmp_path, bad=(0, 1), save_freq=-1, val_freq=-1)
    assert again.step == 3 and again.workers.weight == loop.workers.weight


def test_val_only_reports_under_the_step_of_the_weights_and_leaves_the_run_alone(tmp_path):
    trained = run(tmp_path)
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    for _ in range(2):
        loop = run(tmp_path, val_only=True)
        out = tmp_path / "out" / "val_only_step_6"
        value = float(trained.workers.weight)
        assert logged(out) == [{"step": 6, "metrics": {"val/rows/accuracy": value}}]
    assert loop.tracker.output_dir == out
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before


def test_a_number_that_is_not_finite_does_not_prevent_the_checkpoint(tmp_path):
    def spoil(moment: str, loop: CountingLoop) -> None:
        if moment == "save":
            loop.metrics["loss"] = float("nan")

    assert run(tmp_path, moments=spoil).checkpoints.last_step == 6
    assert [line["metrics"]["loss"] for line in logged(tmp_path / "out")[1:]] == [None] * 6


def test_the_checkpoint_is_part_of_the_step_that_it_ends(tmp_path):
    run(tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    saved = [line["step"] for line in lines if "timing_s/checkpoint" in line["metrics"]]
    assert saved == [2, 4, 6]
    for line in lines[1:]:
        metrics = line["metrics"]
        assert metrics["memory/host_peak_gib"] == 2.0  # the largest of all workers
        work = metrics["timing_s/data"] + metrics["timing_s/update"]
        assert metrics["perf/step_s"] == pytest.approx(work)
        assert metrics["perf/tokens_per_second"] == pytest.approx(10 / work)


def test_phases_add_up_until_they_are_taken():
    timer = PhaseTimer()
    for _ in range(2):
        with timer("a"):
            time.sleep(0.01)
    with pytest.raises(ValueError), timer("b"):
        raise ValueError
    seconds = timer.take()
    assert list(seconds) == ["a", "b"]
    assert 0.02 <= seconds["a"] < 5 and seconds["b"] < 1
    assert timer.take() == {}


def test_a_phase_that_lasts_tells_that_it_goes_on(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("verl.utils.progress.SIGN_OF_LIFE_S", 0.01)
    timer = PhaseTimer()
    timer.title = "step 3 of 9"
    with timer("generation"):
        time.sleep(0.2)
    assert "step 3 of 9: generation: 0 s so far" in caplog.text
    n_lines = len(caplog.messages)
    time.sleep(0.1)
    assert len(caplog.messages) <= n_lines + 1  # one may have been on its way
