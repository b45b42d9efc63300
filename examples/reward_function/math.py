"""Reward of mathematics with a boxed result: 0.9 accuracy + 0.1 format, judged by math-verify."""

from __future__ import annotations

import re
from typing import Any

from math_verify import parse, verify

from verl.utils.answers import after_thinking, last_boxed

THOUGHT = re.compile(r"\s*<think>((?:(?!</?think>).)+)</think>", re.DOTALL)
LONGEST_RESULT = 1000


def format_reward(response: str) -> float:
    """1 when the response is one chain of thought, not blank, and then text with a boxed result."""
    thought = THOUGHT.match(response)
    rest = response[thought.end() :] if thought and thought[1].strip() else ""
    return 1.0 if last_boxed(rest).strip() and "think>" not in rest else 0.0


def accuracy_reward(response: str, ground_truth: str) -> float:
    """1 when the last boxed result after the chain of thought equals the ground truth."""
    rest = after_thinking(response)
    boxed = last_boxed(rest) if rest else ""
    if not boxed.strip() or len(boxed) > LONGEST_RESULT:
        return 0.0
    # A model may write 9^{9^9}: what takes longer than a second is wrong.
    gold = parse(f"${ground_truth.strip('$ ')}$", parsing_timeout=1)
    given = parse(f"$\\boxed{{{boxed}}}$", parsing_timeout=1)
    return 1.0 if gold and given and verify(gold, given, timeout_seconds=1) else 0.0


def compute_score(
    samples: list[dict[str, Any]], format_weight: float = 0.1
) -> list[dict[str, float]]:
    """Scores a batch; `format_weight` moves weight from accuracy to format."""
    scores = []
    for sample in samples:
        accuracy = accuracy_reward(sample["response"], sample["ground_truth"])
        form = format_reward(sample["response"])
        overall = (1 - format_weight) * accuracy + format_weight * form
        scores.append({"overall": overall, "accuracy": accuracy, "format": form})
    return scores
