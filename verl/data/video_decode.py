"""Decode exactly the frames that were asked for, through PyAV (exact) or decord. No torch.

Frames are named by their place in presentation order. Where the container carries time stamps
that can be trusted (MP4, Matroska, MPEG), a frame is found by its time stamp, so that one damaged
frame does not shift the others; elsewhere (AVI) frames are counted as they come out.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from verl.data.media_files import BadMedia
from verl.data.video import (
    DEFAULT_TIMEOUT_S,
    MATROSKA,
    MIN_SHARE,
    MP4,
    Deadline,
    FrameTable,
    VideoInfo,
    frame_table,
    opened,
    shortfall,
)

logger = logging.getLogger(__name__)

Decoder = Literal["pyav", "decord"]
_DECORD_CHUNK = 8
_TELL_UNREFERENCED = ("h264", "hevc")
"""Codecs whose packets say whether another frame is predicted from theirs."""
_DECORD_CODECS = ("h264", "vp8", "vp9")


@dataclass(frozen=True, kw_only=True)
class DecodedFrame:
    """One frame as it was asked for."""

    index: int
    time_s: float
    """Seconds after the first frame of the video; `index / fps` where time stamps are missing."""
    rgb_HWC: np.ndarray
    held: bool
    """The frame itself could not be decoded, and this is the nearest one before it."""


def check_decoder(info: VideoInfo, decoder: Decoder) -> None:
    """Raise BadMedia when a decoder is known to return wrong frames for such a file.

    decord 0.6.0 gives other frames than asked for, without raising, of AVI, MPEG and HEVC files,
    and four colours of turned ones. MP4 and Matroska with these codecs were found right.
    """
    if decoder not in get_args(Decoder):
        raise ValueError(f"decoder {decoder!r}: use one of {', '.join(get_args(Decoder))}.")
    if decoder == "pyav":
        return
    if info.container in (MP4, MATROSKA) and info.codec in _DECORD_CODECS and not info.rotation:
        return
    kind = f"{info.codec} in {info.container}, turned by {info.rotation} degrees"
    detail = f"decord returns wrong frames of {kind}; set data.video_decoder=pyav"
    raise BadMedia("decode_error", info.path, detail)


def iter_frames(
    info: VideoInfo,
    indices: Sequence[int],
    *,
    decoder: Decoder = "pyav",
    timeout_s: float = DEFAULT_TIMEOUT_S,
    threads: int = 1,
) -> Iterator[DecodedFrame]:
    """Decode the frames at `indices` (ascending, in presentation order), one at a time.

    One frame is held in memory, so that the caller can shrink each as it comes. Raises BadMedia,
    after the last frame when more than a tenth had to be held: consume the whole iterator.
    """
    if not indices or list(indices) != sorted(indices):
        raise ValueError(f"frame indices {list(indices)[:8]}... must be ascending, at least one.")
    if not 0 <= indices[0] <= indices[-1] < info.n_frames:
        raise ValueError(f"frames {indices[0]}..{indices[-1]} of a video of {info.n_frames}.")
    check_decoder(info, decoder)
    deadline = Deadline(info.path, timeout_s)
    decode = _decode_with_pyav if decoder == "pyav" else _decode_with_decord
    n_held = 0
    for frame in decode(info, indices, deadline, threads):
        n_held += frame.held
        yield frame
    if n_held > (1 - MIN_SHARE) * len(indices):
        raise shortfall(info.path, len(indices) - n_held, len(indices), "asked for")
    if n_held:
        logger.warning("%s: %d of %d frames hold the one before", info.path, n_held, len(indices))


def _decode_with_pyav(
    info: VideoInfo, indices: Sequence[int], deadline: Deadline, threads: int
) -> Iterator[DecodedFrame]:
    with opened(info.path, deadline) as (container, stream):
        table = frame_table(container, stream, deadline)
        time_base = float(stream.time_base or 0)
    if len(table.times) != info.n_frames:
        raise shortfall(info.path, len(table.times), info.n_frames, "counted before")
    with opened(info.path, deadline) as (container, stream):
        stream.codec_context.thread_count = threads
        if threads > 1:
            stream.thread_type = "AUTO"
        wanted = {table.times[index] for index in indices}
        reader = _Reader(container, stream, table, wanted, deadline)
        # One a file, with one thread: to start threads a frame takes longer than small frames do.
        reformatter = VideoReformatter()
        for index in indices:
            frame, moment, held = reader.frame_at(index)
            if table.by_order:
                time_s = moment / info.fps
            else:
                time_s = (moment - table.times[0]) * time_base
            rgb_HWC = _to_rgb(frame, info, reformatter)
            yield DecodedFrame(index=index, time_s=time_s, rgb_HWC=rgb_HWC, held=held)


class _Reader:
    """Decodes forward, and jumps when a key frame lies between here and the wanted frame."""

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        table: FrameTable,
        wanted: set[int],
        deadline: Deadline,
    ) -> None:
        self._container, self._stream = container, stream
        self._wanted = wanted
        # Half of a film's frames are predicted from others and used by none. Where they are not
        # wanted, leaving them out halves the time and changes no other frame.
        codec = stream.codec_context.name
        self._may_skip = codec in _TELL_UNREFERENCED and not table.by_order
        self._table, self._deadline = table, deadline
        self._frames = self._decoded()
        self._before: tuple[int, VideoFrame] | None = None
        self._current: tuple[int, VideoFrame] | None = None
        self._last_error = "no frame came out of the decoder"

    def frame_at(self, index: int) -> tuple[VideoFrame, int, bool]:
        """(frame, its time, held) for a place in presentation order."""
        target = self._table.times[index]
        self._jump_towards(target)
        while self._current is None or self._current[0] < target:
            following = next(self._frames, None)
            if following is None:
                break
            self._before, self._current = self._current, following
        if self._current is None:
            raise BadMedia("decode_error", self._deadline.path, self._last_error)
        is_later = self._current[0] > target
        nearest = self._before if is_later and self._before is not None else self._current
        return nearest[1], nearest[0], nearest[0] != target

    def _jump_towards(self, target: int) -> None:
        place = self._table.key_before(target)
        here = self._table.times[0] if self._current is None else self._current[0]
        if place is None or self._table.keys[place] <= here:
            return
        while place >= 0:
            # Seeking goes by decoding time in some containers and may land after the key frame
            # it was asked for; then start from an earlier one.
            key = self._table.keys[place]
            self._container.seek(key, stream=self._stream)
            self._frames = self._decoded()
            self._before, self._current = None, next(self._frames, None)
            if self._current is not None and self._current[0] <= target:
                return
            place -= 1

    def _decoded(self) -> Iterator[tuple[int, VideoFrame]]:
        n_seen = 0
        for packet in self._container.demux(self._stream):
            self._deadline.check()
            if self._may_skip:
                needed = not packet.size or packet.pts in self._wanted
                self._stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
            try:
                frames = packet.decode()
            except FFmpegError as error:
                # One damaged packet costs its own frame, which `frame_at` then finds missing.
                self._last_error = f"{type(error).__name__}: {error}"
                continue
            for frame in frames:
                moment = n_seen if self._table.by_order else frame.pts
                n_seen += 1
                if moment is not None:
                    yield moment, frame


def _to_rgb(frame: VideoFrame, info: VideoInfo, reformatter: VideoReformatter) -> np.ndarray:
    turned = -frame.rotation % 360
    if turned != info.rotation:
        detail = f"the header turns it by {info.rotation} degrees, its frames by {turned}"
        raise BadMedia("decode_error", info.path, detail)
    rgb = reformatter.reformat(frame, format="rgb24", threads=1)
    return _upright(rgb.to_ndarray(), info)


def _upright(rgb_HWC: np.ndarray, info: VideoInfo) -> np.ndarray:
    if info.rotation:
        rgb_HWC = np.ascontiguousarray(np.rot90(rgb_HWC, k=-info.rotation // 90))
    if rgb_HWC.shape != (info.height, info.width, 3):
        found = "x".join(map(str, rgb_HWC.shape[1::-1]))
        detail = f"the header says {info.width}x{info.height}, a frame is {found}"
        raise BadMedia("decode_error", info.path, detail)
    return rgb_HWC


def _decode_with_decord(
    info: VideoInfo, indices: Sequence[int], deadline: Deadline, threads: int
) -> Iterator[DecodedFrame]:
    reader = _open_decord(info, threads)
    if len(reader) != info.n_frames:
        counts = f"decord counts {len(reader)} frames, FFmpeg {info.n_frames}"
        detail = f"{counts}; set data.video_decoder=pyav"
        raise BadMedia("frame_count_mismatch", info.path, detail)
    for start in range(0, len(indices), _DECORD_CHUNK):
        deadline.check()
        chunk = list(indices[start : start + _DECORD_CHUNK])
        try:
            frames = reader.get_batch(chunk).asnumpy()
            spans_s = reader.get_frame_timestamp(chunk)
        except Exception as error:  # decord raises its own DECORDError and bare RuntimeErrors.
            raise BadMedia("decode_error", info.path, f"{type(error).__name__}: {error}") from error
        for index, rgb_HWC, span_s in zip(chunk, frames, spans_s, strict=True):
            upright = _upright(rgb_HWC, info)
            yield DecodedFrame(index=index, time_s=float(span_s[0]), rgb_HWC=upright, held=False)


def _open_decord(info: VideoInfo, threads: int) -> Any:
    import decord  # Optional second decoder; its FFmpeg is loaded only when it is asked for.

    decord.logging.set_level(decord.logging.QUIET)
    try:
        return decord.VideoReader(info.path, ctx=decord.cpu(0), num_threads=threads)
    except Exception as error:
        raise BadMedia("decode_error", info.path, f"{type(error).__name__}: {error}") from error
