"""Rows as samples that a model can take, and what happens to rows that cannot be used.

Nothing is ever replaced by another sample or cut: a row that cannot be used stops the run or is
left out with a reason, as `data.on_bad_sample` and `data.filter_overlong_prompts` say.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import threading
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from verl.data.cache_dirs import index_dir
from verl.data.inline import InlineImages
from verl.data.media import MediaItem, Reading, make_media_item
from verl.data.media_files import REMEDIES, BadMedia, contained_path
from verl.data.media_index import MediaIndex, MediaLook
from verl.data.preprocess import MediaKind, ResizeRule, VisionSpec
from verl.data.prompts import MediaSlot, PromptBuilder, PromptFormat
from verl.data.rows import BadSample, Row, RowKeys, Segment, question_and_answer, read_rows
from verl.data.sources import DataError
from verl.data.video import FrameSampling
from verl.utils.answers import gold_option, option_letters, same_text

if TYPE_CHECKING:
    from verl.config import DataConfig

logger = logging.getLogger(__name__)

OVERLONG = ("prompt_too_long", "response_too_long")
"""Reasons that are a choice of lengths and not a fault of the data."""
_REPORTED_PER_REASON = 3
_LETTER = re.compile(r"\(?[A-Z]\)?[.:]?")
_PROBES_KEPT = 4096


class HasMedia(Protocol):
    """What the loader needs to know of a sample."""

    @property
    def uid(self) -> str: ...

    @property
    def media(self) -> tuple[MediaItem, ...]: ...


SampleT = TypeVar("SampleT", bound=HasMedia)


@dataclass(frozen=True)
class Sample:
    """One question, ready for a model; frames are named, not held."""

    uid: str
    """Stable over runs, resumes and shuffles."""
    prompt_ids: list[int]
    """Token ids with visual placeholders already expanded."""
    media: tuple[MediaItem, ...]
    """In the order of their placeholders."""
    question: str
    answer: str
    """Gold answer without `<answer>` tags."""
    problem_type: str
    options: tuple[str, ...]
    extra: dict[str, Any] = field(repr=False)
    """Every other column of the row, in JSON's types."""
    prompt_text: str = field(repr=False)
    """The prompt as text, each piece of media as one placeholder."""


@dataclass(frozen=True)
class QuarantinedRow:
    """A row that was left out, and why."""

    uid: str
    where: str
    reason: str
    path: str
    """The media file at fault; empty when the row itself is."""
    detail: str


class RowDataset(ABC, Generic[SampleT]):
    """Rows of some files, built into samples one at a time, with a policy on unusable rows."""

    def __init__(
        self,
        data: DataConfig,
        files: Sequence[str],
        required: Callable[[Mapping[str, Any]], Sequence[str]],
    ) -> None:
        if not files:
            raise DataError(
                "data.train_files or data.val_files: no file is named; give at least one"
            )
        self.files = tuple(files)
        self.rows: list[Row] = read_rows(
            files, RowKeys.from_config(data), required, InlineImages(data).keep
        )
        self._media: MediaProbe
        """Set by subclasses."""
        self._data = data
        self._quarantine: dict[str, QuarantinedRow] = {}

    def __len__(self) -> int:
        """Rows in the files, unusable ones included."""
        return len(self.rows)

    @abstractmethod
    def sample(self, index: int) -> SampleT:
        """The sample of a row, from metadata alone. Thread-safe. Raises BadSample."""

    @property
    def quarantine(self) -> list[QuarantinedRow]:
        """Every row left out so far, in the order in which they were met."""
        return list(self._quarantine.values())

    def is_quarantined(self, index: int) -> bool:
        """Whether the row is known to be unusable."""
        return self.rows[index].uid in self._quarantine

    def reject(self, bad: BadSample) -> None:
        """Applies the policy to an unusable row: raises DataError, or puts it into quarantine."""
        if bad.reason in OVERLONG:
            if not self._data.filter_overlong_prompts:
                raise DataError(
                    f"{bad}; raise the limit, or drop such rows with "
                    "data.filter_overlong_prompts=true"
                ) from bad
        elif not self.skips_bad_rows:
            raise DataError(
                f"{bad}; repair the row, or leave such rows out with data.on_bad_sample=skip"
            ) from bad
        self.leave_out([bad])

    @property
    def skips_bad_rows(self) -> bool:
        """Whether `data.on_bad_sample` leaves bad rows out instead of stopping."""
        return self._data.on_bad_sample == "skip"

    def leave_out(self, bad: Sequence[BadSample]) -> None:
        """Puts rows into quarantine. Raises DataError when too many are there then."""
        for fault in bad:
            row = fault.row
            entry = QuarantinedRow(row.uid, row.where, fault.reason, fault.path, fault.detail)
            self._quarantine.setdefault(row.uid, entry)
            self._report(entry)
        n_bad = sum(entry.reason not in OVERLONG for entry in self._quarantine.values())
        if bad and n_bad > self._data.max_bad_fraction * len(self):
            raise DataError(
                f"{n_bad} of {len(self)} rows cannot be used, more than "
                f"data.max_bad_fraction={self._data.max_bad_fraction}: {self.summary()}. "
                f"Last: {bad[-1]}"
            ) from bad[-1]

    @property
    def probe(self) -> MediaProbe:
        """Where the media of rows are, and what they measure."""
        return self._media

    def slots(self, row: Row) -> list[MediaSlot]:
        """The media that a row names, images first; none where the model reads text only."""
        if not self._media.sees:
            return []  # PromptBuilder refuses rows with media
        segments = row.segments or [(None, None)] * len(row.videos)
        videos = zip(row.videos, segments, strict=True)
        return [
            *(MediaSlot("image", path) for path in row.images),
            *(MediaSlot("video", path, segment) for path, segment in videos),
        ]

    def summary(self) -> str:
        """Rows left out by reason, with the first place of each."""
        counts = Counter(entry.reason for entry in self._quarantine.values())
        first = {e.reason: e.where for e in reversed(self._quarantine.values())}
        texts = [f"{n} {reason} (first {first[reason]})" for reason, n in counts.most_common()]
        return ", ".join(texts) or "no row left out"

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any edit of the rows, since order and cursor mean nothing for others."""
        digest = hashlib.blake2b(digest_size=8)
        for row in self.rows:
            digest.update(json.dumps([row.uid, row.columns]).encode())
        return f"{len(self.rows)}-{digest.hexdigest()}"

    def state_dict(self) -> list[dict[str, str]]:
        """The quarantine, so that a resumed run leaves out and counts the same rows.

        Rows whose embeddings are not stored are no part of it: they may be when it resumes.
        """
        kept = [entry for entry in self._quarantine.values() if entry.reason != "not_encoded"]
        return [dataclasses.asdict(entry) for entry in kept]

    def load_state_dict(self, state: Sequence[Mapping[str, str]]) -> None:
        """Adds a quarantine to the rows that were left out at the start."""
        self._quarantine |= {entry["uid"]: QuarantinedRow(**entry) for entry in state}

    def _report(self, entry: QuarantinedRow) -> None:
        n = sum(other.reason == entry.reason for other in self._quarantine.values())
        if n <= _REPORTED_PER_REASON:
            logger.warning(
                "left out %s: %s: %s %s", entry.where, entry.reason, entry.detail, entry.path
            )
        if n == _REPORTED_PER_REASON:
            logger.warning("further rows left out as %s are only counted", entry.reason)


class PromptDataset(RowDataset[Sample]):
    """Questions for generation: rollouts, validation and evaluation."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Any,
        fmt: PromptFormat,
        *,
        files: Sequence[str] | None = None,
    ) -> None:
        """`files` defaults to `data.train_files`. Raises DataError.

        Rows whose gold answer is none of their options are rejected here, before anything is
        generated: such a row would score 0 whatever the model says.
        """
        super().__init__(
            config, config.train_files if files is None else files, question_and_answer
        )
        for row in self.rows:
            try:
                check_gold_answer(row)
            except BadSample as bad:
                self.reject(bad)
        self._prompts = PromptBuilder(config, tokenizer, fmt)
        self._media = MediaProbe(config, fmt.vision)

    def sample(self, index: int) -> Sample:
        row = self.rows[index]
        prompt = self._prompts.build(row)
        media = self._media.items(row, prompt.slots)
        ids = self._prompts.expand(row, self._prompts.tokenise(prompt.text), media)
        check_length(row, "prompt", len(ids), self._data.max_prompt_length, media)
        return Sample(
            uid=row.uid,
            prompt_ids=ids,
            media=media,
            question=row.problem,
            answer=row.answer,
            problem_type=row.problem_type,
            options=row.options,
            extra=row.extra,
            prompt_text=prompt.text,
        )


def check_gold_answer(row: Row) -> None:
    """Raises BadSample for a multiple-choice row whose gold answer is none of its options.

    Options that only stand in the question count when the gold answer is a letter: other questions
    may just look as if they had some.
    """
    letters = option_letters(row.options, row.problem)
    if gold_option(row.answer, letters) or not (letters or row.options):
        return
    if not row.options and not _LETTER.fullmatch(row.answer):
        return
    if not letters and any(same_text(row.answer, option) for option in row.options):
        return  # more options than letters
    offered = "; ".join(f"{k}. {text}" if text else k for k, text in letters.items())
    detail = (
        f"the answer {row.answer[:200]!r} is none of the options ({offered or len(row.options)}); "
        "write the letter or the words of one option, or leave the options of an open question "
        "empty (data.options_key)"
    )
    raise BadSample("answer_not_offered", row, detail)


class MediaProbe:
    """Measures the media of rows from metadata; a file that several rows name alike, once.

    What was measured of a video is kept in `data.cache_dir` for later runs, which then know it
    without its file.
    """

    def __init__(
        self, data: DataConfig, vision: VisionSpec | None, *, keep_images: bool = False
    ) -> None:
        """`keep_images`: later runs know images, too, without their files."""
        self._data = data
        self._keep_images = keep_images
        self._sampling = frame_sampling(data)
        self._inline = InlineImages(data)
        # A text-only model needs no rules: PromptBuilder refuses its rows with media.
        self._rules: dict[MediaKind, ResizeRule] = {}
        if vision is not None:
            self._rules = {
                "image": vision.resize_rule("image", data.min_pixels, data.max_pixels),
                "video": vision.resize_rule("video", data.video_min_pixels, data.video_max_pixels),
            }
        self._reading = Reading.from_config(data)
        self._index = MediaIndex(index_dir(data.cache_dir))
        self._kept: OrderedDict[tuple[MediaKind, str, str, Segment], MediaItem] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def sees(self) -> bool:
        """Whether the model takes media at all."""
        return bool(self._rules)

    def items(self, row: Row, slots: Sequence[MediaSlot]) -> tuple[MediaItem, ...]:
        """Geometry and token counts, one for each slot. Raises BadSample."""
        return tuple(self._item(row, slot) for slot in slots)

    def _item(self, row: Row, slot: MediaSlot) -> MediaItem:
        try:
            return self.measure(row, slot)
        except BadMedia as error:
            raise bad_media(row, error, slot.kind) from error

    def measure(self, row: Row, slot: MediaSlot) -> MediaItem:
        """Geometry and token count of one piece of media. Raises BadMedia."""
        path = self.locate(row, slot)
        if slot.kind == "image" and self._inline.path_of(slot.path):
            # Every run writes it anew, with its row: it needs no entry.
            return self._kept_or(slot, path, path, lambda: self._measure("image", path, None))
        # Not normalised: behind a link `..` leads elsewhere than the name says.
        name = os.path.join(os.path.abspath(self.root_of(row, slot.kind)), slot.path)
        return self._kept_or(slot, path, name, lambda: self._indexed(slot, path, name))

    def locate(self, row: Row, slot: MediaSlot) -> str:
        """Absolute path of the file that a row names, whether or not it is there.

        Raises BadMedia for addresses and for what lies outside of the media folder.
        """
        return self._inline.path_of(slot.path) or contained_path(
            slot.path, self.root_of(row, slot.kind), self._data.allow_outside_media_dir
        )

    def root_of(self, row: Row, kind: MediaKind) -> str | os.PathLike[str]:
        """The folder that relative paths start from, and stay in."""
        return (self._data.video_dir if kind == "video" else self._data.image_dir) or row.folder

    def _kept_or(
        self, slot: MediaSlot, path: str, name: str, find: Callable[[], MediaItem]
    ) -> MediaItem:
        key = (slot.kind, path, name, slot.segment)
        with self._lock:
            if (known := self._kept.get(key)) is not None:
                return known
        item = find()
        with self._lock:
            self._kept[key] = item
            if len(self._kept) > _PROBES_KEPT:
                self._kept.popitem(last=False)
        return item

    def _indexed(self, slot: MediaSlot, path: str, name: str) -> MediaItem:
        is_video = slot.kind == "video"
        sampling = self._sampling_of(slot.segment, path) if is_video else None
        look = MediaLook(
            kind=slot.kind,
            path=path,
            name=name,
            sampling=sampling,
            resize=self._rules[slot.kind],
            decoder=self._data.video_decoder,
            reading=self._reading,
        )
        return self._index.item(
            look,
            lambda: self._measure(slot.kind, path, sampling),
            remember=is_video or self._keep_images,
        )

    def _measure(self, kind: MediaKind, path: str, sampling: FrameSampling | None) -> MediaItem:
        decoder, reading = self._data.video_decoder, self._reading
        return make_media_item(path, kind, sampling, self._rules[kind], decoder, reading)

    def _sampling_of(self, segment: Segment, path: str) -> FrameSampling:
        start_s, end_s = segment
        try:
            return dataclasses.replace(self._sampling, start_s=start_s or 0.0, end_s=end_s)
        except ValueError as error:
            raise BadMedia("bad_segment", path, str(error)) from None


def frame_sampling(data: DataConfig) -> FrameSampling:
    """Which frames the configuration asks for; `data.fps` wins over `data.num_video_frames`."""
    if data.fps is None:
        return FrameSampling(num_frames=data.num_video_frames)
    most = data.max_video_frames
    return FrameSampling(fps=data.fps, max_frames=most, min_frames=min(4, most))


def bad_media(row: Row, error: BadMedia, kind: MediaKind | None = None) -> BadSample:
    """The row that cannot be used because of a file; `kind` is what the row takes it for."""
    remedy = REMEDIES[error.reason]
    if kind is not None and error.reason == "missing":
        remedy = f"check data.{kind}_dir and the path in the row"
    detail = f"{error.detail}; {remedy}"
    return BadSample(error.reason, row, detail, error.path)


def check_length(
    row: Row, what: str, n_tokens: int, limit: int, media: Sequence[MediaItem]
) -> None:
    """Raises BadSample when a `prompt` or `response` is longer than its limit; it is never cut."""
    if n_tokens <= limit:
        return
    n_visual = sum(item.n_tokens for item in media)
    visual = f", {n_visual} of them visual" if n_visual else ""
    detail = f"{n_tokens} tokens{visual}; data.max_{what}_length={limit}"
    raise BadSample(f"{what}_too_long", row, detail)
