"""Media files that are not there are found before anything starts, all of them together."""

from __future__ import annotations

import logging
import threading

import pytest

from tests.data.bad_media import write_video as write_film
from verl.data import presence
from verl.data.dataset import PromptDataset
from verl.data.presence import check_media_files
from verl.data.sources import DataError


@pytest.fixture
def open_dataset(write_rows, make_config, tokenizer, fmt, fake_media, tmp_path):
    def open_rows(rows, name="rows.jsonl", **settings):
        rows = [{"answer": "A", "problem": f"question {i}", **row} for i, row in enumerate(rows)]
        settings = {"cache_dir": str(tmp_path / "cache")} | settings
        return PromptDataset(make_config(write_rows(rows, name), **settings), tokenizer, fmt)

    return open_rows


def refusal(*datasets) -> str:
    with pytest.raises(DataError) as caught:
        check_media_files(datasets)
    return str(caught.value)


def test_every_kind_of_bad_path_is_named_with_its_row_in_one_message(
    open_dataset, write_video, tmp_path
):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    paths = ["gone.mp4", "empty.mp4", "folder.mp4", "../outside.mp4", "http://host/a.mp4"]
    dataset = open_dataset([{"videos": path} for path in [write_video("a.mp4"), *paths]])
    text = refusal(dataset)
    assert text.startswith("5 rows cannot be used; repair them, or leave such rows out with data.")
    reasons = ["missing", "empty", "not_regular", "outside_media_dir", "remote_address"]
    lines = text.splitlines()[1:]
    assert len(lines) == 5
    for number, (reason, line) in enumerate(zip(reasons, lines, strict=True), start=2):
        assert f"rows.jsonl:{number}: {reason}: " in line


def test_ten_rows_are_listed_and_all_are_counted(open_dataset):
    text = refusal(open_dataset([{"videos": f"{i}.mp4"} for i in range(25)]))
    assert text.startswith("25 rows") and len(text.splitlines()) == 12
    assert text.splitlines()[-1].strip() == "and 15 more"


def test_rows_of_all_files_are_listed_and_one_that_is_read_twice_once(open_dataset):
    train = open_dataset([{"videos": "x.mp4"}])
    val = open_dataset([{"images": "y.png"}], "val.jsonl")
    text = refusal(train, val, val)
    assert text.startswith("2 rows") and "rows.jsonl:1" in text and "val.jsonl:1" in text


def test_a_missing_file_names_the_folder_setting_of_its_kind_alone(open_dataset):
    video, image = (refusal(open_dataset([row])) for row in ({"videos": "x"}, {"images": "x"}))
    assert "check data.video_dir and" in video and "image_dir" not in video
    assert "check data.image_dir and" in image and "video_dir" not in image


def test_nothing_is_measured_and_a_shared_file_is_looked_at_once(
    open_dataset, write_video, fake_media, monkeypatch
):
    asked, look = [], presence.check_regular
    monkeypatch.setattr(presence, "check_regular", lambda path: asked.append(path) or look(path))
    video = write_video("a.mp4")
    rows = [{"videos": [video, video]}, {"videos": video, "video_start": 1.0, "video_end": 2.0}]
    check_media_files([open_dataset(rows), open_dataset([{"videos": video}], "val.jsonl")])
    assert len(asked) == 1 and fake_media == []


def test_skipping_leaves_them_out_before_the_first_batch(open_dataset, write_video):
    rows = [{"videos": write_video("a.mp4")}, {"videos": "gone.mp4"}, {}]
    dataset = open_dataset(rows, on_bad_sample="skip", max_bad_fraction=0.5)
    check_media_files([dataset])
    assert [dataset.is_quarantined(i) for i in range(3)] == [False, True, False]
    check_media_files([dataset])
    assert len(dataset.quarantine) == 1


def test_skipping_counts_all_bad_rows_before_it_gives_up(open_dataset):
    rows = [{"videos": f"{i}.mp4"} for i in range(6)] + [{}] * 4
    text = refusal(open_dataset(rows, on_bad_sample="skip", max_bad_fraction=0.2))
    assert "6 of 10 rows cannot be used, more than data.max_bad_fraction=0.2" in text


def test_a_video_that_is_gone_but_was_measured_before_is_no_bad_row(
    write_rows, make_config, tokenizer, fmt, tmp_path
):
    rows = write_rows([{"problem": "?", "answer": "A", "videos": n} for n in ("a.mp4", "b.mp4")])

    def opened(**settings) -> PromptDataset:
        pixels = {"video_min_pixels": 28 * 28, "video_max_pixels": 28 * 28 * 6}
        settings = {"cache_dir": str(tmp_path / "cache"), **pixels} | settings
        return PromptDataset(make_config(rows, **settings), tokenizer, fmt)

    write_film(tmp_path / "a.mp4")
    opened().sample(0)
    (tmp_path / "a.mp4").unlink()
    text = refusal(opened())
    assert "rows.jsonl:2: missing" in text and "rows.jsonl:1" not in text
    # Another way to look at it is not known, and neither is it elsewhere.
    assert refusal(opened(num_video_frames=3)).startswith("2 rows")
    assert refusal(opened(cache_dir=str(tmp_path / "other"))).startswith("2 rows")


def test_a_model_that_reads_text_only_is_not_asked_for_files(open_dataset, fmt, monkeypatch):
    monkeypatch.setattr(type(fmt), "vision", None)
    check_media_files([open_dataset([{"videos": "gone.mp4"}])])


def test_a_slow_disk_is_talked_about_and_a_fast_one_is_not(
    open_dataset, write_video, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    dataset = open_dataset([{"videos": write_video("a.mp4")}])
    check_media_files([dataset])
    assert "looking whether" not in caplog.text
    said, look = threading.Event(), presence.check_regular
    monkeypatch.setattr(presence, "QUIET_S", 0.0)
    monkeypatch.setattr(presence.logger, "info", lambda *args: (said.set(), caplog.text))
    monkeypatch.setattr(presence, "check_regular", lambda path: said.wait(20) and look(path))
    check_media_files([dataset])
    assert said.is_set()
