"""Supervised steps: one gradient for any packing, micro-batch and number of workers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import run_gloo
from tests.workers.tiny_runs import (
    CLIP,
    FILM,
    MODEL,
    PHOTO,
    NoFiles,
    added,
    keep_gradients,
    largest_gap,
    lone_rank,
    own_share,
    prompt_ids,
    tiny_encoder,
    tiny_engine,
    write_model,
)
from verl.config import DataConfig, SFTConfig
from verl.config.sft import SFTBatchConfig, SFTOptimConfig
from verl.data.media import pixels
from verl.models.loader import build_model, load_adapter
from verl.protocol import DataProto
from verl.sequence_parallel.topology import SequenceGroup
from verl.workers.fsdp_workers import SFTWorker
from verl.workers.sft_engine import SFTRunner

ROUNDING = 2e-5
BATCHING = {
    "all in one row": SFTBatchConfig(max_tokens_per_micro_batch=10_000),
    "packed by 40": SFTBatchConfig(max_tokens_per_micro_batch=40),
    "longer than the limit": SFTBatchConfig(max_tokens_per_micro_batch=1),
    "a row each": SFTBatchConfig(packing=False),
}
BATCHES = ("ragged", "fewer samples than workers", "nothing to learn on a rank")
TOWERS = ("frozen", "trained")


@dataclass
class Step:
    """What is known after a training and a validation step."""

    gradients: dict[str, Tensor]
    loss: dict[str, list[float]]
    validation: dict[str, list[float]]


Results = dict[tuple[str, str, str], Step]


def sft_batch(adapter: Any, name: str) -> DataProto:
    """Ragged conversations; on two ranks, three fall to the first and two to the second.

    All media fall to the first.
    """
    g = torch.Generator().manual_seed(3)
    rows = [
        ((CLIP,), 6, 5), ((FILM, PHOTO), 3, 4), ((), 4, 9),
        ((), 1, 2), ((), 7, 12),
    ]  # fmt: skip
    inputs, masks = [], []
    for items, n_question, n_answer in rows:
        words = torch.randint(8, 60, (n_question + n_answer,), generator=g)
        ids = prompt_ids(adapter, items, words.tolist())
        mask = torch.zeros(len(ids), dtype=torch.bool)
        mask[-n_answer:] = True
        mask[-n_answer // 2] = False  # a second turn of the user
        inputs.append(ids)
        masks.append(mask)
    if name == "nothing to learn on a rank":
        masks[3:] = [torch.zeros_like(m) for m in masks[3:]]
    columns = {"input_ids": inputs, "loss_mask": masks, "media": [r[0] for r in rows]}
    batch = DataProto(columns)
    return batch.take([1]) if name == "fewer samples than workers" else batch


def targets_of(batch: DataProto) -> int:
    return sum(int(mask[1:].sum()) for mask in batch["loss_mask"])


def collect(rank: int, world_size: int, folder: str) -> Results:
    results: Results = {}
    for tower in TOWERS:
        engine = tiny_engine(folder, replace(MODEL, freeze_vision_tower=tower == "frozen"))
        for name in BATCHES:
            for batching, config in BATCHING.items():
                batch = sft_batch(engine.adapter, name)
                key = (tower, name, batching)
                results[key] = step(engine, batch, config, rank, world_size)
    return results


def step(engine: Any, batch: DataProto, config: SFTBatchConfig, rank: int, world_size: int) -> Step:
    kept = keep_gradients(engine)
    runner = SFTRunner(engine, tiny_encoder(engine), config)
    share = own_share(batch, rank, world_size)
    metrics = runner.train_step(share, targets_of(batch))
    validation = runner.evaluate(share)
    return Step(
        kept[0],
        {k: [v] for k, v in metrics.items()},
        {k: [v] for k, v in validation.items()},
    )


def collect_shared(rank: int, world_size: int, folder: str) -> Results:
    """The same on ranks that all share each row."""
    results: Results = {}
    together = SequenceGroup.of_neighbours(world_size, "cpu")
    for tower in TOWERS:
        model = replace(MODEL, freeze_vision_tower=tower == "frozen")
        engine = tiny_engine(folder, model, sequence=together)
        for name in BATCHES:
            for batching in ("all in one row", "packed by 40"):
                batch = sft_batch(engine.adapter, name)
                results[tower, name, batching] = step(engine, batch, BATCHING[batching], 0, 1)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(folder) -> Results:
    with lone_rank():
        return collect(0, 1, str(folder))


@pytest.fixture(scope="module")
def two(folder) -> list[Results]:
    return run_gloo(collect, 2, str(folder))


@pytest.fixture(scope="module")
def plain(folder):
    """The same by transformers' own forward pass, token by token."""
    return {(tower, name): plain_step(folder, tower, name) for tower in TOWERS for name in BATCHES}


def plain_step(folder, tower: str, name: str) -> tuple[dict[str, Tensor], float]:
    model = replace(MODEL, model_path=str(folder))
    hf: Any = build_model(model, dtype=torch.float32, attention="sdpa", materialize=True)
    hf.model.visual.requires_grad_(tower == "trained")
    adapter = load_adapter(model)
    batch = sft_batch(adapter, name)
    total, count = torch.zeros(()), 0
    for ids, mask, items in zip(
        batch["input_ids"], batch["loss_mask"], batch["media"], strict=True
    ):
        log_p = plain_log_probs(hf, adapter, ids, items)
        for at in range(1, len(ids)):
            if mask[at]:
                total = total - log_p[at - 1, ids[at]]
                count += 1
    (total / count).backward()
    found = {n: p for n, p in hf.named_parameters() if p.requires_grad}
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in found.items()}
    return gradients, float((total / count).detach())


def plain_log_probs(hf, adapter, ids: Tensor, items) -> Tensor:
    features = None
    if items:
        values = torch.cat([pixels(NoFiles().get(m.ref), adapter.vision)[0] for m in items])
        grids = torch.tensor([m.grid_thw for m in items])
        features = hf.model.visual(values, grid_thw=grids).pooler_output
    hidden = hf.model.language_model(
        inputs_embeds=adapter.embed(hf, ids, features)[None],
        position_ids=adapter.positions(ids, items)[:, None],
    ).last_hidden_state[0]
    logits = hf.lm_head(hidden)
    logits[:, list(adapter.forbidden_ids)] = -torch.inf
    return logits.log_softmax(-1)


CASES = [(t, n, b) for t in TOWERS for n in BATCHES for b in BATCHING]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_gradients_equal_a_plain_loop_for_any_packing_and_number_of_workers(
    alone, two, plain, case
):
    expected, loss = plain[case[:2]]
    for ranks in ([alone], two):
        assert added([r[case].loss for r in ranks], "loss") == pytest.approx([loss], abs=2e-6)
        for rank in ranks:
            assert largest_gap(rank[case].gradients, expected) < ROUNDING


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_validation_loss_and_the_count_of_targets_add_up_over_workers(alone, two, plain, case):
    for ranks in ([alone], two):
        validations = [r[case].validation for r in ranks]
        (total,), (count,) = added(validations, "loss_sum"), added(validations, "n_tokens")
        assert total / count == pytest.approx(plain[case[:2]][1], abs=2e-6)
        assert count == alone[case].validation["n_tokens"][0]


def test_ranks_had_different_numbers_of_targets(two):
    counts = [r["frozen", "ragged", "packed by 40"].validation["n_tokens"][0] for r in two]
    assert counts[0] != counts[1]
    assert [
        r["frozen", "fewer samples than workers", "a row each"].validation["n_tokens"][0]
        for r in two
    ][1] == 0


@pytest.mark.parametrize("limit", [1e-3, 0.25, 1e6])
def test_gradients_are_scaled_down_to_the_norm_that_the_settings_name(tmp_path, limit):
    config = SFTConfig(
        data=DataConfig(cache_dir=str(tmp_path / "cache")),
        model=replace(MODEL, model_path=str(write_model(tmp_path / "model"))),
        optim=SFTOptimConfig(max_grad_norm=limit),
    )
    with lone_rank():
        worker = SFTWorker(config, 1, rank=0, world_size=1, device="cpu", dp_rank=0, dp_size=1)
        worker.init_model()
        used: list[float] = []

        def step() -> None:
            used.append(sum(float(p.grad.norm()) ** 2 for p in trained if p.grad is not None))

        trained = list(worker.engine.policy.parameters())
        worker.engine.optimizer.step = step  # type: ignore[method-assign]
        batch = sft_batch(worker.engine.adapter, "ragged").take([2, 3, 4])
        n_tokens = sum(int(mask[1:].sum()) for mask in batch["loss_mask"])
        found = worker.train_step(batch.with_meta(n_tokens=n_tokens))
    assert found["grad_norm"] > 0.25
    assert used[0] ** 0.5 == pytest.approx(min(limit, found["grad_norm"]), rel=1e-3)


def test_ranks_that_share_sequences_take_the_step_of_one(alone, folder):
    for rank in run_gloo(collect_shared, 2, str(folder)):
        assert len(rank) == 12
        for key, shared in rank.items():
            assert largest_gap(shared.gradients, alone[key].gradients) < ROUNDING
            assert shared.loss["loss"] == pytest.approx(alone[key].loss["loss"], abs=2e-6)
            assert shared.validation["n_tokens"] == alone[key].validation["n_tokens"]
            total = alone[key].validation["loss_sum"]
            assert shared.validation["loss_sum"] == pytest.approx(total, rel=1e-5, abs=1e-6)
