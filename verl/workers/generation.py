"""Prompts in, samples out: what a worker does between the driver and a rollout engine."""

from __future__ import annotations

from verl.models.adapter import Adapter
from verl.protocol import DataProto
from verl.rollout import Rollout, RolloutRequest, SamplingParams
from verl.workers.encoder import MediaEncoder


def generate(
    prompts: DataProto, adapter: Adapter, encoder: MediaEncoder, rollout: Rollout
) -> DataProto:
    """Samples of each prompt, in order, n rows a prompt.

    `prompts` has columns prompt_ids, media and seeds (a tuple, one seed a sample), and
    `meta["sampling"]`, the `SamplingParams`. Returns columns response_ids, rollout_logp and
    finish_reason.
    """
    params: SamplingParams = prompts.meta["sampling"]
    features = encoder.features_each(prompts["media"])
    requests = [
        RolloutRequest(ids, adapter.positions(ids, media), feature, seeds)
        for ids, media, feature, seeds in zip(
            prompts["prompt_ids"], prompts["media"], features, prompts["seeds"], strict=True
        )
    ]
    outputs = [sample for samples in rollout.generate(requests, params) for sample in samples]
    return DataProto(
        {
            "response_ids": [o.token_ids for o in outputs],
            "rollout_logp": [o.log_probs for o in outputs],
            "finish_reason": [o.finish_reason for o in outputs],
        }
    )
