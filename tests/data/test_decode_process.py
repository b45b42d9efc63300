"""Decoding in a process of its own: the same frames, and every end of it has a name."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.data.bad_media import write_video
from verl.data import decode_process
from verl.data.dataset import PromptDataset
from verl.data.decode_process import Limits, frames_from_subprocess, probe_in_subprocess
from verl.data.loader import PromptLoader
from verl.data.media import FrameSampling, MediaCache, Reading, decode_media, make_media_item
from verl.data.media_files import BadMedia
from verl.data.preprocess import VisionSpec
from verl.data.video import probe
from verl.data.video_decode import iter_frames

RULE = VisionSpec().resize_rule("video", 28 * 28, 28 * 28 * 6)
FOUR = FrameSampling(num_frames=4)


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> str:
    return str(write_video(tmp_path_factory.mktemp("film") / "a.mp4"))


@pytest.fixture
def broken(monkeypatch):
    """The decoding process breaks after its second frame, in the way that is named."""

    def break_it(how: str) -> None:
        monkeypatch.setenv("VERL_TEST_BREAK", how)
        start = decode_process.start_child
        monkeypatch.setattr(
            decode_process, "start_child", lambda: start("tests.data.broken_decoder")
        )

    return break_it


def running_children() -> list[str]:
    found = subprocess.run(["ps", "-o", "args="], capture_output=True, text=True)
    return [line for line in found.stdout.splitlines() if "verl.data.decode_child" in line]


def decode_all(film: str, limits: Limits) -> list:
    return list(frames_from_subprocess(probe(film), range(40), "pyav", 1, limits))


def test_frames_and_measures_are_those_of_this_process(film):
    assert probe_in_subprocess(film, Limits()) == probe(film)
    mine = list(iter_frames(probe(film), range(40)))
    theirs = decode_all(film, Limits())
    assert [(f.index, f.time_s, f.held) for f in mine] == [
        (f.index, f.time_s, f.held) for f in theirs
    ]
    assert all(np.array_equal(a.rgb_HWC, b.rgb_HWC) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    "how, reason, said", [("segfault", "crashed", "SIGSEGV"), ("exit", "crashed", "exit code 7")]
)
def test_a_decoder_that_crashes_costs_its_file_and_not_this_process(
    film, broken, how, reason, said
):
    broken(how)
    with pytest.raises(BadMedia, match=said) as caught:
        decode_all(film, Limits())
    assert caught.value.reason == reason


@pytest.mark.parametrize("how", ["hang", "sleep"])
def test_a_decoder_that_hangs_in_c_is_killed_at_its_deadline(film, broken, how, monkeypatch):
    monkeypatch.setattr(decode_process, "_SLOWER_END_S", 0.5)
    broken(how)
    start = time.monotonic()
    with pytest.raises(BadMedia, match="not done after 1 s") as caught:
        decode_all(film, Limits(timeout_s=1))
    assert caught.value.reason == "timeout"
    assert time.monotonic() - start < 5


def test_a_decoder_that_takes_too_much_memory_is_refused_it(film, broken):
    broken("memory")
    with pytest.raises(BadMedia, match=r"more than 0\.39 GiB are needed") as caught:
        decode_all(film, Limits(memory_bytes=400 << 20))
    assert caught.value.reason == "out_of_memory"


def test_a_picture_that_does_not_fit_into_the_memory_limit_is_named(tmp_path):
    path = str(write_video(tmp_path / "a.mp4", n_frames=3, codec="mpeg4", size=(4096, 4096)))
    info = probe(path)
    with pytest.raises(BadMedia) as caught:
        list(frames_from_subprocess(info, [0], "pyav", 1, Limits(memory_bytes=180 << 20)))
    assert caught.value.reason == "out_of_memory"
    assert "data.decode_memory_gib" in str(caught.value)


def test_the_reason_of_a_bad_file_comes_through(tmp_path, film):
    text = tmp_path / "a.mp4"
    text.write_text("no film at all " * 99)
    with pytest.raises(BadMedia) as caught:
        probe_in_subprocess(str(text), Limits())
    with pytest.raises(BadMedia) as expected:
        probe(str(text))
    assert caught.value.reason == expected.value.reason
    longer = replace(probe(film), n_frames=60)
    with pytest.raises(BadMedia, match="60 frames were counted before"):
        list(frames_from_subprocess(longer, [0], "pyav", 1, Limits()))


def test_a_reader_that_stops_early_leaves_no_process(film):
    frames = frames_from_subprocess(probe(film), range(40), "pyav", 1, Limits())
    next(frames)
    frames.close()  # type: ignore[attr-defined]
    assert not running_children()


def test_the_process_ends_with_its_parent(film):
    code = (
        "import os; from verl.data.decode_process import start_child; "
        "print(start_child('verl.data.decode_child').pid, flush=True); os._exit(0)"
    )
    root = Path(decode_process.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    child = Path("/proc", done.stdout.strip())
    for _ in range(100):
        if not child.exists() or "\tZ" in (child / "status").read_text():
            return
        time.sleep(0.1)
    pytest.fail("the process outlives its parent")


def test_media_are_the_same_whether_in_a_process_of_their_own_or_not(film, broken):
    apart = Reading(in_subprocess=True, threads=2)
    mine = make_media_item(film, "video", FOUR, RULE)
    theirs = make_media_item(film, "video", FOUR, RULE, reading=apart)
    assert theirs.ref.key == mine.ref.key
    assert (decode_media(theirs.ref).frames_u8 == decode_media(mine.ref).frames_u8).all()
    broken("segfault")
    with pytest.raises(BadMedia) as caught:
        decode_media(theirs.ref)
    assert caught.value.reason == "crashed"


def test_a_crash_costs_its_row_and_the_run_goes_on(
    tmp_path, write_rows, make_config, tokenizer, fmt, broken
):
    names = ["good_a.mp4", "evil.mp4", "good_b.mp4"]
    for name in names:
        write_video(tmp_path / name)
    file = write_rows([{"problem": n, "answer": "A", "videos": n} for n in names])
    config = make_config(
        file,
        num_video_frames=4,
        video_min_pixels=1,
        on_bad_sample="skip",
        max_bad_fraction=0.5,
        decode_in_subprocess=True,
    )
    broken("segfault")
    dataset = PromptDataset(config, tokenizer, fmt)
    cache = MediaCache(tmp_path / "cache", 1 << 24)
    (batch,) = PromptLoader(dataset, 2, shuffle=False, seed=1, media_cache=cache)
    assert [sample.question for sample in batch] == ["good_a.mp4", "good_b.mp4"]
    assert [(entry.where[-1], entry.reason) for entry in dataset.quarantine] == [("2", "crashed")]


def test_the_full_fingerprint_is_another_key(film):
    keys = {
        make_media_item(film, "video", FOUR, RULE, reading=Reading(fingerprint=how)).ref.key
        for how in ("fast", "full")
    }
    assert len(keys) == 2
    item = make_media_item(film, "video", FOUR, RULE, reading=Reading(fingerprint="full"))
    assert len(decode_media(item.ref).frames_u8) == 4
