"""Our pixels, grids and token counts against the Hugging Face Qwen2-VL processors."""

import pytest
import torch
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from verl.data.preprocess import (
    ResizeRule,
    VisionSpec,
    grid_of,
    n_tokens_of,
    patchify,
    pixel_values,
    resize,
    smart_resize,
    target_size,
)

SPEC = VisionSpec()


def noise(n_frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n_frames * height + width)
    shape = (n_frames, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def ours(frames: torch.Tensor, rule: ResizeRule) -> tuple[torch.Tensor, tuple[int, int, int]]:
    size = target_size(frames.shape[0], frames.shape[2], frames.shape[3], rule)
    return pixel_values(resize(frames, size), SPEC)


VIDEO_SHAPES = [
    (4, 360, 640),
    (5, 123, 257),
    (2, 1080, 608),
    (3, 40, 64),
    (1, 252, 448),
    (7, 9, 30),
]


@pytest.mark.parametrize(("n_frames", "height", "width"), VIDEO_SHAPES)
@pytest.mark.parametrize("bounds", [(None, None), (28 * 28, 28 * 28 * 4)])
def test_video_pixels_are_bit_equal_to_the_hf_processor(n_frames, height, width, bounds):
    frames = noise(n_frames, height, width)
    rule = SPEC.resize_rule("video", *bounds)
    theirs = Qwen2VLVideoProcessor(
        size={"shortest_edge": rule.min_pixels, "longest_edge": rule.max_pixels},
        cap_pixels_per_frame=False,
    )(videos=[frames], do_sample_frames=False, return_tensors="pt")
    rows, grid = ours(frames, rule)
    assert theirs["video_grid_thw"].tolist() == [list(grid)]
    assert torch.equal(theirs["pixel_values_videos"], rows)


@pytest.mark.parametrize(("height", "width"), [(360, 640), (37, 911), (1500, 2000), (20, 20)])
def test_image_pixels_are_bit_equal_to_the_hf_processor(height, width):
    image = noise(1, height, width)
    theirs = Qwen2VLImageProcessor()(images=[image[0]], return_tensors="pt")
    rows, grid = ours(image, SPEC.resize_rule("image"))
    assert theirs["image_grid_thw"].tolist() == [list(grid)]
    assert torch.equal(theirs["pixel_values"], rows)


@pytest.mark.parametrize(("n_frames", "height", "width"), VIDEO_SHAPES)
def test_the_grid_known_from_numbers_alone_is_the_real_one(n_frames, height, width):
    rule = SPEC.resize_rule("video")
    _, grid = ours(noise(n_frames, height, width), rule)
    assert grid_of(n_frames, height, width, rule) == grid


def test_token_count_is_the_grid_after_merging():
    assert n_tokens_of((4, 18, 32), merge_size=2) == 4 * 9 * 16


def test_resizing_frame_by_frame_or_from_channels_last_gives_the_same_bytes():
    frames = noise(3, 90, 160)
    together = resize(frames, (56, 112))
    one_by_one = torch.cat([resize(frame[None], (56, 112)) for frame in frames])
    channels_last = frames.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(together, one_by_one)
    assert torch.equal(together, resize(channels_last, (56, 112)))


def test_resizing_float_frames_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        resize(noise(1, 8, 8).float(), (28, 28))


def test_smart_resize_refuses_a_ribbon():
    with pytest.raises(ValueError, match="200 times"):
        smart_resize(4, 1000, factor=28, min_pixels=1, max_pixels=10**9)


@pytest.mark.parametrize("bounds", [(0, 10), (20, 10)])
def test_bounds_that_no_size_can_meet_are_refused(bounds):
    with pytest.raises(ValueError, match="max_pixels"):
        SPEC.resize_rule("video", *bounds)


def test_patchify_refuses_frames_that_were_not_resized():
    with pytest.raises(ValueError, match="multiple of 28"):
        patchify(torch.zeros(2, 3, 30, 28), SPEC)
