"""Libraries that decode video, behind one table: what each may be used for, and how to call it.

Sequential PyAV is the reference that each is compared with, frame by frame. A library that
returns other frames of some kind of file refuses that kind (`refuses`). decord2 is left out: it
returned wrong frames of a plain ten minute MP4 without raising.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from verl.data.media_files import BadMedia
from verl.data.video import MATROSKA, MP4, Deadline, VideoInfo
from verl.utils.exits import UserError

Decoder = Literal["pyav", "decord", "torchcodec"]
_CHUNK = 8
"""Frames that a library which gives lists is asked for at once; they are all in memory."""
_CODECS = ("h264", "vp8", "vp9")


@dataclass(frozen=True, kw_only=True)
class DecodedFrame:
    """One frame as it was asked for."""

    index: int
    time_s: float
    """Seconds after the first frame of the video; `index / fps` where time stamps are missing."""
    rgb_HWC: np.ndarray
    held: bool
    """The frame itself could not be decoded, and this is the nearest one before it."""


Decode = Callable[[VideoInfo, Sequence[int], Deadline, int], Iterator[DecodedFrame]]
"""(video, ascending indices, deadline, threads) -> one frame for each index. Raises BadMedia."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One library."""

    decode: Decode
    refuses: Callable[[VideoInfo], bool]
    """Whether it is known to return wrong frames for such a file."""


BACKENDS: dict[str, Backend] = {}
"""By name; `video_decode` adds "pyav"."""


def check_decoder(info: VideoInfo, decoder: Decoder) -> None:
    """Raise BadMedia when a decoder is known to return wrong frames for such a file."""
    if decoder not in get_args(Decoder):
        raise ValueError(f"decoder {decoder!r}: use one of {', '.join(get_args(Decoder))}.")
    if decoder == "pyav" or not BACKENDS[decoder].refuses(info):
        return
    kind = f"{info.codec} in {info.container}, turned by {info.rotation} degrees"
    detail = f"{decoder} returns wrong frames of {kind}; set data.video_decoder=pyav"
    raise BadMedia("decode_error", info.path, detail)


def upright(rgb_HWC: np.ndarray, info: VideoInfo) -> np.ndarray:
    """The frame as it is shown. Raises BadMedia when its size is not the one that was measured."""
    if info.rotation:
        rgb_HWC = np.ascontiguousarray(np.rot90(rgb_HWC, k=-info.rotation // 90))
    if rgb_HWC.shape != (info.height, info.width, 3):
        found = "x".join(map(str, rgb_HWC.shape[1::-1]))
        detail = f"the header says {info.width}x{info.height}, a frame is {found}"
        raise BadMedia("decode_error", info.path, detail)
    return rgb_HWC


def _not_plain(info: VideoInfo) -> bool:
    """All but unturned MP4 and Matroska with the codecs that were compared and found right.

    decord 0.6.0 gives other frames than asked for, without raising, of AVI, MPEG and HEVC files,
    and four colours of turned ones. torchcodec was compared on the same kinds only.
    """
    return info.container not in (MP4, MATROSKA) or info.codec not in _CODECS or bool(info.rotation)


def _check_count(name: str, found: int, info: VideoInfo) -> None:
    if found != info.n_frames:
        counts = f"{name} counts {found} frames, FFmpeg {info.n_frames}"
        detail = f"{counts}; set data.video_decoder=pyav"
        raise BadMedia("frame_count_mismatch", info.path, detail)


def _chunks(
    info: VideoInfo,
    indices: Sequence[int],
    deadline: Deadline,
    read: Callable[[list[int]], tuple[np.ndarray, Sequence[float]]],
) -> Iterator[DecodedFrame]:
    """Frames from a library that gives lists; `read` returns (frames_FHWC, seconds_F)."""
    for start in range(0, len(indices), _CHUNK):
        deadline.check()
        chunk = list(indices[start : start + _CHUNK])
        try:
            frames_FHWC, times_s = read(chunk)
        except Exception as error:  # Errors of their own and bare RuntimeErrors.
            raise BadMedia("decode_error", info.path, f"{type(error).__name__}: {error}") from error
        for index, rgb_HWC, time_s in zip(chunk, frames_FHWC, times_s, strict=True):
            shown_HWC = upright(rgb_HWC, info)
            yield DecodedFrame(index=index, time_s=float(time_s), rgb_HWC=shown_HWC, held=False)


def _decode_with_decord(
    info: VideoInfo, indices: Sequence[int], deadline: Deadline, threads: int
) -> Iterator[DecodedFrame]:
    reader = _open_decord(info, threads)
    _check_count("decord", len(reader), info)

    def read(chunk: list[int]) -> tuple[np.ndarray, Sequence[float]]:
        frames_FHWC = reader.get_batch(chunk).asnumpy()
        return frames_FHWC, [span[0] for span in reader.get_frame_timestamp(chunk)]

    yield from _chunks(info, indices, deadline, read)


def _open_decord(info: VideoInfo, threads: int) -> Any:
    import decord  # Optional second decoder; its FFmpeg is loaded only when it is asked for.

    decord.logging.set_level(decord.logging.QUIET)
    try:
        return decord.VideoReader(info.path, ctx=decord.cpu(0), num_threads=threads)
    except Exception as error:
        raise BadMedia("decode_error", info.path, f"{type(error).__name__}: {error}") from error


def _decode_with_torchcodec(
    info: VideoInfo, indices: Sequence[int], deadline: Deadline, threads: int
) -> Iterator[DecodedFrame]:
    reader = _open_torchcodec(info, threads)
    _check_count("torchcodec", len(reader), info)
    first_s = reader.metadata.begin_stream_seconds

    def read(chunk: list[int]) -> tuple[np.ndarray, Sequence[float]]:
        batch = reader.get_frames_at(chunk)
        return batch.data.numpy(), [float(t) - first_s for t in batch.pts_seconds]

    yield from _chunks(info, indices, deadline, read)


def _open_torchcodec(info: VideoInfo, threads: int) -> Any:
    """Raises UserError where the package or its FFmpeg is missing.

    Its wheels hold no FFmpeg: they load the shared libraries of the system, at the first use.
    """
    try:
        from torchcodec.decoders import VideoDecoder  # pyright: ignore

        # The exact mode counts the packets first; "approximate" trusts the header's frame rate.
        return VideoDecoder(
            info.path, dimension_order="NHWC", num_ffmpeg_threads=threads, seek_mode="exact"
        )
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        if not isinstance(error, ImportError | OSError) and "libtorchcodec" not in text:
            raise BadMedia("decode_error", info.path, f"{type(error).__name__}: {error}") from error
        raise UserError(
            f"data.video_decoder=torchcodec cannot be loaded ({text.splitlines()[0]}); install the "
            "torchcodec that fits this torch and FFmpeg's shared libraries (libavcodec and the "
            "others, from the system's packages), or set data.video_decoder=pyav"
        ) from error


BACKENDS["decord"] = Backend(decode=_decode_with_decord, refuses=_not_plain)
BACKENDS["torchcodec"] = Backend(decode=_decode_with_torchcodec, refuses=_not_plain)
