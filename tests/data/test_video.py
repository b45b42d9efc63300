"""Probing, sampling and exact decoding of videos, good and bad."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from tests.data.bad_media import (
    BAD_FILES,
    HEIGHT,
    N_FRAMES,
    WIDTH,
    brightness,
    claim_avi_frames,
    cut,
    hide_last_vp8_frame,
    make_bad_file,
    playlist,
    trim_mp4,
    turn_mp4,
    wipe_frames,
    write_video,
)
from verl.data import decoders, media_files, video, video_decode
from verl.data.media_files import BadMedia, fingerprint, resolve_media_path
from verl.data.video import FrameSampling, probe, sample_indices
from verl.data.video_decode import iter_frames

KINDS = {
    "plain.mp4": {},
    "index_first.mp4": {"options": {"movflags": "faststart"}},
    "fragmented.mp4": {"options": {"movflags": "frag_keyframe+empty_moov"}},
    "every_frame_a_key.mp4": {"gop": 1, "b_frames": 0},
    "short_gop.mp4": {"gop": 3, "b_frames": 2},
    "no_keys_but_the_first.mp4": {"gop": 400},
    "hevc.mov": {"codec": "libx265"},
    "h264.mkv": {},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg2.mpg": {"codec": "mpeg2video", "fps": 25},
    "stream.ts": {},
}


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_video(folder / name, **kind) for name, kind in KINDS.items()}


def levels(frames) -> list[int]:
    return [round(float(frame.rgb_HWC.mean())) for frame in frames]


def reason_of(call, *args, **kwargs) -> str:
    with pytest.raises(BadMedia) as caught:
        call(*args, **kwargs)
    return caught.value.reason


@pytest.mark.parametrize("name", KINDS)
def test_probing_finds_size_rate_and_frame_count_without_decoding(videos, name):
    info = probe(str(videos[name]))
    assert (info.width, info.height, info.n_frames) == (WIDTH, HEIGHT, N_FRAMES)
    assert info.fps == pytest.approx(25 if name == "mpeg2.mpg" else 10)
    assert info.duration_s == pytest.approx(N_FRAMES / info.fps)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("step", [1, 3, 13], ids="every_{}".format)
def test_pyav_returns_exactly_the_frames_asked_for(videos, name, step):
    info = probe(str(videos[name]))
    everything = list(iter_frames(info, range(N_FRAMES)))
    assert levels(everything) == pytest.approx([brightness(i) for i in range(N_FRAMES)], abs=2)
    indices = list(range(step - 1, N_FRAMES, step))
    frames = list(iter_frames(info, indices))
    assert [frame.index for frame in frames] == indices
    for frame in frames:
        assert np.array_equal(frame.rgb_HWC, everything[frame.index].rgb_HWC)
        assert frame.time_s == pytest.approx(frame.index / info.fps, abs=0.002)
        assert not frame.held


@pytest.mark.parametrize("name", ["plain.mp4", "short_gop.mp4", "h264.mkv", "vp9.webm"])
def test_decord_returns_the_same_frames_as_pyav(videos, name):
    info = probe(str(videos[name]))
    indices = [0, 5, 11, 12, 13, 30, 39]
    mine = list(iter_frames(info, indices, decoder="decord"))
    assert levels(mine) == levels(iter_frames(info, indices))
    assert [frame.time_s for frame in mine] == pytest.approx([i / 10 for i in indices], abs=0.002)


@pytest.mark.parametrize("name", ["mpeg4.avi", "mpeg2.mpg", "hevc.mov", "stream.ts"])
def test_decord_is_refused_where_it_returns_other_frames(videos, name):
    with pytest.raises(BadMedia, match=r"data\.video_decoder=pyav") as caught:
        list(iter_frames(probe(str(videos[name])), [0, 20], decoder="decord"))
    assert caught.value.reason == "decode_error"


def test_frames_far_apart_are_reached_by_seeking(videos, monkeypatch):
    n_decoded = 0
    decoded = video_decode._Reader._decoded

    def counted(reader):
        nonlocal n_decoded
        for found in decoded(reader):
            n_decoded += 1
            yield found

    monkeypatch.setattr(video_decode._Reader, "_decoded", counted)
    assert len(list(iter_frames(probe(str(videos["plain.mp4"])), [0, 39]))) == 2
    assert n_decoded < 10


def test_a_jump_that_saves_few_frames_is_not_made(videos, monkeypatch):
    jumps = []
    monkeypatch.setattr(video_decode, "_WORTH_A_JUMP", 24)
    seek = video_decode._Reader._is_far
    monkeypatch.setattr(
        video_decode._Reader, "_is_far", lambda r, key: jumps.append(seek(r, key)) or jumps[-1]
    )
    list(iter_frames(probe(str(videos["plain.mp4"])), range(0, 40, 5)))
    assert jumps and not any(jumps)
    jumps.clear()
    list(iter_frames(probe(str(videos["plain.mp4"])), [0, 26]))
    assert jumps[-1]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_key_frames_side_by_side_do_not_confuse_seeking(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(video_decode, "_WORTH_A_JUMP", 1)
    kind = {"b_frames": 3, "codec_options": {"b-pyramid": "normal"}}
    path = write_video(tmp_path / f"a{suffix}", keys=(20, 21), **kind)
    for index in (19, 20, 21, 22):
        first, wanted = iter_frames(probe(str(path)), [0, index])
        assert levels([first, wanted]) == pytest.approx([brightness(0), brightness(index)], abs=2)
        assert not wanted.held


class LandsLate:
    """A container whose search ends one key frame after the one that was asked for."""

    def __init__(self, container, keys) -> None:
        self.demux, self._seek, self._keys = container.demux, container.seek, keys

    def seek(self, moment, stream) -> None:
        self._seek(self._keys[self._keys.index(moment) + 1], stream=stream)


def test_a_search_that_ends_too_late_is_repeated_from_an_earlier_key_frame(videos):
    path = str(videos["plain.mp4"])
    deadline = video.Deadline(path, 10)
    with video.opened(path, deadline) as (container, stream):
        table = video.frame_table(container, stream, deadline)
    with video.opened(path, deadline) as (container, stream):
        late = LandsLate(container, table.keys)
        wanted = {table.times[0], table.times[30]}
        reader = video_decode._Reader(late, stream, table, wanted, deadline)
        for index in (0, 30):
            frame, moment, held = reader.frame_at(index)
            assert (moment, held) == (table.times[index], False)
            level = frame.to_ndarray(format="rgb24").mean()
            assert level == pytest.approx(brightness(index), abs=2)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_phone_video_is_turned_upright_and_measured_so(tmp_path, degrees):
    path = turn_mp4(write_video(tmp_path / "phone.mp4"), degrees)
    info = probe(str(path))
    assert (info.width, info.height) == ((WIDTH, HEIGHT) if degrees == 180 else (HEIGHT, WIDTH))
    (frame,) = iter_frames(info, [7])
    assert frame.rgb_HWC.shape == (info.height, info.width, 3)


def test_turning_by_90_degrees_moves_the_top_left_corner_to_the_right(tmp_path):
    info = probe(str(turn_mp4(write_video(tmp_path / "a.mp4"), 90)))
    lying = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    lying[0, 0] = 255
    assert decoders.upright(lying, info)[0, -1, 0] == 255


@pytest.mark.parametrize("n_trimmed", [1, 5, 13, 34])
def test_frames_trimmed_by_an_edit_list_are_neither_counted_nor_shown(tmp_path, n_trimmed):
    info = probe(str(trim_mp4(write_video(tmp_path / "a.mp4"), n_trimmed)))
    assert info.n_frames == N_FRAMES - n_trimmed
    indices = [0, 4, info.n_frames - 1]
    expected = [brightness(i + n_trimmed) for i in indices]
    assert levels(iter_frames(info, indices)) == pytest.approx(expected, abs=2)


def test_a_vp8_frame_that_is_never_shown_is_not_counted(videos):
    info = probe(str(hide_last_vp8_frame(videos["vp8.webm"])))
    assert info.n_frames == N_FRAMES - 1
    assert not any(frame.held for frame in iter_frames(info, range(N_FRAMES - 1)))


def test_without_a_frame_count_in_the_header_frames_are_counted_by_demuxing(videos):
    info = probe(str(videos["mpeg2.mpg"]))
    assert (info.claimed_frames, info.n_frames) == (0, N_FRAMES)


@pytest.mark.parametrize("name", BAD_FILES)
def test_each_bad_file_is_refused_with_its_reason(tmp_path, name):
    path = make_bad_file(name, tmp_path)
    with pytest.raises(BadMedia) as caught:
        probe(str(path))
    assert caught.value.reason == name.split("/")[0]
    assert str(path) in str(caught.value)
    assert media_files.REMEDIES[caught.value.reason] in str(caught.value)


def test_a_header_that_claims_a_few_frames_too_many_is_corrected(tmp_path):
    path = claim_avi_frames(write_video(tmp_path / "a.avi", codec="mpeg4"), N_FRAMES + 3)
    info = probe(str(path))
    assert (info.n_frames, info.claimed_frames) == (N_FRAMES, N_FRAMES + 3)


def test_a_file_that_lost_its_last_frames_gives_the_others(tmp_path):
    path = write_video(tmp_path / "a.mp4", options={"movflags": "faststart"}, noise=40)
    info = probe(str(cut(path, 0.95)))
    assert 36 <= info.n_frames < N_FRAMES
    assert levels(iter_frames(info, [0, info.n_frames - 1]))[0] == pytest.approx(40, abs=3)


def test_one_damaged_frame_holds_the_one_before_and_does_not_shift_the_rest(tmp_path, caplog):
    path = wipe_frames(write_video(tmp_path / "a.mp4", gop=1, b_frames=0), [20])
    frames = list(iter_frames(probe(str(path)), range(N_FRAMES)))
    assert [frame.index for frame in frames if frame.held] == [20]
    expected = [brightness(19 if i == 20 else i) for i in range(N_FRAMES)]
    assert levels(frames) == pytest.approx(expected, abs=2)
    assert "1 of 40 frames hold the one before" in caplog.text


def test_more_than_a_tenth_of_damaged_frames_is_a_mismatch(tmp_path):
    path = wipe_frames(write_video(tmp_path / "a.mp4", gop=1, b_frames=0), [3, 9, 15, 21, 27])
    info = probe(str(path))
    assert reason_of(lambda: list(iter_frames(info, range(N_FRAMES)))) == "frame_count_mismatch"


def test_a_stream_without_one_whole_frame_is_a_decode_error(tmp_path):
    path = wipe_frames(write_video(tmp_path / "a.mp4"), list(range(N_FRAMES)))
    assert reason_of(lambda: list(iter_frames(probe(str(path)), [0, 9]))) == "decode_error"


def test_work_that_takes_too_long_is_a_timeout(videos):
    assert reason_of(probe, str(videos["h264.mkv"]), timeout_s=1e-9) == "timeout"
    info = probe(str(videos["plain.mp4"]))
    assert reason_of(lambda: list(iter_frames(info, [3], timeout_s=1e-9))) == "timeout"


def test_a_file_that_this_user_may_not_read_says_so(videos, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert reason_of(probe, str(videos["plain.mp4"])) == "permission"


@pytest.mark.parametrize(
    "address",
    ["http://{}/a.mp4", "HTTPS://{}/a.mp4", " http://{}/a.mp4", "rtsp://{}/a", "tcp://{}",
     "concat:http://{}/a.mp4|b.mp4", "file:///etc/passwd", "pipe:0", "subfile,,start,0,end,9,,:a",
     "data:video/mp4;base64,AAAA", "udp:{}", "s3://bucket/{}"],
)  # fmt: skip
def test_addresses_are_refused_and_never_open_a_socket(tmp_path, address):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        given = address.format(f"127.0.0.1:{server.getsockname()[1]}")
        assert reason_of(resolve_media_path, given, tmp_path, True) == "remote_address"
        assert reason_of(probe, given) in ("missing", "remote_address")
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_playlist_that_names_an_address_is_never_followed(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        path = tmp_path / "list.mp4"
        path.write_bytes(playlist(f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"))
        assert reason_of(probe, str(path)) == "not_media"
        with pytest.raises(TimeoutError):
            server.accept()


def test_paths_stay_inside_the_media_folder_unless_allowed(tmp_path, videos):
    inside, outside = tmp_path / "media", videos["plain.mp4"]
    inside.mkdir()
    (inside / "link.mp4").symlink_to(outside)
    (inside / "own.mp4").write_bytes(outside.read_bytes())
    for path in (str(outside), os.path.relpath(outside, inside), "link.mp4", "../media2/a.mp4"):
        assert reason_of(resolve_media_path, path, inside, False) == "outside_media_dir"
    assert resolve_media_path("own.mp4", inside, False) == str((inside / "own.mp4").resolve())
    assert resolve_media_path("link.mp4", inside, True) == str(outside.resolve())


@pytest.mark.parametrize("path", ["", "no\0thing.mp4", "absent.mp4", "own.mp4/x"])
def test_paths_that_lead_nowhere_are_missing(tmp_path, path):
    (tmp_path / "own.mp4").write_bytes(b"x")
    assert reason_of(resolve_media_path, path, tmp_path, False) == "missing"


def test_a_title_with_a_colon_is_a_file_and_no_address(tmp_path):
    path = write_video(tmp_path / "Endgame: the end.mp4")
    resolved = resolve_media_path(path.name, tmp_path, False)
    assert probe(resolved).n_frames == N_FRAMES


def test_bad_media_survives_pickling():
    error = BadMedia("timeout", "/a.mp4", "too slow")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.reason, copy.path, copy.detail) == ("timeout", "/a.mp4", "too slow")
    assert str(copy) == str(error)


def test_an_invented_reason_is_refused():
    with pytest.raises(ValueError, match="unknown reason"):
        BadMedia("bad luck", "/a.mp4", "")  # type: ignore[arg-type]


def test_every_reason_has_a_remedy():
    assert set(media_files.REMEDIES) == set(media_files.Reason.__args__)


def replaced_in_place(path, content: bytes) -> None:
    """Another file under the same name, of the same size and time of change."""
    before = os.stat(path)
    other = path.with_suffix(".new")
    other.write_bytes(content)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    after = os.stat(path)
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_a_replaced_file_of_the_same_name_size_and_time_has_another_fingerprint(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(3_000_000))
    fast, full = fingerprint(str(path)), fingerprint(str(path), "full")
    replaced_in_place(path, b"x" * 65_536 + bytes(3_000_000 - 65_536))
    assert fingerprint(str(path)) != fast
    assert fingerprint(str(path), "full") != full


def test_only_the_full_fingerprint_sees_a_change_between_the_sampled_blocks(tmp_path):
    path = tmp_path / "a"
    content = bytearray(3_000_000)
    path.write_bytes(content)
    fast, full = fingerprint(str(path)), fingerprint(str(path), "full")
    content[200_000] = 1
    replaced_in_place(path, bytes(content))
    assert fingerprint(str(path)) == fast
    assert fingerprint(str(path), "full") != full


def test_a_copy_keeps_its_full_fingerprint_and_is_read_once(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).write_bytes(b"film" * 1000)
    os.utime(tmp_path / "b", (1, 1))
    first, second = (fingerprint(str(tmp_path / name), "full") for name in "ab")
    assert first == second
    monkeypatch.setattr(media_files, "open_media", lambda _: pytest.fail("read again"))
    assert fingerprint(str(tmp_path / "a"), "full") == first


def test_a_fingerprint_changes_with_content_and_with_time(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(10**6))
    first = fingerprint(str(path))
    assert fingerprint(str(path)) == first
    info = path.stat()
    path.write_bytes(b"x" + bytes(10**6 - 1))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    changed = fingerprint(str(path))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    assert len({first, changed, fingerprint(str(path))}) == 3


@pytest.mark.parametrize("n_frames", [8, 40, 41, 999, 14315])
@pytest.mark.parametrize("num_frames", [2, 4, 7, 8])
def test_stride_sampling_is_that_of_the_hf_qwen2_vl_processor(n_frames, num_frames):
    metadata = VideoMetadata(total_num_frames=n_frames, fps=24.0)
    theirs = Qwen2VLVideoProcessor().sample_frames(metadata, num_frames=num_frames, fps=None)
    mine = sample_indices(n_frames, 24.0, FrameSampling(num_frames=num_frames, rule="stride"))
    assert mine == theirs.tolist()


@pytest.mark.parametrize("n_frames", [40, 999, 14315])
@pytest.mark.parametrize("fps", [0.1, 0.5, 2.0, 30.0])
def test_fps_sampling_takes_as_many_frames_as_the_hf_processors(n_frames, fps):
    metadata = VideoMetadata(total_num_frames=n_frames, fps=24.0)
    theirs = Qwen2VLVideoProcessor().sample_frames(metadata, num_frames=None, fps=fps)
    mine = sample_indices(n_frames, 24.0, FrameSampling(fps=fps))
    assert len(mine) == len(theirs)
    even = sample_indices(n_frames, 24.0, FrameSampling(fps=fps, rule="stride"))
    assert even == theirs.tolist()


@pytest.mark.parametrize(("n_frames", "num_frames"), [(40, 8), (999, 64), (14315, 256)])
def test_linspace_sampling_is_that_of_the_hf_qwen3_vl_processor(n_frames, num_frames):
    metadata = VideoMetadata(total_num_frames=n_frames, fps=24.0)
    theirs = Qwen3VLVideoProcessor().sample_frames(metadata, num_frames=num_frames, fps=None)
    mine = sample_indices(n_frames, 24.0, FrameSampling(num_frames=num_frames))
    assert mine == theirs.tolist()
    assert (mine[0], mine[-1]) == (0, n_frames - 1)


@pytest.mark.parametrize(
    ("n_frames", "num_frames", "taken"),
    [(1, 8, 1), (2, 8, 2), (3, 8, 2), (7, 8, 6), (8, 8, 8), (9, 1, 1), (9, 3, 4), (9, 5, 4)],
)
def test_frames_come_in_pairs_where_the_video_allows(n_frames, num_frames, taken):
    indices = sample_indices(n_frames, 10.0, FrameSampling(num_frames=num_frames))
    assert len(indices) == len(set(indices)) == taken


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_frames": 8, "fps": 2.0}, {"num_frames": 0}, {"fps": -1.0}, {"fps": float("nan")},
     {"fps": 1.0, "max_frames": 2, "min_frames": 4}],
)  # fmt: skip
def test_sampling_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=r"frames|fps"):
        FrameSampling(**settings)


@pytest.mark.parametrize("indices", [[], [3, 2], [-1], [N_FRAMES]])
def test_frames_that_cannot_be_asked_for_are_refused(videos, indices):
    with pytest.raises(ValueError, match="frame"):
        list(iter_frames(probe(str(videos["plain.mp4"])), indices))


def test_probing_and_sampling_need_no_torch():
    code = "import sys, verl.data.video, verl.data.video_decode; sys.exit('torch' in sys.modules)"
    root = Path(video_decode.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
