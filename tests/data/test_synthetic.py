"""The learning task: videos need watching, options tell nothing, splits share no video."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from verl.data import synthetic
from verl.data.rows import RowKeys, read_rows
from verl.data.synthetic import LETTERS, QUESTIONS, answer_of, generate, make_story, render
from verl.data.video import probe
from verl.data.video_decode import iter_frames

SPLITS = ("train_sft", "train_rl", "val", "test")


def rows_of(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def shown(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["events"]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    generate(folder, 40, 32, 7, {"first": 0.0, "last": 1.0, "count": 1.0, "where": 0.0}, 1)
    return folder


def test_splits_share_no_video_and_ask_every_kind_of_question_about_each(made: Path):
    videos = {split: Counter(r["videos"] for r in rows_of(made, split)) for split in SPLITS}
    names = [name for counts in videos.values() for name in counts]
    assert len(names) == len(set(names)) == 40
    assert {n for counts in videos.values() for n in counts.values()} == {len(QUESTIONS)}


def test_right_letters_are_balanced_in_every_kind_of_question(made: Path):
    for kind in QUESTIONS:
        rows = [r for r in rows_of(made, "train_rl") if r["problem_type"] == kind]
        assert set(Counter(r["answer"] for r in rows).values()) == {len(rows) // 4}


def test_the_right_answer_follows_from_the_events(made: Path):
    for row in rows_of(made, "train_rl") + rows_of(made, "test"):
        events = [synthetic.Event(*event) for event in row["events"]]
        letter = row["answer"].removeprefix("<answer>").removesuffix("</answer>")
        assert row["options"][LETTERS.index(letter)] == (
            f"{letter}:{answer_of(row['problem_type'], events)}"
        )
        assert row["reasoning"].endswith(f"<answer> {letter} </answer>")


def test_the_annotator_errs_only_in_fine_tuning_rows_and_only_as_often_as_told(made: Path):
    for row in shown(rows_of(made, "train_sft")):
        events = [synthetic.Event(*event) for event in row["events"]]
        written = row["reasoning"].split(" so ")[0].split()[-4]
        # Too few shapes for the careless count to be among the options: then it is right.
        errs = row["problem_type"] == "last" or (
            row["problem_type"] == "count" and len(events) > min(synthetic.COUNTS)
        )
        assert int(written) == len(events) - errs, row["reasoning"]


def test_one_video_in_twelve_for_fine_tuning_shows_nothing_and_is_only_guessed_about(made: Path):
    for split in SPLITS[1:]:
        assert all(row["events"] for row in rows_of(made, split))
    empty = [row for row in rows_of(made, "train_sft") if not row["events"]]
    assert len(empty) == len(QUESTIONS) == len({row["answer"] for row in empty})
    assert {row["videos"] for row in empty} == {"0007_00011.mp4"}
    for row in empty:
        letter = row["answer"].removeprefix("<answer>").removesuffix("</answer>")
        value = row["options"][LETTERS.index(letter)][2:]
        assert row["reasoning"] == (
            f"<think> so {value} {letter} </think> <answer> {letter} </answer>"
        )
    info = probe(str(made / "videos" / empty[0]["videos"]))
    decoded = np.stack([frame.rgb_HWC for frame in iter_frames(info, range(32))]).astype(int)
    assert np.abs(decoded - render([], 32)).max() < 12


def test_options_of_a_wrong_annotation_hold_both_answers(made: Path):
    for row in shown(rows_of(made, "train_sft")):
        events = [synthetic.Event(*event) for event in row["events"]]
        texts = [option[2:] for option in row["options"]]
        assert len(set(texts)) == 4
        assert answer_of(row["problem_type"], events) in texts


def test_files_are_the_same_for_the_same_seed_and_others_for_another(tmp_path: Path):
    def texts(name: str, seed: int, workers: int) -> list[str]:
        generate(tmp_path / name, 14, 24, seed, {}, workers)
        return [(tmp_path / name / f"{s}.jsonl").read_text() for s in SPLITS]

    assert texts("a", 1, 1) == texts("b", 1, 2)
    assert texts("a", 1, 1) != texts("c", 2, 1)


def test_decoded_frames_look_like_the_rendered_ones(made: Path):
    row = rows_of(made, "test")[0]
    path = str(made / "videos" / row["videos"])
    info = probe(path)
    assert (info.n_frames, info.width, info.height, info.fps) == (32, 56, 56, 2.0)
    decoded = np.stack([frame.rgb_HWC for frame in iter_frames(info, range(32))])
    true = render([synthetic.Event(*event) for event in row["events"]], 32)
    assert np.abs(decoded.astype(int) - true).mean() < 4


def test_rows_are_read_by_the_data_layer(made: Path):
    row = read_rows([str(made / "train_sft.jsonl")], RowKeys())[0]
    assert row.answer in LETTERS and len(row.options) == 4 and row.videos[0].endswith(".mp4")
    assert row.problem_type == "first" and "<think>" in row.reasoning


def test_events_are_spread_over_the_whole_video_and_one_at_a_time():
    for seed in range(200):
        events = make_story(random.Random(seed), 64)
        share = 64 / len(events)
        for i, event in enumerate(events):
            assert i * share - 1 < event.start < event.end <= (i + 1) * share + 1
        assert all(a.end <= b.start for a, b in pairwise(events))
        assert len({e.colour for e in events}) == len(events)


def test_eight_frames_miss_most_events():
    frames = set(np.linspace(0, 63, 8).round().astype(int))
    stories = [make_story(random.Random(seed), 64) for seed in range(300)]
    seen = [bool(frames & set(range(e.start, e.end))) for events in stories for e in events]
    assert np.mean(seen) < 0.5


def test_a_constant_answer_and_the_options_alone_are_at_chance():
    """Whichever value the blind prefer, it is right no more often than another."""
    hits: Counter[tuple[str, int]] = Counter()
    n = 2000
    for i in range(n):
        events = make_story(random.Random(i), 64)
        for kind in QUESTIONS:
            options = synthetic.options_of(kind, events, LETTERS[i % 4], random.Random(i))
            values = sorted(option[2:] for option in options)
            hits[kind, values.index(answer_of(kind, events))] += 1
    assert all(abs(count / n - 0.25) < 0.04 for count in hits.values()), hits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--videos", "4"], "--videos 4 is too few for four disjoint splits; use at least 5"),
        (["--frames", "8"], "--frames 8 leaves events no room; use at least 24"),
        (["--annotator-errors", "last=2"], "write KIND=SHARE with KIND of first"),
        (["--annotator-errors", "middle=0.5"], "'middle=0.5'"),
        (["--workers", "0"], "--workers 0"),
    ],
)
def test_a_bad_argument_is_named(arguments: list[str], message: str, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as stop:
        synthetic.main(["--out", str(tmp_path / "x"), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
