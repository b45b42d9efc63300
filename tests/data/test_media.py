"""What metadata promises of a piece of media, and what decoding and the cache deliver."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.bad_media import (
    N_FRAMES,
    brightness,
    claim_avi_frames,
    turn_mp4,
    wipe_frames,
    write_video,
)
from verl.data import media
from verl.data.cache_dirs import default_cache_dir
from verl.data.image import load_image, probe_image
from verl.data.media import (
    FrameSampling,
    MediaCache,
    MediaItem,
    decode_media,
    make_media_item,
    pixels,
)
from verl.data.media_files import BadMedia
from verl.data.preprocess import VisionSpec

SPEC = VisionSpec()
RULE = SPEC.resize_rule("video", 28 * 28, 28 * 28 * 6)
EIGHT = FrameSampling(num_frames=8)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="session")
def clip(folder) -> Path:
    return write_video(folder / "clip.mp4")


@pytest.fixture
def cache(tmp_path) -> MediaCache:
    return MediaCache(tmp_path / "cache", 10**9)


def clip_item(path: Path, sampling: FrameSampling = EIGHT, decoder="pyav") -> MediaItem:
    return make_media_item(str(path), "video", sampling, RULE, decoder)


def reason_of(call, *args) -> str:
    with pytest.raises(BadMedia) as caught:
        call(*args)
    return caught.value.reason


SOURCES = {
    "long.mp4": {},
    "one_frame.mp4": {"n_frames": 1},
    "three_frames.mkv": {"n_frames": 3},
    "wide.mp4": {"size": (320, 64), "n_frames": 9},
    "counted.mpg": {"codec": "mpeg2video", "fps": 25},
    "claimed.avi": {"codec": "mpeg4"},
    "turned.mp4": {"size": (320, 64)},
}
SAMPLINGS = {
    "8_frames": EIGHT,
    "7_frames": FrameSampling(num_frames=7),
    "1_frame": FrameSampling(num_frames=1),
    "all_frames": FrameSampling(num_frames=10**6),
    "5_fps": FrameSampling(fps=5.0, max_frames=16),
    "stride": FrameSampling(num_frames=6, rule="stride"),
}


@pytest.fixture(scope="session")
def sources(folder):
    paths = {name: write_video(folder / name, **kind) for name, kind in SOURCES.items()}
    claim_avi_frames(paths["claimed.avi"], N_FRAMES + 2)
    turn_mp4(paths["turned.mp4"], 90)
    return paths


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_token_count_from_metadata_is_the_real_one(sources, source, sampling):
    item = clip_item(sources[source], SAMPLINGS[sampling])
    frames = decode_media(item.ref)
    rows, grid = pixels(frames, SPEC)
    assert grid == item.grid_thw
    assert rows.shape[0] == item.n_tokens * SPEC.merge_size**2
    assert frames.frame_times == pytest.approx(item.frame_times, abs=0.002)
    assert len(frames.frame_times) == frames.frames_u8.shape[0]


def test_frames_arrive_resized_in_order_and_with_their_own_brightness(clip):
    frames = decode_media(clip_item(clip).ref)
    assert frames.frames_u8.dtype == torch.uint8
    levels = frames.frames_u8.float().mean((1, 2, 3)).tolist()
    wanted = np.linspace(0, N_FRAMES - 1, 8).round().astype(int)
    assert levels == pytest.approx([brightness(i) for i in wanted], abs=2)
    assert (frames.source_fps, frames.n_held) == (10.0, 0)


def test_seconds_per_grid_is_two_frames_of_the_sampled_rate(clip):
    item = clip_item(clip)
    assert item.seconds_per_grid == pytest.approx(2 / (8 / 4.0))
    assert item.frame_times[-1] == pytest.approx(3.9)


def test_items_can_be_hashed_and_sent(clip):
    item = clip_item(clip)
    assert pickle.loads(pickle.dumps(item)) == item
    assert len({item, clip_item(clip)}) == 1


def test_the_key_depends_on_all_that_changes_a_pixel(clip, folder):
    others = [
        clip_item(clip, FrameSampling(num_frames=6)),
        clip_item(clip, FrameSampling(num_frames=8, rule="stride")),
        clip_item(clip, decoder="decord"),
        make_media_item(str(clip), "video", EIGHT, SPEC.resize_rule("video")),
        clip_item(write_video(folder / "other.mp4", n_frames=39)),
    ]
    assert len({clip_item(clip).ref.key, *(item.ref.key for item in others)}) == 6


def test_decord_gives_the_same_pixels(clip):
    mine = decode_media(clip_item(clip).ref)
    theirs = decode_media(clip_item(clip, decoder="decord").ref)
    gap = mine.frames_u8.int() - theirs.frames_u8.int()
    assert gap.abs().max() <= 1


def test_a_file_that_changed_since_it_was_measured_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    item = clip_item(path)
    write_video(path, n_frames=30)
    assert reason_of(decode_media, item.ref) == "changed"
    path.unlink()
    assert reason_of(decode_media, item.ref) == "missing"


def test_a_file_that_decodes_to_another_shape_than_measured_is_refused(clip):
    ref = replace(clip_item(clip).ref, source_shape=(41, 48, 64))
    with pytest.raises(BadMedia, match=r"\(41, 48, 64\)") as caught:
        decode_media(ref)
    assert caught.value.reason == "frame_count_mismatch"


def test_frames_that_are_not_there_never_change_the_count_silently(tmp_path):
    path = wipe_frames(write_video(tmp_path / "a.mp4", gop=1, b_frames=0), list(range(5, 15)))
    assert reason_of(decode_media, clip_item(path).ref) == "frame_count_mismatch"
    path = wipe_frames(write_video(tmp_path / "b.mp4", gop=1, b_frames=0), [20])
    frames = decode_media(clip_item(path, FrameSampling(num_frames=N_FRAMES)).ref)
    assert (frames.frames_u8.shape[0], frames.n_held) == (N_FRAMES, 1)


def test_a_ribbon_of_pixels_is_refused_by_its_shape(tmp_path):
    path = tmp_path / "ribbon.png"
    Image.new("RGB", (1000, 2)).save(path)
    rule = SPEC.resize_rule("image")
    assert reason_of(make_media_item, str(path), "image", None, rule) == "too_large"


def test_a_video_without_a_sampling_is_a_mistake_of_the_caller(clip):
    with pytest.raises(ValueError, match="FrameSampling"):
        make_media_item(str(clip), "video", None, RULE)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
def test_images_of_any_colour_mode_become_rgb_with_the_promised_tokens(tmp_path, mode):
    path = tmp_path / "picture.tiff"
    noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    item = make_media_item(str(path), "image", None, SPEC.resize_rule("image"))
    rows, grid = pixels(decode_media(item.ref), SPEC)
    assert grid == item.grid_thw and grid[0] == 1
    assert rows.shape[0] == 4 * item.n_tokens
    assert item.seconds_per_grid == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_measured_and_loaded_upright(tmp_path, orientation):
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (60, 40)).save(path, exif=exif)
    assert probe_image(str(path)) == ((60, 40) if orientation >= 5 else (40, 60))
    assert load_image(str(path)).shape[:2] == probe_image(str(path))


def damaged_image(path: Path, keep: float) -> str:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    return str(path)


def test_bad_images_give_their_reason(tmp_path, clip, monkeypatch):
    assert reason_of(load_image, damaged_image(tmp_path / "cut.jpg", 0.5)) == "truncated"
    assert reason_of(load_image, damaged_image(tmp_path / "cut.png", 0.5)) == "truncated"
    assert reason_of(probe_image, str(clip)) == "not_media"
    assert reason_of(probe_image, str(tmp_path)) == "not_regular"
    monkeypatch.setattr("verl.data.image.MAX_FRAME_PIXELS", 100)
    whole = damaged_image(tmp_path / "whole.png", 1.0)
    assert reason_of(probe_image, whole) == "too_large"


def test_the_cache_decodes_once_and_returns_the_same_frames(cache, clip, monkeypatch):
    ref = clip_item(clip).ref
    first = cache.get(ref)
    monkeypatch.setattr(media, "decode_media", lambda _: pytest.fail("decoded again"))
    again = MediaCache(cache.root, 10**9).get(ref)
    assert torch.equal(first.frames_u8, again.frames_u8)
    assert again.frame_times == first.frame_times
    assert (again.source_fps, again.n_held) == (first.source_fps, 0)
    assert [path.name for path in cache.root.glob("*.safetensors")] == [f"{ref.key}.safetensors"]


def test_a_damaged_cache_file_is_made_again(cache, clip, caplog):
    ref = clip_item(clip).ref
    whole = cache.get(ref).frames_u8.clone()
    path = cache.root / f"{ref.key}.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    assert torch.equal(cache.get(ref).frames_u8, whole)
    assert str(path) in caplog.text


def test_bad_media_leave_nothing_in_the_cache(cache, tmp_path):
    path = wipe_frames(write_video(tmp_path / "a.mp4"), list(range(N_FRAMES)))
    assert reason_of(cache.get, clip_item(path).ref) == "decode_error"
    assert not list(cache.root.glob("*.safetensors"))


def test_held_media_survive_a_full_cache(tmp_path, clip):
    first, second = (clip_item(clip, FrameSampling(num_frames=n)).ref for n in (8, 4))
    cache = MediaCache(tmp_path / "small", 150_000)
    assert cache.get(first).frames_u8.numel() > 75_000
    with cache.hold([first.key]):
        assert cache.get(replace(second)).frames_u8.shape[0] == 4
        assert (cache.root / f"{first.key}.safetensors").exists()


def test_the_default_cache_is_one_of_this_user():
    assert str(os.getuid()) in default_cache_dir().name
