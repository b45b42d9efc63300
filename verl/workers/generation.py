"""Prompts in, samples out: what a worker does between the driver and a rollout engine."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from verl.data.media import MediaItem
from verl.models.adapter import Adapter
from verl.protocol import DataProto
from verl.rollout import (
    RequestMedia,
    Rollout,
    RolloutOutput,
    RolloutRequest,
    SamplingParams,
)
from verl.sequence_parallel.topology import SequenceGroup
from verl.workers.encoder import MediaEncoder
from verl.workers.media_stores import media_of


def generate(
    prompts: DataProto, adapter: Adapter, encoder: MediaEncoder, rollout: Rollout
) -> DataProto:
    """Samples of each prompt, in order, n rows a prompt.

    With a store, all ranks first make together what it lacks: a collective. Media are read or
    encoded wave by wave, so that the features of one wave exist at a time, however many
    prompts there are. With a trained tower, ranks go through equally many waves: a collective.

    `prompts` has columns uid, prompt_ids, media and seeds (a tuple, one seed a sample), and
    `meta["sampling"]`, the `SamplingParams`. Returns columns response_ids, rollout_logp and
    finish_reason.
    """
    params: SamplingParams = prompts.meta["sampling"]
    prompt_lens = [len(ids) for ids in prompts["prompt_ids"]]
    encoder.prepare(media_of(prompts["media"]))
    n_samples = [len(seeds) for seeds in prompts["seeds"]]
    waves = rollout.waves(prompt_lens, n_samples, params.max_tokens)
    samples: list[list[RolloutOutput]] = [[] for _ in prompt_lens]
    for turn in range(encoder.turns(len(waves))):
        wave = waves[turn] if turn < len(waves) else []
        # The requests, and with them the features, end with the call.
        answers = rollout.generate(_requests(prompts.take(wave), adapter, encoder), params)
        for i, answer in zip(wave, answers, strict=True):
            samples[i] = answer
    outputs = [output for answer in samples for output in answer]
    return DataProto(
        {
            "response_ids": [o.token_ids for o in outputs],
            "rollout_logp": [o.log_probs for o in outputs],
            "finish_reason": [o.finish_reason for o in outputs],
        }
    )


def gathered(output: DataProto, sequence: SequenceGroup) -> DataProto:
    """Samples of all ranks of a group that shared out its prompts, in order, on each of them."""
    if sequence.size == 1:
        return output
    parts: list[Any] = [None] * sequence.size
    dist.all_gather_object(parts, output, group=sequence.group)
    return DataProto.concat(parts)


def _requests(prompts: DataProto, adapter: Adapter, encoder: MediaEncoder) -> list[RolloutRequest]:
    """What the engine needs of some prompts, their media encoded; a call of the tower for none."""
    features = encoder.features_each(prompts["media"])
    return [
        RolloutRequest(
            ids, adapter.positions(ids, media), feature, seeds,
            media=tuple(_geometry(item, encoder) for item in media), name=str(uid),
        )
        for uid, ids, media, feature, seeds in zip(
            *(prompts[c] for c in ("uid", "prompt_ids", "media")), features, prompts["seeds"],
            strict=True,
        )
    ]  # fmt: skip


def _geometry(item: MediaItem, encoder: MediaEncoder) -> RequestMedia:
    return RequestMedia(
        item.ref.kind, item.grid_thw, item.seconds_per_grid, item.n_tokens, encoder.name_of(item)
    )
