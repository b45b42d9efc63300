"""What the quickstart's base model is taught, as endless batches from a seed.

Two lessons, never together. A clip, as a video file shows it, and its description: which shapes
appear, in order. A description given as text, and a question about it. What belongs to the other
lesson may stand beside and is to be ignored: prompts of clips may hold a question, and prompts of
descriptions a clip of another story, so that neither skill depends on what else is there.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from make_tokenizer import DESCRIBE, chat
from torch import Tensor
from torch.utils.data import Dataset

from verl.data.synthetic import (
    BACKGROUND,
    COUNTS,
    LETTERS,
    QUESTIONS,
    SIDE,
    chain,
    describe,
    make_story,
    options_of,
    render,
    write_video,
)
from verl.models.positions import VisualSpan, mrope_positions
from verl.sequence_parallel.packing import Group, PackedRow, pack

# Share of the steps, frames of a clip, number of events in it.
CURRICULUM = (
    (0.12, 8, (1, 2)),
    (0.15, 16, (1, 2, 3, 4)),
    (0.23, 32, (2, 3, 4, 5, 6)),
    (0.50, 64, (3, 4, 5, 6)),
)
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
EMPTY = 0.04
"""Share of clips and descriptions without any event; asked about them, one can only guess."""
BESIDE = 0.5
"""Share of readings that have a clip of another story beside."""
GRID_SIDE = SIDE // 14


@dataclass(frozen=True)
class Row:
    """One sequence, its visual placeholder expanded, and how many tokens at its end are learnt."""

    ids: list[int]
    n_learnt: int
    frames: Tensor | None = None
    """(F, 3, SIDE, SIDE) uint8."""

    def group(self, video_id: int) -> Group:
        """The row as the model takes it."""
        ids = torch.tensor(self.ids)
        spans = []
        if self.frames is not None:
            spans = [VisualSpan((len(self.frames) // 2, GRID_SIDE, GRID_SIDE), 1.0)]
        positions = mrope_positions(ids == video_id, spans, merge_size=2, tokens_per_second=1)
        mask = torch.arange(len(ids)) >= len(ids) - self.n_learnt
        return Group(ids, positions, prompt_loss_mask=mask)


@dataclass(frozen=True)
class Batch:
    """The packed rows of one step with the frames of all clips, one clip after another."""

    row: PackedRow
    frames: Tensor
    lengths: list[int]
    """Frames of each clip."""


class Lessons(Dataset[Batch]):
    """The batch of every step; `steps` sets the pace of the curriculum."""

    def __init__(
        self, tokenizer: Any, video_id: int, *, seed: int, steps: int, clips: int, readings: int
    ) -> None:
        self._tokenizer = tokenizer
        self._video_id = video_id
        self._seed = seed
        self._steps = steps
        self._sizes = (clips, readings)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        torch.set_num_threads(1)
        clips, readings = self._sizes
        n_frames, counts = self.stage(step)
        rows = [self.clip(f"{step}/{i}", n_frames, counts) for i in range(clips)]
        rows += [self.reading(f"{step}/{i}", n_frames, counts) for i in range(readings)]
        films = [row.frames for row in rows if row.frames is not None]
        packed = pack([row.group(self._video_id) for row in rows])
        return Batch(packed, torch.cat(films), [len(film) for film in films])

    def stage(self, step: int) -> tuple[int, tuple[int, ...]]:
        """Frames of a clip and numbers of events at a step."""
        done = step / self._steps
        for share, n_frames, counts in CURRICULUM:
            if done < share:
                return n_frames, counts
            done -= share
        return CURRICULUM[-1][1:]

    def clip(
        self, name: str, n_frames: int, counts: Sequence[int], *, distract: bool | None = None
    ) -> Row:
        """A clip and its description; `distract` decides whether the prompt holds a question."""
        rng = random.Random(f"{self._seed}/clip/{name}")
        events = [] if rng.random() < EMPTY else make_story(rng, n_frames, counts)
        if events or rng.random() < 0.5:
            frames = as_tensor(filmed(render(events, n_frames)))
        else:
            frames = blank(n_frames)
        question = self._question(rng)
        texts = [f"{question} {DESCRIBE}", f"{DESCRIBE} {question}"]
        others = rng.random() < 0.67 if distract is None else distract
        text = rng.choice(texts) if others else DESCRIBE
        answer = self._answer(" ".join(filter(None, ["<think>", describe(events), "</think>"])))
        return Row(self._prompt(text, n_frames) + answer, len(answer), frames)

    def reading(
        self, name: str, n_frames: int, counts: Sequence[int], *, beside: bool | None = None
    ) -> Row:
        """A question and a description; what follows the description is learnt.

        `beside` decides whether a clip of another story stands in the prompt.
        """
        rng = random.Random(f"{self._seed}/reading/{name}")
        events = make_story(rng, 64, (2, *COUNTS))
        kind = rng.choice([k for k in QUESTIONS if k != "count" or len(events) in COUNTS])
        options = options_of(kind, events, rng.choice(LETTERS), rng)
        text = chain(kind, events, options)[0]
        given, learnt = text[: text.index(" so ")], text[text.index(" so ") :]
        if rng.random() < EMPTY:
            guess = rng.choice(options)
            letter, value = guess[0], guess[2:]
            given = "<think>"
            learnt = f" so {value} {letter} </think> <answer> {letter} </answer>"
        frames = None
        if (rng.random() < BESIDE) if beside is None else beside:
            frames = as_tensor(filmed(render(make_story(rng, n_frames, counts), n_frames)))
        question = f"{QUESTIONS[kind]} {' '.join(options)}"
        prompt = self._prompt(question, None if frames is None else n_frames)
        answer = self._answer(learnt)
        return Row(prompt + self._ids(given) + answer, len(answer), frames)

    def _prompt(self, text: str, n_frames: int | None) -> list[int]:
        """A user's turn; with a clip of `n_frames` before the text, its placeholder expanded."""
        ids = self._ids(chat(self._tokenizer, f"{VIDEO if n_frames else ''}{text}"))
        if n_frames is None:
            return ids
        at = ids.index(self._video_id)
        visual = [self._video_id] * (n_frames // 2 * (GRID_SIDE // 2) ** 2)
        return ids[:at] + visual + ids[at + 1 :]

    def _question(self, rng: random.Random) -> str:
        """A question with options about some other video."""
        kind, events = rng.choice(list(QUESTIONS)), make_story(rng, 64)
        options = options_of(kind, events, rng.choice(LETTERS), rng)
        return f"{QUESTIONS[kind]} {' '.join(options)}"

    def _answer(self, text: str) -> list[int]:
        return [*self._ids(text), self._tokenizer.eos_token_id]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def filmed(frames: np.ndarray) -> np.ndarray:
    """Frames as they come out of a video file, (F, H, W, 3) uint8.

    A codec moves colours by a few levels; a model that saw exact ones only reads nothing in files.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, frames)
        with av.open(str(path)) as container:
            to_rgb = VideoReformatter()
            films = [
                to_rgb.reformat(f, format="rgb24", threads=1) for f in container.decode(video=0)
            ]
            return np.stack([film.to_ndarray() for film in films])


def as_tensor(frames: np.ndarray) -> Tensor:
    """(F, H, W, 3) as (F, 3, H, W)."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()


def blank(n_frames: int) -> Tensor:
    """Frames of nothing at all, without the border."""
    frames = np.empty((n_frames, SIDE, SIDE, 3), np.uint8)
    frames[:] = BACKGROUND
    return as_tensor(frames)


def clips_for_test(lessons: Lessons, n: int, stage: tuple[int, tuple[int, ...]]) -> list[Row]:
    """Held-out clips; every second prompt holds a question as well."""
    return [lessons.clip(f"test/{i}", *stage, distract=i % 2 == 1) for i in range(n)]
