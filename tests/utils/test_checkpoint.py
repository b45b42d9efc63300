"""Folders of checkpoints: atomic, verified, pruned; a kill at any moment leaves a usable one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from verl.utils.checkpoint import (
    CheckpointDir,
    CheckpointError,
    changed_keys,
    find_checkpoint,
    read_driver_state,
    read_shards,
    resolve_checkpoint,
    verify_checkpoint,
    write_shards,
)


def model_of(step: int) -> nn.Module:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, step)
    return model


def save(root: Path, step: int, keep: int = -1) -> Path:
    with CheckpointDir(root, step) as checkpoint:
        write_shards(checkpoint.path / "actor", {"model": model_of(step)})
        assets = checkpoint.path / "actor" / "huggingface"
        assets.mkdir()
        (assets / "config.json").write_text("{}")
        state = {"step": step, "loader": {"epoch": 0, "cursor": step * 4}}
        return checkpoint.commit(state, config={"lr": 0.1}, keep=keep)


def assert_holds(path: Path, step: int) -> None:
    model = model_of(-1)
    read_shards(path / "actor", {"model": model})
    assert model.weight.unique().tolist() == [step]
    assert read_driver_state(path)[0]["step"] == step


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_the_newest_checkpoint_is_found_with_all_of_its_state(tmp_path):
    save(tmp_path, 4)
    save(tmp_path, 8)
    path = find_checkpoint(tmp_path)
    assert path == tmp_path / "global_step_8"
    assert_holds(path, 8)
    state, config = read_driver_state(path)
    assert state == {"step": 8, "loader": {"epoch": 0, "cursor": 32}}
    assert config == {"lr": 0.1}


def test_the_manifest_lists_every_file_and_every_tensor(tmp_path):
    path = save(tmp_path, 1)
    manifest = verify_checkpoint(path)
    on_disk = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert manifest["files"].keys() == on_disk - {"manifest.json"}
    assert {"config_fingerprint", "versions", "git", "saved_at", "step"} <= manifest.keys()
    actor = json.loads((path / "actor" / "manifest.json").read_text())
    assert actor["tensors"]["model.weight"] == {"dtype": "float32", "shape": [2, 3]}
    assert actor["world_size"] == 1


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint_tracker.json", "global_step_3", "global_step_4"]
    assert json.loads((tmp_path / "checkpoint_tracker.json").read_text())["last_global_step"] == 4


def test_the_newest_is_the_one_written_last_not_the_highest_step(tmp_path):
    save(tmp_path, 9)
    save(tmp_path, 2)
    assert find_checkpoint(tmp_path) == tmp_path / "global_step_2"


def test_a_step_that_exists_is_replaced_as_a_whole(tmp_path):
    old = save(tmp_path, 3)
    (old / "actor" / "mine.txt").write_text("of the first run")
    save(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint_tracker.json", "global_step_3"]
    assert not (old / "actor" / "mine.txt").exists()
    assert_holds(old, 3)


def test_a_save_that_fails_leaves_no_trace_and_the_earlier_one_intact(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ZeroDivisionError), CheckpointDir(tmp_path, 2) as checkpoint:
        write_shards(checkpoint.path / "actor", {"model": model_of(2)})
        raise ZeroDivisionError
    assert names(tmp_path) == ["checkpoint_tracker.json", "global_step_1"]
    assert_holds(find_checkpoint(tmp_path), 1)


def test_an_empty_folder_means_a_fresh_start(tmp_path):
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "none") is None
    assert resolve_checkpoint(tmp_path, None, automatic=True) is None


def needed_files(path: Path) -> list[Path]:
    return [p for p in path.rglob("*") if p.is_file() and "huggingface" not in p.parts]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def to_lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink, to_lfs_pointer])
def test_any_damage_to_any_file_is_named_and_the_previous_one_is_used(tmp_path, caplog, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    pristine = tmp_path / "pristine"
    shutil.copytree(newest, pristine)
    files = needed_files(newest)
    assert len(files) == 7
    for file in files:
        damage(file)
        caplog.clear()
        with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")):
            verify_checkpoint(newest)
        assert find_checkpoint(tmp_path) == tmp_path / "global_step_1"
        assert "NOT resuming from" in caplog.text and "falling back to" in caplog.text
        shutil.rmtree(newest)
        shutil.copytree(pristine, newest)


def test_a_damaged_tokenizer_does_not_stop_a_resume(tmp_path):
    path = save(tmp_path, 1)
    (path / "actor" / "huggingface" / "config.json").write_text('{"dtype": "float32"}')
    assert find_checkpoint(tmp_path) == path


def test_a_pointer_of_git_lfs_says_what_to_run(tmp_path):
    path = save(tmp_path, 1)
    to_lfs_pointer(path / "actor" / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="run git lfs pull"):
        verify_checkpoint(path)


def test_with_checkpoints_but_no_usable_one_the_run_stops(tmp_path):
    for step in (1, 2):
        flip(save(tmp_path, step) / "driver_state.json")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints") as error:
        find_checkpoint(tmp_path)
    assert "trainer.find_last_checkpoint=false" in str(error.value)


def test_a_given_path_that_is_damaged_is_an_error(tmp_path):
    save(tmp_path, 1)
    flip(save(tmp_path, 2) / "actor" / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"global_step_2 is damaged.*__0_0\.distcp"):
        resolve_checkpoint(tmp_path, tmp_path / "global_step_2", automatic=True)


def test_a_mistyped_path_is_an_error_that_names_the_newest(tmp_path):
    save(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"global_step_5 does not exist; .*global_step_4"):
        resolve_checkpoint(tmp_path, tmp_path / "global_step_5", automatic=True)
    with pytest.raises(CheckpointError, match=r"holds several checkpoints; .*global_step_4"):
        resolve_checkpoint(tmp_path, tmp_path, automatic=True)


def test_a_given_path_may_name_the_actor_folder(tmp_path):
    path = save(tmp_path, 4)
    assert resolve_checkpoint(tmp_path, path / "actor", automatic=False) == path


def test_a_manifest_of_a_later_format_is_refused(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="has format 99; this version reads 1"):
        verify_checkpoint(path)


def test_a_manifest_that_points_outside_is_refused(tmp_path):
    from verl.utils.manifest import from_json

    for name in ("/etc/passwd", "../x"):
        with pytest.raises(CheckpointError, match="points outside the checkpoint"):
            from_json({name: {"size": 1, "sha256": "0"}})


def test_shards_that_the_driver_cannot_see_name_the_shared_folder(tmp_path):
    with (
        pytest.raises(CheckpointError, match="on storage that all nodes share"),
        CheckpointDir(tmp_path, 1) as checkpoint,
    ):
        write_shards(checkpoint.path / "actor", {"model": model_of(1)})
        (checkpoint.path / "actor" / "__0_0.distcp").unlink()
        checkpoint.commit({}, config={})
    assert names(tmp_path) == []


def test_driver_state_that_json_cannot_hold_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="Out of range float"),
        CheckpointDir(tmp_path, 1) as checkpoint,
    ):
        checkpoint.commit({"best": float("nan")}, config={})
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_names_the_setting(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match=r"set trainer\.save_checkpoint_path"),
        CheckpointDir(tmp_path / "file" / "root", 1),
    ):
        pass


def test_changed_settings_are_listed():
    saved = {"optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "n": 4}
    current = {"optim": {"lr": 0.2, "betas": (0.9, 0.99)}, "m": 1}
    assert changed_keys(saved, current) == [
        "m: 'absent' -> 1",
        "n: 4 -> 'absent'",
        "optim.lr: 0.1 -> 0.2",
    ]


def in_child(work) -> int:
    """Runs `work` in a forked process; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(root: Path, boundary: int) -> None:
    """From now on, SIGKILL at the given change of a file or folder below `root`."""
    seen = 0
    changes = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")

    def watch(event: str, args: tuple) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        # Inside of rmtree names are relative to a folder's descriptor.
        inside = str(root) in str(args[0]) or event in ("os.remove", "os.rmdir")
        if (event in changes or writes) and inside:
            if seen == boundary:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(watch)


@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "a step that exists"])
def test_a_kill_at_any_file_boundary_leaves_a_usable_checkpoint(tmp_path, step):
    logging.getLogger("verl").setLevel(logging.CRITICAL)
    pristine = tmp_path / "pristine"
    for earlier in (1, 2):
        save(pristine, earlier)
    boundary, found = 0, []
    while True:
        root = tmp_path / f"run_{boundary}"
        shutil.copytree(pristine, root)

        def killed_save(root: Path = root, boundary: int = boundary) -> None:
            kill_at(root, boundary)
            save(root, step, keep=2)

        status = in_child(killed_save)
        path = find_checkpoint(root)
        assert path is not None
        found.append(json.loads((path / "manifest.json").read_text())["serial"])
        assert_holds(path, {1: 1, 2: 2, 3: step}[found[-1]])
        save(root, 4, keep=2)
        assert not [n for n in names(root) if "tmp" in n or "old" in n]
        shutil.rmtree(root)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        boundary += 1
    logging.getLogger("verl").setLevel(logging.NOTSET)
    assert boundary >= 12, "the harness killed at every change"
    assert found == sorted(found) and found[0] == 2 and found[-1] == 3


def test_hidden_state_of_torch_is_untouched_by_a_save(tmp_path):
    before = torch.get_rng_state()
    with CheckpointDir(tmp_path, 1) as checkpoint:
        write_shards(checkpoint.path / "actor", {"model": nn.Identity()})
        checkpoint.commit({}, config={})
    assert torch.equal(torch.get_rng_state(), before)
