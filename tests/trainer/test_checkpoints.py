"""Which checkpoint a run starts from, and what it says about it."""

from __future__ import annotations

import logging

import pytest

from tests.trainer.loops import OneNumber
from verl.config import OptimConfig, TrainerConfig
from verl.trainer.checkpoints import Checkpoints
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
    save(tmp_path, 2)
    changed = config(num_workers=8, val_batch_size=16)
    changed["trainer"]["max_steps"] = 99
    checkpoints(tmp_path, saved=changed)
    assert not caplog.records


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
    prolonged(tmp_path / "a", COSINE, total_epochs=4)
    assert not caplog.records  # max_steps ends it as before
    prolonged(tmp_path / "b", COSINE, total_epochs=5, max_steps=None)
    changes = "trainer.max_steps: 8 -> None, trainer.total_epochs: 3 -> 5"
    assert f"{changes} changes the run from 8 to 50 steps" in caplog.text


def test_a_warm_up_that_is_a_share_of_the_run_is_bent_while_it_lasts(tmp_path, caplog):
    prolonged(tmp_path / "late", RATIO, at=10, max_steps=20)
    prolonged(tmp_path / "constant", CONSTANT, max_steps=20)
    prolonged(tmp_path / "unchanged", COSINE)
    assert not caplog.records
    prolonged(tmp_path / "early", RATIO, max_steps=20)
    assert "worker.actor.optim.lr_warmup_ratio=0.5 is a share of all steps" in caplog.text


def test_a_new_run_has_no_schedule_to_bend(tmp_path, caplog):
    checkpoints(tmp_path, max_steps=3).warn_of_bent_schedule(COSINE, "optim", lambda _: 3)
    assert not caplog.records
