"""How many workers share a sequence when the settings leave it to the program."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from verl.config import (
    ActorConfig,
    DataConfig,
    FSDPConfig,
    ModelConfig,
    PPOConfig,
    RolloutConfig,
    WorkerConfig,
)
from verl.config.rollout_checks import DEFAULT_SHARE
from verl.config.trainer import TrainerConfig
from verl.config.worker import OffloadConfig
from verl.models.shape import TextShape
from verl.trainer import launch
from verl.trainer.fitting import fitted, legal_sizes, plan_of, with_engine_share
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
    assert (
        "it may not fit. To take less: set worker.actor.offload.offload_optimizer=true"
        in caplog.text
    )


def advice(caplog, tokens: int, **settings: Any) -> str:
    """What a run whose longest row does not fit is told to set."""
    caplog.clear()
    fitted(config(tokens, **{"ulysses_size": 2, **settings}), SEVEN_B, H100)
    (text,) = [message for message in caplog.messages if "it may not fit" in message]
    return text.partition("To take less: ")[2]


def test_a_row_that_may_not_fit_is_told_the_smallest_legal_size_that_is_enough(caplog):
    assert size(160_000, ulysses_size=1) == 1 and "it may not fit" in caplog.text
    assert size(160_000) == 2
    assert "set worker.actor.ulysses_size=2," in advice(caplog, 160_000, ulysses_size=1)
    assert size(300_000) == 4
    assert "set worker.actor.ulysses_size=4," in advice(caplog, 300_000, ulysses_size=1)
    # Too much for any of them: the one with which it takes least.
    assert "set worker.actor.ulysses_size=4," in advice(caplog, 3_000_000, ulysses_size=1)
    assert "ulysses_size" not in advice(caplog, 3_000_000, ulysses_size=4)


def test_a_larger_size_is_not_offered_where_passes_are_filled_by_tokens_of_each_worker(caplog):
    assert "ulysses_size" not in advice(caplog, 252_000, max_tokens_per_device=900_000)


def test_only_what_would_help_is_offered(caplog):
    whole = advice(caplog, 900_000, model=ModelConfig(enable_gradient_checkpointing=False))
    assert "set worker.actor.model.enable_gradient_checkpointing=true" in whole
    assert "offload_activations" not in whole  # refused without checkpointing
    assert "enable_gradient_checkpointing" not in advice(caplog, 900_000)
    on_host = advice(caplog, 900_000, offload=OffloadConfig(offload_params=True))
    assert "offload_activations=true" in on_host
    assert "offload_optimizer" not in on_host and "moment_dtype" not in on_host


@pytest.mark.parametrize(("asked", "told"), [("auto", 1), (1, 0), (2, 0)])
def test_on_a_cpu_auto_is_one_worker_and_says_so(caplog, asked, told):
    caplog.set_level(logging.INFO)
    found = fitted(config(900_000, ulysses_size=asked), SEVEN_B, None)
    assert found.worker.actor.ulysses_size == (1 if asked == "auto" else asked)
    said = [m for m in caplog.messages if m.startswith("worker.actor.ulysses_size=auto: 1, since")]
    assert len(said) == told


def test_with_passes_filled_by_tokens_a_size_must_hold_a_sequence_and_fit():
    # 7B and a prompt of 252k: a quarter of it on each of four workers.
    assert size(252_000, workers=4, max_tokens_per_device=66_000) == 4
    with pytest.raises(StartError, match=r"holds a sequence of 253024 tokens; raise it"):
        size(252_000, workers=4, max_tokens_per_device=60_000)


def test_a_tower_and_passes_without_gradients_count():
    plain = plan_of(config(60_000), SEVEN_B, 1)
    with_tower = plan_of(config(60_000), SEVEN_B, 1, 700_000_000)
    assert with_tower.weights - plain.weights == pytest.approx(1.4e9)
    model = ModelConfig(freeze_vision_tower=False)
    trained = plan_of(config(60_000, model=model), SEVEN_B, 1, 700_000_000)
    untowered = plan_of(config(60_000, model=model), SEVEN_B, 1)
    assert trained.moments - untowered.moments == pytest.approx(8 * 0.7e9 / 8)
    more = plan_of(config(60_000, micro_batch_size_per_device_for_experience=40), SEVEN_B, 1)
    assert more.forward > 2 * plain.forward > 0
    wide = plan_of(config(60_000, fsdp=FSDPConfig(mp_param="fp32")), SEVEN_B, 1)
    assert wide.kept == 2 * plain.kept


def test_auto_needs_to_know_the_gpu(monkeypatch):
    monkeypatch.setattr(launch, "smallest_gpu_bytes", lambda: None)
    assert launch.gpu_bytes(config(100), "cpu") is None
    assert launch.gpu_bytes(config(100, ulysses_size=2), "cuda") is None
    with pytest.raises(StartError, match="nvidia-smi"):
        launch.gpu_bytes(config(100), "cuda")
    monkeypatch.setattr(launch, "smallest_gpu_bytes", lambda: H100)
    assert launch.gpu_bytes(config(100), "cuda") == H100


def engine_share(
    caplog, share: float | None, name: str = "vllm", workers: int = 2, **offload: bool
):
    """The share that is taken beside a 7B model on GPUs of 80 GiB, and what is said of it."""
    caplog.clear()
    cfg = config(4_000, workers=workers, offload=OffloadConfig(**offload))
    rollout = RolloutConfig(name=name, gpu_memory_utilization=share)  # type: ignore[arg-type]
    cfg = replace(cfg, worker=replace(cfg.worker, rollout=rollout))
    found = with_engine_share(cfg, plan_of(cfg, SEVEN_B, 1), H100)
    return found.worker.rollout.gpu_memory_utilization, caplog.text


def test_an_engine_takes_what_training_leaves_and_at_most_its_usual_share(caplog):
    caplog.set_level(logging.INFO)
    assert engine_share(caplog, None, workers=8)[0] == DEFAULT_SHARE
    share, words = engine_share(caplog, None)  # weights and moments: 45 GB on each of two GPUs
    assert 0.1 < share < 0.4 and "gpu_memory_utilization=null: " in words
    assert engine_share(caplog, None, offload_optimizer=True)[0] > share
    assert engine_share(caplog, None, "hf") == (None, "")
    with pytest.raises(StartError, match=r"=null of 80.0 GiB: .* no room .*offload_optimizer=true"):
        engine_share(caplog, None, workers=1)


def test_an_engine_too_large_beside_what_training_keeps_is_told_what_fits(caplog):
    share, words = engine_share(caplog, 0.6)
    assert share == 0.6 and "worker.rollout.gpu_memory_utilization=0.6 of 80.0 GiB: " in words
    fits = float(words.partition("set worker.rollout.gpu_memory_utilization=")[2].split()[0])
    assert "or worker.actor.offload.offload_optimizer=true" in words
    assert engine_share(caplog, fits)[1] == "" != engine_share(caplog, fits + 0.02)[1]
    assert engine_share(caplog, 0.5, offload_optimizer=True)[1] == ""
    assert engine_share(caplog, 0.6, workers=8)[1] == "" == engine_share(caplog, 0.6, "hf")[1]
