"""What the processor files of a model folder say about pixels, checked against its adapter.

A folder holds `preprocessor_config.json` for images and `video_preprocessor_config.json` for
videos; transformers 5 also writes both into one `processor_config.json`, which then counts. Where
neither says anything of videos, the file for images counts for them, too: published Qwen2.5-VL
folders have no other. This is the order of transformers 5.19.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from verl.data.preprocess import VisionSpec
from verl.models.adapter import ModelError

COMBINED_FILE = "processor_config.json"
IMAGE_FILE = "preprocessor_config.json"
VIDEO_FILE = "video_preprocessor_config.json"
PROCESSOR_FILES = (IMAGE_FILE, VIDEO_FILE, COMBINED_FILE)
_SIZES = ("patch_size", "merge_size", "temporal_patch_size")
_STEPS = ("do_resize", "do_rescale", "do_normalize")
_BICUBIC = 3
_LOWEST, _HIGHEST = ("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")


@dataclass(frozen=True)
class _Section:
    """The entries of one processor that are not null, and the file that holds them."""

    path: Path
    entries: dict[str, Any]

    def refuse(self, key: str, value: object, reason: str) -> NoReturn:
        raise ModelError(f"{self.path}: {key}={json.dumps(value)}: {reason}")


def vision_of(spec: VisionSpec, find: Callable[[str], Path | None]) -> VisionSpec:
    """The adapter's `spec` with mean, std and pixel bounds as the model's files have them.

    `find` gives the path of a file of the folder, if it is there; what no file names stays as it
    is in `spec`. Raises ModelError, with file and key, for a value that pixels cannot be made by.
    """
    image = _section(find, "image_processor", IMAGE_FILE)
    video = _section(find, "video_processor", VIDEO_FILE, IMAGE_FILE)
    for section in (image, video):
        _check_steps(section)
        _check_sizes(section, spec)
        mean, std = _colours(section, "image_mean"), _colours(section, "image_std")
        if section is video and image.entries:
            _check_same(section, "image_mean", mean, spec.mean)
            _check_same(section, "image_std", std, spec.std)
        spec = replace(spec, mean=mean or spec.mean, std=std or spec.std)
    lowest, highest = _bounds(image, spec.min_pixels, spec.max_pixels)
    video_lowest, video_highest = _bounds(video, spec.video_min_pixels, spec.video_max_pixels)
    return replace(
        spec,
        min_pixels=lowest,
        max_pixels=highest,
        video_min_pixels=video_lowest,
        video_max_pixels=video_highest,
    )


def _section(find: Callable[[str], Path | None], part: str, *names: str) -> _Section:
    """The `part` of the combined file, else the first file of `names` that is there."""
    combined = find(COMBINED_FILE)
    entries = None if combined is None else _read(combined).get(part)
    if combined is not None and entries is not None:
        if not isinstance(entries, dict):
            raise ModelError(f"{combined}: {part} must be a JSON object")
        return _Section(combined, _without_nulls(entries))
    path = next((path for name in names if (path := find(name)) is not None), None)
    return _Section(path or Path(names[0]), {} if path is None else _without_nulls(_read(path)))


def _read(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return entries


def _without_nulls(entries: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if value is not None}


def _check_steps(section: _Section) -> None:
    """Resizing (bicubic), scaling to 0..1 and normalising are always done."""
    entries = section.entries
    for key in _STEPS:
        if entries.get(key, True) is not True:
            section.refuse(key, entries[key], "this step is always done; use true")
    if entries.get("resample", _BICUBIC) != _BICUBIC:
        section.refuse("resample", entries["resample"], "frames are resized bicubically; use 3")
    factor = entries.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        section.refuse("rescale_factor", factor, "pixels are scaled by 1/255")
    if entries.get("cap_pixels_per_frame"):
        section.refuse(
            "cap_pixels_per_frame", entries["cap_pixels_per_frame"],
            "each frame is bounded by itself; use false, and data.video_max_pixels for the bound",
        )  # fmt: skip


def _check_sizes(section: _Section, spec: VisionSpec) -> None:
    for key in _SIZES:
        wanted = getattr(spec, key)
        if section.entries.get(key, wanted) != wanted:
            reason = f"the vision tower of config.json takes {wanted}; one of the two is wrong"
            section.refuse(key, section.entries[key], reason)


def _colours(section: _Section, key: str) -> tuple[float, float, float] | None:
    value = section.entries.get(key)
    if value is None:
        return None
    numbers = value if isinstance(value, list) else []
    right = [x for x in numbers if isinstance(x, int | float) and math.isfinite(x)]
    if len(right) != 3 or len(numbers) != 3 or (key == "image_std" and min(right) <= 0):
        section.refuse(key, value, "three numbers are needed, for red, green and blue")
    return (float(right[0]), float(right[1]), float(right[2]))


def _check_same(
    section: _Section, key: str, value: tuple[float, ...] | None, of_images: tuple[float, ...]
) -> None:
    if value is not None and value != of_images:
        reason = f"images have {list(of_images)}; the two must be the same"
        section.refuse(key, list(value), reason)


def _bounds(section: _Section, lowest: int, highest: int) -> tuple[int, int]:
    """`min_pixels` and `max_pixels`, which go before `size`, as in transformers."""
    size = section.entries.get("size", {})
    if not isinstance(size, dict):
        section.refuse("size", size, "shortest_edge and longest_edge are needed")
    size = _without_nulls(size)
    if unknown := set(size) - {*_LOWEST, *_HIGHEST}:
        section.refuse("size", size, f"{min(unknown)} has no meaning: pixels are bounded by area")
    found = []
    for (in_size, name), default in ((_LOWEST, lowest), (_HIGHEST, highest)):
        value = size.get(name, size.get(in_size, default))
        value = section.entries.get(name, value)
        if type(value) is not int or value < 1:
            section.refuse(name, value, "a positive whole number is needed")
        found.append(value)
    if found[0] > found[1]:
        section.refuse("min_pixels", found[0], f"exceeds max_pixels={found[1]}; give both")
    return found[0], found[1]
