"""What becomes of media when processes that encode them fail or die."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.workers.offline_toys import toy_serve
from verl.data.media import FrameSampling, MediaItem, MediaRef
from verl.data.preprocess import ResizeRule
from verl.utils.exits import UserError
from verl.workers import offline_pool
from verl.workers.offline_encode import Failed
from verl.workers.offline_pool import OfflinePool

RULE = ResizeRule(min_pixels=784, max_pixels=784)


@dataclass(frozen=True)
class ToyJob:
    store_dir: str
    threads: int = 2


@pytest.fixture
def encode(tmp_path, monkeypatch):
    """Reasons by name of the file; empty where it was made."""
    monkeypatch.setattr(offline_pool, "serve", toy_serve)

    def run(names: list[str], devices=("cpu", "cpu")) -> dict[str, str]:
        items = [item_of(name) for name in names]
        job: Any = ToyJob(str(tmp_path))
        with OfflinePool(job, devices, ahead_bytes=1 << 30) as pool:
            answers = list(pool.run(items))
        assert not any(child.process.is_alive() for child in pool._children)
        assert len(answers) == len(names)
        return {
            Path(item.ref.path).name: f"{a.reason}: {a.detail}" if isinstance(a, Failed) else ""
            for item, a in answers
        }

    return run


def item_of(name: str) -> MediaItem:
    ref = MediaRef("video", f"/v/{name}", FrameSampling(num_frames=2), RULE, name)
    return MediaItem(ref, (1, 2, 2), 1.0, 1, (0.0, 1.0))


def test_every_piece_is_answered_once_by_any_number_of_processes(encode, tmp_path):
    names = [f"{i}.mp4" for i in range(20)] + ["bad.mp4"]
    expected = dict.fromkeys(names, "") | {"bad.mp4": "truncated: too short"}
    assert encode(names) == expected
    assert all(len((tmp_path / name).read_text().split()) == 1 for name in names)


def test_a_file_that_kills_its_process_costs_itself_alone(encode):
    names = ["a.mp4", "kill-1.mp4", "b.mp4", "c.mp4", "kill-2.mp4", "d.mp4", "e.mp4"]
    answers = encode(names)
    lost = {name: said for name, said in answers.items() if said}
    assert set(lost) == {"kill-1.mp4", "kill-2.mp4"}
    said = lost["kill-1.mp4"]
    assert said.startswith("crashed: the process that worked on it was ended by SIGKILL")
    assert "re-encode the file" in said and "--num_workers" in said


@pytest.mark.parametrize("others", [[], ["a.mp4", "b.mp4"]])
def test_a_file_whose_process_dies_once_is_made_when_it_is_tried_alone(encode, others, caplog):
    """Another program may have taken the memory, or the file beside it was the culprit."""
    names = ["kill-once.mp4", *others]
    assert encode(names, devices=("cpu",)) == dict.fromkeys(names, "")
    assert "was ended by SIGKILL: trying its" in caplog.text


def test_a_file_that_kills_its_process_is_tried_twice_and_no_more(encode, monkeypatch):
    started = []
    real = OfflinePool._started
    monkeypatch.setattr(OfflinePool, "_started", lambda pool, i: started.append(i) or real(pool, i))
    assert encode(["kill.mp4"])["kill.mp4"].startswith("crashed")
    assert len(started) == 2


def test_processes_that_cannot_start_end_the_run_with_their_reason(encode):
    with pytest.raises(UserError, match="no such device"):
        encode(["a.mp4"], devices=("broken",))


def test_ctrl_c_is_held_back_while_a_process_imports_and_not_from_the_parent(encode):
    assert encode(["signal"])["signal"] == "signal: held back: True"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
