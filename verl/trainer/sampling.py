"""Asks the workers for samples and turns them into text and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from verl.config import RolloutConfig
from verl.data.dataset import Sample
from verl.protocol import DataProto
from verl.rollout import SamplingParams, sample_seed

PROMPT_COLUMNS = (
    "uid",
    "prompt_ids",
    "media",
    "question",
    "answer",
    "problem_type",
    "options",
    "extra",
)


def prompt_batch(samples: Sequence[Sample]) -> DataProto:
    """One row a prompt."""
    columns: dict[str, list[Any]] = {
        name: [getattr(s, name) for s in samples] for name in PROMPT_COLUMNS
    }
    columns["prompt_ids"] = [torch.tensor(ids) for ids in columns["prompt_ids"]]
    return DataProto(columns)


class Sampler:
    """Draws `rollout.n` responses a prompt from a worker group that offers `generate`."""

    def __init__(
        self,
        workers: Any,
        tokenizer: Any,
        max_tokens: int,
        *,
        skip_special_tokens: bool,
    ) -> None:
        self._workers = workers
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._skip_special = skip_special_tokens
        self.stop_ids = stop_ids(tokenizer)

    def __call__(
        self, samples: Sequence[Sample], rollout: RolloutConfig, step: int, *, blank: bool = False
    ) -> DataProto:
        """One row a sample, n neighbouring rows a prompt, with response columns added.

        `blank` hides the frames; only evaluation workers know it.
        """
        prompts = prompt_batch(samples)
        seeds = [
            tuple(sample_seed(rollout.seed, step, s.uid, k) for k in range(rollout.n))
            for s in samples
        ]
        request = prompts.select(["uid", "prompt_ids", "media"]).with_columns(seeds=seeds)
        request.meta["sampling"] = SamplingParams(
            max_tokens=self._max_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            stop_ids=self.stop_ids,
            ignore_eos=rollout.ignore_eos,
        )
        request.meta["blank"] = blank
        responses = self._workers.generate(request)
        batch = prompts.repeat(rollout.n).union(responses)
        return batch.with_columns(response_text=self.decode(batch))

    def decode(self, batch: DataProto) -> list[str]:
        """Text of every response."""
        return [
            self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)
            for ids in batch["response_ids"]
        ]


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """Words that end a response: the tokenizer's end of turn and its padding word."""
    ids = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return tuple(sorted({i for i in ids if i is not None}))


def reward_rows(batch: DataProto) -> list[dict[str, Any]]:
    """What a reward function receives for each sample; extra columns of the data file included."""
    return [
        batch["extra"][i]
        | {
            "uid": batch["uid"][i],
            "response": batch["response_text"][i],
            "response_length": len(batch["response_ids"][i]),
            "ground_truth": batch["answer"][i],
            "question": batch["question"][i],
            "problem_type": batch["problem_type"][i],
            "options": list(batch["options"][i]),
            "finish_reason": batch["finish_reason"][i],
        }
        for i in range(len(batch))
    ]
