"""Video files: probe, choose frames, decode exactly those frames."""

from dataclasses import dataclass
from typing import Literal

from verl.data.media_files import BadMedia, resolve_media_path

__all__ = ["BadMedia", "FrameSampling", "VideoInfo", "resolve_media_path"]

Decoder = Literal["pyav", "decord"]


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Which frames of a video are looked at; exactly one of `num_frames` and `fps` is set."""

    num_frames: int | None = None
    fps: float | None = None
    max_frames: int = 768
    min_frames: int = 4
    rule: Literal["linspace", "stride"] = "linspace"

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


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a file says about its video, known without decoding a frame."""

    path: str
    width: int
    height: int
    """As shown: after `rotation`."""
    rotation: int
    """Degrees clockwise (0, 90, 180, 270) by which decoded frames are turned."""
    fps: float
    n_frames: int
    """Frames that can be decoded, counted in the file's index or by demuxing."""
    claimed_frames: int
    """Frames that the header claims; 0 when it does not say."""
    duration_s: float
