"""The gradient of an update is one number: it does not depend on how the work was laid out."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import run_gloo
from tests.workers.tiny_runs import (
    KL_COEF,
    MODEL,
    TEMPERATURE,
    NoFiles,
    added,
    keep_gradients,
    largest_gap,
    lone_rank,
    own_share,
    rl_batch,
    tiny_actor,
    tiny_engine,
    totals_of,
    whole_weights,
    write_model,
)
from verl.config import AlgorithmConfig, OptimConfig, RolloutCorrectionConfig
from verl.data.media import pixels
from verl.models.loader import build_model, load_adapter
from verl.protocol import DataProto
from verl.trainer.shares import CostModel, deal
from verl.workers.optimizer import build_schedule

ROUNDING = 2e-5
"""Largest difference by rounding of float32, as a share of a tensor's largest gradient."""


@dataclass(frozen=True)
class Layout:
    """How a batch is laid out for one update."""

    micro: int
    packed: bool = True
    shared: bool = True
    averaging: str = "token"
    frozen: bool = True
    tokens: int | None = None
    corrected: bool = False

    def settings(self) -> dict[str, Any]:
        return {
            "micro_batch_size_per_device_for_update": self.micro,
            "padding_free": self.packed,
            "shared_prefix": self.shared,
            "loss_avg_mode": self.averaging,
            "max_tokens_per_device": self.tokens,
            "algorithm": CORRECTED if self.corrected else AlgorithmConfig(),
        }


CORRECTED = AlgorithmConfig(
    rollout_correction=RolloutCorrectionConfig(
        rollout_is="sequence",
        rollout_is_threshold=1.5,
        rollout_rs="token",
        rollout_rs_threshold=1.6,
    )
)
PLACEMENTS = [(True, True), (True, False), (False, True)]
LAYOUTS = (
    [Layout(m, packed, shared) for m in (1, 2, 4) for packed, shared in PLACEMENTS]
    + [Layout(m, averaging="seq") for m in (1, 2, 4)]
    + [Layout(4, packed=False, averaging="seq")]
    + [Layout(m, frozen=False) for m in (1, 2, 4)]
    + [Layout(2, *placement, frozen=False) for placement in PLACEMENTS[1:]]
    + [Layout(1, tokens=tokens) for tokens in (1, 40, 10**6)]
    + [Layout(1, shared=False, tokens=60), Layout(1, frozen=False, tokens=40)]
    + [Layout(m, packed, shared, corrected=True) for m in (1, 4) for packed, shared in PLACEMENTS]
    + [Layout(2, averaging="seq", corrected=True)]
)


@dataclass
class Update:
    """What is known after an update."""

    gradients: list[dict[str, Tensor]]
    metrics: dict[str, list[float]]
    log_probs: list[Tensor]


Results = dict[Any, Update]
SPECIAL = [
    "the batch is text only",
    "the first rank has no media",
    "the policy is the one that sampled",
    "a rank has empty responses only",
    "a rank has nothing",
    "a rank has nothing, in tokens",
    "ranks have unequal shares",
    "shares by cost",
]


def collect(rank: int, world_size: int, folder: str) -> Results:
    """Every case of this module on one rank, so that ranks are started once."""
    results: Results = {}
    for frozen in (True, False):
        engine = tiny_engine(folder, dataclasses.replace(MODEL, freeze_vision_tower=frozen))
        results |= layouts(engine, frozen, rank, world_size)
    results |= special_batches(engine, rank, world_size)
    results |= mini_batches(folder, rank, world_size)
    return results


def update(
    engine: Any,
    batch: DataProto,
    rank: int,
    world_size: int,
    sizes: tuple[int, ...] = (),
    nothing: bool = False,
    **actor: Any,
) -> Update:
    """An update with equal shares, or on two ranks with shares of `sizes`, or of nothing."""
    kept = keep_gradients(engine)
    share = own_share(batch, rank, world_size)
    if sizes and world_size == 2:
        share = batch.chunk_by(sizes)[rank]
    if nothing:
        share = batch.take([])
    metrics, log_probs = tiny_actor(engine, **actor).update(share, totals_of(batch), TEMPERATURE)
    return Update(kept, metrics, log_probs)


def layouts(engine: Any, frozen: bool, rank: int, world_size: int) -> Results:
    batches = {c: rl_batch(engine.adapter, with_rollout=c) for c in (False, True)}
    return {
        case: update(engine, batches[case.corrected], rank, world_size, **case.settings())
        for case in LAYOUTS
        if case.frozen == frozen
    }


def special_batches(engine: Any, rank: int, world_size: int) -> Results:
    """Batches that a trained tower has to live with."""
    batch = rl_batch(engine.adapter)
    text = batch.take(range(6, 12))
    text_first = batch.take([6, 7, 8, 0, 1, 2])
    first_pass = without_old_log_probs(batch)
    return {
        "the batch is text only": update(engine, text, rank, world_size),
        "the first rank has no media": update(engine, text_first, rank, world_size),
        "the policy is the one that sampled": update(engine, first_pass, rank, world_size),
        "a rank has empty responses only": update(
            engine, empty_second_half(batch), rank, world_size
        ),
        "a rank has nothing": update(engine, batch, rank, world_size, (12, 0)),
        "a rank has nothing, in tokens": update(
            engine, batch, rank, world_size, (0, 12), max_tokens_per_device=40
        ),
        "ranks have unequal shares": update(engine, batch, rank, world_size, (3, 9)),
        "nobody has anything": update(engine, batch, rank, world_size, nothing=True),
        "shares by cost": update(engine, *by_cost(engine, batch, rank, world_size)),
    }


def by_cost(
    engine: Any, batch: DataProto, rank: int, world_size: int
) -> tuple[DataProto, int, int, tuple[int, ...]]:
    """What the driver would deal out, as arguments of `update`."""
    cost = CostModel(engine.adapter.shape, shared_prefix=True)
    shares = deal(batch, [0] * len(batch), world_size, cost)
    order = [i for share in shares for i in share]
    return batch.take(order), rank, world_size, tuple(map(len, shares))


def without_old_log_probs(batch: DataProto) -> DataProto:
    wanted = ["uid", "prompt_ids", "media", "response_ids", "advantage", "ref_logp"]
    return batch.select(wanted)


def empty_second_half(batch: DataProto) -> DataProto:
    """On two ranks, the second has not one token to learn from."""
    lengths = [len(r) if i < 6 else 0 for i, r in enumerate(batch["response_ids"])]
    ragged = ("response_ids", "old_logp", "ref_logp")
    cut = {k: [v[:n] for v, n in zip(batch[k], lengths, strict=True)] for k in ragged}
    return batch.with_columns(**cut)


def mini_batches(folder: str, rank: int, world_size: int) -> Results:
    """Two mini-batches, twice: real steps, so that later gradients depend on earlier ones."""
    results: Results = {}
    for name, minis in (("minis", [0] * 6 + [1] * 6), ("minis, mixed up", [0, 1] * 6)):
        engine = tiny_engine(folder)
        batch = rl_batch(engine.adapter).with_columns(mini=minis)
        # Plain descent: Adam's first step turns rounding of tiny gradients into whole steps.
        engine.optimizer = torch.optim.SGD(
            [p for p in engine.policy.parameters() if p.requires_grad], lr=0.05
        )
        engine.schedule = build_schedule(engine.optimizer, OptimConfig(), 4)
        share = batch.take(range(rank, 12, world_size))
        actor = tiny_actor(engine, ppo_epochs=2, micro_batch_size_per_device_for_update=2)
        metrics, log_probs = actor.update(share, totals_of(batch, 2), TEMPERATURE)
        results[name] = Update([whole_weights(engine)], metrics, log_probs)
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
    """Gradient and loss of the batch by transformers' own forward pass and a loop over samples."""
    return {
        case: plain_update(folder, *case)
        for case in itertools.product((True, False), ("token", "seq"), (False, True))
    }


def plain_update(
    folder, frozen: bool, averaging: str, corrected: bool
) -> tuple[dict[str, Tensor], float]:
    model = dataclasses.replace(MODEL, model_path=str(folder))
    hf: Any = build_model(model, dtype=torch.float32, attention="sdpa", materialize=True)
    hf.model.visual.requires_grad_(not frozen)
    adapter = tiny_adapter(folder)
    batch = rl_batch(adapter, with_rollout=True)
    policy, kl = torch.zeros(()), torch.zeros(())
    n_tokens = sum(len(r) for r in batch["response_ids"])
    for i in range(len(batch)):
        response = batch["response_ids"][i]
        if len(response) == 0:
            continue
        logp = plain_log_probs(hf, adapter, batch["prompt_ids"][i], response, batch["media"][i])
        ratio = (logp - batch["old_logp"][i]).exp()
        gain = batch["advantage"][i] * torch.stack([ratio, ratio.clamp(0.8, 1.3)])
        gain = gain.min(0).values
        if batch["advantage"][i] < 0:
            gain = gain.clamp(min=3.0 * batch["advantage"][i])
        if corrected:
            ratios = (batch["old_logp"][i] - batch["rollout_logp"][i]).exp()
            gain = gain * ratios.prod().clamp(max=1.5)
            gain = gain * ((ratios >= 1 / 1.6) & (ratios <= 1.6))
        gap = batch["ref_logp"][i] - logp
        divide = n_tokens if averaging == "token" else len(response) * len(batch)
        policy = policy - gain.sum() / divide
        kl = kl + (gap.exp() - 1 - gap).sum() / divide
    (policy + KL_COEF * kl).backward()
    gradients = {n: p.grad for n, p in hf.named_parameters() if p.grad is not None}
    return gradients, float(policy.detach())


def plain_log_probs(hf, adapter, prompt, response, items) -> Tensor:
    features = None
    if items:
        values = torch.cat([pixels(NoFiles().get(m.ref), adapter.vision)[0] for m in items])
        grids = torch.tensor([m.grid_thw for m in items])
        features = hf.model.visual(values, grid_thw=grids).pooler_output
    at = adapter.positions(prompt, items)
    after = int(at.max()) + 1 + torch.arange(len(response)).expand(3, -1)
    hidden = hf.model.language_model(
        inputs_embeds=adapter.embed(hf, torch.cat([prompt, response]), features)[None],
        position_ids=torch.cat([at, after], dim=1)[:, None],
    ).last_hidden_state[0]
    logits = hf.lm_head(hidden[len(prompt) - 1 : -1]) / TEMPERATURE
    logits[:, list(adapter.forbidden_ids)] = -torch.inf
    return logits.log_softmax(-1).gather(1, response[:, None])[:, 0]


def tiny_adapter(folder):
    return load_adapter(dataclasses.replace(MODEL, model_path=str(folder)))


def by_name(case: Layout) -> str:
    tower = "frozen" if case.frozen else "trained"
    layout = "padded" if not case.packed else "shared" if case.shared else "packed"
    return f"{case.micro}-{layout}-{case.averaging}-{tower}" + "-corrected" * case.corrected


@pytest.mark.parametrize("case", LAYOUTS, ids=by_name)
def test_gradients_equal_a_plain_loop_for_any_layout_and_number_of_workers(alone, two, plain, case):
    expected, loss = plain[case.frozen, case.averaging, case.corrected]
    for ranks in ([alone], two):
        assert added([r[case].metrics for r in ranks], "pg_loss") == pytest.approx([loss], abs=2e-6)
        for rank in ranks:
            assert largest_gap(rank[case].gradients[0], expected) < ROUNDING


def test_what_was_corrected_is_counted(folder, alone, two):
    batch = rl_batch(tiny_adapter(folder), with_rollout=True)
    case = next(case for case in LAYOUTS if case.corrected)
    ratios = (torch.cat(batch["old_logp"]) - torch.cat(batch["rollout_logp"])).exp()
    masked = float(((ratios > 1.6) | (ratios < 1 / 1.6)).float().mean())
    assert 0.1 < masked < 0.9
    for ranks in ([alone], two):
        metrics = [r[case].metrics for r in ranks]
        assert added(metrics, "correction_masked_share") == pytest.approx([masked])
        assert 0 < added(metrics, "correction_clipped_share")[0] < 1 - masked
        assert 0 < added(metrics, "correction_mean")[0] < 1.5


def test_token_and_sequence_mean_differ_and_are_not_mixed_up(plain):
    by_token, by_sequence = plain[True, "token", False][1], plain[True, "seq", False][1]
    assert abs(by_token - by_sequence) > 0.05


@pytest.mark.parametrize("case", LAYOUTS, ids=by_name)
def test_log_probs_come_back_in_the_order_of_the_samples(alone, two, case):
    first = alone[LAYOUTS[0]].log_probs
    for log_probs in (alone[case].log_probs, two[0][case].log_probs + two[1][case].log_probs):
        assert len(log_probs) == 12
        for got, expected in zip(log_probs, first, strict=True):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", SPECIAL)
def test_gradients_do_not_depend_on_workers_when(alone, two, name):
    for rank in two:
        assert largest_gap(rank[name].gradients[0], alone[name].gradients[0]) < ROUNDING
    for metric in alone[name].metrics:
        total = added([r[name].metrics for r in two], metric)
        assert total == pytest.approx(alone[name].metrics[metric], abs=2e-6)


def test_a_step_without_samples_has_a_gradient_of_zero(alone, two):
    for rank in (alone, *two):
        found = rank["nobody has anything"]
        assert found.gradients[0].keys() == alone["a rank has nothing"].gradients[0].keys()
        assert not any(g.any() for g in found.gradients[0].values())
        assert found.metrics.keys() == alone["a rank has nothing"].metrics.keys()


def test_a_tower_without_media_gets_a_gradient_of_zero(alone):
    gradients = alone["the batch is text only"].gradients[0]
    tower = [g for name, g in gradients.items() if name.startswith("model.visual.")]
    assert len(tower) > 10
    assert not any(g.any() for g in tower)
    assert any(g.any() for g in gradients.values())


def test_without_old_log_probs_the_ratio_is_one(alone):
    metrics = alone["the policy is the one that sampled"].metrics
    assert metrics["ppo_kl"] == [0.0]
    assert metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == [0.0]


def test_every_mini_batch_of_every_epoch_is_a_step_with_the_same_samples_on_any_workers(alone, two):
    steps = alone["minis"].metrics["pg_loss"]
    assert len(steps) == 4
    assert len(set(steps)) == 4
    assert added([r["minis"].metrics for r in two], "pg_loss") == pytest.approx(steps, abs=5e-6)
    norms = alone["minis"].metrics["grad_norm"]
    for rank in two:
        assert rank["minis"].metrics["grad_norm"] == pytest.approx(norms, rel=1e-4)
        assert largest_gap(rank["minis"].gradients[0], alone["minis"].gradients[0]) < ROUNDING


def test_another_order_would_mix_the_mini_batches(alone, two):
    name = "minis, mixed up"
    assert largest_gap(two[0][name].gradients[0], alone["minis"].gradients[0]) > 100 * ROUNDING


def test_several_steps_need_the_log_probs_of_the_policy_that_sampled(folder):
    with lone_rank():
        engine = tiny_engine(folder)
        batch = without_old_log_probs(rl_batch(engine.adapter))
        for actor, n_minis in ((tiny_actor(engine, ppo_epochs=2), 1), (tiny_actor(engine), 2)):
            with pytest.raises(ValueError, match=r"2 optimizer steps .* need column old_logp"):
                actor.update(batch, totals_of(batch, n_minis), TEMPERATURE)
