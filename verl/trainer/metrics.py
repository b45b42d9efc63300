"""Numbers of one training step. Letters: B samples, T response tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

import torch

from verl.algorithms.correction import mismatch_metrics
from verl.protocol import DataProto
from verl.utils.answers import score_answer


def reward_metrics(scores: Sequence[dict[str, float]], types: Sequence[str]) -> dict[str, float]:
    """Mean of every part of the reward, and of the whole by problem type."""
    metrics = {f"reward/{part}": fmean(s[part] for s in scores) for part in scores[0]}
    by_type: dict[str, list[float]] = defaultdict(list)
    for score, kind in zip(scores, types, strict=True):
        by_type[kind or "none"].append(score["overall"])
    return metrics | {f"reward/by_type/{k}": fmean(v) for k, v in sorted(by_type.items())}


def flat_groups(rewards_B: torch.Tensor, prompt_B: torch.Tensor) -> bool:
    """Whether within each prompt's group all rewards are equal, so that nothing is learnt."""
    return all(
        bool((group_G == group_G[0]).all())
        for group_G in (rewards_B[prompt_B == prompt] for prompt in prompt_B.unique())
    )


def why_flat(batch: DataProto, n_groups: int) -> str:
    """What a user wants to know of a step whose groups all have equal rewards."""
    columns = ("response_text", "answer", "options", "question")
    readable = fmean(
        score_answer(text, answer, list(options), question).extracted is not None
        for text, answer, options, question in zip(*map(batch.__getitem__, columns), strict=True)
    )
    cut = fmean(reason == "length" for reason in batch["finish_reason"])
    return (
        f"all {n_groups} groups have equal rewards: this step teaches nothing; {readable:.0%} of "
        f"responses had a readable answer, {cut:.0%} were cut at data.max_response_length"
    )


def length_metrics(batch: DataProto) -> dict[str, float]:
    """Prompt and response lengths in tokens, and the share of responses cut by length."""
    responses = [len(r) for r in batch["response_ids"]]
    return {
        "response_length/mean": fmean(responses),
        "response_length/max": float(max(responses)),
        "response_length/min": float(min(responses)),
        "response_length/clip_ratio": fmean(r == "length" for r in batch["finish_reason"]),
        "prompt_length/mean": fmean(len(p) for p in batch["prompt_ids"]),
        "prompt_length/max": float(max(len(p) for p in batch["prompt_ids"])),
    }


def rollout_mismatch(batch: DataProto, threshold: float) -> dict[str, float]:
    """How far column rollout_logp is from trainer_logp, both of the same weights."""
    lengths = [len(r) for r in batch["response_ids"]]
    sequence_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    values = mismatch_metrics(
        torch.cat(batch["trainer_logp"]), torch.cat(batch["rollout_logp"]), sequence_T, threshold
    )
    return {f"mismatch/{name}": float(value) for name, value in values.items()}


def merge_rank_metrics(
    ranks: Sequence[dict[str, list[float]]], computed: Sequence[bool] = ()
) -> dict[str, float]:
    """Actor metrics: shares add over ranks, then average over optimizer steps.

    Every value but the optimizer's own is a share of a global mean, so ranks are summed. Norm,
    learning rate and skipped steps are the same on all ranks. `computed` says of which steps any
    sample was computed, by default of all: the others know no entropy and no correction.
    """
    same_everywhere = ("grad_norm", "lr", "skipped_steps")
    of_computed = (
        "entropy",
        "correction_mean",
        "correction_clipped_share",
        "correction_masked_share",
    )
    merged = {}
    for name, values in ranks[0].items():
        of_step = [sum(shares) for shares in zip(*(r[name] for r in ranks), strict=True)]
        if name in same_everywhere:
            merged[name] = values[-1] if name == "skipped_steps" else fmean(values)
        elif name in of_computed and computed:
            known = [v for v, is_known in zip(of_step, computed, strict=True) if is_known]
            merged |= {name: fmean(known)} if known else {}
        else:
            merged[name] = fmean(of_step)
    return {f"actor/{name}": value for name, value in merged.items()}
