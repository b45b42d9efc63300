"""What saves memory on long rows changes no gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import run_gloo
from tests.workers.tiny_runs import (
    MODEL,
    TEMPERATURE,
    keep_gradients,
    largest_gap,
    lone_rank,
    own_share,
    rl_batch,
    tiny_actor,
    tiny_engine,
    totals_of,
    write_model,
)
from verl.config.worker import FSDPConfig, OffloadConfig
from verl.sequence_parallel import tail as tail_module
from verl.sequence_parallel import tree
from verl.sequence_parallel.packing import PackedRow
from verl.sequence_parallel.tail import Tail, tail_of
from verl.utils import host_stash
from verl.workers import fsdp_engine

ROUNDING = 2e-5
CHECKPOINTED = replace(MODEL, enable_gradient_checkpointing=True)
PLAIN: dict[str, Any] = {"model": MODEL, "kernel": "sdpa"}
CASES: dict[str, dict[str, Any]] = {
    "all computed again": {
        "model": replace(CHECKPOINTED, keep_attention=False, mlp_tile_tokens=-1),
        "kernel": "exact",
    },
    "attention kept": {"model": replace(CHECKPOINTED, mlp_tile_tokens=-1), "kernel": "exact"},
    "MLP by tiles": {
        "model": replace(CHECKPOINTED, keep_attention=False, mlp_tile_tokens=7),
        "kernel": "sdpa",
    },
    "both": {"model": replace(CHECKPOINTED, mlp_tile_tokens=5), "kernel": "exact"},
    "the last layer whole": {
        "model": replace(CHECKPOINTED, mlp_tile_tokens=5, trim_last_layer=False),
        "kernel": "exact",
    },
    "the last layer trimmed, without checkpoints": {"model": MODEL, "kernel": "exact"},
    "compiled": {
        "model": replace(CHECKPOINTED, mlp_tile_tokens=5, compile_pointwise="on"),
        "kernel": "exact",
    },
    "both, and what is saved is handed out": {
        "model": replace(CHECKPOINTED, mlp_tile_tokens=5),
        "kernel": "exact",
        "offload": OffloadConfig(offload_activations=True),
    },
}


def collect(
    rank: int, world_size: int, folder: str
) -> dict[str, tuple[dict[str, Tensor], int, list[float]]]:
    """Gradients of an update, how often attention's forward ran, and what tails were kept."""
    calls: list[str] = []
    tails: list[float] = []

    def spied(row: PackedRow, device: torch.device) -> Tail | None:
        tail = tail_of(row, device)
        tails.append(1.0 if tail is None else len(tail.rows_R) / len(row.ids_S))
        return tail

    fsdp_engine.tail_of = spied
    tail_module.MOST = 1.0  # the responses of tiny rows are most of them
    exact = tree.KERNELS["exact"]
    forward = exact.forward
    exact.forward = lambda *args: calls.append("forward") or forward(*args)  # type: ignore
    found = {}
    for name, case in {"plain": PLAIN, **CASES}.items():
        settings = {k: v for k, v in case.items() if k not in ("kernel", "model")}
        engine = tiny_engine(folder, case["model"], **settings)
        engine._attention = case["kernel"]
        gradients = keep_gradients(engine)
        batch = rl_batch(engine.adapter)
        calls.clear()
        tails.clear()
        actor = tiny_actor(engine, micro_batch_size_per_device_for_update=12)
        actor.update(own_share(batch, rank, world_size), totals_of(batch), TEMPERATURE)
        found[name] = gradients[0], len(calls), list(tails)
    return found


@pytest.fixture(scope="module", params=[1, 2])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = str(write_model(tmp_path_factory.mktemp("model")))
    return run_gloo(collect, request.param, folder)[0]


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_without_checkpointing(results, case):
    assert largest_gap(results[case][0], results["plain"][0]) < ROUNDING


def test_tails_are_kept_where_the_settings_say(results):
    trims = {name for name, (_, _, tails) in results.items() if min(tails, default=1.0) < 1}
    whole = {"plain", "MLP by tiles", "the last layer whole"}
    assert trims == set(results) - whole


def test_attention_that_is_kept_is_computed_once(results):
    assert results["all computed again"][1] == 2 * results["attention kept"][1] > 0
    assert results["both"][1] == results["attention kept"][1]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LONG = 10**8
"""Cycles that a stream sleeps: far longer than any copy here takes."""


@pytest.fixture
def stash(monkeypatch: pytest.MonkeyPatch) -> host_stash.HostStash:
    monkeypatch.setattr(host_stash, "LEAST_BYTES", 0)
    monkeypatch.setattr(host_stash, "PIECE_BYTES", 2**20)
    return host_stash.HostStash(torch.device("cuda"))


@needs_gpu
def test_what_waits_on_the_host_comes_back_as_it_was(stash):
    expected = [torch.randn(1000, 1000, device="cuda") for _ in range(8)]
    handles = [stash.put(t.clone()) for t in expected]
    assert not any(isinstance(handle, Tensor) for handle in handles)
    for handle, right in zip(handles[::-1], expected[::-1], strict=True):
        assert torch.equal(stash.take(handle), right)


@needs_gpu
def test_what_is_still_being_computed_is_waited_for(stash):
    expected = torch.randn(3000, 1000, device="cuda")
    late = torch.zeros_like(expected)
    torch.cuda._sleep(LONG)
    late.copy_(expected)
    assert torch.equal(stash.take(stash.put(late)), expected)


@needs_gpu
def test_memory_that_is_being_copied_out_is_not_used_anew(stash):
    expected = torch.randn(3000, 1000, device="cuda")
    with torch.cuda.stream(stash._stream):
        torch.cuda._sleep(LONG)
    handle = stash.put(expected.clone())
    # Allocated and filled before the copy has begun: in the clone's memory, if that were free.
    others = [torch.full_like(expected, torch.nan) for _ in range(4)]
    assert torch.equal(stash.take(handle), expected)
    del others


@needs_gpu
def test_memory_that_is_still_written_is_not_filled_yet(stash):
    expected = torch.randn(3000, 1000, device="cuda")
    handle = stash.put(expected.clone())
    torch.cuda.synchronize()
    stash._leaving.clear()
    torch.cuda.empty_cache()
    other = torch.empty_like(expected)
    torch.cuda._sleep(LONG)
    other.fill_(torch.nan)
    del other  # its memory is what the fetched tensor gets, and is written later on
    assert torch.equal(stash.take(handle), expected)


@needs_gpu
def test_on_a_gpu_activations_on_the_host_change_no_gradient(monkeypatch, tmp_path):
    monkeypatch.setattr(host_stash, "LEAST_BYTES", 0)
    folder = write_model(tmp_path)
    gradients = {}
    with lone_rank("cpu:gloo,cuda:nccl"):
        for offloaded in (False, True):
            engine = tiny_engine(
                folder, replace(CHECKPOINTED, mlp_tile_tokens=5), device="cuda",
                fsdp=FSDPConfig(mp_param="fp32"),
                offload=OffloadConfig(offload_activations=offloaded),
            )  # fmt: skip
            engine._attention = "exact"
            kept = keep_gradients(engine)
            batch = rl_batch(engine.adapter)
            actor = tiny_actor(engine, micro_batch_size_per_device_for_update=12)
            actor.update(batch, totals_of(batch), TEMPERATURE)
            gradients[offloaded] = kept[0]
    assert largest_gap(gradients[True], gradients[False]) < ROUNDING
