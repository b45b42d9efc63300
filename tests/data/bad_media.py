"""Makes tiny videos whose brightness tells the frame, and files with everything wrong with them."""

import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType
from PIL import Image

N_FRAMES, WIDTH, HEIGHT = 40, 64, 48


def brightness(index: int) -> int:
    """Grey level of a frame; neighbours are 5 levels apart, far over what a codec loses."""
    return 20 + 5 * index


def write_video(
    path: Path,
    *,
    n_frames: int = N_FRAMES,
    codec: str = "libx264",
    fps: int = 10,
    gop: int = 12,
    b_frames: int = 2,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
    noise: int = 0,
    keys: tuple[int, ...] = (),
) -> Path:
    """Write a video of flat grey frames, `noise` levels of static on top to make it larger.

    Frames at `keys` become key frames besides those that `gop` asks for.
    """
    static = np.random.default_rng(0)
    quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options={**quiet, **(codec_options or {})})
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.bit_rate = 2_000_000  # Enough that the levels survive.
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        for i in range(n_frames):
            frame = np.full((size[1], size[0], 3), brightness(i), np.uint8)
            if noise:
                frame += static.integers(0, noise, frame.shape, np.uint8)
            picture = av.VideoFrame.from_ndarray(frame, "rgb24")
            picture.pict_type = PictureType.I if i in keys else PictureType.NONE
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def write_audio(path: Path) -> Path:
    """A sound file without any picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for i in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, 1024 * i
            frame.time_base = Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(path: Path, share: float) -> Path:
    """Keep only the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def claim_avi_frames(path: Path, claimed: int) -> Path:
    """Make an AVI header claim another number of frames (`dwLength` of its stream header)."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.index(b"strh") + 8 + 32, claimed)
    struct.pack_into("<I", content, content.index(b"avih") + 8 + 16, claimed)
    path.write_bytes(content)
    return path


def turn_mp4(path: Path, degrees: int) -> Path:
    """Ask players to turn an MP4 clockwise, as a phone does."""
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    content = bytearray(path.read_bytes())
    matrix = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", content, content.index(b"tkhd") + 4 + 40, *matrix)
    path.write_bytes(content)
    return path


def trim_mp4(path: Path, n_frames: int, fps: int = 10) -> Path:
    """Leave out the first frames by the MP4's edit list; their bytes stay, as editors do."""
    content = bytearray(path.read_bytes())
    place = content.index(b"elst") + 12
    duration_ms, start = struct.unpack_from(">Ii", content, place)
    with av.open(str(path)) as container:
        ticks = round(1 / (container.streams.video[0].time_base * fps))
    edit = (duration_ms - 1000 * n_frames // fps, start + ticks * n_frames)
    struct.pack_into(">Ii", content, place, *edit)
    path.write_bytes(content)
    return path


def wipe_frames(path: Path, indices: list[int]) -> Path:
    """Overwrite the bytes of some frames of an MP4 with zeros; header and index stay whole."""
    with av.open(str(path)) as container:
        places = [(entry.pos, entry.size) for entry in container.streams.video[0].index_entries]
    content = bytearray(path.read_bytes())
    for start, size in (places[i] for i in indices):
        content[start : start + size] = bytes(size)
    path.write_bytes(content)
    return path


def _huge(path: Path) -> Path:
    """An uncompressed QuickTime film whose sample description states 16384x16384 pixels."""
    with av.open(str(path.with_suffix(".mov")), "w") as container:
        stream = container.add_stream("rawvideo", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "rgb24"
        for _ in range(3):
            black = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(black, "rgb24")))
        container.mux(stream.encode())
    content = bytearray(path.with_suffix(".mov").read_bytes())
    struct.pack_into(">HH", content, content.index(b"raw ") + 28, 16384, 16384)
    path.with_suffix(".mov").write_bytes(content)
    return path.with_suffix(".mov")


def hide_last_vp8_frame(path: Path) -> Path:
    """Mark the last frame of a VP8 video as one that is decoded and never shown."""
    hidden = path.with_name(f"hidden_{path.name}")
    with av.open(str(path)) as source, av.open(str(hidden), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for packet in packets:
            content = bytearray(bytes(packet))
            if packet is packets[-1]:
                content[0] &= ~0x10
            copy = av.Packet(bytes(content))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            target.mux(copy)
    return hidden


def make_bad_file(reason: str, folder: Path) -> Path:
    """A file (or what stands in its place) that `probe` must refuse for the reason named."""
    return _MAKERS[reason](folder / f"{reason.replace(chr(47), chr(95))}.mp4")


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _bytes(content: bytes):
    def write(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return write


def _picture(path: Path) -> Path:
    Image.new("RGB", (64, 48)).save(path, format="PNG")
    return path


def _no_frames(path: Path) -> Path:
    with av.open(str(path.with_suffix(".mkv")), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        container.start_encoding()
    return path.with_suffix(".mkv")


_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
_PAGE = b"\xef\xbb\xbf <!DOCTYPE HTML>\n<html><body>404 Not Found</body></html>\n"
_PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n%s\n#EXT-X-ENDLIST\n"
_FASTSTART = {"movflags": "faststart"}

_MAKERS = {
    "missing": lambda path: path,
    "empty": _bytes(b""),
    "not_regular": _folder,
    "not_regular/fifo": _fifo,
    "not_regular/device": lambda path: Path("/dev/zero"),
    "lfs_pointer": _bytes(_LFS),
    "html": _bytes(_PAGE),
    "truncated": lambda path: cut(write_video(path), 0.6),
    "truncated/index_first": lambda path: cut(write_video(path, options=_FASTSTART, noise=40), 0.6),
    "truncated/mkv": lambda path: cut(write_video(path.with_suffix(".mkv"), noise=40), 0.6),
    "truncated/avi": lambda path: cut(
        write_video(path.with_suffix(".avi"), codec="mpeg4", noise=40), 0.6
    ),
    "no_video_stream": write_audio,
    "zero_frames": _no_frames,
    "frame_count_mismatch": lambda path: claim_avi_frames(
        write_video(path.with_suffix(".avi"), codec="mpeg4"), 444
    ),
    "too_large": _huge,
    "not_media": _bytes(b"just some text, " * 100),
    "not_media/picture": _picture,
    "not_media/playlist": _bytes(_PLAYLIST % b"other.ts"),
    "not_media/concat": _bytes(b"ffconcat version 1.0\nfile /etc/passwd\n"),
}
BAD_FILES = tuple(_MAKERS)


def playlist(address: str) -> bytes:
    """An HLS playlist, which FFmpeg would follow."""
    return _PLAYLIST % address.encode()
