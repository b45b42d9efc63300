"""Rows of a data set: columns of any name become one checked type, once, at the start."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.data.segments import Segment, read_segments, split_segments
from verl.data.sources import DataError, LocatedRow, read_source
from verl.utils.answers import option_letters
from verl.utils.exits import Explained

if TYPE_CHECKING:
    from verl.config.data import DataConfig

logger = logging.getLogger(__name__)

_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL | re.IGNORECASE)
_LETTER = re.compile(r"[A-Z]")
_ANSWER_TAG = re.compile(r"</?answer>", re.IGNORECASE)


class BadSample(Explained, ValueError):
    """One row that cannot be used. `reason` is a short fixed name that summaries count by."""

    def __init__(self, reason: str, row: Row, detail: str, path: str = "") -> None:
        super().__init__(f"{row.where}: {reason}: {detail}" + (f" [{path}]" if path else ""))
        self.reason, self.row, self.detail, self.path = reason, row, detail, path


@dataclass(frozen=True, kw_only=True)
class RowKeys:
    """Names of the columns that mean something; `SETTINGS` names the config key of each."""

    problem: str = "problem"
    answer: str = "answer"
    problem_type: str = "problem_type"
    reasoning: str = "reasoning"
    options: str = "options"
    images: str = "images"
    videos: str = "videos"
    video_start: str = "video_start"
    video_end: str = "video_end"

    @classmethod
    def from_config(cls, data: DataConfig) -> RowKeys:
        return cls(
            problem=data.prompt_key,
            answer=data.answer_key,
            problem_type=data.problem_type_key,
            reasoning=data.reasoning_key,
            options=data.options_key,
            images=data.image_key,
            videos=data.video_key,
            video_start=data.video_start_key,
            video_end=data.video_end_key,
        )


SETTINGS = {
    "problem": "data.prompt_key",
    "answer": "data.answer_key",
    "problem_type": "data.problem_type_key",
    "reasoning": "data.reasoning_key",
    "options": "data.options_key",
    "images": "data.image_key",
    "videos": "data.video_key",
    "video_start": "data.video_start_key",
    "video_end": "data.video_end_key",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checked row; texts are stripped, absent texts are empty."""

    uid: str
    """Stable: hash of the source's name, then the row number. It survives reordering and resume."""
    where: str
    """Place to look at when something is wrong: `train.jsonl:381`."""
    folder: Path
    """Folder of the data file; relative media paths start here unless configured otherwise."""
    problem: str
    answer: str
    """Gold answer without `<answer>` tags."""
    problem_type: str
    reasoning: str
    options: tuple[str, ...]
    images: tuple[str, ...]
    videos: tuple[str, ...]
    extra: dict[str, Any]
    """Every column that no key names, in values that JSON can hold."""
    columns: dict[str, Any] = field(repr=False)
    """All columns under their own names, for templates."""
    segments: tuple[Segment, ...] = ()
    """One for each of `videos`; empty when the row looks at whole videos."""


def question_and_answer(columns: Mapping[str, Any]) -> Sequence[str]:
    """The fields that a row of a reinforcement-learning or evaluation set must have."""
    return ("problem", "answer")


def read_rows(
    sources: Sequence[str],
    keys: RowKeys,
    required: Callable[[Mapping[str, Any]], Sequence[str]] = question_and_answer,
    keep_image: Callable[[bytes], str] | None = None,
) -> list[Row]:
    """All rows of all sources in order, with unique ids.

    `required` returns the fields (`problem`, `answer`, `reasoning`) that a row must have;
    `keep_image` takes the bytes of an image and returns the path that stands for it in the row.
    Raises DataError for unreadable, empty or inconsistent sources.
    """
    rows: list[Row] = []
    for source, name in zip(sources, _distinct_names(sources), strict=True):
        folder, located = read_source(source)
        if not located:
            raise DataError(f"{source}: holds no rows")
        _check_required(source, located, keys, required)
        _warn_of_unread_media(source, located, keys)
        digest = hashlib.blake2b(name.encode(), digest_size=5).hexdigest()
        rows.extend(
            _make_row(f"{digest}-{number:06d}", where, folder, columns, keys, keep_image)
            for number, (where, columns) in enumerate(located)
        )
    if len({row.uid for row in rows}) != len(rows):
        raise DataError(f"{list(sources)}: two sources hash to the same id; rename one of them")
    return rows


def strip_answer_tags(text: str) -> str:
    """The content of the last innermost `<answer>...</answer>`, or the whole text, stripped.

    Tags may stand on several lines, be nested or have other text around them.
    """
    spans = [span.strip() for span in _ANSWER.findall(text)]
    filled = [span for span in spans if span]
    return filled[-1] if filled else _ANSWER_TAG.sub(" ", text).strip()


# --- from columns to a row ---------------------------------------------------------------------


def _make_row(
    uid: str,
    where: str,
    folder: Path,
    raw: Mapping[str, Any],
    keys: RowKeys,
    keep_image: Callable[[bytes], str] | None,
) -> Row:
    columns: dict[str, Any] = {}
    for key, value in raw.items():
        if key == keys.videos:
            value, bounds = split_segments(value)
            columns[key] = _paths(value, where, key, None)
            for name, seconds in bounds.items():
                own = getattr(keys, name)
                if raw.get(own) is not None:
                    raise DataError(
                        f"{where}: {name!r} stands in the column {key!r} and in the column {own!r};"
                        " keep one of the two"
                    )
                columns[own] = seconds
        elif key == keys.images:
            columns[key] = _paths(value, where, key, keep_image)
        elif key not in columns and not isinstance(value, bytes | bytearray):
            columns[key] = _plain(value, where, key)
    for name in ("problem", "answer", "reasoning", "problem_type"):
        value = columns.get(getattr(keys, name))
        if isinstance(value, list | dict):
            raise DataError(
                f"{where}: column {getattr(keys, name)!r} holds a {type(value).__name__} instead "
                f"of a text or number; set {SETTINGS[name]} to another column"
            )
    known = vars(keys).values()
    videos = columns.get(keys.videos, ())
    return Row(
        uid=uid,
        where=where,
        folder=folder,
        problem=_text(columns.get(keys.problem)),
        answer=strip_answer_tags(_text(columns.get(keys.answer))),
        problem_type=_text(columns.get(keys.problem_type)),
        reasoning=_text(columns.get(keys.reasoning)),
        options=_options(columns.get(keys.options), where, keys.options),
        images=columns.get(keys.images, ()),
        videos=videos,
        segments=read_segments(columns, (keys.video_start, keys.video_end), len(videos), where),
        extra={key: value for key, value in columns.items() if key not in known},
        columns=columns,
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _options(value: Any, where: str, column: str) -> tuple[str, ...]:
    """Options as texts: a list, lines of one text, or a mapping from letter to text.

    Raises DataError for a mapping whose letters would not be the letters of its options.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(line.strip() for line in value.splitlines() if line.strip())
    if isinstance(value, dict):
        filled = {key: text for key, text in value.items() if text is not None}
        options = tuple(f"{key}. {text}" for key, text in filled.items())
        letters = {key.strip().upper() for key in filled}
        if all(map(_LETTER.fullmatch, letters)) and letters != option_letters(options).keys():
            raise DataError(
                f"{where}: column {column!r} names its options {', '.join(filled)}; name them in "
                "order from A, each once, with few left out"
            )
        return options
    return tuple(_text(option) for option in value) if isinstance(value, list) else (_text(value),)


def _paths(
    value: Any, where: str, column: str, keep: Callable[[bytes], str] | None
) -> tuple[str, ...]:
    """Media paths of a column: a path, bytes, `{"bytes": ..., "path": ...}`, a list, or absent.

    Bytes win over a path beside them, which mostly is a name without a file.
    """
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(path for part in value for path in _paths(part, where, column, keep))
    if isinstance(value, dict):
        content = value.get("bytes")
        value = value.get("path") if content is None else content
    if isinstance(value, str) and value.strip():
        return (value.strip(),)
    if isinstance(value, bytes) and value and keep:
        return (keep(value),)
    held = "an empty text" if isinstance(value, str) else f"{type(value).__name__} data"
    raise DataError(
        f"{where}: column {column!r} holds {held} instead of a file path; save media as files and "
        "give their paths, or leave the column out of rows without media"
    )


def _plain(value: Any, where: str, column: str) -> Any:
    """The value in JSON's types. Raises DataError for NaN and infinity."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        raise DataError(
            f"{where}: column {column!r} is {value}, which is no number; write null or a number"
        )
    if isinstance(value, dict):
        return {str(k): _plain(v, where, f"{column}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, where, column) for part in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    if isinstance(value, bytes | bytearray):
        return f"<{len(value)} bytes>"
    raise DataError(f"{where}: column {column!r} holds a {type(value).__name__}, not JSON data")


# --- checks over a whole source ----------------------------------------------------------------


def _check_required(
    source: str,
    located: Sequence[LocatedRow],
    keys: RowKeys,
    required: Callable[[Mapping[str, Any]], Sequence[str]],
) -> None:
    missing: dict[str, list[str]] = {}
    for where, columns in located:
        for name in required(columns):
            text = _text(columns.get(getattr(keys, name)))
            if not (strip_answer_tags(text) if name == "answer" else text):
                missing.setdefault(name, []).append(where)
    for name, places in missing.items():
        key, setting = getattr(keys, name), SETTINGS[name]
        present = sorted({column for _, columns in located for column in columns})
        near = get_close_matches(key, [c for c in present if c != key], n=1)
        hint = f"set {setting}={near[0]}" if near else f"set {setting} to the right column"
        raise DataError(
            f"{source}: {len(places)} of {len(located)} rows have no {key!r} ({setting}={key}), "
            f"first {', '.join(places[:3])}. Columns: {', '.join(present)}. Fill in these rows "
            f"or {hint}."
        )


def _warn_of_unread_media(source: str, located: Sequence[LocatedRow], keys: RowKeys) -> None:
    """Says when rows are read as text although a column looks like media, or holds raw bytes."""
    present = {column for _, columns in located for column in columns}
    for name, kind in (("images", "image"), ("videos", "video")):
        key = getattr(keys, name)
        similar = present & {kind, f"{kind}s", f"{kind}_path", f"{kind}_paths", f"{kind}_file"}
        if key not in present and similar:
            logger.warning(
                "%s: no column %r, so rows are read without %ss; to use column %r set %s=%s",
                *(source, key, kind, min(similar), SETTINGS[name], min(similar)),
            )
    raw = {c for _, row in located for c, v in row.items() if isinstance(v, bytes)}
    if raw := sorted(raw - {keys.images, keys.videos}):
        logger.warning("%s: columns of raw bytes are left out: %s", source, ", ".join(raw))


def _distinct_names(sources: Sequence[str]) -> list[str]:
    """The shortest trailing part of each source that tells them apart.

    Ids made from it do not change when a data folder is moved. A source given twice is an error:
    its rows would have the same ids.
    """
    parts = [Path(source).parts for source in sources]
    for i, source in enumerate(sources):
        if parts[i] in parts[:i]:
            raise DataError(f"{source}: given twice; name each file once")
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]
