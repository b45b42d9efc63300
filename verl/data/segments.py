"""Parts of videos that rows ask for: start and end in seconds, as Qwen's message dicts name them.

Qwen's tools (qwen-vl-utils) and the data made for them write `video_start` and `video_end` beside
`video` in one dict. A table has columns: the same two names, one number a row, or a list with one
entry for each video. Both forms are read. Here only their types are checked; whether a video
holds the segment is known when the file is measured.
"""

import math
from collections.abc import Mapping
from typing import Any

from verl.data.sources import DataError

Segment = tuple[float | None, float | None]
"""Start and end of a part of a video, in seconds; None: from the first, up to the last frame."""

BOUNDS = ("video_start", "video_end")


def split_segments(value: Any) -> tuple[Any, dict[str, list[Any]]]:
    """(a video column without segments, the `video_start` and `video_end` of its dicts)."""
    parts = value if isinstance(value, list | tuple) else [value]
    if not any(isinstance(part, dict) and ("video" in part or _bounded(part)) for part in parts):
        return value, {}
    paths = [part.get("video", part.get("path")) if _has_path(part) else part for part in parts]
    bounds = {}
    for name in BOUNDS:
        found = [part.get(name) if isinstance(part, dict) else None for part in parts]
        if any(bound is not None for bound in found):
            bounds[name] = found
    return paths, bounds


def read_segments(
    columns: Mapping[str, Any], names: tuple[str, str], n_videos: int, where: str
) -> tuple[Segment, ...]:
    """One segment a video from the two columns; empty when neither says anything.

    Raises DataError for values that are no numbers and for another count than that of the videos.
    """
    starts, ends = (_numbers(columns.get(name), name, n_videos, where) for name in names)
    segments = tuple(zip(starts, ends, strict=True))
    return segments if any(bound is not None for pair in segments for bound in pair) else ()


def _bounded(part: Mapping[str, Any]) -> bool:
    return any(part.get(name) is not None for name in BOUNDS)


def _has_path(part: Any) -> bool:
    return isinstance(part, dict) and ("video" in part or "path" in part)


def _numbers(value: Any, column: str, n_videos: int, where: str) -> list[float | None]:
    if value is None:
        return [None] * n_videos
    values = value if isinstance(value, list | tuple) else [value]
    if len(values) != n_videos:
        raise DataError(
            f"{where}: column {column!r} holds {len(values)} values for {n_videos} videos; write "
            "one number of seconds for each video, null for none"
        )
    for one in values:
        is_number = isinstance(one, int | float) and not isinstance(one, bool)
        if one is not None and not (is_number and math.isfinite(one)):
            raise DataError(
                f"{where}: column {column!r} holds {one!r}, which is no number of seconds; write "
                "90.5 instead of 00:01:30.5"
            )
    return [None if one is None else float(one) for one in values]
