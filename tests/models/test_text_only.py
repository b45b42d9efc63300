"""Llama and Qwen2 without a tower: every path gives what transformers' own classes give."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.conftest import run_gloo
from tests.tiny import EOS_ID, tiny_text_config, write_tiny_text_model
from tests.workers.tiny_runs import CLIP, largest_gap, lone_rank, tiny_engine, whole_gradients
from verl.config import ModelConfig
from verl.models.adapter import ModelError, get_adapter
from verl.models.loader import build_model, save_assets
from verl.models.pointwise import Pointwise
from verl.rollout import RolloutRequest, SamplingParams, sample_seed
from verl.rollout.hf_rollout import HFRollout
from verl.sequence_parallel.attention import ATTENTION, PackedAttention, register_attention
from verl.sequence_parallel.layout import Layout
from verl.sequence_parallel.packing import Group, PackedRow, pack, without_sharing
from verl.sequence_parallel.topology import SequenceGroup
from verl.utils.checkpoint import CheckpointDir, write_shards

SCRIPT = Path(__file__).parents[2] / "scripts" / "model_merger.py"
CPU = torch.device("cpu")
TEMPERATURE = 0.7
ROUNDING = 3e-5
FAMILIES = ["llama", "qwen2"]


def model_at(folder: Path | str, **settings: Any) -> ModelConfig:
    return ModelConfig(model_path=str(folder), init="random", **settings)


def transformers_model(folder: Path | str) -> Any:
    """The oracle: transformers' class with its own attention, the weights that `init=random` draws.

    Biases and norms are drawn as well, so that they matter.
    """
    return build_model(model_at(folder), dtype=torch.float32, attention="sdpa", materialize=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("ours", [True, False], ids=["our blocks", "transformers' blocks"])
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, family, tie, ours):
    register_attention()
    folder = write_tiny_text_model(tmp_path, family, tie=tie)
    theirs, hf = transformers_model(folder), transformers_model(folder)
    for p, q in zip(theirs.parameters(), hf.parameters(), strict=True):
        p.add_(0.1 * torch.randn_like(p))
        q.copy_(p)
    hf.set_attn_implementation(ATTENTION)
    adapter = get_adapter(hf.config)
    if ours:
        assert adapter.use_packed_blocks(hf, Pointwise.plain())
    ids = torch.randint(8, 60, (23,))
    hidden = adapter.hidden(
        hf, adapter.embed(hf, ids, None), adapter.positions(ids, ()),
        PackedAttention(Layout((23,), (-1,)), CPU),
    )  # fmt: skip
    got = adapter.head(hf)(hidden)
    torch.testing.assert_close(got, theirs(input_ids=ids[None]).logits[0], atol=1e-5, rtol=1e-5)


# Rows as the trainer makes them, through the engine.


def groups() -> list[Group]:
    """Prompts with several responses, one with one, and one that goes on in two questions."""
    g = torch.Generator().manual_seed(5)

    def words(n: int) -> Tensor:
        return torch.randint(8, 60, (n,), generator=g)

    def group(n_prompt: int, *lengths: int, first: int = 0, **kwargs: Any) -> Group:
        positions = torch.arange(first, first + n_prompt).expand(3, -1)
        return Group(words(n_prompt), positions, tuple(words(n) for n in lengths), **kwargs)

    questions = (group(2, 3, 1, first=6), group(1, 4, first=6))
    return [group(5, 3, 7, 1, 4), group(1, 6), group(6, branches=questions)]


def alone(row_of: list[Group]) -> list[PackedRow]:
    return [pack([g]) for g in without_sharing(row_of)]


def weighted(logp_T: Tensor) -> Tensor:
    """A loss in which every target counts differently."""
    return (logp_T * torch.arange(1, len(logp_T) + 1).cos()).sum()


def oracle(folder: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and gradients of each sequence on its own, by transformers."""
    hf = transformers_model(folder).train()
    found = []
    for row in alone(groups()):
        logits = hf(input_ids=row.ids_S[None]).logits[0, row.predict_T] / TEMPERATURE
        found.append(logits.log_softmax(-1).gather(1, row.labels_T[:, None]).squeeze(1))
    logp_T = torch.cat(found)
    weighted(logp_T).backward()
    return logp_T.detach(), {n: p.grad for n, p in hf.named_parameters()}


@dataclass(frozen=True)
class Case:
    """How the rows are computed."""

    shared: bool = True
    checkpointing: bool = False
    keep_attention: bool = False
    tile_tokens: int = 0


CASES = [Case(), Case(shared=False), Case(checkpointing=True, keep_attention=True, tile_tokens=4)]


def run_cases(rank: int, world_size: int, folder: str) -> dict[Case, tuple[Any, Any, float]]:
    found = {}
    for case in CASES:
        settings = model_at(
            folder, enable_gradient_checkpointing=case.checkpointing,
            keep_attention=case.keep_attention, mlp_tile_tokens=case.tile_tokens,
        )  # fmt: skip
        sequence = SequenceGroup.of_neighbours(world_size, "cpu")
        engine = tiny_engine(folder, settings, sequence=sequence)
        row = pack(groups() if case.shared else without_sharing(groups()))
        logp_T, _ = engine.forward(row, features_ME=None, vision=None, temperature=TEMPERATURE)
        # Every rank of a sequence has the same loss, of which FSDP takes the mean.
        engine.backward(weighted(logp_T))
        gradients = whole_gradients(engine)
        norm = engine.optimizer_step()["grad_norm"]
        found[case] = logp_T.detach(), gradients, norm
    return found


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> str:
    return str(write_tiny_text_model(tmp_path_factory.mktemp("model"), request.param))


@pytest.mark.parametrize("world_size", [1, 3])
def test_packed_and_shared_rows_give_the_log_probs_and_gradients_of_sequences_alone(
    folder, world_size
):
    if world_size == 1:
        with lone_rank():
            ranks = [run_cases(0, 1, folder)]
    else:
        ranks = run_gloo(run_cases, world_size, folder)
    logp, gradients = oracle(folder)
    for found in ranks:
        for case, (got, grads, norm) in found.items():
            torch.testing.assert_close(got, logp, atol=ROUNDING, rtol=ROUNDING, msg=str(case))
            assert largest_gap(grads, gradients) < ROUNDING, case
            assert norm > 0


def test_a_checkpoint_merged_back_loads_in_transformers(tmp_path):
    spec: Any = importlib.util.spec_from_file_location("model_merger", SCRIPT)
    merger = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(merger)
    settings = model_at(write_tiny_text_model(tmp_path / "model"))
    with lone_rank():
        engine = tiny_engine(settings.model_path, settings)
        logp_T, _ = engine.forward(
            pack(groups()), features_ME=None, vision=None, temperature=TEMPERATURE
        )
        engine.backward(weighted(logp_T))
        engine.optimizer_step()
        with CheckpointDir(tmp_path / "run", 1) as checkpoint:
            actor = checkpoint.path / "actor"
            write_shards(actor, {"model": engine.policy.hf})
            save_assets(settings, actor / "huggingface")
            actor = checkpoint.commit({"step": 1}, config={}) / "actor"
        trained = dict(engine.named_full_tensors())
    merged = merger.merge(actor, tmp_path / "merged", dtype=torch.float32)
    hf, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(hf).__name__ == "LlamaForCausalLM"
    assert hf.state_dict().keys() == trained.keys()
    assert all(torch.equal(hf.state_dict()[name], value) for name, value in trained.items())
    assert not torch.equal(
        trained["lm_head.weight"], transformers_model(settings.model_path).lm_head.weight
    )


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_the_built_in_rollout_samples_from_the_trainers_law_after_each_sync(tmp_path, tie):
    settings = model_at(write_tiny_text_model(tmp_path, tie=tie))
    params = SamplingParams(max_tokens=8, temperature=TEMPERATURE, stop_ids=(EOS_ID,))
    with lone_rank():
        engine = tiny_engine(settings.model_path, settings)
        empty = build_model(settings, dtype=torch.float32, attention=ATTENTION, materialize=False)
        rollout = HFRollout.with_empty_weights(empty, engine.adapter, CPU, 512)
        requests = [
            RolloutRequest(
                ids, engine.adapter.positions(ids, ()), None,
                tuple(sample_seed(1, 1, str(n), k) for k in range(4)), (), f"prompt {n}",
            )
            for n in (1, 4, 9)
            for ids in [torch.arange(10, 10 + n)]
        ]  # fmt: skip
        for _ in range(2):
            names = [name for name, _ in engine.named_full_tensors()]
            assert "lm_head.weight" in names and "model.embed_tokens.weight" in names
            rollout.load_weights(engine.named_full_tensors())
            outputs = rollout.generate(requests, params)
            row = pack(
                [
                    Group(r.prompt_ids, r.positions, tuple(o.token_ids for o in samples))
                    for r, samples in zip(requests, outputs, strict=True)
                ]
            )
            logp_T, _ = engine.forward(row, features_ME=None, vision=None, temperature=TEMPERATURE)
            sampled = torch.cat([o.log_probs for samples in outputs for o in samples])
            torch.testing.assert_close(logp_T.detach(), sampled, atol=1e-4, rtol=0)
            engine.backward(weighted(logp_T))
            engine.optimizer_step()


def test_media_are_refused():
    adapter = get_adapter(tiny_text_config())
    with pytest.raises(ValueError, match="1 pieces of media, but the model reads text alone"):
        adapter.expand([9], [CLIP])
    with pytest.raises(ValueError, match="4 rows of features for a model of text alone"):
        adapter.embed(torch.nn.Module(), torch.tensor([9]), torch.zeros(4, 72))
    with pytest.raises(ValueError, match="no tower"):
        adapter.encode(torch.nn.Module(), torch.zeros(4, 8), [(1, 2, 2)])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_frequencies_that_a_packed_row_would_change_are_refused(kind):
    config = tiny_text_config()
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ModelError, match=f"rope_type='{kind}'.*use a model with one of default"):
        get_adapter(config)


def test_a_sliding_window_is_refused():
    config: Any = tiny_text_config("qwen2")
    windowed = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    config = type(config)(**config.to_dict() | windowed | {"layer_types": None})
    with pytest.raises(ModelError, match=r"config.json: use_sliding_window=true with slid.*=64"):
        get_adapter(config)


def test_the_size_follows_from_the_configuration():
    shape = get_adapter(tiny_text_config(head_dim=64)).shape
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.hidden) == (9, 3, 64, 576)
    assert shape.is_tied and not replace(shape, is_tied=False).is_tied
