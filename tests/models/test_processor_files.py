"""Processor files of a model folder: read, or refused by file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from tests.tiny import write_tiny_model
from verl.config import ModelConfig
from verl.data.media import FrameSampling, make_media_item
from verl.data.preprocess import CLIP_MEAN, VisionSpec, pixel_values, resize, target_size
from verl.models.adapter import ModelError
from verl.models.loader import load_adapter
from verl.models.processor_files import COMBINED_FILE, IMAGE_FILE, VIDEO_FILE

COLOURS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25]}
AREA = {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


def write(folder: Path, name: str, entries: Any) -> None:
    (folder / name).write_text(json.dumps(entries), encoding="utf-8")


def vision(folder: Path) -> VisionSpec:
    spec = load_adapter(ModelConfig(model_path=str(folder), init="random")).vision
    assert spec is not None
    return spec


def bounds(spec: VisionSpec) -> tuple[int, int, int, int]:
    return spec.min_pixels, spec.max_pixels, spec.video_min_pixels, spec.video_max_pixels


def frames_of(spec: VisionSpec, kind: Any, n_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random frames, and what we make of them by the spec alone."""
    frames = torch.randint(0, 256, (n_frames, 3, 130, 170), dtype=torch.uint8)
    size = target_size(n_frames, 130, 170, spec.resize_rule(kind))
    return frames, pixel_values(resize(frames, size), spec)[0]


def test_without_files_the_family_keeps_its_own_numbers(folder):
    spec = vision(folder)
    assert spec.mean == CLIP_MEAN
    assert bounds(spec) == (4 * 28**2, 16384 * 28**2, 128 * 28**2, 768 * 28**2)


def test_pixels_are_bit_equal_to_processors_that_transformers_has_saved(folder):
    Qwen2VLImageProcessor(**COLOURS, **AREA).save_pretrained(folder)
    wider = {"size": {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}}
    Qwen2VLVideoProcessor(**COLOURS, **wider, cap_pixels_per_frame=False).save_pretrained(folder)
    spec = vision(folder)
    assert bounds(spec) == (56**2, 112**2, 28**2, 84**2)
    image, rows = frames_of(spec, "image", 1)
    theirs = Qwen2VLImageProcessor.from_pretrained(folder)(images=[image[0]], return_tensors="pt")
    assert torch.equal(theirs["pixel_values"], rows)
    video, rows = frames_of(spec, "video", 4)
    theirs = Qwen2VLVideoProcessor.from_pretrained(folder)(
        videos=[video], do_sample_frames=False, return_tensors="pt"
    )
    assert torch.equal(theirs["pixel_values_videos"], rows)


def test_bounds_by_name_go_before_size_and_the_combined_file_before_all(folder):
    write(folder, IMAGE_FILE, AREA | {"max_pixels": 56 * 112, "min_pixels": 28 * 28})
    assert bounds(vision(folder))[:2] == (28 * 28, 56 * 112)
    write(
        folder, COMBINED_FILE, {"image_processor": AREA, "video_processor": {"max_pixels": 10**6}}
    )
    assert bounds(vision(folder)) == (56**2, 112**2, 128 * 28**2, 10**6)


EDGES = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}
BY_NAME = {"min_pixels": 3136, "max_pixels": 12845056}
SMALL = {"size": {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}}


@pytest.mark.parametrize(
    "files",
    [
        {IMAGE_FILE: EDGES},
        {IMAGE_FILE: BY_NAME},
        {IMAGE_FILE: BY_NAME | AREA},
        {IMAGE_FILE: EDGES, VIDEO_FILE: AREA},
        {IMAGE_FILE: BY_NAME, VIDEO_FILE: {"do_resize": True}},
        {IMAGE_FILE: EDGES, COMBINED_FILE: {"processor_class": "Qwen2_5_VLProcessor"}},
        {IMAGE_FILE: EDGES, COMBINED_FILE: {"image_processor": AREA}},
        {IMAGE_FILE: EDGES, COMBINED_FILE: {"video_processor": AREA}},
        {IMAGE_FILE: EDGES, VIDEO_FILE: AREA, COMBINED_FILE: {"video_processor": SMALL}},
        {IMAGE_FILE: EDGES, VIDEO_FILE: AREA, COMBINED_FILE: {"video_processor": None}},
    ],
    ids=str,
)
def test_bounds_come_from_the_file_that_transformers_takes_them_from(folder, files):
    for name, entries in files.items():
        write(folder, name, entries)
    ours = bounds(vision(folder))
    image, video = (
        cls.from_pretrained(folder).size for cls in (Qwen2VLImageProcessor, Qwen2VLVideoProcessor)
    )
    assert ours[:2] == (image.shortest_edge, image.longest_edge)
    assert ours[2:] == (video.shortest_edge, video.longest_edge)


def test_without_files_videos_have_the_bounds_of_transformers_class(folder):
    theirs = Qwen2VLVideoProcessor().size
    assert bounds(vision(folder))[2:] == (theirs.shortest_edge, theirs.longest_edge)


@pytest.mark.parametrize("entries", [EDGES, BY_NAME], ids=["size", "by name"])
def test_a_clip_of_a_folder_with_a_file_for_images_alone_has_transformers_grid(folder, entries):
    write(folder, IMAGE_FILE, entries)
    rule = vision(folder).resize_rule("video")
    height, width = target_size(2, 720, 1280, rule)
    theirs = Qwen2VLVideoProcessor.from_pretrained(folder)(
        videos=[torch.zeros(2, 3, 720, 1280, dtype=torch.uint8)],
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert theirs["video_grid_thw"].tolist() == [[1, height // 14, width // 14]] == [[1, 52, 92]]


def test_other_bounds_are_other_cached_frames(folder):
    path = str(Path(__file__).parents[1] / "assets" / "bbb_60s.mp4")
    keys = set()
    for entries in ({}, {"max_pixels": 128 * 28 * 28}, {"max_pixels": 129 * 28 * 28}):
        write(folder, VIDEO_FILE, entries)
        rule = vision(folder).resize_rule("video")
        keys.add(make_media_item(path, "video", FrameSampling(num_frames=4), rule).ref.key)
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("patch_size", 16, "the vision tower of config.json takes 14"),
        ("merge_size", 3, "takes 2"),
        ("temporal_patch_size", 1, "takes 2"),
        ("do_normalize", False, "always done"),
        ("rescale_factor", 1.0, "scaled by 1/255"),
        ("resample", 2, "bicubically"),
        ("image_mean", [0.5], "three numbers"),
        ("image_std", [0.5, 0.5, 0], "three numbers"),
        ("min_pixels", "many", "positive whole number"),
        ("max_pixels", 7, "exceeds max_pixels=7"),
        ("size", {"height": 224, "width": 224}, "height has no meaning"),
    ],
)
@pytest.mark.parametrize("name", [IMAGE_FILE, VIDEO_FILE])
def test_a_value_that_cannot_be_honoured_names_file_and_key(folder, name, key, value, reason):
    write(folder, name, {key: value})
    with pytest.raises(ModelError) as error:
        vision(folder)
    told = "min_pixels" if reason.startswith("exceeds") else key
    assert f"{folder / name}: {told}=" in str(error.value)
    assert reason in str(error.value)


def test_frames_bounded_by_the_length_of_the_video_are_refused(folder):
    write(folder, VIDEO_FILE, {"cap_pixels_per_frame": True})
    with pytest.raises(ModelError, match=r"cap_pixels_per_frame=true: each frame is bounded"):
        vision(folder)


def test_images_and_videos_of_different_colours_are_refused(folder):
    write(folder, IMAGE_FILE, COLOURS)
    write(folder, VIDEO_FILE, {"image_mean": list(CLIP_MEAN)})
    with pytest.raises(ModelError, match=rf"{VIDEO_FILE}: image_mean=.*must be the same"):
        vision(folder)


@pytest.mark.parametrize(("text", "reason"), [("{", "not valid JSON"), ("[]", "JSON object")])
def test_a_broken_file_is_named(folder, text, reason):
    (folder / IMAGE_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=rf"{IMAGE_FILE}: .*{reason}"):
        vision(folder)
