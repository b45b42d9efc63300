"""Reward of reasoned answers to questions on videos and images: 0.9 accuracy + 0.1 format.

The response is to be `<think> ... </think> <answer> ... </answer>`. A choice counts by its letter,
other answers by normalised text or, where the ground truth is a number or formula, by value.
"""

from __future__ import annotations

import re
from typing import Any

from math_verify import parse, verify

from verl.utils.answers import score_answer

FORMAT = re.compile(
    r"\s*<think>((?:(?!</?think>).)+)</think>\s*<answer>((?:(?!</?answer>).)+)</answer>\s*",
    re.DOTALL,
)
# Commands, single letters and signs with a digit or command among them, and no words.
MATHEMATICAL = re.compile(
    r"(?=.{1,200}\Z)(?=.*[0-9\\])(?:\\[a-zA-Z]++|\\(?![a-zA-Z])|[a-zA-Z](?![a-zA-Z])|[^a-zA-Z\\])*+",
    re.DOTALL,
)


def format_reward(response: str) -> float:
    """1 when the response is one chain of thought and one answer, neither blank, and no more."""
    parts = FORMAT.fullmatch(response)
    return 1.0 if parts and all(part.strip() for part in parts.groups()) else 0.0


def accuracy_reward(sample: dict[str, Any]) -> float:
    """1 when the extracted answer is right."""
    score = score_answer(
        sample["response"], sample["ground_truth"], sample["options"], sample["question"]
    )
    if score.correct:
        return 1.0
    if sample["options"] or score.extracted is None:
        return 0.0
    return equal_value(score.extracted, sample["ground_truth"])


def equal_value(given: str, wanted: str) -> float:
    """1 when two formulas have the same value; words, which hide numbers too, have none."""
    if not (MATHEMATICAL.fullmatch(given) and MATHEMATICAL.fullmatch(wanted)):
        return 0.0
    # A model may write 9^{9^9}: what takes longer than a second is wrong.
    gold, answer = (parse(f"${text.strip('$ ')}$", parsing_timeout=1) for text in (wanted, given))
    return 1.0 if gold and answer and verify(gold, answer, timeout_seconds=1) else 0.0


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
