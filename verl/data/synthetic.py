"""Long-video question answering made from nothing: `python3 -m verl.data.synthetic --out DIR`.

A video is a still background on which coloured shapes appear one after another, each for a moment,
spread over its whole length. Questions ask which came first or last, how many there were and where
the last one was; no single moment answers them. Files follow LongVideo-Reason's keys.

Chains of thought for fine-tuning are written by an annotator who does not always watch to the end,
or from the start: `--annotator-errors` says how often, by kind of question. Such chains are
consistent and wrong, as generated reasoning often is; answers for RL are always right. One video in
twelve of the fine-tuning rows shows nothing, and its chains name no event and end in a guess: a
model that never saw that answers an empty film with anything at all.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from verl.utils.progress import progress

logger = logging.getLogger(__name__)

SIDE = 56
"""Pixels of a frame's side; a quadrant is one visual token of Qwen2.5-VL (2 x 2 patches of 14)."""
FPS = 2
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 220, 50),
    "purple": (160, 50, 200),
    "white": (245, 245, 245),
    "black": (10, 10, 10),
}
SHAPES = ("circle", "square", "cross")
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
LETTERS = "ABCD"
COUNTS = (3, 4, 5, 6)
# Near the mean of the training images, so that an empty frame is near zero once normalised.
BACKGROUND = (123, 117, 104)
BORDER = (70, 66, 60)
QUESTIONS = {
    "first": "which color came first ?",
    "last": "which color came last ?",
    "count": "how many shapes appeared ?",
    "where": "where was the last shape ?",
}
EMPTY_EVERY = 12
"""Of how many videos for fine-tuning one shows nothing."""
ANNOTATOR_ERRORS = dict.fromkeys(QUESTIONS, 0.7)


@dataclass(frozen=True)
class Event:
    """A shape that is there from frame `start` up to frame `end`, exclusive."""

    start: int
    end: int
    colour: str
    shape: str
    place: str

    def words(self) -> str:
        """The event as a chain of thought names it."""
        return f"{self.colour} {self.shape} {self.place}"


def make_story(rng: random.Random, n_frames: int, counts: Sequence[int] = COUNTS) -> list[Event]:
    """Events of one video, each somewhere in its own equal share of the frames.

    Colours differ within a video, so that a colour names an event. Events begin and end on even
    frames, where temporal patches of two frames do.
    """
    count = rng.choice(counts)
    colours = rng.sample(list(COLOURS), count)
    events = []
    for i, colour in enumerate(colours):
        low, high = i * n_frames // count, (i + 1) * n_frames // count
        length = min(rng.choice((2, 4)), (high - low) // 2 * 2)
        first, last = (low + 1) // 2, (high - length) // 2
        start = 2 * rng.randint(first, max(first, last))
        events.append(Event(start, start + length, colour, rng.choice(SHAPES), rng.choice(PLACES)))
    return events


def render(events: Sequence[Event], n_frames: int) -> np.ndarray:
    """Frames of a story, (n_frames, SIDE, SIDE, 3) uint8."""
    frame = np.empty((SIDE, SIDE, 3), np.uint8)
    frame[:] = BORDER
    frame[2:-2, 2:-2] = BACKGROUND
    frames = np.repeat(frame[None], n_frames, axis=0)
    for event in events:
        y, x = divmod(PLACES.index(event.place), 2)
        half = SIDE // 2
        corner = frames[
            event.start : event.end, y * half : (y + 1) * half, x * half : (x + 1) * half
        ]
        corner[:, _mask(event.shape, half)] = COLOURS[event.colour]
    return frames


def _mask(shape: str, side: int) -> np.ndarray:
    """Pixels of a shape within a square of `side`, bool."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    radius = side * 0.36
    if shape == "circle":
        return x**2 + y**2 <= radius**2
    inside = np.maximum(abs(x), abs(y)) <= radius
    if shape == "square":
        return inside
    return inside & (np.minimum(abs(x), abs(y)) <= radius * 0.4)


def answer_of(kind: str, events: Sequence[Event]) -> str:
    """What a watcher who saw exactly these events answers."""
    return {
        "first": events[0].colour,
        "last": events[-1].colour,
        "count": str(len(events)),
        "where": events[-1].place,
    }[kind]


def candidates(kind: str) -> list[str]:
    """Every answer that a kind of question can have."""
    if kind == "count":
        return [str(c) for c in COUNTS]
    return list(PLACES) if kind == "where" else list(COLOURS)


def options_of(kind: str, events: Sequence[Event], letter: str, rng: random.Random) -> list[str]:
    """Four options as single words, `A:red`, the right one behind `letter`.

    What a careless watcher would answer is always among them, so that options tell nothing.
    """
    right = answer_of(kind, events)
    lure = answer_of(kind, seen_by_careless_annotator(kind, events))
    others = [c for c in candidates(kind) if c not in (right, lure)]
    wrong = [lure] if lure != right and lure in candidates(kind) else []
    wrong += rng.sample(others, len(LETTERS) - 1 - len(wrong))
    rng.shuffle(wrong)
    wrong.insert(LETTERS.index(letter), right)
    return [f"{a}:{text}" for a, text in zip(LETTERS, wrong, strict=True)]


def chain(kind: str, events: Sequence[Event], options: Sequence[str]) -> tuple[str, str]:
    """A tagged chain of thought over these events with its answer, and the answer's letter."""
    value = answer_of(kind, events)
    letter = next((o[0] for o in options if o[2:] == value), None)
    if letter is None:
        raise ValueError(f"{value} is not among the options {options}")
    return _tagged(f"{describe(events)} so {value} {letter}", letter), letter


def _tagged(thoughts: str, letter: str) -> str:
    return f"<think> {thoughts} </think> <answer> {letter} </answer>"


def describe(events: Sequence[Event]) -> str:
    """The events in order, numbered."""
    return " ".join(f"{i} {event.words()}" for i, event in enumerate(events, start=1))


def seen_by_careless_annotator(kind: str, events: Sequence[Event]) -> list[Event]:
    """What is left when the first event (or else the last) was missed."""
    return list(events[1:] if kind == "first" else events[:-1])


def make_rows(
    video: str, events: Sequence[Event], index: int, seed: str
) -> Iterator[dict[str, Any]]:
    """One row a kind of question; the right letter goes round by index, so letters balance."""
    for k, kind in enumerate(QUESTIONS):
        rng = random.Random(f"{seed}/{video}/{kind}")
        letter = LETTERS[(index + k) % len(LETTERS)]
        options = options_of(kind, events, letter, rng)
        yield {
            "problem": QUESTIONS[kind],
            "options": options,
            "answer": f"<answer>{letter}</answer>",
            "data_type": "video",
            "problem_type": kind,
            "reasoning": chain(kind, events, options)[0],
            "videos": video,
            "events": [[e.start, e.end, e.colour, e.shape, e.place] for e in events],
        }


def annotate(
    row: dict[str, Any], events: Sequence[Event], errors: dict[str, float], seed: str
) -> dict[str, Any]:
    """The row as the annotator wrote it: chain and answer may miss an event."""
    kind = row["problem_type"]
    rng = random.Random(f"{seed}/{row['videos']}/{kind}/annotator")
    missed = seen_by_careless_annotator(kind, events)
    careless = rng.random() < errors.get(kind, 0.0)
    if not careless or answer_of(kind, missed) not in [o[2:] for o in row["options"]]:
        return row
    reasoning, letter = chain(kind, missed, row["options"])
    return row | {"reasoning": reasoning, "answer": f"<answer>{letter}</answer>"}


def guess(row: dict[str, Any]) -> dict[str, Any]:
    """The row asked about a video that shows nothing: its answer is left, and is only a guess."""
    option = next(o for o in row["options"] if f"<answer>{o[0]}</answer>" == row["answer"])
    letter, value = option[0], option[2:]
    return row | {"reasoning": _tagged(f"so {value} {letter}", letter), "events": []}


def write_video(path: Path, frames: np.ndarray, fps: int = FPS) -> None:
    """Writes frames (F, H, W, 3) as h264 in mp4. The colours survive to within a few levels."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast"}
        for image in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@dataclass(frozen=True)
class Split:
    """One file of rows, which asks every kind of question about each of its videos."""

    name: str
    n_videos: int
    annotated: bool = False
    """Whether chains and answers are the annotator's, with the annotator's mistakes."""
    empty_every: int | None = None
    """Of how many videos the last shows nothing; None: every video shows events."""

    def is_empty(self, i: int) -> bool:
        """Whether the split's video `i` shows nothing."""
        return self.empty_every is not None and (i + 1) % self.empty_every == 0


def default_splits(n_videos: int) -> list[Split]:
    """Shares of the videos: fine-tuning 3/10, RL 5/10, validation 1/40, test the rest."""
    sft, rl, val = n_videos * 3 // 10, n_videos // 2, max(1, n_videos // 40)
    test = n_videos - sft - rl - val
    if min(sft, rl, test) < 1:
        raise ValueError(f"--videos {n_videos} is too few for four disjoint splits; use at least 5")
    return [
        Split("train_sft", sft, annotated=True, empty_every=EMPTY_EVERY),
        Split("train_rl", rl),
        Split("val", val),
        Split("test", test),
    ]


def _make_one(job: tuple[Path, int, int, str, bool]) -> list[Event]:
    """Renders and writes one video; runs in a worker process.

    Returns the story that is asked about, which a video that is to be empty does not show.
    """
    path, n_frames, index, seed, empty = job
    events = make_story(random.Random(f"{seed}/{index}"), n_frames)
    write_video(path, render([] if empty else events, n_frames))
    return events


def generate(
    out: Path,
    n_videos: int,
    n_frames: int,
    seed: int,
    errors: dict[str, float],
    workers: int,
) -> dict[str, int]:
    """Writes videos and one jsonl a split; returns rows by split.

    Each video belongs to one split. The same arguments give the same stories and rows.
    """
    if n_frames < 4 * max(COUNTS):
        raise ValueError(
            f"--frames {n_frames} leaves events no room; use at least {4 * max(COUNTS)}"
        )
    if workers < 1:
        raise ValueError(f"--workers {workers} makes nothing; use at least 1")
    splits = default_splits(n_videos)
    folder = out / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    empty = [split.is_empty(i) for split in splits for i in range(split.n_videos)]
    names = [f"{seed:04d}_{i:05d}.mp4" for i in range(n_videos)]
    jobs = [(folder / names[i], n_frames, i, str(seed), empty[i]) for i in range(n_videos)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        made = pool.map(_make_one, jobs, chunksize=16)
        stories = list(progress(made, "writing videos", total=n_videos))
    counts, first = {}, 0
    for split in splits:
        rows = []
        for i in range(first, first + split.n_videos):
            for row in make_rows(names[i], stories[i], i, str(seed)):
                if empty[i]:
                    row = guess(row)
                elif split.annotated:
                    row = annotate(row, stories[i], errors, str(seed))
                rows.append(row)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (out / f"{split.name}.jsonl").write_text(lines, encoding="utf-8")
        counts[split.name] = len(rows)
        first += split.n_videos
    return counts


def _errors(text: str) -> dict[str, float]:
    """`last=0.6,count=0.5` as a mapping; raises ArgumentTypeError for anything else."""
    errors = {}
    for part in filter(None, text.split(",")):
        kind, _, share = part.partition("=")
        try:
            errors[kind] = float(share)
        except ValueError:
            errors[kind] = -1.0
        if kind not in QUESTIONS or not 0 <= errors[kind] <= 1:
            raise argparse.ArgumentTypeError(
                f"{part!r}: write KIND=SHARE with KIND of {', '.join(QUESTIONS)} and a share "
                "between 0 and 1"
            )
    return errors


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser("verl.data.synthetic", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--videos", type=int, default=1200, help="videos over all splits")
    parser.add_argument("--frames", type=int, default=64, help="frames a video, at 2 a second")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other stories")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument(
        "--annotator-errors", type=_errors, default=ANNOTATOR_ERRORS, metavar="KIND=SHARE,...",
        help=f"how often the annotator misses an event; default {ANNOTATOR_ERRORS}",
    )  # fmt: skip
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        counts = generate(
            args.out, args.videos, args.frames, args.seed, args.annotator_errors, args.workers
        )
    except ValueError as error:
        parser.error(str(error))
    logger.info(
        "%s: %s", args.out, ", ".join(f"{n} rows in {name}.jsonl" for name, n in counts.items())
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
