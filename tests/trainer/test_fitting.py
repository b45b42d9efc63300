"""How many workers share a sequence when the settings leave it to the program."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from verl.config import ActorConfig, DataConfig, PPOConfig, WorkerConfig
from verl.config.trainer import TrainerConfig
from verl.config.worker import OffloadConfig
from verl.models.shape import TextShape
from verl.trainer.fitting import fitted, legal_sizes
from verl.trainer.launch import StartError

SEVEN_B = TextShape(
    layers=28, hidden=3584, heads=28, kv_heads=4, head_dim=128, mlp=18944, vocab=152064,
    is_tied=False,
)  # fmt: skip
H100 = 80 * 2**30


def config(tokens: int, workers: int = 8, **actor: Any) -> PPOConfig:
    return PPOConfig(
        data=DataConfig(max_prompt_length=tokens, max_response_length=1024),
        worker=WorkerConfig(actor=ActorConfig(**{"ulysses_size": "auto", **actor})),
        trainer=TrainerConfig(n_gpus_per_node=workers),
    )


def size(tokens: int, **settings: Any) -> int:
    found = fitted(config(tokens, **settings), SEVEN_B, H100).worker.actor.ulysses_size
    assert isinstance(found, int)
    return found


def test_longer_prompts_are_shared_by_more_workers_and_short_ones_by_none():
    sizes = [size(tokens) for tokens in (4_000, 60_000, 180_000, 380_000)]
    assert sizes[0] == 1 and sizes == sorted(sizes) and sizes[-1] > 1
    assert set(sizes) <= {1, 2, 4}


def test_what_takes_less_memory_needs_fewer_workers():
    offload = OffloadConfig(offload_activations=True, offload_optimizer=True)
    assert size(380_000, offload=offload) < size(380_000)


def test_only_sizes_that_divide_heads_and_workers_are_legal():
    assert legal_sizes(SEVEN_B, 8) == [1, 2, 4]
    assert legal_sizes(SEVEN_B, 14) == [1, 2, 7, 14]
    assert legal_sizes(replace(SEVEN_B, heads=16), 8) == [1, 2, 4, 8]


def test_a_prompt_that_fits_nothing_is_refused_with_what_to_set():
    with pytest.raises(StartError, match=r"ulysses_size=4: .*offload_activations=true"):
        size(3_000_000)


def test_a_number_stays_and_its_estimate_is_told(caplog):
    with caplog.at_level(logging.INFO):
        assert size(30_000, ulysses_size=2) == 2
        assert "takes an estimated" in caplog.text and "80.0 GiB" in caplog.text
        assert "may not fit" not in caplog.text
        assert size(900_000, ulysses_size=2) == 2
    assert "it may not fit. Set worker.actor.offload.offload_optimizer=true" in caplog.text


def test_on_a_cpu_auto_is_one_worker():
    assert fitted(config(900_000), SEVEN_B, None).worker.actor.ulysses_size == 1
