"""The estimate of an update's memory against what was measured, and what each setting saves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from verl.config import ActorConfig, FSDPConfig, ModelConfig, OffloadConfig
from verl.models.shape import TextShape
from verl.workers.memory_plan import longest_row, plan_memory

THREE_B = TextShape(
    layers=36, hidden=2048, heads=16, kv_heads=2, head_dim=128, mlp=11008, vocab=151936,
    is_tied=True,
)  # fmt: skip


def peak(tokens: int = 137_376, world: int = 1, model: Any = None, **settings: Any) -> float:
    """GB, of the 3B model on one device if nothing else is said."""
    offload = settings.pop("offload", OffloadConfig())
    fsdp = settings.pop("fsdp", FSDPConfig())
    plan = plan_memory(
        THREE_B, model or ModelConfig(), fsdp, offload, world=world, tokens=tokens, **settings
    )
    return plan.peak / 1e9


@pytest.mark.parametrize(
    ("tokens", "keep_attention", "measured"),
    [(137_376, True, 60.9), (42_126, True, 30.1), (42_126, False, 28.8), (61_018, True, 36.0)],
)
def test_it_is_within_a_tenth_of_what_an_h100_took(tokens, keep_attention, measured):
    """Updates without an optimizer step of benchmarks/train_ladder.py."""
    found = peak(tokens, model=ModelConfig(keep_attention=keep_attention), moment_bytes=0)
    assert found == pytest.approx(measured, rel=0.1)


def test_what_saves_memory_saves_it():
    whole = peak()
    assert peak(tokens=1000) < whole - 30
    assert peak(model=ModelConfig(keep_attention=False)) < whole - 20
    assert peak(model=ModelConfig(enable_gradient_checkpointing=False)) > whole + 100
    assert peak(model=ModelConfig(mlp_tile_tokens=-1)) > whole + 10
    assert peak(offload=OffloadConfig(offload_activations=True)) < whole - 25
    # Without moments that lie there, the larger end is checkpoints rather than the step.
    assert peak(offload=OffloadConfig(offload_optimizer=True)) < whole - 20
    assert peak(offload=OffloadConfig(offload_params=True)) < whole - 30
    assert peak(moment_bytes=4) == pytest.approx(whole - 4 * THREE_B.parameters / 1e9)
    assert peak(world=8) < whole - 25
    assert peak(reference=OffloadConfig()) == pytest.approx(whole + 2 * THREE_B.parameters / 1e9)
    assert peak(reference=OffloadConfig(offload_params=True)) == whole
    assert peak(fsdp=FSDPConfig(enable_full_shard=False)) > whole + 3


def test_the_step_itself_needs_all_moments_on_the_device():
    moved = peak(tokens=10, offload=OffloadConfig(offload_optimizer=True))
    assert moved > 16 * THREE_B.parameters / 1e9


@pytest.mark.parametrize(
    ("actor", "longest"),
    [
        (ActorConfig(micro_batch_size_per_device_for_update=4), 1000 + 4 * 50),
        (ActorConfig(micro_batch_size_per_device_for_update=6), 1000 + 5 * 50),
        (ActorConfig(micro_batch_size_per_device_for_update=4, shared_prefix=False), 4 * 1050),
        (ActorConfig(micro_batch_size_per_device_for_update=4, padding_free=False), 1050),
        (ActorConfig(max_tokens_per_device=3000), 3000),
    ],
)
def test_the_longest_row_follows_from_the_settings(actor, longest):
    assert longest_row(actor, n=5, max_prompt=1000, max_response=50) == longest


def test_a_shape_counts_its_parameters():
    assert THREE_B.parameters == pytest.approx(3.09e9, rel=0.01)
    untied = replace(THREE_B, is_tied=False)
    assert untied.parameters - THREE_B.parameters == 151936 * 2048
