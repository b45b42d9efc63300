"""Accuracy of sampled answers, by file and by type of problem."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from verl.data.video import FrameSampling
from verl.protocol import DataProto
from verl.trainer.validation import (
    answer_report,
    best_constant_answer,
    evaluation_record,
    file_labels,
)

OPTIONS = ("A. red", "B. blue", "C. green", "D. white")


def answered(*responses: tuple[str, str, str]) -> DataProto:
    """One row for each (response, gold answer, problem type); the first has a video."""
    video = SimpleNamespace(
        ref=SimpleNamespace(path="/clip.mp4", sampling=FrameSampling(num_frames=4, start_s=2.0))
    )
    n = len(responses)
    return DataProto(
        {
            "uid": [f"u{i}" for i in range(n)],
            "question": ["what is first ?"] * n,
            "options": [OPTIONS] * n,
            "media": [(video,) if i == 0 else () for i in range(n)],
            "response_text": [r for r, _, _ in responses],
            "answer": [a for _, a, _ in responses],
            "problem_type": [t for _, _, t in responses],
            "response_ids": [torch.zeros(i + 1, dtype=torch.long) for i in range(n)],
            "finish_reason": ["stop"] * n,
        }
    )


BATCH = answered(
    ("<think> red </think> <answer> A </answer>", "A", "first"),
    ("The answer is B", "B", "first"),
    ("<answer> C </answer>", "D", "last"),
    ("I do not know", "D", ""),
)


def test_a_report_gives_accuracy_strict_and_parse_rate_over_all_and_by_type():
    metrics = answer_report(BATCH).metrics
    assert metrics["n"] == 4
    assert metrics["accuracy"] == 0.5
    assert metrics["strict"] == 0.25  # only one right answer stands in its tags
    assert metrics["parse_rate"] == 0.75
    assert metrics["response_length"] == 2.5
    by_type = {k: v for k, v in metrics.items() if k.startswith("accuracy/")}
    assert by_type == {"accuracy/first": 1.0, "accuracy/last": 0.0, "accuracy/none": 0.0}


def test_rows_tell_what_was_asked_answered_and_understood():
    first, *_, last = answer_report(BATCH).rows
    assert first["video"] == "/clip.mp4" and last["video"] is None
    assert first["segment"] == [2.0, None] and last["segment"] is None
    assert (first["extracted"], first["correct"], first["strict"]) == ("A", True, True)
    assert (last["extracted"], last["correct"]) == (None, False)
    assert first["question"] == "what is first ?" and first["options"] == list(OPTIONS)


def test_the_reward_is_that_of_the_reward_function_where_there_is_one():
    assert answer_report(BATCH).metrics["reward"] == 0.5
    rewards = [{"overall": 0.25, "accuracy": 1.0}] * 4
    report = answer_report(BATCH, rewards)
    assert report.metrics["reward"] == 0.25 and report.metrics["accuracy"] == 0.5


def test_a_record_of_an_evaluation_is_made_of_its_rows_alone():
    assert evaluation_record("rl", answer_report(BATCH).rows, temperature=1.0) == {
        "name": "rl",
        "n": 4,
        "overall": 0.5,
        "by_type": {"first": 1.0, "last": 0.0, "none": 0.0},
        "strict": 0.25,
        "parse_rate": 0.75,
        "response_length": 2.5,
        "temperature": 1.0,
        "chance": {"answer": "D", "overall": 0.5},
    }


def test_the_best_constant_answer_is_the_most_frequent_one():
    assert best_constant_answer(["A", "B", "B", "C"]) == ("B", 0.5)


@pytest.mark.parametrize(
    ("files", "labels"),
    [
        (["data/val.jsonl", "data/test.parquet"], ["val", "test"]),
        (["data/set@test", "data/set@val"], ["set_test", "set_val"]),
        (["a/test.jsonl", "b/test.jsonl"], ["a_test", "b_test"]),
        (["/x/a/test.jsonl", "/y/a/test.jsonl"], ["x_a_test", "y_a_test"]),
        (["test.json", "test.jsonl"], ["test_0", "test_1"]),
        ([], []),
    ],
)
def test_every_file_has_a_name_of_its_own(files, labels):
    assert file_labels(files) == dict(zip(labels, files, strict=True))
