"""Offline caching: what training would make, made before it, once, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image

from tests.data.bad_media import cut, write_video
from verl.config import DataConfig, ModelConfig
from verl.data.cache_dirs import embeds_dir, index_dir
from verl.data.dataset import PromptDataset
from verl.data.embed_store import EmbedKey, EmbedStore
from verl.data.media import MediaCache
from verl.models.fingerprint import tower_fingerprint
from verl.models.loader import build_model, load_adapter, load_tokenizer
from verl.utils import cache_video_embeds_vila as command
from verl.utils.progress import Progress
from verl.workers import offline_encode

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "quickstart" / "base"
SCRIPT = [str(ROOT / "verl" / "utils" / "cache_video_embeds_vila.py")]
MODULE = ["-m", "verl.utils.cache_video_embeds_vila"]
BUDGET = ["--video_max_pixels", str(28 * 28 * 6), "--max_pixels", str(28 * 28 * 8)]
ALL = ["a.mp4", "b.mp4", "c.mp4", "film.mp4"]


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """Videos of 40, 31 and 9 frames, a real one, one cut off, and an image."""
    folder = tmp_path_factory.mktemp("media")
    for name, n_frames in (("a", 40), ("b", 31), ("c", 9)):
        write_video(folder / f"{name}.mp4", n_frames=n_frames)
    shutil.copy2(ROOT / "tests" / "assets" / "bbb_60s.mp4", folder / "film.mp4")
    cut(write_video(folder / "cut.mp4", noise=40), 0.5)
    Image.radial_gradient("L").convert("RGB").save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def rows(media) -> Path:
    """A row a video, with repetitions, a segment, a broken video and one that is not there."""
    videos: list[Any] = [*ALL, "a.mp4", "cut.mp4", "gone.mp4", "cut.mp4"]
    videos.append({"video": "a.mp4", "video_start": 0.5, "video_end": 2.2})
    content = [{"problem": "?", "answer": "A", "videos": video} for video in videos]
    content.append({"problem": "?", "answer": "A", "images": "picture.png"})
    path = media / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def flags(rows: Path, out: Path, *more: str) -> list[str]:
    return ["--model_path", str(MODEL), "--data_file", str(rows), "--output_dir", str(out),
            "--num_video_frames", "8", *BUDGET, *more]  # fmt: skip


def start(how: list[str], arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *how, *arguments], cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return out, err


@pytest.fixture
def here(monkeypatch, capsys):
    """Runs the command in this process: exit code and what it said. Its workers are processes."""
    monkeypatch.setattr(command, "setup_logging", lambda: None)

    def run(arguments: list[str]) -> tuple[int, str]:
        code = command.run(*command.arguments(arguments))
        return code, capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def cached(rows, tmp_path_factory) -> tuple[Path, str, str]:
    """A whole run, as a script, with two processes: the folder, what it said and what it logged."""
    out = tmp_path_factory.mktemp("cache")
    return out, *finish(start(SCRIPT, flags(rows, out, "--num_workers", "2")))


def files(out: Path) -> dict[str, float]:
    """Stored files and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in embeds_dir(out).glob("*.safetensors")}


def test_embeddings_equal_those_of_live_encoding_bit_for_bit(cached, rows, tmp_path):
    args, data = command.arguments(flags(rows, cached[0]))
    job, _ = command._job(args, data, 1 << 40)
    items, _ = command._measured(job, data)
    hf = build_model(job.model, dtype=torch.float32, attention="sdpa", materialize=True)
    adapter, cpu = load_adapter(job.model), torch.device("cpu")
    frames: Any = MediaCache(tmp_path / "frames", 1 << 30)
    live = offline_encode._media_encoder(
        hf, adapter, cpu, frames, EmbedStore(tmp_path / "live", 1 << 30), job
    )
    store = EmbedStore(embeds_dir(cached[0]), 1 << 40)
    assert len(items) == 6  # 4 videos, a part of one, and an image
    for item in items:
        stored = store.get(job.key(item))
        made = live.features([item])
        assert stored is not None and made is not None
        assert torch.equal(stored.features, made)
        assert (stored.grid_thw, stored.frame_times) == (item.grid_thw, item.frame_times)


def test_training_asks_for_the_keys_that_were_stored(cached, rows):
    """By way of a data set and a loaded tower, as workers do."""
    model = ModelConfig(model_path=str(MODEL))
    adapter = load_adapter(model)
    data = DataConfig(
        train_files=[str(rows)], cache_dir=str(cached[0]), num_video_frames=8,
        video_max_pixels=28 * 28 * 6, max_pixels=28 * 28 * 8,
    )  # fmt: skip
    dataset = PromptDataset(data, load_tokenizer(model), adapter)
    hf = build_model(model, dtype=torch.float32, attention="sdpa", materialize=True)
    tower: Any = adapter.vision_tower(hf)
    asked = {
        EmbedKey(media=item.ref.key, family="qwen2_5_vl", weights=tower_fingerprint(tower),
                 dtype=torch.float32, pixels=adapter.vision)
        for i in (0, 1, 2, 3, 4, 8, 9)
        for item in dataset.sample(i).media
    }  # fmt: skip
    assert {f"{key.digest()}.safetensors" for key in asked} == files(cached[0]).keys()


def test_a_run_tells_the_settings_for_training_and_failures_by_reason(cached, media):
    out, said, _ = cached
    assert "6 pieces of media encoded, 0 stored before, 2 failed" in said
    assert f"1 truncated, first: {media / 'cut.mp4'}" in said
    assert f"1 missing, first: {media / 'gone.mp4'}" in said
    assert f"data.cache_dir={out} worker.actor.cached_embeds_dir={out / 'embeds'}" in said
    assert "as they were here: data.max_pixels=6272 data.video_max_pixels=4704" in said
    losses = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [loss["reason"] for loss in losses] == ["truncated", "missing"]
    assert losses[0]["where"].endswith("rows.jsonl:6") and "download" in losses[0]["detail"]
    assert len(files(out)) == 6 and not (out / "frames").exists()


def test_the_same_command_skips_what_is_stored_even_without_the_media(cached, rows, tmp_path):
    out = shutil.copytree(cached[0], tmp_path / "copy", symlinks=True)
    before = files(out)
    aside = rows.parent / "aside"
    aside.mkdir()
    media = [*rows.parent.glob("*.mp4"), *rows.parent.glob("*.png")]
    try:
        for path in media:
            path.rename(aside / path.name)
        said, log = finish(start(MODULE, flags(rows, out, "--resume")))
    finally:
        for path in media:
            (aside / path.name).rename(path)
        aside.rmdir()
    assert "0 pieces of media encoded, 6 stored before, 2 failed" in said
    assert "6 are stored already, 0 to encode" in log
    assert files(out) == before


def test_a_killed_run_leaves_no_process_and_goes_on(rows, tmp_path):
    process = start(SCRIPT, flags(rows, tmp_path, "--num_video_frames", "32"))
    workers = _kill_after_first_file(process, tmp_path, signal.SIGKILL)
    process.wait(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive, "processes outlive the command that was killed"
    process.communicate()
    before = files(tmp_path)
    assert before
    said, _ = finish(start(MODULE, flags(rows, tmp_path, "--num_video_frames", "32")))
    assert f"{6 - len(before)} pieces of media encoded, {len(before)} stored before" in said
    assert len(files(tmp_path)) == 6 and files(tmp_path).items() >= before.items()
    assert not list(embeds_dir(tmp_path).glob(".part-*"))


def test_ctrl_c_stops_at_once_and_says_how_to_go_on(rows, tmp_path):
    # The film takes long enough that the signal comes while it is being decoded.
    process = start(MODULE, flags(rows, tmp_path, "--num_video_frames", "256"))
    workers = _kill_after_first_file(process, tmp_path, signal.SIGINT)
    _, err = finish(process, 130)
    assert "the same command goes on from there" in err and "Traceback" not in err
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


def _kill_after_first_file(
    process: subprocess.Popen[str], out: Path, signum: signal.Signals
) -> list[psutil.Process]:
    """Sends a signal once something is stored, with work left; the processes that it had."""
    deadline = time.monotonic() + 180
    while not files(out):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signum)
    return workers


def test_overwriting_makes_everything_again(here, cached, rows, tmp_path):
    out = shutil.copytree(cached[0], tmp_path / "copy", symlinks=True)
    before = files(out)
    (damaged := embeds_dir(out) / next(iter(before))).write_bytes(b"nonsense")
    code, said = here(flags(rows, out, "--overwrite"))
    assert code == 0 and "6 pieces of media encoded, 0 stored before" in said
    after = files(out)
    assert after.keys() == before.keys() and all(after[name] > before[name] for name in before)
    assert damaged.stat().st_size == (embeds_dir(cached[0]) / damaged.name).stat().st_size


def test_nothing_cached_is_exit_code_1(here, media, tmp_path):
    rows = media / "bad.jsonl"
    rows.write_text(json.dumps({"problem": "?", "answer": "A", "videos": "cut.mp4"}) + "\n")
    code, said = here(flags(rows, tmp_path))
    assert code == 1 and "Nothing could be cached." in said and "1 truncated" in said


def test_what_does_not_fit_the_bound_is_a_failure_and_evicts_nothing(here, cached, rows, tmp_path):
    whole = EmbedStore(embeds_dir(cached[0]), 1 << 40).size_bytes()
    gib = str((whole - 1) / 2**30)
    code, said = here(flags(rows, tmp_path, "--cache_gib", gib))
    stored = files(tmp_path)
    assert code == 0 and 0 < len(stored) < 6
    assert f"{len(stored)} pieces of media encoded" in said
    assert f"{6 - len(stored)} not_stored" in said


def test_flags_and_overrides_give_the_settings_that_training_would_have(rows, tmp_path):
    base = ["--model_path", "m", "--data_file", str(rows), "b.jsonl@val", "--output_dir", "out"]
    _, data = command.arguments(
        [*base, "--fps", "2.5", "--max_frames", "64", "--video_key", "clip",
         "--video_dir", "v,1", "data.decode_threads=3", "data.media_fingerprint=full"]
    )  # fmt: skip
    assert data.train_files == [str(rows), "b.jsonl@val"] and data.cache_dir == "out"
    assert (data.fps, data.max_video_frames, data.video_key) == (2.5, 64, "clip")
    assert (data.video_dir, data.decode_threads, data.media_fingerprint) == ("v,1", 3, "full")
    # An override right behind the files is none of them.
    args, data = command.arguments(["--model_path", "m", "--output_dir", "out", "--data_file",
                                    str(rows), "data.num_video_frames=6"])  # fmt: skip
    assert data.num_video_frames == 6 and args.data_file == [str(rows)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fps", "1", "--num_video_frames", "8"], "give one of them"),
        (["--max_frames", "8"], "write --num_video_frames 8"),
        (["--num_video_frames", "many"], "data.num_video_frames"),
        (["data.num_vido_frames=3"], "num_video_frames"),
        (["--num_workers", "0"], "must be at least 1"),
        (["--cache_gib", "-1"], "must be more than 0"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_started(more, message, capsys):
    with pytest.raises(SystemExit) as caught:
        command.arguments(["--model_path", "m", "--data_file", "f", "--output_dir", "o", *more])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_says_that_any_family_works(capsys):
    with pytest.raises(SystemExit) as caught:
        command.arguments(["--help"])
    assert caught.value.code == 0
    assert "every model family" in capsys.readouterr().out


def test_a_data_file_without_media_names_the_columns(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"problem": "?", "clip": "a.mp4"}) + "\n")
    _, err = finish(start(SCRIPT, flags(rows, tmp_path / "out")), 1)
    assert "no row has a video in the column 'videos'" in err and "--video_key" in err
    assert not index_dir(tmp_path / "out").exists()


def test_a_rate_stands_before_the_count_of_a_progress_line():
    with Progress(4, "encoding") as bar:
        bar.describe("encoding, 2.00 videos/s")
        bar.advance()
        assert bar.line().startswith("encoding, 2.00 videos/s: 1 of 4 (25%)")


def test_verify_finds_damage_in_what_is_stored_and_makes_it_again(here, cached, rows, tmp_path):
    out = shutil.copytree(cached[0], tmp_path / "copy", symlinks=True)
    damaged = next(embeds_dir(out).glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    _, said = here(flags(rows, out))
    assert "0 pieces of media encoded, 6 stored before" in said
    _, said = here(flags(rows, out, "--verify"))
    assert "1 pieces of media encoded, 5 stored before" in said
    content[-1] ^= 1
    assert damaged.read_bytes()[-8:] == bytes(content[-8:])
