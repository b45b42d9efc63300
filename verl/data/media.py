"""Media as the rest of the system sees it: exact names, geometry, decoded frames, their cache.

A batch carries `MediaItem`s: names and sizes, no pixels. Whoever needs pixels asks a `MediaCache`
by name; while it holds a video, nobody on the machine decodes it again.
"""

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from verl.data.decode_process import Limits, frames_from_subprocess, probe_in_subprocess
from verl.data.decoders import DecodedFrame, Decoder, check_decoder
from verl.data.image import load_image, probe_image
from verl.data.media_files import BadMedia, Fingerprint, fingerprint
from verl.data.preprocess import (
    Grid,
    MediaKind,
    ResizeRule,
    VisionSpec,
    grid_of,
    n_tokens_of,
    pixel_values,
    resize,
    target_size,
)
from verl.data.tensor_store import Entry, StoreCounts, TensorStore
from verl.data.video import (
    DEFAULT_TIMEOUT_S,
    FrameSampling,
    VideoInfo,
    frame_range,
    probe,
    sample_indices,
)
from verl.data.video_decode import iter_frames

if TYPE_CHECKING:
    from verl.config.data import DataConfig

__all__ = [
    "BadMedia",
    "Decoder",
    "FrameSampling",
    "Frames",
    "MediaCache",
    "MediaItem",
    "MediaKind",
    "MediaRef",
    "Reading",
    "ResizeRule",
    "content_key",
    "decode_media",
    "make_media_item",
    "pixels",
]

FORMAT_VERSION = 1
"""Part of every key: raise it when the same reference would give other frames. What the index of
media remembers of older versions is forgotten."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How files are read. `fingerprint` is part of a key; the rest changes no frame."""

    fingerprint: Fingerprint = "fast"
    threads: int = 1
    timeout_s: float = DEFAULT_TIMEOUT_S
    in_subprocess: bool = False
    memory_bytes: int = 4 << 30
    """Most memory of a decoder that runs in a process of its own."""

    @classmethod
    def from_config(cls, data: "DataConfig") -> "Reading":
        return cls(
            fingerprint=data.media_fingerprint,
            threads=data.decode_threads,
            timeout_s=data.decode_timeout_s,
            in_subprocess=data.decode_in_subprocess,
            memory_bytes=int(data.decode_memory_gib * 2**30),
        )

    @property
    def limits(self) -> Limits:
        return Limits(timeout_s=self.timeout_s, memory_bytes=self.memory_bytes)


@dataclass(frozen=True)
class MediaRef:
    """Names a piece of media exactly. Cheap and hashable: it crosses Ray instead of pixels."""

    kind: MediaKind
    path: str
    """Absolute, from `resolve_media_path`."""
    sampling: FrameSampling | None
    """None for an image."""
    resize: ResizeRule
    key: str
    """Content key: file fingerprint, sampling, resize, decoder and format version, hashed."""
    decoder: Decoder = "pyav"
    source_shape: tuple[int, int, int] | None = None
    """(frames, height, width) that were measured; decoding must find the same."""
    reading: Reading = Reading()


@dataclass(frozen=True)
class MediaItem:
    """A MediaRef with the geometry that metadata gives."""

    ref: MediaRef
    grid_thw: Grid
    seconds_per_grid: float
    """Seconds of film that one step of the grid's time axis stands for; 0 for an image."""
    n_tokens: int
    frame_times: tuple[float, ...]
    """Seconds of the sampled frames, index / average fps, counted from the start of the whole
    video also where a segment is sampled (as Qwen's tools do); one 0 for an image."""


@dataclass(frozen=True)
class Frames:
    """Decoded frames, resized, ready for `pixels`."""

    frames_u8: Tensor
    """(F, 3, H, W) uint8; possibly mapped from a file."""
    frame_times: tuple[float, ...]
    """Seconds of the frames by their own time stamps."""
    source_fps: float
    """Average frames per second of the video; 0 for an image."""
    n_held: int = 0
    """Frames that could not be decoded and repeat the one before (at most a tenth)."""


def pixels(frames: Frames, spec: VisionSpec) -> tuple[Tensor, Grid]:
    """Rows for the vision tower (float32) and their patch grid."""
    return pixel_values(frames.frames_u8, spec)


def make_media_item(
    path: str,
    kind: MediaKind,
    sampling: FrameSampling | None,
    resize: ResizeRule,
    decoder: Decoder = "pyav",
    reading: Reading | None = None,
) -> MediaItem:
    """Measure a file without decoding it; `path` comes from `resolve_media_path`.

    Raises BadMedia. The token count is the real one: `decode_media` raises where it cannot keep
    what is promised here.
    """
    reading = reading or Reading()
    if kind == "image":
        shape, times, seconds_per_frame = (1, *probe_image(path)), (0.0,), 0.0
    else:
        info = _probe(path, reading)
        check_decoder(info, decoder)
        indices = _indices(info, sampling, resize)
        shape = (info.n_frames, info.height, info.width)
        times = tuple(index / info.fps for index in indices)
        assert sampling is not None  # `_indices` has asked for it.
        n_in_segment = len(frame_range(info.n_frames, info.fps, sampling))
        seconds_per_frame = n_in_segment / info.fps / len(indices)
    try:
        grid = grid_of(len(times), shape[1], shape[2], resize)
    except ValueError as error:
        raise BadMedia("too_large", path, str(error)) from None
    digest = fingerprint(path, reading.fingerprint)
    key = content_key(digest, kind, sampling, resize, decoder)
    return MediaItem(
        ref=MediaRef(kind, path, sampling, resize, key, decoder, shape, reading),
        grid_thw=grid,
        seconds_per_grid=seconds_per_frame * resize.temporal_patch_size,
        n_tokens=n_tokens_of(grid, resize.merge_size),
        frame_times=times,
    )


def decode_media(ref: MediaRef) -> Frames:
    """Decode and resize what a reference names. Raises BadMedia, also for a file that changed."""
    digest = _fingerprint_of(ref)
    if content_key(digest, ref.kind, ref.sampling, ref.resize, ref.decoder) != ref.key:
        raise BadMedia("changed", ref.path, "the file changed after it was measured")
    return _decode_image(ref) if ref.kind == "image" else _decode_video(ref)


class MediaCache:
    """Decoded frames on a local disk, at most `limit_bytes`; shared by threads and processes.

    One safetensors file a key, mapped into memory on a hit. A damaged file is named in the log
    and made again. Media that do not fit are decoded at every call.
    """

    def __init__(self, root: str | os.PathLike[str], limit_bytes: int) -> None:
        self._store = TensorStore(root, limit_bytes)
        self.root = self._store.root
        self._lock = threading.Lock()
        self.decoded: Counter[MediaKind] = Counter()
        """Pieces of media that this object decoded so far."""

    def get(self, ref: MediaRef) -> Frames:
        """Frames of `ref`, decoded here only if no process did so before. Raises BadMedia."""
        return _from_entry(self._store.get_or_make(ref.key, lambda: self._decode(ref)))

    def hold(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        """While inside, no process evicts any of `keys`."""
        return self._store.hold(keys)

    @property
    def counts(self) -> StoreCounts:
        """Hits, misses, damaged and evicted files of this object."""
        return self._store.counts

    def _decode(self, ref: MediaRef) -> Entry:
        frames = decode_media(ref)
        with self._lock:
            self.decoded[ref.kind] += 1
        return _to_entry(ref, frames)


def content_key(
    digest: str,
    kind: MediaKind,
    sampling: FrameSampling | None,
    resize: ResizeRule,
    decoder: Decoder,
) -> str:
    """`MediaRef.key`: all that decides which frames come out; `digest` is the file's fingerprint.

    Every run, and whoever stores something for later runs, must come to the same key.
    """
    described = {
        "version": FORMAT_VERSION,
        "file": digest,
        "kind": kind,
        "sampling": None if sampling is None else asdict(sampling),
        "resize": asdict(resize),
        "decoder": decoder,
    }
    return hashlib.blake2b(
        json.dumps(described, sort_keys=True).encode(), digest_size=16
    ).hexdigest()


def _fingerprint_of(ref: MediaRef) -> str:
    try:
        return fingerprint(ref.path, ref.reading.fingerprint)
    except BadMedia as error:
        if error.reason != "missing":
            raise
        detail = f"{error.detail}; it was there when it was measured, its frames are not stored"
        raise BadMedia("missing", ref.path, detail) from None


def _indices(info: VideoInfo, sampling: FrameSampling | None, rule: ResizeRule) -> list[int]:
    if sampling is None:
        raise ValueError(f"{info.path}: a video needs a FrameSampling, got None.")
    try:
        return sample_indices(info.n_frames, info.fps, sampling, rule.temporal_patch_size)
    except ValueError as error:
        raise BadMedia("bad_segment", info.path, str(error)) from None


def _probe(path: str, reading: Reading) -> VideoInfo:
    if reading.in_subprocess:
        return probe_in_subprocess(path, reading.limits)
    return probe(path, timeout_s=reading.timeout_s)


def _frames(ref: MediaRef, info: VideoInfo, indices: list[int]) -> Iterator[DecodedFrame]:
    reading = ref.reading
    if reading.in_subprocess:
        limits = reading.limits
        return frames_from_subprocess(info, indices, ref.decoder, reading.threads, limits)
    return iter_frames(
        info, indices, decoder=ref.decoder, timeout_s=reading.timeout_s, threads=reading.threads
    )


def _check_shape(ref: MediaRef, shape: tuple[int, int, int]) -> None:
    if ref.source_shape is not None and shape != ref.source_shape:
        detail = f"(frames, height, width) was {ref.source_shape}, and is {shape} now"
        raise BadMedia("frame_count_mismatch", ref.path, detail)


def _decode_image(ref: MediaRef) -> Frames:
    rgb_HWC = load_image(ref.path)
    height, width, _ = rgb_HWC.shape
    _check_shape(ref, (1, height, width))
    frame_CHW = torch.from_numpy(rgb_HWC).permute(2, 0, 1)
    size = target_size(1, height, width, ref.resize)
    return Frames(resize(frame_CHW[None], size).contiguous(), (0.0,), 0.0)


def _decode_video(ref: MediaRef) -> Frames:
    info = _probe(ref.path, ref.reading)
    _check_shape(ref, (info.n_frames, info.height, info.width))
    indices = _indices(info, ref.sampling, ref.resize)
    size = target_size(len(indices), info.height, info.width, ref.resize)
    # Each frame shrinks as it comes: an hour at its own size would not fit into memory.
    frames_FCHW = torch.empty((len(indices), 3, *size), dtype=torch.uint8)
    times, n_held = [], 0
    for i, frame in enumerate(_frames(ref, info, indices)):
        frame_CHW = torch.from_numpy(frame.rgb_HWC).permute(2, 0, 1)
        frames_FCHW[i] = resize(frame_CHW[None], size)[0]
        times.append(frame.time_s)
        n_held += frame.held
    if len(times) != len(indices):
        detail = f"{len(indices)} frames were asked for, {len(times)} came"
        raise BadMedia("frame_count_mismatch", ref.path, detail)
    return Frames(frames_FCHW, tuple(times), info.fps, n_held)


def _to_entry(ref: MediaRef, frames: Frames) -> Entry:
    metadata = {
        "path": ref.path,
        "frame_times": json.dumps(frames.frame_times),
        "source_fps": json.dumps(frames.source_fps),
        "n_held": json.dumps(frames.n_held),
    }
    return Entry({"frames": frames.frames_u8}, metadata)


def _from_entry(entry: Entry) -> Frames:
    return Frames(
        frames_u8=entry.tensors["frames"],
        frame_times=tuple(json.loads(entry.metadata["frame_times"])),
        source_fps=json.loads(entry.metadata["source_fps"]),
        n_held=json.loads(entry.metadata["n_held"]),
    )
