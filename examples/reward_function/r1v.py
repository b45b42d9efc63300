"""Reward of reasoned answers to questions on videos and images: 0.9 accuracy + 0.1 format.

The response is to be `<think> ... </think> <answer> ... </answer>`. A choice counts by its letter,
other answers by normalised text or, for mathematics, by value.
"""

from __future__ import annotations

import re
from typing import Any

from math_verify import parse, verify

from verl.utils.answers import score_answer

FORMAT = re.compile(r"\s*<think>(?:(?!</?think>).)+</think>\s*<answer>(?:(?!</?answer>).)+</answer>\s*", re.DOTALL)  # fmt: skip


def format_reward(response: str) -> float:
    """1 when the response is one chain of thought and one answer, and nothing else."""
    return 1.0 if FORMAT.fullmatch(response) else 0.0


def accuracy_reward(sample: dict[str, Any]) -> float:
    """1 when the extracted answer is right."""
    score = score_answer(
        sample["response"], sample["ground_truth"], sample["options"], sample["question"]
    )
    if score.correct:
        return 1.0
    if sample["options"] or score.extracted is None:
        return 0.0
    gold, given = parse(sample["ground_truth"]), parse(score.extracted)
    return 1.0 if gold and given and verify(gold, given) else 0.0


def compute_score(
    samples: list[dict[str, Any]], format_weight: float = 0.1
) -> list[dict[str, float]]:
    """Scores a batch; `format_weight` moves weight from accuracy to format."""
    scores = []
    for sample in samples:
        accuracy, form = accuracy_reward(sample), format_reward(sample["response"])
        overall = (1 - format_weight) * accuracy + format_weight * form
        scores.append({"overall": overall, "accuracy": accuracy, "format": form})
    return scores
