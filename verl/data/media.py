"""Media as the rest of the system sees it: exact names, geometry, decoded frames, their cache."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from verl.data.preprocess import Grid, MediaKind, ResizeRule, VisionSpec, pixel_values
from verl.data.video import Decoder, FrameSampling

__all__ = ["FrameSampling", "MediaKind", "ResizeRule"]


@dataclass(frozen=True)
class MediaRef:
    """Names a piece of media exactly. Cheap and hashable: it crosses Ray instead of pixels."""

    kind: MediaKind
    path: str
    sampling: FrameSampling | None
    """None for an image."""
    resize: ResizeRule
    key: str
    """Content key: file fingerprint, sampling, resize, decoder and format version, hashed."""
    decoder: Decoder = "pyav"
    n_source_frames: int = 1
    """Frames in the file when it was measured; decoding checks it."""


@dataclass(frozen=True)
class MediaItem:
    """A MediaRef with the geometry that metadata gives."""

    ref: MediaRef
    grid_thw: Grid
    seconds_per_grid: float
    """Seconds of film that one step of the grid's time axis stands for; 0 for an image."""
    n_tokens: int
    frame_times: tuple[float, ...]


@dataclass(frozen=True)
class Frames:
    """Decoded frames, resized, ready for `pixels`."""

    frames_u8: Tensor
    """(F, 3, H, W) uint8."""
    frame_times: tuple[float, ...]
    source_fps: float
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
) -> MediaItem:
    """Measure a file without decoding it. Raises BadMedia. `path` comes from resolve_media_path."""
    raise NotImplementedError


class MediaCache:
    """Decoded frames on disk, one safetensors file a key, at most `limit_bytes` in all."""

    def __init__(self, root: str | os.PathLike[str], limit_bytes: int) -> None:
        self.root = Path(root)
        self.limit_bytes = limit_bytes

    def get(self, ref: MediaRef) -> Frames:
        """Frames of `ref`; decodes on a miss. Raises BadMedia."""
        raise NotImplementedError

    @contextmanager
    def hold(self, keys: Iterable[str]) -> Iterator[None]:
        """While inside, none of `keys` is evicted, by no process."""
        raise NotImplementedError
        yield
