"""Pixels and visual token counts, bit-equal to the Hugging Face Qwen2-VL processors.

Shapes: `F` frames, `C` 3 colours, `H` and `W` pixels, `N` patches (grid_t * grid_h * grid_w).
Geometry (`target_size`, `grid_of`, `n_tokens_of`) is plain arithmetic on numbers that a header
gives, so that the length of a prompt is known before a single pixel is decoded. Resizing happens
in exactly one place, `resize`, because the uint8 kernel of the CPU and a float kernel differ by
up to 11 grey levels: rollout and training must see the same pixels.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

MediaKind = Literal["image", "video"]
Grid = tuple[int, int, int]
"""Patches along time, height and width, before `merge_size` x `merge_size` of them are merged."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200


@dataclass(frozen=True, kw_only=True)
class VisionSpec:
    """What one model family wants of its pixels; the defaults are those of Qwen2.5-VL.

    `min_pixels`, `max_pixels` bound an image, `video_*` bound one frame of a video.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    video_min_pixels: int = 128 * 28 * 28
    video_max_pixels: int = 768 * 28 * 28

    def resize_rule(
        self, kind: MediaKind, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> "ResizeRule":
        """The rule for images or video frames; None keeps the family's own bound."""
        if kind == "image":
            lowest, highest = self.min_pixels, self.max_pixels
        else:
            lowest, highest = self.video_min_pixels, self.video_max_pixels
        return ResizeRule(
            min_pixels=lowest if min_pixels is None else min_pixels,
            max_pixels=highest if max_pixels is None else max_pixels,
            patch_size=self.patch_size,
            merge_size=self.merge_size,
            temporal_patch_size=self.temporal_patch_size,
        )


@dataclass(frozen=True, kw_only=True)
class ResizeRule:
    """Everything that decides the size of a decoded frame; part of the key of cached frames."""

    min_pixels: int
    max_pixels: int
    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"min_pixels={self.min_pixels}, max_pixels={self.max_pixels}: both must be positive"
                " and min_pixels must not exceed max_pixels; lower the first or raise the second."
            )

    @property
    def factor(self) -> int:
        """Pixels along one side of a visual token; heights and widths are multiples of it."""
        return self.patch_size * self.merge_size


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Nearest size with sides divisible by `factor` and an area within the two bounds.

    Rounding is Python's (half to even), as in the Qwen2-VL processors. Raises ValueError when
    one side is over 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"{width}x{height} pixels: one side is over {MAX_ASPECT_RATIO} times the other."
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def target_size(n_frames: int, height: int, width: int, rule: ResizeRule) -> tuple[int, int]:
    """Height and width that every frame is resized to.

    Qwen2.5-VL bounds each frame by itself. `n_frames` is an argument all the same: Qwen3-VL
    bounds time x height x width, and its rule will be told apart by a field of `ResizeRule`.
    """
    if n_frames < 1:
        raise ValueError(f"{n_frames} frames: at least one is needed.")
    return smart_resize(
        height,
        width,
        factor=rule.factor,
        min_pixels=rule.min_pixels,
        max_pixels=rule.max_pixels,
    )


def grid_of(n_frames: int, height: int, width: int, rule: ResizeRule) -> Grid:
    """Patch grid of `n_frames` frames of the original size `height` x `width` (image: 1 frame)."""
    new_height, new_width = target_size(n_frames, height, width, rule)
    n_steps = math.ceil(n_frames / rule.temporal_patch_size)
    return n_steps, new_height // rule.patch_size, new_width // rule.patch_size


def n_tokens_of(grid_thw: Grid, merge_size: int) -> int:
    """Visual tokens that the language model sees for one patch grid."""
    return math.prod(grid_thw) // merge_size**2


def resize(frames_FCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic, antialiased resize of uint8 frames on the CPU, (F,3,H,W) -> (F,3,*size) uint8.

    Frames are independent, so resizing one at a time gives the same bytes.
    """
    if frames_FCHW.dtype != torch.uint8 or frames_FCHW.device.type != "cpu":
        raise ValueError(
            f"frames are {frames_FCHW.dtype} on {frames_FCHW.device}, but only the CPU's uint8 "
            "kernel equals the Hugging Face processors; pass torch.uint8 frames on the CPU."
        )
    if tuple(frames_FCHW.shape[-2:]) == tuple(size):
        return frames_FCHW
    return F.interpolate(
        frames_FCHW, size=size, mode="bicubic", align_corners=False, antialias=True
    )


def normalise(frames_FCHW: Tensor, spec: VisionSpec) -> Tensor:
    """(F,3,H,W) uint8 -> float32 with (x - 255 mean) / (255 std), fused as the processors do."""
    scale = 1.0 / (1 / 255)
    mean_C11 = (torch.tensor(spec.mean) * scale).view(3, 1, 1).to(frames_FCHW.device)
    std_C11 = (torch.tensor(spec.std) * scale).view(3, 1, 1).to(frames_FCHW.device)
    return (frames_FCHW.float() - mean_C11).div_(std_C11)


def patchify(frames_FCHW: Tensor, spec: VisionSpec) -> tuple[Tensor, Grid]:
    """(F,3,H,W) float -> ((N, 3 * temporal * patch * patch), grid).

    When F is not a multiple of `temporal_patch_size` the last frame is repeated. Patches of one
    merged token are neighbours. Raises ValueError for sides that hold no whole tokens.
    """
    patch, merge, step = spec.patch_size, spec.merge_size, spec.temporal_patch_size
    n_frames, n_colours, height, width = frames_FCHW.shape
    if height % (patch * merge) or width % (patch * merge):
        raise ValueError(f"{width}x{height} frames are no multiple of {patch * merge}: resize.")
    if n_missing := -n_frames % step:
        tail_FCHW = frames_FCHW[-1:].expand(n_missing, -1, -1, -1)
        frames_FCHW = torch.cat([frames_FCHW, tail_FCHW])
    grid_t, grid_h, grid_w = frames_FCHW.shape[0] // step, height // patch, width // patch
    patches = frames_FCHW.reshape(
        grid_t, step, n_colours, grid_h // merge, merge, patch, grid_w // merge, merge, patch
    ).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    rows = patches.reshape(grid_t * grid_h * grid_w, n_colours * step * patch * patch)
    return rows, (grid_t, grid_h, grid_w)


def pixel_values(frames_FCHW: Tensor, spec: VisionSpec) -> tuple[Tensor, Grid]:
    """Frames that are resized already -> (float32 rows as the vision tower takes them, grid)."""
    return patchify(normalise(frames_FCHW, spec), spec)
