"""Video files: measure without decoding, and choose frames for `video_decode`. No torch.

What a header says is a claim. `probe` counts the frames that are really in the file (in the index
of MP4, by demuxing elsewhere), `video_decode.iter_frames` counts those that come out of the
decoder, and both raise BadMedia when under nine tenths of what was expected is there: decoders
return wrong counts without raising.
"""

import math
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import av
import numpy as np
from av.container import InputContainer
from av.error import ArgumentError, ExitError, InvalidDataError
from av.stream import Disposition
from av.video.stream import VideoStream

from verl.data.media_files import (
    BadMedia,
    check_first_bytes,
    check_regular,
    is_cut_short,
    mp4_rotation,
    resolve_media_path,
)

__all__ = [
    "BadMedia",
    "FrameSampling",
    "VideoInfo",
    "frame_range",
    "probe",
    "resolve_media_path",
    "sample_indices",
]

MAX_FRAME_PIXELS = 8192 * 8192
MAX_FPS = 1000
END_SLACK_S = 1.0
"""Seconds by which the end of a segment may lie behind the last frame: ends are often rounded."""
MIN_SHARE = 0.9
"""Of the expected frames, the share that must be there."""
DEFAULT_TIMEOUT_S = 600.0
MP4, MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"
"""FFmpeg's names of the two container formats in which a key frame can be found exactly."""
_DEMUXERS = f"{MP4},{MATROSKA},avi,mpeg,mpegts,mpegvideo,flv,ogg,asf,gif"
_EXACT_SEEK = (MP4, MATROSKA)
_TRUSTED_TIMES = (*_EXACT_SEEK, "mpeg", "mpegts")


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Which frames of a video are looked at; exactly one of `num_frames` and `fps` is set."""

    num_frames: int | None = None
    """Frames spread over the whole video; a shorter video gives fewer."""
    fps: float | None = None
    """Frames per second of film, at least `min_frames` and at most `max_frames` in all."""
    max_frames: int = 768
    min_frames: int = 4
    rule: Literal["linspace", "stride"] = "linspace"
    """"linspace" takes first and last frame (Qwen's own tools, Qwen3-VL in transformers);
    "stride" takes the first frame of equal stretches (Qwen2-VL in transformers)."""
    start_s: float = 0.0
    end_s: float | None = None
    """The part of the video that is looked at, in seconds of film; None: up to the last frame."""

    def __post_init__(self) -> None:
        if (self.num_frames is None) == (self.fps is None):
            raise ValueError(
                f"num_frames={self.num_frames}, fps={self.fps}: set exactly one of the two."
            )
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames={self.num_frames} must be at least 1.")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"fps={self.fps} must be a positive number.")
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"min_frames={self.min_frames}, max_frames={self.max_frames}: "
                "they must be at least 1, and the first must not exceed the second."
            )
        if not 0 <= self.start_s < (float("inf") if self.end_s is None else self.end_s):
            raise ValueError(
                f"start={self.start_s:g} s, end={self.end_s} s: the start must be at least 0 and "
                "before the end."
            )
        if self.end_s is not None and not math.isfinite(self.end_s):
            raise ValueError(f"end={self.end_s} s: give a number of seconds, or null.")


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What is known of a video without decoding a frame."""

    path: str
    width: int
    height: int
    """Pixels as shown, after `rotation`."""
    rotation: int
    """Degrees clockwise (0, 90, 180, 270) by which decoded frames are turned."""
    fps: float
    """Average frames per second that the header states."""
    n_frames: int
    """Frames in the file, counted."""
    claimed_frames: int
    """Frames that the header claims; 0 where it does not say."""
    container: str
    codec: str
    """FFmpeg's names of the container format and the video codec."""

    @property
    def duration_s(self) -> float:
        """Seconds of film in the counted frames."""
        return self.n_frames / self.fps


def probe(path: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> VideoInfo:
    """Measure a video without decoding it. Raises BadMedia.

    Reads the index of an MP4 file, and every packet (not its pixels) of other containers.
    """
    size_bytes = check_regular(path).st_size
    check_first_bytes(path)
    deadline = Deadline(path, timeout_s)
    with opened(path, deadline) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        _check_dimensions(path, width, height)
        counted = _count_in_mp4_index(container, stream, size_bytes)
        if counted is None:
            n_frames, claimed = len(frame_table(container, stream, deadline).times), stream.frames
        else:
            n_frames, claimed = counted
        if not claimed and container.duration and is_cut_short(path):
            claimed = round(container.duration / av.time_base * _fps_of(path, stream))
        fps = _fps_of(path, stream)
        rotation = mp4_rotation(path, stream.id) if container.format.name == MP4 else 0
        names = container.format.name, stream.codec_context.name
    if n_frames == 0 or n_frames < MIN_SHARE * claimed:
        raise shortfall(path, n_frames, claimed)
    if rotation in (90, 270):
        width, height = height, width
    return VideoInfo(
        path=path,
        width=width,
        height=height,
        rotation=rotation,
        fps=fps,
        n_frames=n_frames,
        claimed_frames=claimed,
        container=names[0],
        codec=names[1],
    )


def sample_indices(
    n_frames: int, fps: float, sampling: FrameSampling, multiple: int = 2
) -> list[int]:
    """Indices of the frames to look at, ascending, for a video of `n_frames` at `fps`.

    Their number is a multiple of `multiple` (the temporal patch) whenever the video and the
    setting allow that many: `num_frames` is rounded to it, the number that `fps` gives is
    rounded down, as in the Qwen2-VL and Qwen3-VL processors.
    """
    places = frame_range(n_frames, fps, sampling)
    n_frames = len(places)
    if sampling.num_frames is not None:
        wanted = max(round(sampling.num_frames / multiple) * multiple, 1)
        if sampling.num_frames < multiple:
            wanted = sampling.num_frames
        count = min(wanted, n_frames)
    else:
        assert sampling.fps is not None
        wanted_by_fps = n_frames / fps * sampling.fps
        highest = min(sampling.max_frames, n_frames)
        count = int(min(max(wanted_by_fps, sampling.min_frames), highest))
    if count > multiple:
        count -= count % multiple
    if sampling.rule == "stride":
        return [places[i * n_frames // count] for i in range(count)]
    return np.linspace(places[0], places[-1], count).round().astype(int).tolist()


def frame_range(n_frames: int, fps: float, sampling: FrameSampling) -> range:
    """Frames in the segment of `sampling`, both ends included, of a video of `n_frames` at `fps`.

    As in Qwen's own tools: the first frame that is not before the start to the last that is not
    after the end. Raises ValueError for a segment that is not in the video or holds no frame.
    """
    first, last = math.ceil(sampling.start_s * fps - 1e-6), n_frames - 1
    if sampling.end_s is not None:
        last = math.floor(sampling.end_s * fps + 1e-6)
        if last > n_frames - 1 + END_SLACK_S * fps:
            raise ValueError(
                f"the segment ends at {sampling.end_s:g} s, the video at {n_frames / fps:g} s"
            )
        last = min(last, n_frames - 1)
    if first > last:
        end = "the end" if sampling.end_s is None else f"{sampling.end_s:g} s"
        raise ValueError(
            f"the segment from {sampling.start_s:g} s to {end} holds no frame of a video of "
            f"{n_frames / fps:g} s"
        )
    return range(first, last + 1)


class Deadline:
    """Wall-clock limit of one piece of work. FFmpeg's own covers only waiting for input."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self.path, self.timeout_s = path, timeout_s
        self._end = time.monotonic() + timeout_s

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise BadMedia("timeout", self.path, f"not done after {self.timeout_s:g} s")


@contextmanager
def opened(path: str, deadline: Deadline) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a local file with nothing but the file protocol and the demuxers listed above."""
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": _DEMUXERS,
        "max_pixels": str(MAX_FRAME_PIXELS),
    }
    try:
        with av.open(path, mode="r", options=options, timeout=deadline.timeout_s) as container:
            yield container, _video_stream(container, path)
    except BadMedia:
        raise
    except Exception as error:
        # PyAV lets AttributeError, ValueError and others through on damaged files; all of them
        # mean the same to the caller, and the original stays attached.
        raise _named(error, path) from error


def _video_stream(container: InputContainer, path: str) -> VideoStream:
    pictures = Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & pictures]
    if not streams:
        if is_cut_short(path):
            raise BadMedia("truncated", path, "the file ends before its list of streams")
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        raise BadMedia("no_video_stream", path, f"the file holds {kinds}")
    if streams[0].codec_context is None:
        raise BadMedia("decode_error", path, "there is no decoder for the video codec")
    return streams[0]


def _named(error: Exception, path: str) -> BadMedia:
    detail = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError):
        return BadMedia("out_of_memory", path, detail)
    if isinstance(error, (ExitError, TimeoutError)):
        return BadMedia("timeout", path, detail)
    if isinstance(error, EOFError):
        cut = is_cut_short(path)
        return BadMedia(
            "truncated" if cut else "zero_frames", path, "the file ends with its header"
        )
    if isinstance(error, (InvalidDataError, ArgumentError)):
        if is_cut_short(path):
            return BadMedia("truncated", path, "the file ends before its own stated size")
        return BadMedia("not_media", path, f"FFmpeg does not take it for a video file ({detail})")
    return BadMedia("decode_error", path, detail)


def shortfall(path: str, found: int, expected: int, verb: str = "claimed") -> BadMedia:
    share = f" ({found / expected:.0%})" if expected else ""
    detail = f"{expected} frames were {verb}, {found}{share} can be read"
    if is_cut_short(path):
        return BadMedia("truncated", path, f"the file ends too early: {detail}")
    return BadMedia("frame_count_mismatch" if found else "zero_frames", path, detail)


def _check_dimensions(path: str, width: int, height: int) -> None:
    if 0 < width * height <= MAX_FRAME_PIXELS:
        return
    if is_cut_short(path):
        raise BadMedia("truncated", path, "the file ends before the size of its pictures")
    # FFmpeg reports 0x0 for sizes over the limit it was given, and for codecs without a size.
    stated = f"{width}x{height}" if width else "pictures of no usable size, or"
    raise BadMedia("too_large", path, f"{stated} more than {MAX_FRAME_PIXELS} pixels a frame")


def _fps_of(path: str, stream: VideoStream) -> float:
    for rate in (stream.average_rate, stream.guessed_rate):
        if rate is not None and 0 < rate <= MAX_FPS:
            return float(rate)
    raise BadMedia("decode_error", path, "the header gives no usable frame rate")


def _count_in_mp4_index(
    container: InputContainer, stream: VideoStream, size_bytes: int
) -> tuple[int, int] | None:
    """(frames whose bytes are in the file, frames claimed) from the sample table.

    None where there is no complete table: other containers, and fragmented MP4.
    """
    entries = list(stream.index_entries) if container.format.name == MP4 else []
    if not entries or not 0 < len(entries) <= stream.frames:
        return None
    shown = [entry for entry in entries if not entry.is_discard]
    whole = sum(entry.pos + entry.size <= size_bytes for entry in shown)
    # An edit list leaves out frames and shortens the stream; frames that are just not there
    # leave the stated duration as it was.
    n_shown, claimed = len(shown), stream.frames
    if n_shown > 1:
        listed = (shown[-1].timestamp - shown[0].timestamp) * n_shown / (n_shown - 1)
        claimed = n_shown if listed >= MIN_SHARE * (stream.duration or 0) else claimed
    return whole, claimed


@dataclass(frozen=True)
class FrameTable:
    """Every frame of a stream, from its packets."""

    times: list[int]
    """Ascending; time stamps in the stream's time base, or 0, 1, 2, ... when `by_order`."""
    keys: list[int]
    """Times of key frames, ascending; empty when the container cannot be searched exactly."""
    by_order: bool

    def key_before(self, moment: int) -> int | None:
        """Index in `keys` of the last key frame that is not after `moment`."""
        place = bisect_right(self.keys, moment) - 1
        return place if place >= 0 else None


def frame_table(container: InputContainer, stream: VideoStream, deadline: Deadline) -> FrameTable:
    """Read all packets of the stream; decodes nothing."""
    keeps_corrupt = container.format.name == "mpegts"  # There it means a lost packet, not an end.
    times: list[int | None] = []
    keys: list[int] = []
    for packet in container.demux(stream):
        deadline.check()
        if not packet.size or packet.is_discard or (packet.is_corrupt and not keeps_corrupt):
            continue
        if stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10:
            continue  # A reference frame that is never shown (RFC 6386, section 9.1).
        times.append(packet.pts)
        if packet.is_keyframe and packet.pts is not None:
            keys.append(packet.pts)
    known = sorted(moment for moment in times if moment is not None)
    name = container.format.name
    if name not in _TRUSTED_TIMES or len(set(known)) < len(times):
        return FrameTable(list(range(len(times))), [], by_order=True)
    return FrameTable(known, sorted(keys) if name in _EXACT_SEEK else [], by_order=False)
