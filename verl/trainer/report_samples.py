"""Sample questions of a report: which are shown, and the frames that the model saw."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.data.video import BadMedia, FrameSampling, probe, sample_indices
from verl.data.video_decode import iter_frames

logger = logging.getLogger(__name__)

Rows = dict[str, dict[str, Any]]
"""Predictions by uid."""

THUMBNAIL_PX = 112
"""Longest side of a thumbnail."""
MAX_THUMBNAILS = 64
_TAG = re.compile(r"(</?(?:think|answer)>)")
_SHOWN_CHARACTERS = 4000


@dataclass(frozen=True)
class Thumbnail:
    """One frame as a JPEG that stands in the page itself."""

    data_uri: str
    time_s: float


@dataclass(frozen=True)
class Strip:
    """The frames of a question in order."""

    frames: list[Thumbnail]
    n_sampled: int
    """Frames that the model saw; `frames` may be fewer."""
    problem: str = ""
    """Why there are no frames."""


@dataclass(frozen=True)
class Reply:
    """One response as it is shown."""

    label: str
    pieces: list[tuple[bool, str]]
    """(is a tag, text), in order."""
    extracted: str | None
    correct: bool
    reward: float | None


@dataclass(frozen=True)
class SampleCard:
    """One question with its frames and the responses before and after RL."""

    question: str
    options: list[str]
    answer: str
    problem_type: str
    strip: Strip
    replies: list[Reply]


@dataclass(frozen=True)
class Agreement:
    """How many questions were right before and after."""

    both: int
    gained: int
    lost: int
    neither: int

    @property
    def total(self) -> int:
        """Questions that both answered."""
        return self.both + self.gained + self.lost + self.neither


def read_predictions(path: Path) -> Rows:
    """Predictions by uid; of several responses to a question the first is kept."""
    rows: Rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.setdefault(row["uid"], row)
    return rows


def first_and_last(generations: Path) -> dict[str, Rows]:
    """Logged generations of the first and the last step, by the name of the step."""
    steps: dict[int, Rows] = {}
    for line in generations.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "uid" in row:
            steps.setdefault(row["step"], {}).setdefault(row["uid"], row)
    if not steps:
        return {}
    return {f"step {step}": steps[step] for step in sorted({min(steps), max(steps)})}


def compare(before: Rows, after: Rows) -> Agreement:
    """Counts over the questions that both answered."""
    pairs = [(bool(before[u]["correct"]), bool(after[u]["correct"])) for u in before if u in after]
    return Agreement(
        both=pairs.count((True, True)),
        gained=pairs.count((False, True)),
        lost=pairs.count((True, False)),
        neither=pairs.count((False, False)),
    )


def choose(before: Rows, after: Rows, count: int) -> list[str]:
    """Uids to show: half of them learnt in RL, the rest unchanged or lost, kinds in turn.

    The choice depends on the predictions alone, so a report can be made again.
    """
    shared = sorted(u for u in before if u in after)
    groups: dict[tuple[bool, bool], list[str]] = {}
    for uid in shared:
        key = bool(before[uid]["correct"]), bool(after[uid]["correct"])
        groups.setdefault(key, []).append(uid)
    queues = {key: _kinds_in_turn(uids, after) for key, uids in groups.items()}
    gained, both, lost, neither = (False, True), (True, True), (True, False), (False, False)
    order = [gained, both, gained, neither, gained, lost]
    chosen: list[str] = []
    while len(chosen) < min(count, len(shared)):
        for key in order:
            if queues.get(key) and len(chosen) < count:
                chosen.append(queues[key].pop(0))
    return chosen


def _kinds_in_turn(uids: Sequence[str], rows: Rows) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for uid in uids:
        kinds.setdefault(str(rows[uid].get("problem_type") or ""), []).append(uid)
    queues, ordered = [kinds[k] for k in sorted(kinds)], []
    while any(queues):
        ordered += [queue.pop(0) for queue in queues if queue]
    return ordered


def make_cards(
    uids: Iterable[str], answered: Mapping[str, Rows], n_frames: int
) -> Iterator[SampleCard]:
    """Cards of the chosen questions; `answered` maps a label to predictions, in order of time."""
    for uid in uids:
        rows = {label: rows[uid] for label, rows in answered.items()}
        first = next(iter(rows.values()))
        video = first.get("video")
        yield SampleCard(
            question=first["question"],
            options=[str(o) for o in first.get("options") or ()],
            answer=str(first["answer"]),
            problem_type=first.get("problem_type") or "",
            strip=_strip_of(first, n_frames) if video else Strip([], 0, "no video"),
            replies=[_reply(label, row) for label, row in rows.items()],
        )


def _reply(label: str, row: Mapping[str, Any]) -> Reply:
    text = str(row["response"]).strip()
    if len(text) > _SHOWN_CHARACTERS:
        left_out = len(text) - _SHOWN_CHARACTERS
        text = f"{text[:_SHOWN_CHARACTERS]} [{left_out} more characters]"
    pieces = [(bool(_TAG.fullmatch(p)), p) for p in _TAG.split(text) if p]
    return Reply(label, pieces, row.get("extracted"), bool(row["correct"]), row.get("reward"))


def _strip_of(row: Mapping[str, Any], n_frames: int) -> Strip:
    start_s, end_s = row.get("segment") or (0.0, None)
    sampling = FrameSampling(num_frames=n_frames, start_s=start_s, end_s=end_s)
    return make_strip(row["video"], sampling)


def make_strip(video: str, sampling: FrameSampling, limit: int = MAX_THUMBNAILS) -> Strip:
    """Thumbnails of the frames that `sampling` takes; at most `limit` of them."""
    try:
        info = probe(video)
        indices = sample_indices(info.n_frames, info.fps, sampling)
        shown = indices
        if len(indices) > limit:
            shown = [indices[i * (len(indices) - 1) // (limit - 1)] for i in range(limit)]
        frames = [Thumbnail(_jpeg(f.rgb_HWC), f.time_s) for f in iter_frames(info, shown)]
    except (BadMedia, OSError, ValueError) as error:
        logger.warning("report: no frames of %s: %s", video, error)
        return Strip([], 0, f"{Path(video).name} cannot be read: {type(error).__name__}")
    return Strip(frames, len(indices))


def _jpeg(rgb_HWC: Any) -> str:
    from PIL import Image

    image = Image.fromarray(rgb_HWC)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=72, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
