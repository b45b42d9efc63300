"""Which checkpoint a run starts from, and what it says about it."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.loops import OneNumber
from verl.config import OptimConfig, TrainerConfig
from verl.trainer.checkpoints import Checkpoints
from verl.utils.checkpoint import verify_checkpoint
from verl.utils.manifest import CheckpointError


def config(**changes):
    data = {"seed": 1, "rollout_batch_size": 4, "val_batch_size": -1, "num_workers": 2}
    return {"data": data | changes, "trainer": {"max_steps": 8}}


def checkpoints(folder, saved=None, **settings) -> Checkpoints:
    trainer = TrainerConfig(save_checkpoint_path=str(folder), **settings)
    return Checkpoints(trainer, saved or config())


def save(folder, *steps: int, **settings) -> None:
    for step in steps:
        workers = OneNumber()
        workers.weight = step
        checkpoints(folder, **settings).save(step, workers, {"step": step})


def test_a_new_run_starts_from_scratch_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    found = checkpoints(tmp_path / "none")
    assert found.last_step == 0
    assert found.resume(OneNumber()) is None
    assert "starting from scratch" in caplog.text


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save(tmp_path, 2, 4)
    workers = OneNumber()
    found = checkpoints(tmp_path)
    assert found.last_step == 4
    assert found.resume(workers) == {"step": 4} and workers.weight == 4
    assert f"RESUMED from {tmp_path / 'global_step_4'} after step 4" in caplog.text


def test_a_given_checkpoint_wins_over_the_newest(tmp_path):
    save(tmp_path, 2, 4)
    workers = OneNumber()
    found = checkpoints(tmp_path, load_checkpoint_path=str(tmp_path / "global_step_2"))
    found.resume(workers)
    assert workers.weight == found.last_step == 2


def test_the_same_command_goes_on_from_what_it_has_made_since_the_given_checkpoint(
    tmp_path, caplog
):
    save(tmp_path / "first", 2)
    given, own = str(tmp_path / "first" / "global_step_2"), tmp_path / "second"
    command = {"load_checkpoint_path": given}
    assert checkpoints(own, **command).last_step == 2
    assert "goes on from" not in caplog.text
    save(own, 3, **command)
    save(own, 4, **command)  # a second time by the same command
    workers = OneNumber()
    found = checkpoints(own, **command)
    assert found.last_step == 4 and found.resume(workers) == {"step": 4} and workers.weight == 4
    assert f"load_checkpoint_path={given} is where this run started" in caplog.text
    assert f"goes on from the newest of them, {own / 'global_step_4'}" in caplog.text
    assert "set trainer.find_last_checkpoint=false" in caplog.text
    assert checkpoints(own, **command, find_last_checkpoint=False).last_step == 2


def test_going_on_without_the_key_stays_the_run_of_the_given_checkpoint(tmp_path):
    save(tmp_path / "first", 2)
    command = {"load_checkpoint_path": str(tmp_path / "first" / "global_step_2")}
    save(tmp_path / "second", 3, **command)
    save(tmp_path / "second", 4)
    assert checkpoints(tmp_path / "second", **command).last_step == 4


def test_a_run_taken_back_to_an_older_checkpoint_of_its_own_goes_on_from_there(tmp_path):
    save(tmp_path, 2, 4, 6)
    back = {"load_checkpoint_path": str(tmp_path / "global_step_2"), "save_limit": 1}
    assert checkpoints(tmp_path, **back).last_step == 2
    save(tmp_path, 3, **back)
    assert checkpoints(tmp_path, **back).last_step == 3
    # The given one must outlive `save_limit`: without it the same command would be refused.
    assert {p.name for p in tmp_path.glob("global_step_*")} == {"global_step_2", "global_step_3"}
    # Another given one is another start, here the run's own.
    other = {"load_checkpoint_path": str(tmp_path / "global_step_3")}
    save(tmp_path, 4, **other)
    assert checkpoints(tmp_path, **back).last_step == 3
    assert checkpoints(tmp_path, **other).last_step == 4


def test_a_damaged_own_checkpoint_is_passed_over_for_an_earlier_one_or_the_given(tmp_path, caplog):
    save(tmp_path / "first", 2)
    own = tmp_path / "second"
    command = {"load_checkpoint_path": str(tmp_path / "first" / "global_step_2")}
    save(own, 3, 4, **command)
    for newest, next_best in ((4, 3), (3, 2)):
        (own / f"global_step_{newest}" / "actor" / "weight.json").write_text("9")
        assert checkpoints(own, **command).last_step == next_best
        assert f"NOT resuming from {own / f'global_step_{newest}'}" in caplog.text


def test_a_run_that_only_validates_takes_the_given_checkpoint_whatever_came_after(tmp_path):
    save(tmp_path, 2)
    command = {"load_checkpoint_path": str(tmp_path / "global_step_2")}
    save(tmp_path, 3, **command)
    assert checkpoints(tmp_path, **command, val_only=True).last_step == 2
    assert checkpoints(tmp_path, val_only=True).last_step == 3


HOLDER = """
import sys, time
from verl.config import TrainerConfig
from verl.trainer.checkpoints import Checkpoints
held = Checkpoints(TrainerConfig(save_checkpoint_path=sys.argv[1]), {})
print("holds", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A run of another process that has a checkpoint folder, `tmp_path / "run"`."""
    save(tmp_path / "run", 2)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(tmp_path, holder):
    folder = tmp_path / "run"
    with pytest.raises(CheckpointError) as error:
        checkpoints(folder)
    message = str(error.value)
    assert f"{folder} is in use by process {holder.pid} on " in message
    assert "Wait until that one ends" in message and "trainer.save_checkpoint_path" in message
    assert checkpoints(tmp_path / "elsewhere").last_step == 0
    holder.kill()  # SIGKILL: nothing of its own cleans up
    holder.wait()
    save(folder, 4)
    assert checkpoints(folder).last_step == 4


def test_reading_a_folder_that_a_run_writes_to_is_not_blocked_and_moves_nothing(tmp_path, holder):
    folder = tmp_path / "run"
    half = folder / "global_step_9.old-0a"  # between the two renames of the run's save
    shutil.copytree(folder / "global_step_2", half)
    found = checkpoints(folder, val_only=True)
    workers = OneNumber()
    found.resume(workers)
    assert workers.weight == found.last_step == 2
    verify_checkpoint(folder / "global_step_2")
    assert half.is_dir() and not (folder / "global_step_9").exists()


def test_runs_of_one_process_share_a_folder_and_give_it_back(tmp_path):
    first = checkpoints(tmp_path)
    second = checkpoints(tmp_path)
    del first
    assert lock_from_elsewhere(tmp_path) != 0
    del second
    assert lock_from_elsewhere(tmp_path) == 0


def lock_from_elsewhere(folder) -> int:
    """Status of another process that tries to lock a folder."""
    code = "import sys; from pathlib import Path; from verl.utils.folder_lock import FolderLock;"
    command = [sys.executable, "-c", code + "FolderLock(Path(sys.argv[1]))", str(folder)]
    return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True).returncode


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"set trainer\.save_checkpoint_path"):
        checkpoints(tmp_path / "file" / "run")


def test_looking_for_the_last_checkpoint_can_be_turned_off(tmp_path):
    save(tmp_path, 2)
    assert checkpoints(tmp_path, find_last_checkpoint=False).last_step == 0


def test_only_as_many_checkpoints_as_asked_for_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, save_limit=2)
    assert sorted(p.name for p in tmp_path.glob("global_step_*")) == [
        "global_step_2", "global_step_3"
    ]  # fmt: skip


def test_a_damaged_checkpoint_is_found_before_anything_is_started(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "global_step_2" / "actor" / "weight.json").write_text("3")
    with pytest.raises(CheckpointError, match=r"weight\.json is damaged"):
        checkpoints(tmp_path)


def test_a_changed_setting_is_named_with_both_values(tmp_path, caplog):
    save(tmp_path, 2)
    checkpoints(tmp_path, saved=config(rollout_batch_size=8))
    assert "data.rollout_batch_size: 4 -> 8" in caplog.text
    assert "will not equal an uninterrupted" in caplog.text


def test_settings_that_change_no_number_may_change_in_silence(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    save(tmp_path, 2)
    changed = config(num_workers=8, val_batch_size=16, decode_threads=4)
    changed["trainer"] |= {"max_steps": 99, "save_freq": 5}
    checkpoints(tmp_path, saved=changed)
    assert not caplog.records


def test_memory_and_speed_may_change_and_are_told_as_rounding_at_most(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    old = {"offload": {"offload_params": False}, "micro_batch_size_per_device_for_update": 4}
    actor = {"actor": old | {"optim": {"lr": 1e-6}}}
    checkpoints(tmp_path, saved={"worker": actor}).save(2, OneNumber(), {"step": 2})
    caplog.clear()
    new = {"offload": {"offload_params": True}, "micro_batch_size_per_device_for_update": 8}
    for lr, warnings in ((1e-6, 0), (1e-5, 1)):
        caplog.clear()
        checkpoints(tmp_path, saved={"worker": {"actor": new | {"optim": {"lr": lr}}}})
        (rounding,) = [m for m in caplog.messages if "by rounding at most: " in m]
        assert rounding.endswith(
            "worker.actor.micro_batch_size_per_device_for_update: 4 -> 8; "
            "worker.actor.offload.offload_params: False -> True"
        )
        warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warned) == warnings
    assert warned[0].endswith("uninterrupted one: worker.actor.optim.lr: 1e-06 -> 1e-05")


COSINE, RATIO = OptimConfig(warmup_style="cosine"), OptimConfig(lr_warmup_ratio=0.5)
CONSTANT = OptimConfig(lr_warmup_steps=9)


def prolonged(folder, optim: OptimConfig, *, at: int = 2, **settings) -> None:
    """Resumes a run that was to have 3 epochs of 10 steps, but at most 8 steps, with `settings`."""
    old = {"max_steps": 8, "total_epochs": 3}
    checkpoints(folder, saved={"trainer": old}).save(at, OneNumber(), {"step": at})
    found = checkpoints(folder, saved={"trainer": old | settings}, **(old | settings))

    def steps(trainer: TrainerConfig) -> int:
        return min(trainer.max_steps or 1000, 10 * trainer.total_epochs)

    found.warn_of_bent_schedule(optim, "worker.actor.optim", steps)


@pytest.mark.parametrize("style", ["cosine", "linear"])
def test_a_longer_run_bends_its_schedule_and_says_so_with_both_lengths(tmp_path, caplog, style):
    prolonged(tmp_path, OptimConfig(warmup_style=style), max_steps=20)
    assert "trainer.max_steps: 8 -> 20 changes the run from 8 to 20 steps" in caplog.text
    assert f"worker.actor.optim.warmup_style={style} falls until the last step" in caplog.text
    assert "From step 3 on" in caplog.text


def test_more_epochs_bend_a_schedule_where_they_make_the_run_longer(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    prolonged(tmp_path / "a", COSINE, total_epochs=4)
    assert not caplog.records  # max_steps ends it as before
    prolonged(tmp_path / "b", COSINE, total_epochs=5, max_steps=None)
    changes = "trainer.max_steps: 8 -> None, trainer.total_epochs: 3 -> 5"
    assert f"{changes} changes the run from 8 to 50 steps" in caplog.text


def test_a_warm_up_that_is_a_share_of_the_run_is_bent_while_it_lasts(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    prolonged(tmp_path / "late", RATIO, at=10, max_steps=20)
    prolonged(tmp_path / "constant", CONSTANT, max_steps=20)
    prolonged(tmp_path / "unchanged", COSINE)
    assert not caplog.records
    prolonged(tmp_path / "early", RATIO, max_steps=20)
    assert "worker.actor.optim.lr_warmup_ratio=0.5 is a share of all steps" in caplog.text


def test_a_new_run_has_no_schedule_to_bend(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    checkpoints(tmp_path, max_steps=3).warn_of_bent_schedule(COSINE, "optim", lambda _: 3)
    assert not caplog.records


def test_what_the_same_command_does_next_is_told_as_it_is(tmp_path):
    new = checkpoints(tmp_path)
    scratch = "the same command starts from scratch"
    assert new.how_to_go_on() == f"No checkpoint was written yet: {scratch}."
    new.save(10, OneNumber(), {"step": 10})
    assert new.how_to_go_on() == "The same command goes on from global_step_10."
    assert checkpoints(tmp_path).how_to_go_on() == "The same command goes on from global_step_10."


def test_a_command_that_starts_anew_or_from_a_given_checkpoint_says_that(tmp_path):
    save(tmp_path / "first", 2)
    given = str(tmp_path / "first" / "global_step_2")
    command = {"load_checkpoint_path": given}
    other = checkpoints(tmp_path / "second", **command)
    assert other.how_to_go_on().endswith(f"yet: the same command starts from {given}.")
    anew = checkpoints(tmp_path / "second", find_last_checkpoint=False)
    anew.save(4, OneNumber(), {"step": 4})
    text = anew.how_to_go_on()
    assert text.startswith("The same command starts from scratch, because of trainer.find_last_ch")
    assert "with true it goes on from global_step_4" in text
    assert checkpoints(tmp_path, val_only=True).how_to_go_on() == ""
