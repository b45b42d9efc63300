"""Sharded weights, optimizer steps and weight sync, on two ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import run_gloo
from tests.tiny import EOS_ID
from tests.workers.tiny_runs import (
    CLIP,
    FILM,
    MODEL,
    OPTIM,
    PHOTO,
    TEMPERATURE,
    largest_gap,
    lone_rank,
    own_share,
    rl_batch,
    tiny_actor,
    tiny_encoder,
    tiny_engine,
    totals_of,
    whole_weights,
    write_model,
)
from verl.config import FSDPConfig, OptimConfig
from verl.config.worker import OffloadConfig
from verl.models.fingerprint import checkpoint_fingerprint, tower_fingerprint
from verl.models.loader import build_model
from verl.protocol import DataProto
from verl.rollout import SamplingParams, sample_seed
from verl.rollout.hf_rollout import HFRollout
from verl.sequence_parallel.attention import ATTENTION
from verl.utils.manifest import CheckpointError
from verl.workers import encoder as encoder_module
from verl.workers.generation import generate

FULL_TUNING = replace(MODEL, freeze_vision_tower=False)
WARM = OptimConfig(lr=1e-2, lr_warmup_steps=4)


@dataclass
class Findings:
    """What one rank saw, by the name of what was done."""

    metrics: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    gaps: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def collect(rank: int, world_size: int, folders: dict[str, str]) -> Findings:
    found = Findings()
    random = folders["random"]
    for poison in ("nan", "inf"):
        skip_a_step(found, rank, random, float(poison))
    for name, settings in VARIANTS.items():
        train_two_steps(found, name, rank, world_size, random, **settings)
    for name in ("tied", "untied"):
        load(found, name, folders[name])
    for name, model in (("frozen", MODEL), ("trained", FULL_TUNING)):
        sync(found, name, rank, world_size, random, replace(model, init="random"))
    reference(found, rank, world_size, random)
    uneven_encoding(found, rank, random)
    found.tensors["random"] = whole_weights(tiny_engine(random, seed=1))
    return found


VARIANTS: dict[str, dict[str, Any]] = {
    "as is": {},
    "offloaded parameters": {"offload": OffloadConfig(offload_params=True)},
    "offloaded optimizer": {"offload": OffloadConfig(offload_optimizer=True)},
    "all offloaded": {"offload": OffloadConfig(offload_params=True, offload_optimizer=True)},
    "kept after forward": {"fsdp": FSDPConfig(enable_full_shard=False)},
    "recomputed": {"model": replace(FULL_TUNING, enable_gradient_checkpointing=True)},
    "bf16": {"fsdp": FSDPConfig(mp_param="bf16"), "optim": replace(OPTIM, lr=1e-6)},
    "fp32, slow": {"optim": replace(OPTIM, lr=1e-6)},
}


def step(engine: Any, rank: int, world_size: int, **actor: Any) -> dict[str, float]:
    batch = rl_batch(engine.adapter)
    share = own_share(batch, rank, world_size)
    metrics, _ = tiny_actor(engine, **actor).update(share, totals_of(batch), TEMPERATURE)
    return {name: values[0] for name, values in metrics.items()}


def train_two_steps(
    found: Findings, name: str, rank: int, world_size: int, folder: str, **settings: Any
) -> None:
    engine = tiny_engine(folder, **{"model": FULL_TUNING} | settings)
    before = whole_weights(engine)
    found.metrics[name] = [step(engine, rank, world_size) for _ in range(2)]
    found.tensors[name] = whole_weights(engine)
    found.notes[name] = {
        "master": {p.dtype for p in engine.policy.parameters()},
        "sent": {t.dtype for _, t in engine.named_full_tensors()},
        "moved": [k for k, t in found.tensors[name].items() if not torch.equal(t, before[k])],
    }


def skip_a_step(found: Findings, rank: int, folder: str, poison: float) -> None:
    engine = tiny_engine(folder, optim=WARM)
    before = whole_weights(engine)
    metrics = [step(engine, rank, 2)]
    spoil_backward(engine, poison if rank == 1 else 1.0)
    after_one = whole_weights(engine)
    metrics.append(step(engine, rank, 2))
    after_skip = whole_weights(engine)
    gone = [p.grad for p in engine.policy.parameters()]
    spoil_backward(engine, 1.0)
    metrics.append(step(engine, rank, 2))
    name = f"skipped, {poison}"
    found.metrics[name] = metrics
    found.gaps[name] = largest_gap(after_one, after_skip)
    found.notes[name] = {
        "learnt": largest_gap(before, after_one) > 0,
        "gradients gone": all(g is None for g in gone),
        "skipped": engine.rank_state()["skipped_steps"],
        "moments": {float(s["step"]) for s in engine.optimizer.state.values()},
    }


def spoil_backward(engine: Any, factor: float) -> None:
    """From now on this rank's gradients are multiplied by `factor`."""
    backward = type(engine).backward
    engine.backward = lambda loss: backward(engine, loss * factor)


def load(found: Findings, name: str, folder: str) -> None:
    model = replace(FULL_TUNING, init="pretrained")
    engine = tiny_engine(folder, model)
    hf: Any = engine.policy.hf
    found.notes[name] = {"tied": hf.lm_head.weight is hf.model.language_model.embed_tokens.weight}
    found.tensors[name] = {k: t.clone() for k, t in engine.named_full_tensors()}
    frozen = tiny_engine(folder, replace(model, freeze_vision_tower=True))
    found.tensors[name + ", frozen"] = {k: t.clone() for k, t in frozen.named_full_tensors()}
    tower = {k: v for k, v in frozen.policy.hf.state_dict().items() if k.startswith("model.visual")}
    found.tensors[name + ", own tower"] = {k: v.clone() for k, v in tower.items()}


def sync(found: Findings, name: str, rank: int, world_size: int, folder: str, model: Any) -> None:
    engine = tiny_engine(folder, model)
    step(engine, rank, world_size)
    empty = build_model(
        replace(model, model_path=folder), dtype=torch.float32, attention=ATTENTION,
        materialize=False,
    )  # fmt: skip
    rollout = HFRollout.with_empty_weights(empty, engine.adapter, engine.device, 64)
    rollout.load_weights(engine.named_full_tensors())
    encoder = tiny_encoder(engine)
    prompts = own_share(prompts_of(rl_batch(engine.adapter)), rank, world_size)
    samples = generate(prompts, engine.adapter, encoder, rollout)
    batch = prompts.repeat(3).with_columns(**{k: samples[k] for k in samples.keys()})  # noqa: SIM118
    log_probs = tiny_actor(engine, micro_batch_size_per_device_for_experience=4).log_probs(
        batch, TEMPERATURE
    )
    pairs = list(zip(log_probs, samples["rollout_logp"], strict=True))
    found.gaps["sync, " + name] = max(float((a - b).abs().max()) for a, b in pairs)
    found.notes["sync, " + name] = {
        "tokens": sum(len(a) for a, _ in pairs),
        "waves": len(rollout.waves([len(p) for p in prompts["prompt_ids"]], [3, 3], 8)),
        "responses": len(samples),
    }


def prompts_of(batch: DataProto) -> DataProto:
    once = batch.take(range(0, 12, 3)).select(["uid", "prompt_ids", "media"])
    seeds = [tuple(sample_seed(0, 1, uid, k) for k in range(3)) for uid in once["uid"]]
    params = SamplingParams(max_tokens=8, temperature=TEMPERATURE, stop_ids=(EOS_ID,))
    return once.with_columns(seeds=seeds).with_meta(sampling=params)


def reference(found: Findings, rank: int, world_size: int, folder: str) -> None:
    """A reference has no optimizer, and at the start it is the actor."""
    batch = own_share(rl_batch(tiny_engine(folder).adapter), rank, world_size)
    logps = [
        torch.cat(tiny_actor(tiny_engine(folder, optim=o)).log_probs(batch, TEMPERATURE))
        for o in (OPTIM, None)
    ]
    found.gaps["reference"] = float((logps[0] - logps[1]).abs().max())
    engine = tiny_engine(folder, FULL_TUNING, optim=None)
    found.notes["reference"] = {
        "trained": [n for n, p in engine.policy.named_parameters() if p.requires_grad],
        "optimizer": hasattr(engine, "optimizer"),
    }


def uneven_encoding(found: Findings, rank: int, folder: str) -> None:
    """Rank 0 encodes three pieces of media, one a call, and rank 1 none, then one, twice."""
    encoder_module.PATCHES_PER_CALL = 8
    for name, model in (("frozen", MODEL), ("trained", FULL_TUNING)):
        engine = tiny_engine(folder, model)
        encoder = tiny_encoder(engine)
        first = encoder.features((CLIP, FILM, PHOTO) if rank == 0 else ())
        second = encoder.features((CLIP,))
        again = encoder.features((CLIP,))
        assert second is not None and again is not None
        found.tensors[f"encoded, {name}"] = {"clip": second} | (
            {} if first is None else {"all": first}
        )
        found.notes[f"encoded, {name}"] = encoder.encoded.total()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    made = {name: write_model(root / name, tie=name != "untied") for name in ("tied", "untied")}
    for folder in made.values():
        write_weights(folder)
    return {k: str(v) for k, v in made.items()} | {"random": str(made["tied"])}


def write_weights(folder: Path) -> None:
    model = replace(MODEL, model_path=str(folder))
    hf: Any = build_model(model, dtype=torch.float32, attention="sdpa", materialize=True, seed=7)
    weights = dict(hf.named_parameters())  # a tied weight once, as folders hold it
    save_file({k: v.detach() for k, v in weights.items()}, folder / "model.safetensors")


@pytest.fixture(scope="module")
def ranks(folders) -> list[Findings]:
    return run_gloo(collect, 2, folders)


@pytest.mark.parametrize("poison", ["nan", "inf"])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(ranks, poison):
    name = f"skipped, {poison}"
    for rank in ranks:
        good, skipped, next_one = rank.metrics[name]
        assert [m["skipped_steps"] for m in (good, skipped, next_one)] == [0, 1, 1]
        assert math.isfinite(good["grad_norm"]) and math.isfinite(next_one["grad_norm"])
        assert not math.isfinite(skipped["grad_norm"])
        assert rank.gaps[name] == 0.0
        assert rank.notes[name] == {
            "learnt": True,
            "gradients gone": True,
            "skipped": 1,
            "moments": {2.0},
        }


@pytest.mark.parametrize("poison", ["nan", "inf"])
def test_a_skipped_step_does_not_advance_the_schedule(ranks, poison):
    for rank in ranks:
        lrs = [m["lr"] for m in rank.metrics[f"skipped, {poison}"]]
        assert lrs == pytest.approx([0.0025, 0.005, 0.005])


@pytest.mark.parametrize(
    "name", ["offloaded parameters", "offloaded optimizer", "all offloaded", "kept after forward"]
)
def test_where_things_are_kept_changes_no_bit(ranks, name):
    for rank in ranks:
        assert rank.metrics[name] == rank.metrics["as is"]
        assert largest_gap(rank.tensors[name], rank.tensors["as is"]) == 0.0


def test_recomputing_activations_changes_nothing(ranks):
    for rank in ranks:
        for got, expected in zip(rank.metrics["recomputed"], rank.metrics["as is"], strict=True):
            assert got == pytest.approx(expected, rel=1e-6, abs=1e-7)
        assert largest_gap(rank.tensors["recomputed"], rank.tensors["as is"]) < 1e-6


def test_bf16_computes_on_float32_master_weights(ranks):
    for rank in ranks:
        assert rank.notes["bf16"]["master"] == {torch.float32}
        assert rank.notes["bf16"]["sent"] == {torch.bfloat16}
        assert rank.notes["fp32, slow"]["sent"] == {torch.float32}
        # A step of 1e-6 is far below what bf16 weights could hold.
        assert rank.notes["bf16"]["moved"] == rank.notes["fp32, slow"]["moved"]
        exact, rounded = rank.metrics["fp32, slow"][0], rank.metrics["bf16"][0]
        assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.05)
        assert rounded["grad_norm"] != exact["grad_norm"]


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_weights_of_a_folder_reach_every_rank_exactly(ranks, folders, name):
    stored = load_file(Path(folders[name], "model.safetensors"))
    for rank in ranks:
        sent = rank.tensors[name]
        assert rank.notes[name]["tied"] == (name == "tied")
        assert sent.keys() == stored.keys() | {"lm_head.weight"}
        assert all(torch.equal(sent[k], v) for k, v in stored.items())
        if name == "tied":
            embedding = sent["model.language_model.embed_tokens.weight"]
            assert torch.equal(sent["lm_head.weight"], embedding)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_weight_sync_leaves_out_a_frozen_tower_alone_which_every_rank_has_whole(
    ranks, folders, name
):
    stored = load_file(Path(folders[name], "model.safetensors"))
    tower = {k: v for k, v in stored.items() if k.startswith("model.visual.")}
    for rank in ranks:
        assert rank.tensors[name].keys() - rank.tensors[name + ", frozen"].keys() == tower.keys()
        own = rank.tensors[name + ", own tower"]
        assert own.keys() == tower.keys()
        assert all(torch.equal(own[k], v) for k, v in tower.items())


@pytest.mark.parametrize("tower", ["frozen", "trained"])
def test_after_weight_sync_rollout_log_probs_equal_the_actors(ranks, tower):
    for rank in ranks:
        assert rank.notes["sync, " + tower]["tokens"] > 20
        assert rank.gaps["sync, " + tower] < 2e-5


@pytest.mark.parametrize("tower", ["frozen", "trained"])
def test_ranks_whose_prompts_make_different_numbers_of_waves_all_finish(ranks, tower):
    notes = [r.notes[f"sync, {tower}"] for r in ranks]
    assert [n["waves"] for n in notes] == [2, 1]
    assert [n["responses"] for n in notes] == [6, 6]


def test_a_reference_is_the_actor_at_the_start_and_trains_nothing(ranks):
    for rank in ranks:
        assert rank.gaps["reference"] == 0.0
        assert rank.notes["reference"] == {"trained": [], "optimizer": False}


def test_ranks_with_a_frozen_tower_encode_different_numbers_of_media(ranks):
    # Without a store once a call: three pieces and one, or none, and then one, twice.
    assert [r.notes["encoded, frozen"] for r in ranks] == [5, 2]


def test_ranks_with_a_trained_tower_encode_together_and_keep_nothing(ranks):
    assert [r.notes["encoded, trained"] for r in ranks] == [5, 2]


@pytest.mark.parametrize("tower", ["frozen", "trained"])
def test_all_ranks_see_the_same_features_of_the_same_media(ranks, tower):
    first, second = (r.tensors[f"encoded, {tower}"] for r in ranks)
    torch.testing.assert_close(first["clip"], second["clip"], atol=1e-6, rtol=0)
    torch.testing.assert_close(first["all"][:8], second["clip"], atol=1e-6, rtol=0)


def test_random_weights_follow_from_the_seed_and_not_from_the_number_of_workers(folders, ranks):
    with lone_rank():
        weights = [whole_weights(tiny_engine(folders["random"], seed=s)) for s in (1, 1, 2)]
    assert largest_gap(weights[0], weights[1]) == 0.0
    assert largest_gap(weights[0], weights[2]) > 0.1
    for rank in ranks:
        assert largest_gap(weights[0], rank.tensors["random"]) == 0.0


@pytest.mark.parametrize("optim", [OPTIM, None], ids=["actor", "reference"])
def test_a_frozen_tower_in_bf16_keeps_its_frequencies_and_its_name(folders, optim):
    model = replace(MODEL, init="pretrained", model_path=folders["tied"])
    with lone_rank():
        engine = tiny_engine(folders["tied"], model, fsdp=FSDPConfig(mp_param="bf16"), optim=optim)
        tower = engine.adapter.vision_tower(engine.policy.hf)
        assert tower is not None
        assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}
        frequencies = dict(tower.named_buffers())
        assert frequencies and {b.dtype for b in frequencies.values()} == {torch.float32}
        assert tower_fingerprint(tower) == checkpoint_fingerprint(model, torch.bfloat16)


@pytest.mark.parametrize(("saved", "now"), [("bf16", "fp32"), ("fp32", "bf16"), (None, "bf16")])
def test_moments_of_another_precision_are_refused(tmp_path, saved, now):
    with lone_rank():
        engine = tiny_engine(write_model(tmp_path), optim=OptimConfig(moment_dtype=now))
        assert engine.rank_state()["moments"] == now
        state = {"skipped_steps": 0} | ({"moments": saved} if saved else {})
        with pytest.raises(
            CheckpointError, match=f"go on with optim.moment_dtype={saved or 'fp32'}"
        ):
            engine.restore(state)
        engine.restore(engine.rank_state())
