"""Decode exactly the frames that were asked for, with PyAV or another of `decoders`. No torch.

Frames are named by their place in presentation order. Where the container carries time stamps
that can be trusted (MP4, Matroska, MPEG), a frame is found by its time stamp, so that one damaged
frame does not shift the others; elsewhere (AVI) frames are counted as they come out.
"""

import logging
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from verl.data.decoders import BACKENDS, Backend, DecodedFrame, Decoder, check_decoder, upright
from verl.data.media_files import BadMedia
from verl.data.video import (
    DEFAULT_TIMEOUT_S,
    MIN_SHARE,
    Deadline,
    FrameTable,
    VideoInfo,
    frame_table,
    opened,
    shortfall,
)

logger = logging.getLogger(__name__)

_TELL_UNREFERENCED = ("h264", "hevc")
"""Codecs whose packets say whether another frame is predicted from theirs."""
_WORTH_A_JUMP = 24
"""Frames that a jump must save. Measured on a 720p film with a key frame every 75 frames: jumping
always takes a third of the time of never at 64 frames, and 16% more at 1,024."""


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
    n_held = 0
    for frame in BACKENDS[decoder].decode(info, indices, deadline, threads):
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
        if place is None or not self._is_far(self._table.keys[place]):
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

    def _is_far(self, key: int) -> bool:
        """Whether it saves time to jump to this key frame instead of decoding up to it."""
        times = self._table.times
        here = 0 if self._current is None else bisect_left(times, self._current[0])
        return bisect_left(times, key) - here >= _WORTH_A_JUMP

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
                if isinstance(error, MemoryError):
                    raise BadMedia("out_of_memory", self._deadline.path, str(error)) from error
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
    return upright(rgb.to_ndarray(), info)


BACKENDS["pyav"] = Backend(decode=_decode_with_pyav, refuses=lambda _: False)
