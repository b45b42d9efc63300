"""Parts of videos: from the columns of a row to frames, times and keys."""

import json

import av
import numpy as np
import pytest

from tests.data.bad_media import write_video as write_film
from verl.data.dataset import PromptDataset
from verl.data.media import FrameSampling, decode_media, make_media_item
from verl.data.media_files import BadMedia
from verl.data.preprocess import VisionSpec
from verl.data.rows import BadSample, RowKeys, read_rows
from verl.data.sources import DataError
from verl.data.video import frame_range, probe, sample_indices
from verl.data.video_decode import iter_frames

RULE = VisionSpec().resize_rule("video", 28 * 28, 28 * 28 * 6)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return str(write_film(tmp_path_factory.mktemp("film") / "a.mp4"))  # 40 frames, 10 a second


def read(tmp_path, *rows, **keys):
    path = tmp_path / "rows.jsonl"
    rows = [{"problem": "?", "answer": "A", **row} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows([str(path)], RowKeys(**keys))


@pytest.mark.parametrize(
    "start, end, expected",
    [(0, None, (0, 39)), (1, 2, (10, 20)), (0.95, 2.05, (10, 20)), (3, 4.0, (30, 39)),
     (1.5, 1.5000001, (15, 15)), (0.3, 0.7, (3, 7)), (0, 4.9, (0, 39))],
)  # fmt: skip
def test_a_segment_holds_the_frames_between_its_ends(start, end, expected):
    found = frame_range(40, 10.0, FrameSampling(num_frames=2, start_s=start, end_s=end))
    assert (found[0], found[-1]) == expected


@pytest.mark.parametrize(
    "start, end, message",
    [(4.5, None, "holds no frame"), (1.01, 1.09, "holds no frame"), (0, 5.2, "ends at 5.2 s"),
     (9, 10, "the video at 4 s")],
)  # fmt: skip
def test_a_segment_outside_of_the_video_is_a_named_error(film, start, end, message):
    sampling = FrameSampling(num_frames=2, start_s=start, end_s=end)
    with pytest.raises(BadMedia, match=message) as caught:
        make_media_item(film, "video", sampling, RULE)
    assert caught.value.reason == "bad_segment"
    assert "data.video_start_key" in str(caught.value)


@pytest.mark.parametrize("start, end", [(-1, 2), (2, 2), (3, 1), (float("nan"), 1)])
def test_ends_in_the_wrong_order_are_refused(start, end):
    with pytest.raises(ValueError, match="start"):
        FrameSampling(num_frames=2, start_s=start, end_s=end)


@pytest.mark.parametrize("rule", ["linspace", "stride"])
def test_frames_times_and_seconds_a_grid_are_those_of_the_segment(film, rule):
    sampling = FrameSampling(num_frames=4, start_s=1, end_s=2, rule=rule)
    item = make_media_item(film, "video", sampling, RULE)
    assert item.frame_times[0] == 1.0
    assert all(1 <= time <= 2 for time in item.frame_times)
    # Eleven frames of a tenth of a second, four of them in two steps of the grid.
    assert item.seconds_per_grid == pytest.approx(1.1 / 2)
    frames = decode_media(item.ref)
    assert frames.frame_times == pytest.approx(item.frame_times, abs=0.002)
    whole = decode_media(make_media_item(film, "video", FrameSampling(num_frames=40), RULE).ref)
    places = [round(time * 10) for time in item.frame_times]
    assert np.array_equal(frames.frames_u8, whole.frames_u8[places])


def test_frames_a_second_count_in_the_segment_only(film):
    info = probe(film)
    by_rate = FrameSampling(fps=2, min_frames=2, start_s=1, end_s=3)
    assert sample_indices(info.n_frames, info.fps, by_rate) == [10, 17, 23, 30]
    most = FrameSampling(fps=10, max_frames=6, start_s=1, end_s=3)
    assert len(sample_indices(info.n_frames, info.fps, most)) == 6


def test_the_segment_is_part_of_the_key(film):
    segments = [(0.0, None), (0.0, 2.0), (1.0, None), (1.0, 2.0)]
    items = [
        make_media_item(film, "video", FrameSampling(num_frames=4, start_s=s, end_s=e), RULE)
        for s, e in segments
    ]
    assert len({item.ref.key for item in items}) == 4


def test_columns_and_the_dicts_of_qwens_tools_say_the_same(tmp_path):
    rows = read(
        tmp_path,
        {"videos": "a.mp4", "video_start": 1, "video_end": 2.5},
        {"videos": ["a.mp4"], "video_start": [1], "video_end": [2.5]},
        {"videos": {"video": "a.mp4", "video_start": 1, "video_end": 2.5}},
        {"videos": [{"type": "video", "video": "a.mp4", "video_start": 1, "video_end": 2.5}]},
    )
    assert {(row.videos, row.segments) for row in rows} == {(("a.mp4",), ((1.0, 2.5),))}
    assert not any(row.extra for row in rows)


def test_each_video_of_a_row_has_its_own_segment_or_none(tmp_path):
    mixed = [{"video": "a.mp4", "video_end": 3}, "b.mp4", {"path": "c.mp4", "video_start": 1}]
    columns = {"videos": ["a.mp4", "b.mp4"], "from": [None, 2], "to": None}
    assert read(tmp_path, {"videos": mixed})[0].segments == ((None, 3), (None, None), (1, None))
    row = read(tmp_path, columns, video_start="from", video_end="to")[0]
    assert row.segments == ((None, None), (2.0, None))
    assert read(tmp_path, {"videos": ["a.mp4"], "video_start": None})[0].segments == ()


@pytest.mark.parametrize(
    "row, message",
    [
        ({"videos": "a.mp4", "video_start": "00:01:30"}, "no number of seconds"),
        ({"videos": "a.mp4", "video_end": True}, "no number of seconds"),
        ({"videos": ["a.mp4", "b.mp4"], "video_start": 1}, "1 values for 2 videos"),
        ({"video_end": 2, "videos": {"video": "a.mp4", "video_end": 3}}, "keep one of the two"),
    ],
)
def test_a_segment_that_cannot_be_read_stops_with_the_place(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{message}"):
        read(tmp_path, row)


def test_a_row_looks_at_its_segment_and_a_bad_one_costs_its_row(
    film, write_rows, make_config, tokenizer, fmt
):
    rows = [
        {"problem": "?", "answer": "A", "videos": film, **segment}
        for segment in ({}, {"video_start": 1, "video_end": 2}, {"video_start": 3, "video_end": 1},
                        {"video_start": 30})
    ]  # fmt: skip
    config = make_config(write_rows(rows), num_video_frames=4, max_prompt_length=9999,
                         allow_outside_media_dir=True)  # fmt: skip
    dataset = PromptDataset(config, tokenizer, fmt)
    whole, part = (dataset.sample(i).media[0] for i in (0, 1))
    assert (whole.frame_times[0], whole.frame_times[-1]) == (0, pytest.approx(3.9))
    assert (part.frame_times[0], part.frame_times[-1]) == (1, 2)
    for index in (2, 3):
        with pytest.raises(BadSample) as caught:
            dataset.sample(index)
        assert caught.value.reason == "bad_segment"


def test_8192_frames_of_a_long_video_are_sampled_and_decoded(tmp_path):
    path = str(tmp_path / "long.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(8300):
            grey_HWC = np.full((32, 32, 3), 20 + i % 50 * 4, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey_HWC)))
        container.mux(stream.encode())
    info = probe(path)
    indices = sample_indices(info.n_frames, info.fps, FrameSampling(num_frames=8192))
    assert len(set(indices)) == 8192 and (indices[0], indices[-1]) == (0, 8299)
    for frame, index in zip(iter_frames(info, indices), indices, strict=True):
        assert frame.rgb_HWC.mean() == pytest.approx(20 + index % 50 * 4, abs=2)
