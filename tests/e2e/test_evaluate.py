"""Evaluation writes, for each variant, what the model answered with what it was shown."""

from __future__ import annotations

import json

import pytest

from tests.e2e.jobs import QUESTIONS, evaluation_job, lines


def test_each_variant_is_scored_on_all_questions_and_kept_with_its_answers(tmp_path):
    job = evaluation_job(tmp_path)
    process = job.finish(out=tmp_path / "eval.json")
    found = {
        name: json.loads((tmp_path / f"eval{name}.json").read_text())
        for name in ("", "_blind", "_frames2")
    }
    answers = {name: lines(tmp_path / f"eval{name}_answers.jsonl") for name in found}
    assert [f["variant"] for f in found.values()] == ["full", "blind", "frames:2"]
    for name, result in found.items():
        assert result["n"] == len(answers[name]) == 12 and result["left_out"] == 0
        assert result["chance"] == {"answer": "A", "overall": 0.25}
        assert set(result["by_type"]) == {"first", "last"}
        correct = [a["correct"] for a in answers[name]]
        assert result["overall"] == sum(correct) / 12
        assert f"tiny {result['variant']}: {100 * result['overall']:.1f}% of 12" in process.text()

    # A blind model cannot tell one clip from another.
    blind = {a["response"] for a in answers["_blind"] if a["question"] == QUESTIONS[0]}
    seeing = {a["response"] for a in answers[""] if a["question"] == QUESTIONS[0]}
    assert len(blind) == 1 and len(seeing) > 1
    # Two frames less are one step of time, of 4 visual tokens, less; a third has no video.
    full, few = found[""]["prompt_length"], found["_frames2"]["prompt_length"]
    assert full - few == pytest.approx(4 * 8 / 12)
    assert found["_blind"]["prompt_length"] == full
