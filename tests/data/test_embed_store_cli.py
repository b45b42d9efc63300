"""The command that lists, checks and shrinks a store."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from verl.data.embed_store import BY_NAME, EmbedKey, Embeds, EmbedStore
from verl.data.embed_store_cli import main

ROOT = Path(__file__).parents[2]
KEY = EmbedKey(media="ab" * 16, family="qwen2_5_vl", weights="cd" * 16, dtype=torch.bfloat16)
KEYS = [replace(KEY, media=f"{i:032x}") for i in range(3)]
MIB = 1024**2
DAY_S = 86_400


@pytest.fixture
def store(tmp_path) -> EmbedStore:
    """Three films of a MiB each; the first was used nine days ago, the last now."""
    store = EmbedStore(tmp_path / "store", 10**9)
    for i, key in enumerate(KEYS):
        features = torch.full((1024, 512), float(i), dtype=torch.bfloat16)
        kept = Embeds(
            features,
            grid_thw=(64, 8, 8),
            seconds_per_grid=2.0,
            frame_times=[float(s) for s in range(128)],
            path=f"/films/film {i}.mp4",
        )
        store.put(key, kept)
        moment = time.time() - (9, 3, 0)[i] * DAY_S
        os.utime(store.path_of(key), (moment, moment))
    return store


def left(store: EmbedStore) -> list[int]:
    return [i for i, key in enumerate(KEYS) if key not in store.missing(KEYS)]


def test_ls_shows_a_line_for_each_video_the_last_used_first(store, capsys):
    assert main(["ls", str(store.root)]) == 0
    header, *lines, total = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["video", "tokens", "frames", "MiB"]
    assert [line.split()[1] for line in lines] == ["2.mp4", "1.mp4", "0.mp4"]
    for word in ("1024", "128", "1.0", "BF16", "qwen2_5_vl", "cdcdcdcdcdcd", KEYS[0].digest()):
        assert word in lines[2].split()
    assert lines[2].split()[-2] == "9d"
    assert total == "3 entries, 0.00 GiB"


def test_the_command_runs_without_torch_and_leaves_the_folder_as_it_was(store, tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    before = sorted(store.root.rglob("*"))
    for command in ("ls", "verify"):
        subprocess.run(
            [sys.executable, "-m", "verl.data.embed_store", command, str(store.root)],
            env=environment,
            check=True,
            capture_output=True,
        )
    assert sorted(store.root.rglob("*")) == before


def test_verify_names_what_is_damaged_and_exits_with_one(store, capsys):
    assert main(["verify", str(store.root)]) == 0
    assert "3 good, 0 damaged" in capsys.readouterr().out
    path = store.path_of(KEYS[1])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    store.path_of(KEYS[2]).write_bytes(b"nothing like it")
    assert main(["verify", str(store.root)]) == 1
    out = capsys.readouterr().out
    assert f"damaged: {path}: rows 0 to 1023" in out
    assert str(store.path_of(KEYS[2])) in out and "1 good, 2 damaged" in out
    assert main(["ls", str(store.root)]) == 0
    assert "(damaged: see verify)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--limit-gib", str(2.5 / 1024)], [1, 2]),
        (["--limit-gib", "0"], []),
        (["--older-than-days", "2"], [2]),
        (["--older-than-days", "5", "--limit-gib", str(1.5 / 1024)], [2]),
        (["--weights", "cdcd"], [0, 1, 2]),
        (["--weights", "ef"], []),
    ],
)
def test_prune_removes_the_least_recently_used(store, capsys, options, expected):
    assert main(["prune", str(store.root), *options, "--dry-run"]) == 0
    assert left(store) == [0, 1, 2]
    assert f"would remove {3 - len(expected)} entries" in capsys.readouterr().out
    assert main(["prune", str(store.root), *options]) == 0
    assert left(store) == expected
    assert f"removed {3 - len(expected)} entries" in capsys.readouterr().out
    assert len(list((store.root / BY_NAME).iterdir())) == len(expected)


def test_prune_spares_what_a_running_step_holds(store):
    with store.hold([KEYS[0]]):
        assert main(["prune", str(store.root), "--limit-gib", str(2.5 / 1024)]) == 0
        assert left(store) == [0, 2], "what is held counts, too"
        assert main(["prune", str(store.root), "--limit-gib", "0"]) == 0
    assert left(store) == [0]


def test_prune_without_a_rule_and_a_folder_that_is_none_say_what_to_type(store, capsys):
    assert main(["prune", str(store.root)]) == 2
    assert "--older-than-days" in capsys.readouterr().err
    assert main(["ls", str(store.root / "nowhere")]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err
    assert left(store) == [0, 1, 2]


@pytest.mark.parametrize("amount", ["-1", "nan", "much"])
def test_amounts_that_make_no_sense_are_refused(store, capsys, amount):
    with pytest.raises(SystemExit):
        main(["prune", str(store.root), f"--limit-gib={amount}"])
    assert "--limit-gib" in capsys.readouterr().err


def test_a_video_name_cannot_drive_the_terminal(store, capsys):
    kept = store.get(KEYS[0])
    kept.path = "/films/\x1b[2Jx.mp4"
    store.put(KEYS[0], kept)
    main(["ls", str(store.root)])
    assert "\x1b" not in capsys.readouterr().out
