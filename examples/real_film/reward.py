"""Reward on the film: 0.9 accuracy + 0.1 for the tags of the asked form, each counted by itself.

The quickstart's small model knows coloured shapes and hardly ever finishes an answer about a film,
so that all-or-nothing credit for the form would leave every group of responses without a contrast.
"""

from __future__ import annotations

from typing import Any

from verl.utils.answers import score_answer

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def tag_reward(response: str) -> float:
    """Share of the four tags that stand in the response exactly once."""
    return sum(response.count(tag) == 1 for tag in TAGS) / len(TAGS)


def compute_score(samples: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Scores a batch."""
    scores = []
    for sample in samples:
        score = score_answer(
            sample["response"], sample["ground_truth"], sample["options"], sample["question"]
        )
        accuracy, tags = float(score.correct), tag_reward(sample["response"])
        overall = 0.9 * accuracy + 0.1 * tags
        scores.append({"overall": overall, "accuracy": accuracy, "format": tags})
    return scores
