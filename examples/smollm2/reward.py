"""Reward of word problems with a number as the answer: 0.9 accuracy + 0.1 format.

The answer is read by the one extractor of the project, as evaluations do: `<answer>12</answer>`, or
nothing but the number.
"""

from __future__ import annotations

import re
from typing import Any

from verl.utils.answers import score_answer

FORMAT = re.compile(r"(?:(?!</?answer>).)*<answer>-?\d+</answer>\s*", re.DOTALL)


def compute_score(
    samples: list[dict[str, Any]], format_weight: float = 0.1
) -> list[dict[str, float]]:
    """Scores a batch; `format_weight` moves weight from accuracy to format.

    Format: the response ends with its only `<answer>`, which holds a whole number.
    """
    scores = []
    for sample in samples:
        accuracy = float(score_answer(sample["response"], sample["ground_truth"]).correct)
        form = float(FORMAT.fullmatch(sample["response"]) is not None)
        overall = (1 - format_weight) * accuracy + format_weight * form
        scores.append({"overall": overall, "accuracy": accuracy, "format": form})
    return scores
