"""Accuracy of sampled answers, the same for validation during training and for evaluation."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from verl.data.video import FrameSampling
from verl.protocol import DataProto
from verl.utils.answers import score_answer


@dataclass(frozen=True)
class AnswerReport:
    """Accuracy over a batch and one row a sample."""

    metrics: dict[str, float]
    """accuracy (lenient extraction), strict, parse_rate, response_length, accuracy/<type>, n."""
    rows: list[dict[str, Any]]


def answer_report(
    batch: DataProto, rewards: Sequence[dict[str, float]] | None = None
) -> AnswerReport:
    """Scores every response of `batch` against its gold answer."""
    rows = []
    for i in range(len(batch)):
        score = score_answer(
            batch["response_text"][i],
            batch["answer"][i],
            list(batch["options"][i]),
            batch["question"][i],
        )
        media = batch["media"][i]
        rows.append(
            {
                "uid": batch["uid"][i],
                "question": batch["question"][i],
                "options": list(batch["options"][i]),
                "answer": batch["answer"][i],
                "problem_type": batch["problem_type"][i],
                "video": media[0].ref.path if media else None,
                "segment": _segment(media[0].ref.sampling) if media else None,
                "response": batch["response_text"][i],
                "response_length": len(batch["response_ids"][i]),
                "finish_reason": batch["finish_reason"][i],
                "extracted": score.extracted,
                "correct": score.correct,
                "strict": score.strict,
                "reward": rewards[i]["overall"] if rewards else float(score.correct),
            }
        )
    return AnswerReport(aggregate(rows), rows)


def _segment(sampling: FrameSampling | None) -> list[float | None] | None:
    """The part of a video that was asked about, in seconds; None: all of it, or an image."""
    if sampling is None or (sampling.start_s == 0 and sampling.end_s is None):
        return None
    return [sampling.start_s, sampling.end_s]


def aggregate(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy and its companions over the rows of an `AnswerReport`."""
    by_type: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        by_type[row["problem_type"] or "none"].append(row["correct"])
    metrics = {
        "accuracy": fmean(r["correct"] for r in rows),
        "strict": fmean(r["strict"] for r in rows),
        "parse_rate": fmean(r["extracted"] is not None for r in rows),
        "reward": fmean(r["reward"] for r in rows),
        "response_length": fmean(r["response_length"] for r in rows),
        "n": float(len(rows)),
    }
    return metrics | {f"accuracy/{k}": fmean(v) for k, v in sorted(by_type.items())}


def evaluation_record(
    name: str | None, rows: Sequence[dict[str, Any]], temperature: float
) -> dict[str, Any]:
    """What `eval_<name>.json` holds of the rows of an `AnswerReport`, for reports and summaries.

    Keys: name, n, overall, by_type, strict, parse_rate, response_length, temperature, and chance
    ({"answer", "overall"} of the best constant answer).
    """
    metrics = aggregate(rows)
    kinds = {k.partition("/")[2]: v for k, v in metrics.items() if k.startswith("accuracy/")}
    answer, chance = best_constant_answer([row["answer"] for row in rows])
    return {
        "name": name,
        "n": len(rows),
        "overall": metrics["accuracy"],
        "by_type": kinds,
        "strict": metrics["strict"],
        "parse_rate": metrics["parse_rate"],
        "response_length": metrics["response_length"],
        "temperature": temperature,
        "chance": {"answer": answer, "overall": chance},
    }


def best_constant_answer(answers: Sequence[str]) -> tuple[str, float]:
    """The gold answer given most often, and the accuracy of always giving it."""
    answer, count = Counter(answers).most_common(1)[0]
    return answer, count / len(answers)


def file_labels(files: Sequence[str]) -> dict[str, str]:
    """Data files by their names in metrics: the stem, with the split where one is named.

    Folders are put in front until the names of all files differ.
    """
    unique = list(dict.fromkeys(files))
    for depth in range(1, max((len(Path(f).parts) for f in unique), default=0) + 1):
        labels = {_label(f, depth): f for f in unique}
        if len(labels) == len(unique):
            return labels
    return {f"{_label(f, 1)}_{i}": f for i, f in enumerate(unique)}


def _label(file: str, depth: int) -> str:
    path, _, split = file.partition("@")
    parts = [*Path(path).parts[-depth:-1], Path(path).stem, *([split] if split else [])]
    return "_".join(p.strip("/") for p in parts if p.strip("/"))
