"""What an evaluation writes and tells, without a model."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.e2e.jobs import evaluation_job
from verl.config import EvalConfig, load
from verl.data.sources import DataError
from verl.evaluation.main import _build, _evaluate, _write
from verl.protocol import DataProto
from verl.trainer import launch

OPTIONS = ("A. red", "B. blue")


class Questions(list):
    """Batches of gold answers, with the rows that were left out."""

    def __init__(self, *batches: list[str], left_out: int = 0) -> None:
        super().__init__(batches)
        self.dataset = SimpleNamespace(quarantine=[None] * left_out)


def always_a(answers: list[str], rollout: Any, step: int, *, blank: bool) -> DataProto:
    """Stands for a sampler: answers A, or B when hot; longer where it sees the frames."""
    n, letter = len(answers), "B" if rollout.temperature > 0 else "A"
    return DataProto(
        {
            "uid": [f"u{i}" for i in range(n)],
            "question": ["which ?"] * n,
            "options": [OPTIONS] * n,
            "media": [()] * n,
            "answer": answers,
            "problem_type": ["first"] * n,
            "prompt_ids": [torch.zeros(5, dtype=torch.long)] * n,
            "response_ids": [torch.zeros(1 if blank else 3, dtype=torch.long)] * n,
            "response_text": [f"<answer>{letter}</answer>"] * n,
            "finish_reason": ["stop"] * n,
        }
    )


def result(variant: str, *batches: list[str], left_out: int = 0) -> dict[str, Any]:
    sampler: Any = always_a
    return _evaluate(EvalConfig(name="m"), variant, Questions(*batches, left_out=left_out), sampler)


def test_scores_are_over_all_batches_beside_the_best_constant_answer():
    found = result("full", ["A", "B", "B"], ["B"], left_out=2)
    assert (found["n"], found["left_out"]) == (4, 2)
    assert found["overall"] == 0.25 and found["by_type"] == {"first": 0.25}
    assert found["chance"] == {"answer": "B", "overall": 0.75}
    assert (found["prompt_length"], found["response_length"]) == (5, 3)
    assert len(found["rows"]) == 4


def test_only_the_blind_variant_hides_the_frames():
    assert result("blind", ["A"])["response_length"] == 1
    assert result("frames:2", ["A"])["response_length"] == 3


def test_a_temperature_variant_samples_and_says_so():
    greedy, sampled = result("full", ["A", "B"]), result("temperature:0.7", ["A", "A", "B"])
    assert (greedy["temperature"], greedy["overall"]) == (0.0, 0.5)
    assert (sampled["temperature"], sampled["variant"]) == (0.7, "temperature:0.7")
    assert sampled["overall"] == 1 / 3


def test_the_first_variant_has_the_name_that_was_given(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = EvalConfig(
        name="m", output=str(tmp_path / "new" / "eval.json"), variants=["blind", "frames:8"]
    )
    for variant in config.variants:
        _write(config, variant, result(variant, ["A", "B"]))
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "eval.json", "eval_answers.jsonl", "eval_frames8.json", "eval_frames8_answers.jsonl"
    ]  # fmt: skip
    written = json.loads((tmp_path / "new" / "eval_frames8.json").read_text())
    assert written["variant"] == "frames:8" and "rows" not in written
    assert "m frames:8: 50.0% of 2 (best constant answer A: 50.0%)" in caplog.text
    both = [tmp_path / "new" / f"eval_frames8{end}" for end in (".json", "_answers.jsonl")]
    assert f"result in {both[0]}, answers in {both[1]}" in caplog.text


def test_without_a_file_to_write_to_the_result_is_told(caplog):
    caplog.set_level(logging.INFO)
    _write(EvalConfig(name="m"), "full", result("full", ["A"]))
    assert "m full: 100.0% of 1" in caplog.text and "set output=FILE" in caplog.text


def test_files_that_are_missing_are_told_once_for_all_variants_before_ray(tmp_path, monkeypatch):
    def ray_for(*_: Any) -> None:
        raise AssertionError("Ray starts")

    monkeypatch.setattr(launch, "ray_for", ray_for)
    job = evaluation_job(tmp_path)
    (tmp_path / "val" / "clip0.mp4").unlink()
    (tmp_path / "val" / "clip4.mp4").unlink()
    with pytest.raises(DataError) as caught, ExitStack() as stack:
        _build(load([f"config={job.config}"], EvalConfig), stack)
    assert str(caught.value).startswith("2 rows cannot be used")
    assert str(caught.value).count("clip0.mp4") == 1
