"""Reward of mathematics with a boxed result: 0.9 accuracy + 0.1 format, judged by math-verify."""

from __future__ import annotations

import re
from typing import Any

from math_verify import parse, verify

from verl.utils.answers import BOXED, after_thinking

FORMAT = re.compile(r"\s*<think>.+</think>.*\\boxed\{.*\}.*", re.DOTALL)


def accuracy_reward(response: str, ground_truth: str) -> float:
    """1 when the last boxed result outside the chain of thought equals the ground truth."""
    boxed = BOXED.findall(after_thinking(response) or "")
    if not boxed:
        return 0.0
    gold, given = parse(f"${ground_truth}$"), parse(f"$\\boxed{{{boxed[-1]}}}$")
    return 1.0 if gold and given and verify(gold, given) else 0.0


def compute_score(
    samples: list[dict[str, Any]], format_weight: float = 0.1
) -> list[dict[str, float]]:
    """Scores a batch; `format_weight` moves weight from accuracy to format."""
    scores = []
    for sample in samples:
        accuracy = accuracy_reward(sample["response"], sample["ground_truth"])
        form = 1.0 if FORMAT.fullmatch(sample["response"]) else 0.0
        overall = (1 - format_weight) * accuracy + format_weight * form
        scores.append({"overall": overall, "accuracy": accuracy, "format": form})
    return scores
