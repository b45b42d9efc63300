"""From a row to a prompt: template, system turn, media placeholders, chat template, token ids.

The same path serves text, images and video. A prompt is never cut: what is too long is refused by
`verl.data.dataset`, so no visual span is ever truncated.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jinja2
import jinja2.meta
import jinja2.sandbox

from verl.data.rows import BadSample, Row, Segment
from verl.data.sources import DataError

if TYPE_CHECKING:
    from verl.config import DataConfig
    from verl.data.media import MediaItem
    from verl.data.preprocess import MediaKind, VisionSpec

Message = dict[str, str]
"""One turn of a chat: `role` and `content`, media standing in the content as placeholder text."""

_MARKER = re.compile(r"<(image|video)>")


class PromptFormat(Protocol):
    """What the data layer asks of a model family; model adapters satisfy it."""

    @property
    def vision(self) -> VisionSpec | None:
        """Pixel preprocessing; None for a text-only model."""
        ...

    @property
    def image_token(self) -> str:
        """Text that stands for one image in a prompt, holding exactly one pad token."""
        ...

    @property
    def video_token(self) -> str:
        """Text that stands for one video in a prompt, holding exactly one pad token."""
        ...

    def expand(self, ids: Sequence[int], media: Sequence[MediaItem]) -> list[int]:
        """Repeats each single pad token as often as its piece of media has tokens, in order."""
        ...


@dataclass(frozen=True)
class MediaSlot:
    """One piece of media that a prompt asks for, as the row names it."""

    kind: MediaKind
    path: str
    segment: Segment = (None, None)
    """Start and end in seconds of the part of a video that is looked at; None: not said."""


class PromptTemplate:
    """A Jinja template that turns a row into the text of the user turn.

    It sees `content` and `problem` (the question), `options` (a list) and every column under its
    own name. An unknown name is an error, and the template runs in Jinja's sandbox.
    """

    def __init__(self, text: str, name: str) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
        self._name = name
        try:
            self._names = jinja2.meta.find_undeclared_variables(environment.parse(text))
            self._template = environment.from_string(text.strip())
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"data.format_prompt={name}:{error.lineno}: bad template: {error.message}"
            ) from error

    @classmethod
    def from_file(cls, path: str, prompt_key: str) -> PromptTemplate:
        """Raises DataError for a missing file and for a template that leaves the question out."""
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.format_prompt={path}: cannot be read: {error}") from error
        template = cls(text, path)
        if not template._names & {"content", "problem", prompt_key}:
            raise DataError(
                f"data.format_prompt={path}: the template never shows the question; "
                "write {{ content }} where it belongs"
            )
        return template

    def render(self, row: Row) -> str:
        """The user turn, markers such as `<video>` still in it."""
        context = {
            **row.columns,
            "problem": row.problem,
            "content": row.problem,
            "options": list(row.options),
        }
        try:
            return self._template.render(context)
        except jinja2.UndefinedError as error:
            raise DataError(
                f"data.format_prompt={self._name}: {error.message} in {row.where}; names there: "
                f"{', '.join(sorted(context))}"
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise DataError(
                f"data.format_prompt={self._name}: {type(error).__name__} in {row.where}: {error}"
            ) from error


@dataclass(frozen=True)
class Prompt:
    """A prompt as text, with the media it asks for in the order of their placeholders."""

    text: str
    slots: tuple[MediaSlot, ...]


class PromptBuilder:
    """Builds prompts from rows, the way one configuration and one tokenizer say."""

    def __init__(self, data: DataConfig, tokenizer: Any, fmt: PromptFormat) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "worker.actor.model.tokenizer_path: the tokenizer has no chat template; use an "
                "instruction-tuned model's tokenizer, or save one with a chat_template"
            )
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # Fast tokenizers raise "Already borrowed" across threads.
        self._fmt = fmt
        self._system = data.system_prompt
        self._template = (
            PromptTemplate.from_file(data.format_prompt, data.prompt_key)
            if data.format_prompt is not None
            else None
        )
        self._reserved = self._reserved_texts()

    def build(self, row: Row) -> Prompt:
        """The text that generation starts from. Raises BadSample."""
        turns, slots = self.place_media(row, [{"role": "user", "content": self.user_text(row)}])
        return Prompt(self.chat(self.with_system(turns), add_generation_prompt=True), slots)

    def user_text(self, row: Row) -> str:
        """The question in its template, markers still in it."""
        return self._template.render(row) if self._template else row.problem

    def with_system(self, turns: list[Message]) -> list[Message]:
        """The turns after `data.system_prompt`, unless they bring a system turn themselves."""
        if self._system is None or turns[0]["role"] == "system":
            return turns
        return [{"role": "system", "content": self._system}, *turns]

    def place_media(
        self, row: Row, turns: Sequence[Message]
    ) -> tuple[list[Message], tuple[MediaSlot, ...]]:
        """Puts placeholders where turns say `<image>` or `<video>`, or before the first user turn.

        Kinds without a marker go in front, images before videos; assistant turns hold no media.
        Raises BadSample when markers and media differ in number, or when a turn holds text that
        the tokenizer would read as a control or visual token.
        """
        for turn in turns:
            self._refuse_reserved(row, turn["content"])
        paths = {"image": list(row.images), "video": list(row.videos)}
        if self._fmt.vision is None and any(paths.values()):
            raise DataError(
                f"{row.where}: has media but the model has no vision tower; use a "
                "vision-language model or drop the column"
            )
        placed = [dict(turn) for turn in turns]
        asking = [turn for turn in placed if turn["role"] != "assistant"]
        for kind in ("video", "image"):  # In this order, since each goes in front of the other.
            n_markers = sum(turn["content"].count(f"<{kind}>") for turn in asking)
            if n_markers == 0:
                first = next(turn for turn in asking if turn["role"] == "user")
                first["content"] = f"<{kind}>" * len(paths[kind]) + first["content"]
            elif n_markers != len(paths[kind]):
                raise BadSample(
                    "marker_mismatch",
                    row,
                    f"{n_markers} <{kind}> markers but {len(paths[kind])} {kind}s; write one "
                    "marker for each, or none to put all media before the question",
                )
        slots: list[MediaSlot] = []
        segments = list(row.segments)

        def fill(match: re.Match[str]) -> str:
            kind: MediaKind = "image" if match[1] == "image" else "video"
            segment = segments.pop(0) if kind == "video" and segments else (None, None)
            slots.append(MediaSlot(kind, paths[kind].pop(0), segment))
            return self._fmt.image_token if kind == "image" else self._fmt.video_token

        for turn in asking:
            turn["content"] = _MARKER.sub(fill, turn["content"])
        return placed, tuple(slots)

    def chat(self, turns: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The turns as one text, by the tokenizer's chat template."""
        try:
            return self._tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            roles = [turn["role"] for turn in turns]
            raise DataError(f"the chat template refuses the turns {roles}: {error}") from error

    def tokenise(self, text: str) -> list[int]:
        """Token ids of a text that holds its control tokens already."""
        with self._lock:
            return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def expand(self, row: Row, ids: Sequence[int], media: Sequence[MediaItem]) -> list[int]:
        """Token ids with each placeholder as long as its media."""
        try:
            return self._fmt.expand(ids, media)
        except ValueError as error:
            error.add_note(f"while expanding the media of {row.where}")
            raise

    def count_placeholders(self, text: str) -> int:
        """Pieces of media that a text with placeholders holds."""
        return sum(text.count(token) for token in (self._fmt.image_token, self._fmt.video_token))

    def _reserved_texts(self) -> tuple[str, ...]:
        """Texts that the tokenizer turns into control tokens, and those that stand for media."""
        placeholders = (
            [self._fmt.image_token, self._fmt.video_token] if self._fmt.vision is not None else []
        )
        added = set(self._tokenizer.get_added_vocab())
        pieces = {t for text in placeholders for t in self._tokenizer.tokenize(text) if t in added}
        texts = pieces | set(placeholders) | set(self._tokenizer.all_special_tokens)
        return tuple(sorted(text for text in texts if text))

    def _refuse_reserved(self, row: Row, text: str) -> None:
        for reserved in self._reserved:
            if reserved in text:
                raise BadSample(
                    "reserved_text",
                    row,
                    f"holds {reserved!r}, which the model reads as a control or visual token; "
                    "write <image> or <video> where media belong and remove it elsewhere",
                )
