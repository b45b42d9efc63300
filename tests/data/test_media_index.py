"""What is known of a video without its file, and when that is not believed."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.data.bad_media import write_video
from verl.config import DataConfig
from verl.data import dataset as dataset_module
from verl.data import media
from verl.data.cache_dirs import default_cache_dir, embeds_dir, frames_dir, index_dir
from verl.data.dataset import MediaProbe
from verl.data.inline import InlineImages
from verl.data.media import MediaCache, MediaItem
from verl.data.preprocess import VisionSpec
from verl.data.prompts import MediaSlot
from verl.data.rows import BadSample, Row

BUDGET = {"video_min_pixels": 28 * 28, "video_max_pixels": 28 * 28 * 6}


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    """40 frames, 10 a second."""
    return write_video(tmp_path_factory.mktemp("film") / "a.mp4")


@pytest.fixture
def video(tmp_path, film) -> Path:
    (tmp_path / "videos").mkdir()
    return Path(shutil.copy2(film, tmp_path / "videos" / "a.mp4"))


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Names of the files that were opened and measured."""
    names: list[str] = []

    def measure(path, *args):
        names.append(Path(path).name)
        return media.make_media_item(path, *args)

    monkeypatch.setattr(dataset_module, "make_media_item", measure)
    return names


def row_of(folder: Path) -> Row:
    texts = {"problem": "?", "answer": "A", "problem_type": "", "reasoning": ""}
    return Row(
        uid="0", where="rows.jsonl:1", folder=folder, **texts,
        options=(), images=(), videos=(), extra={}, columns={},
    )  # fmt: skip


def probe_of(folder: Path, *, keep_images=False, **settings) -> MediaProbe:
    """What a new run measures with; videos are in `folder`/videos."""
    data = DataConfig(
        cache_dir=str(folder / "cache"),
        **{"video_dir": str(folder / "videos"), "num_video_frames": 8, **BUDGET, **settings},
    )
    return MediaProbe(data, VisionSpec(), keep_images=keep_images)


def item_of(folder: Path, name="a.mp4", *, segment=(None, None), kind="video", **settings):
    """What a new run knows of a video in `folder`/videos, or of an image in `folder`."""
    probe = probe_of(folder, **settings)
    (item,) = probe.items(row_of(folder), [MediaSlot(kind, name, segment)])
    return item


def picture_in(folder: Path, *size: int) -> Path:
    Image.new("RGB", size).save(folder / "a.png")
    return folder / "a.png"


def entries(folder: Path) -> list[Path]:
    return sorted(index_dir(folder / "cache").glob("*"))


def missing(folder: Path, *args, **settings) -> str:
    with pytest.raises(BadSample) as caught:
        item_of(folder, *args, **settings)
    assert caught.value.reason == "missing"
    return str(caught.value)


def test_the_folders_of_a_cache_are_apart(tmp_path):
    names = {f(tmp_path).name for f in (frames_dir, embeds_dir, index_dir)}
    assert names == {"frames", "embeds", "index"}
    assert frames_dir(None).parent == default_cache_dir()


@pytest.mark.parametrize(
    ("segment", "settings"),
    [
        ((None, None), {}),
        ((None, None), {"fps": 3.7, "max_video_frames": 12}),
        ((0.7, 3.1), {}),
        ((1.3, None), {"fps": 1 / 0.3}),
        ((None, 2.9), {"num_video_frames": 7, "media_fingerprint": "full"}),
    ],
    ids=["frames", "fps", "segment", "segment-fps", "full"],
)
def test_a_vanished_video_is_known_as_it_was_measured(tmp_path, video, segment, settings):
    first = item_of(tmp_path, segment=segment, **settings)
    again = item_of(tmp_path, segment=segment, **settings)
    shutil.rmtree(video.parent)
    assert item_of(tmp_path, segment=segment, **settings) == again == first
    assert first.n_tokens > 0 and len(first.frame_times) > 1


def test_a_known_video_is_not_measured_again(tmp_path, video, measured):
    items = [item_of(tmp_path) for _ in range(3)]
    assert measured == ["a.mp4"]
    assert items[0] == items[2]


@pytest.mark.parametrize(
    "other",
    [
        {"num_video_frames": 6},
        {"video_max_pixels": 28 * 28 * 4},
        {"video_decoder": "decord"},
        {"media_fingerprint": "full"},
        {"segment": (1.0, None)},
        {"name": "b.mp4"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_vanished_video_that_is_looked_at_otherwise_is_missing(tmp_path, video, other):
    item_of(tmp_path)
    video.unlink()
    said = missing(tmp_path, **other)
    assert "there is no such file" in said
    assert f"{index_dir(tmp_path / 'cache')}) does not know it either" in said
    assert "check data.video_dir" in said


def test_another_video_of_the_same_name_is_measured_anew_and_named(
    tmp_path, video, measured, caplog
):
    old = item_of(tmp_path)
    write_video(video, n_frames=30, size=(96, 48))
    with caplog.at_level(logging.WARNING):
        new = item_of(tmp_path)
    assert f"{video} is another video than was measured before" in caplog.text
    assert new.ref.key != old.ref.key and new.grid_thw != old.grid_thw
    assert new == media.make_media_item(
        str(video), "video", new.ref.sampling, new.ref.resize, "pyav", new.ref.reading
    )
    video.unlink()
    assert item_of(tmp_path) == new, "the old entry was not replaced"
    assert measured == ["a.mp4", "a.mp4"] and len(entries(tmp_path)) == 1


def test_a_video_that_was_replaced_by_a_broken_file_is_not_served_later(tmp_path, video):
    item_of(tmp_path)
    video.write_text("<html>")
    with pytest.raises(BadSample, match="html"):
        item_of(tmp_path)
    video.unlink()
    missing(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flip", "list", "empty"])
def test_a_damaged_entry_is_named_and_made_again(tmp_path, video, measured, caplog, damage):
    item = item_of(tmp_path)
    (entry,) = entries(tmp_path)
    good = entry.read_text()
    bad = {
        "cut": good[: len(good) // 2],
        "flip": good.replace(f'"n_tokens": {item.n_tokens}', f'"n_tokens": {item.n_tokens + 1}'),
        "list": "[]",
        "empty": "",
    }[damage]
    assert bad != good
    entry.write_text(bad)
    video.rename(tmp_path / "away.mp4")
    assert str(entry) in (said := missing(tmp_path)) and "is damaged" in said
    (tmp_path / "away.mp4").rename(video)
    assert item_of(tmp_path) == item
    assert str(entry) in caplog.text and measured == ["a.mp4", "a.mp4"]
    assert entry.read_text() == good


def test_an_entry_under_the_name_of_another_is_not_believed(tmp_path, video, film):
    shutil.copy2(film, video.with_name("b.mp4"))
    item_of(tmp_path)
    (first,) = entries(tmp_path)
    item_of(tmp_path, "b.mp4")
    (second,) = set(entries(tmp_path)) - {first}
    shutil.copy(first, second)
    shutil.rmtree(video.parent)
    assert "another video" in missing(tmp_path, "b.mp4")


def test_another_version_of_keys_forgets_what_was_measured(tmp_path, video, monkeypatch, measured):
    old = item_of(tmp_path)
    monkeypatch.setattr(media, "FORMAT_VERSION", media.FORMAT_VERSION + 1)
    assert item_of(tmp_path).ref.key != old.ref.key
    assert len(measured) == 2
    monkeypatch.setattr(media, "FORMAT_VERSION", media.FORMAT_VERSION + 1)
    video.unlink()
    missing(tmp_path)


def test_a_vanished_file_must_still_lie_in_the_media_folder(tmp_path, video, film):
    outside = shutil.copy2(film, tmp_path / "outside.mp4")
    item_of(tmp_path, "../outside.mp4", allow_outside_media_dir=True)
    Path(outside).unlink()
    assert item_of(tmp_path, "../outside.mp4", allow_outside_media_dir=True).n_tokens
    with pytest.raises(BadSample) as caught:
        item_of(tmp_path, "../outside.mp4")
    assert caught.value.reason == "outside_media_dir"


@pytest.mark.parametrize("gone", ["link", "target", "both"])
def test_a_link_that_vanishes_with_its_video_keeps_its_entry(tmp_path, video, gone):
    target = video.rename(video.with_name("blob"))
    video.symlink_to(target)
    item = item_of(tmp_path)
    for path in {"link": [video], "target": [target], "both": [video, target]}[gone]:
        path.unlink()
    left = item_of(tmp_path)
    assert (left.ref.key, left.frame_times) == (item.ref.key, item.frame_times)
    # What is opened is what the row names now, never what an entry says.
    assert left.ref.path == os.path.realpath(video)


def test_stored_frames_of_a_vanished_video_are_served(tmp_path, video):
    cache = MediaCache(frames_dir(tmp_path / "cache"), 10**8)
    before = cache.get(item_of(tmp_path).ref).frames_u8.clone()
    video.unlink()
    assert cache.get(item_of(tmp_path).ref).frames_u8.equal(before)
    with pytest.raises(media.BadMedia, match="its frames are not stored"):
        MediaCache(tmp_path / "elsewhere", 10**8).get(item_of(tmp_path).ref)


@pytest.mark.parametrize("names", [("a.mp4", "b.mp4"), ("a.mp4", "/a.mp4"), ("a.mp4", "./a.mp4")])
def test_a_video_is_known_under_each_of_its_names(tmp_path, video, names):
    target = video.rename(tmp_path / "blob")
    for name in ("a.mp4", "b.mp4"):
        video.with_name(name).symlink_to(target)
    names = [str(video.parent) + name if name[0] == "/" else name for name in names]
    settings = {"allow_outside_media_dir": True}
    first = probe_of(tmp_path, **settings)
    items = [first.items(row_of(tmp_path), [MediaSlot("video", name)])[0] for name in names]
    assert items[0] == items[1]
    shutil.rmtree(video.parent)
    target.unlink()
    left = [item_of(tmp_path, name, **settings) for name in names]
    assert [item.ref.key for item in left] == [item.ref.key for item in items]


@pytest.mark.parametrize("gone", ["target", "link", "both"])
def test_a_media_folder_that_is_a_link_may_vanish(tmp_path, video, gone):
    link = tmp_path / "link"
    link.symlink_to(video.parent)
    item = item_of(tmp_path, video_dir=str(link))
    if gone != "link":
        shutil.rmtree(video.parent)
    if gone != "target":
        link.unlink()
    assert item_of(tmp_path, video_dir=str(link)).ref.key == item.ref.key


def test_names_that_only_look_alike_are_different_videos(tmp_path, video):
    """`link/..` is the folder above what the link leads to, not the one that the link is in."""
    (tmp_path / "else" / "inner").mkdir(parents=True)
    write_video(tmp_path / "else" / "a.mp4", n_frames=30)
    (video.parent / "link").symlink_to(tmp_path / "else" / "inner")
    names, settings = ["a.mp4", "link/../a.mp4"], {"allow_outside_media_dir": True}
    keys = [item_of(tmp_path, name, **settings).ref.key for name in names]
    assert keys[0] != keys[1]
    video.unlink()
    (tmp_path / "else" / "a.mp4").unlink()
    assert [item_of(tmp_path, name, **settings).ref.key for name in names] == keys


def test_a_vanished_image_is_known_once_it_was_kept(tmp_path):
    picture = picture_in(tmp_path, 64, 48)
    item = item_of(tmp_path, "a.png", kind="image", keep_images=True)
    picture.unlink()
    assert item_of(tmp_path, "a.png", kind="image") == item
    assert item.n_tokens > 0 and item.ref.sampling is None


def test_another_image_of_the_same_name_is_measured_anew(tmp_path):
    """Also by a run that keeps none: what is known already must not be wrong for the next."""
    old = item_of(tmp_path, picture_in(tmp_path, 64, 48).name, kind="image", keep_images=True)
    picture = picture_in(tmp_path, 640, 480)
    new = item_of(tmp_path, "a.png", kind="image")
    assert new.grid_thw != old.grid_thw
    picture.unlink()
    assert item_of(tmp_path, "a.png", kind="image") == new


def test_a_known_image_is_not_measured_again(tmp_path, measured):
    picture_in(tmp_path, 64, 48)
    for _ in range(3):
        item_of(tmp_path, "a.png", kind="image", keep_images=True)
    assert measured == ["a.png"]


def test_images_leave_no_trace_in_the_index_of_a_run_that_makes_no_embeddings(tmp_path):
    picture = picture_in(tmp_path, 64, 48)
    item = item_of(tmp_path, "a.png", kind="image")
    assert item.n_tokens > 0
    assert not (tmp_path / "cache").exists()
    picture.unlink()
    assert "does not know it either" in missing(tmp_path, "a.png", kind="image")


def test_images_in_data_files_leave_no_trace_in_the_index(tmp_path):
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    name = InlineImages(data).keep(picture_in(tmp_path, 64, 48).read_bytes())
    assert item_of(tmp_path, name, kind="image", keep_images=True).n_tokens > 0
    assert not entries(tmp_path)


def test_an_entry_can_be_read_by_a_person(tmp_path, video):
    item = item_of(tmp_path, segment=(0.5, 2.0))
    text = entries(tmp_path)[0].read_text()
    assert (
        f'"path": "{video}"' in text.splitlines()[1 + text[: text.index('"path"')].count("\n") - 1]
    )
    content = json.loads(text)
    assert content["sampling"]["start_s"] == 0.5 and content["n_tokens"] == item.n_tokens
    assert tuple(content["frame_times"]) == item.frame_times


def test_an_index_that_cannot_be_written_costs_nothing_but_measuring(
    tmp_path, video, measured, caplog
):
    (tmp_path / "cache").mkdir()
    index_dir(tmp_path / "cache").write_text("in the way")
    assert item_of(tmp_path) == item_of(tmp_path)
    assert measured == ["a.mp4", "a.mp4"] and "could not be written" in caplog.text


def _measure_many(folder: str, barrier, results) -> None:
    barrier.wait()
    results.put([item_of(Path(folder), segment=(0.1 * i, None)) for i in range(8)])


def test_processes_that_measure_at_once_agree(tmp_path, video):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_measure_many, args=(str(tmp_path), barrier, results))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert found[0] == found[1]
    assert len(entries(tmp_path)) == 8, "temporary files stay behind"
    video.unlink()
    assert [item_of(tmp_path, segment=(0.1 * i, None)) for i in range(8)] == found[0]


def test_a_video_with_two_names_in_a_linked_folder_is_known_under_both_when_all_are_gone(tmp_path):
    real = tmp_path / "store"
    real.mkdir()
    write_video(real / "x.mp4")
    for name in ("a.mp4", "b.mp4"):
        (real / name).symlink_to(real / "x.mp4")
    folder = tmp_path / "videos"
    folder.symlink_to(real)
    data = DataConfig(
        cache_dir=str(tmp_path / "cache"), video_dir=str(folder), allow_outside_media_dir=True,
        num_video_frames=8, **BUDGET,
    )  # fmt: skip

    def found() -> list[MediaItem]:
        probe = MediaProbe(data, VisionSpec())
        slots = [MediaSlot("video", name, (None, None)) for name in ("a.mp4", "b.mp4")]
        return [probe.items(row_of(tmp_path), [slot])[0] for slot in slots]

    before = found()
    folder.unlink()
    shutil.rmtree(real)
    after = found()
    assert [item.ref.key for item in after] == [item.ref.key for item in before]
    assert [item.frame_times for item in after] == [item.frame_times for item in before]
