"""Ranks that share sequences generate each prompt once, and all of them get all samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import run_gloo
from tests.tiny import tiny_config
from tests.workers.test_generation import CPU, SHOWN, prompts_of
from tests.workers.tiny_runs import tiny_encoder
from verl.models.adapter import get_adapter
from verl.protocol import DataProto
from verl.rollout.hf_rollout import HFRollout
from verl.sequence_parallel.attention import ATTENTION, register_attention
from verl.sequence_parallel.topology import SequenceGroup
from verl.workers.encoder import WholeModel
from verl.workers.fsdp_workers import ActorRolloutRefWorker

COUNTS = (len(SHOWN), 3, 1)
"""Prompts of a call: shared out evenly, unevenly, and fewer than ranks."""


class Counting(HFRollout):
    """Counts the prompts that it was given."""

    seen = 0

    def generate(self, requests: Any, params: Any) -> Any:
        self.seen += len(requests)
        return super().generate(requests, params)


def collect(rank: int, world_size: int) -> list[tuple[DataProto, int]]:
    register_attention()
    adapter = get_adapter(tiny_config())
    torch.manual_seed(0)
    hf = adapter.model_class()(tiny_config())
    hf.set_attn_implementation({"text_config": ATTENTION})
    hf.eval()
    found = []
    for count in COUNTS:
        rollout = Counting(hf, adapter, CPU, 70)
        worker: Any = SimpleNamespace(
            _rollout=rollout,
            _engine_group=SequenceGroup.alone(),
            _sequence=SequenceGroup.of_neighbours(world_size, "cpu"),
            _encoder=tiny_encoder(WholeModel(hf, adapter, CPU)),
            engine=SimpleNamespace(adapter=adapter),
        )
        output = ActorRolloutRefWorker.generate(worker, prompts_of(adapter).take(range(count)))
        found.append((output, rollout.seen))
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_group_gets_the_samples_of_one_rank_in_order(world_size):
    ranks = run_gloo(collect, world_size)
    expected = collect(0, 1)
    for i, count in enumerate(COUNTS):
        assert sum(rank[i][1] for rank in ranks) == expected[i][1] == count
        alone = expected[i][0]
        for rank in ranks:
            shared = rank[i][0]
            assert len(shared) == 2 * count
            assert shared["finish_reason"] == alone["finish_reason"]
            for a, b in zip(shared["response_ids"], alone["response_ids"], strict=True):
                assert torch.equal(a, b)
            for a, b in zip(shared["rollout_logp"], alone["rollout_logp"], strict=True):
                torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
