"""Tensors of a checkpoint: bitwise resume, resharding, damage and full disks, on two gloo ranks."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_net import TinyNet, make_optimizer, train
from torch import nn

from verl.utils.checkpoint import CheckpointError, read_shards, write_shards
from verl.utils.safe_dcp import read_metadata
from verl.utils.torch_functional import clip_and_check

HERE = Path(__file__).resolve().parent


def make_state(seed: int) -> dict:
    torch.manual_seed(seed)
    model = TinyNet()
    optimizer, schedule = make_optimizer(model)
    return {"model": model, "optimizer": optimizer, "schedule": schedule}


def train_state(state: dict, steps: int) -> list[float]:
    return train(state["model"], state["optimizer"], state["schedule"], steps)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Runs two gloo ranks once; what each saw, the folder they shared, and the one-worker state."""
    folder = tmp_path_factory.mktemp("shards")
    one = make_state(5)
    train_state(one, 2)
    write_shards(folder / "one", one, {"skipped": 7})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "shard_ranks.py"), str(rank), str(port), str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    seen = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-3000:]
        seen.append(json.loads(out.splitlines()[-1]))
    return seen, folder, one


@pytest.mark.parametrize("rank", [0, 1])
def test_resuming_with_the_same_workers_is_bitwise(ranks, rank):
    seen = ranks[0][rank]
    assert seen["weights_equal"]
    assert seen["losses_equal"]
    assert seen["weights_equal_after_two_more_steps"]


def test_each_rank_gets_its_own_state_back(ranks):
    assert [r["rank_state"] for r in ranks[0]] == [[0, [0, 0]], [1, [1, 1]]]


def test_one_flipped_bit_is_refused_on_all_ranks_and_loads_nothing(ranks):
    for seen in ranks[0]:
        assert "__1_0.distcp is damaged" in seen["damaged"]
        assert seen["untouched_by_damage"]


def test_a_full_disk_on_one_rank_is_an_error_on_all_of_them(ranks):
    for seen in ranks[0]:
        assert "rank 1" in seen["disk_full"]
        assert "too large" in seen["disk_full"] or "Errno 27" in seen["disk_full"]


def test_two_ranks_read_what_one_wrote(ranks):
    seen, folder, one = ranks
    found = load_file(folder / "from_one.safetensors")
    expected = one["model"].state_dict()
    assert found.keys() == expected.keys() - {"head.weight"}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert [s["from_one"] for s in seen] == [{"skipped": 7}, {"skipped": 7}]


def test_one_process_reads_what_two_wrote(ranks, caplog):
    _, folder, _ = ranks
    state = make_state(9)
    rank_state = read_shards(folder / "two", state)
    expected = load_file(folder / "reference.safetensors")
    assert rank_state["skipped"] == 0
    assert all(torch.equal(state["model"].state_dict()[n], t) for n, t in expected.items())
    assert state["model"].head.weight is state["model"].embed.weight
    assert "written by 2 workers and is read by 1" in caplog.text
    moments = state["optimizer"].state[state["model"].embed.weight]
    assert moments["step"] == 3 and moments["exp_avg"].abs().sum() > 0
    assert state["schedule"].last_epoch == 3
    after = train_state(state, 1)
    state2 = make_state(10)
    read_shards(folder / "two", state2)
    assert train_state(state2, 1) == after, "the derived random numbers are reproducible"


def test_gradient_norm_is_over_all_ranks_and_one_nan_stops_all(ranks):
    seen, folder, _ = ranks
    model = TinyNet()
    model.load_state_dict(load_file(folder / "from_one.safetensors"), strict=False)
    sum((p.float() ** 2).sum() for p in model.parameters() if p.requires_grad).backward()
    norm, finite = clip_and_check(model.parameters(), 0.5)
    assert finite
    for rank in seen:
        assert rank["norm"] == pytest.approx([norm, True], rel=1e-6)
        assert rank["norm_after"] == pytest.approx([0.5, True], rel=1e-4)
        assert rank["finite_with_a_nan_on_rank_1"] is False
    assert seen[0]["norm"] == seen[1]["norm"]


def test_a_non_finite_norm_leaves_gradients_alone():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([float("inf"), 1.0])
    assert clip_and_check([weight], 1.0) == (float("inf"), False)
    assert weight.grad.tolist() == [float("inf"), 1.0]


def test_one_process_resumes_bitwise(tmp_path):
    state = make_state(0)
    train_state(state, 2)
    write_shards(tmp_path / "actor", state)
    on = train_state(state, 2)
    again = make_state(1)
    read_shards(tmp_path / "actor", again)
    assert train_state(again, 2) == on


def test_an_optimizer_that_never_stepped_stays_that_way(tmp_path):
    write_shards(tmp_path / "actor", make_state(0))
    state = make_state(1)
    train_state(state, 1)
    read_shards(tmp_path / "actor", state)
    assert not state["optimizer"].state


@pytest.fixture
def saved(tmp_path):
    state = make_state(0)
    train_state(state, 1)
    write_shards(tmp_path / "actor", state)
    return tmp_path / "actor"


def test_another_shape_is_named(saved):
    state = make_state(1)
    state["model"].norm = nn.LayerNorm(34)
    state["optimizer"], state["schedule"] = make_optimizer(state["model"])
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \(33,\) in the checkpoint"):
        read_shards(saved, state)


def test_another_dtype_is_named_instead_of_cast(saved):
    state = make_state(1)
    state["model"].frozen.float()
    with pytest.raises(CheckpointError, match=r"frozen\.weight is torch\.bfloat16 in the check"):
        read_shards(saved, state)


def test_a_layer_too_many_is_named(saved):
    state = make_state(1)
    state["model"].blocks.append(nn.Linear(33, 33))
    with pytest.raises(CheckpointError, match=r"blocks\.2\.weight is not in the checkpoint"):
        read_shards(saved, state)


class Hostile:
    """Pickles to a call of `os.system`."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_metadata_that_runs_a_command_is_refused(saved, tmp_path):
    (saved / ".metadata").write_bytes(pickle.dumps(Hostile(f"touch {tmp_path}/pwned")))
    with pytest.raises(CheckpointError, match=r"asks for posix\.system: refused"):
        read_metadata(saved)
    assert not (tmp_path / "pwned").exists()


def test_metadata_that_reaches_a_command_through_an_allowed_module_is_refused(saved, tmp_path):
    module, name = "torch.distributed.checkpoint.metadata", "os.system"
    command = f"touch {tmp_path}/pwned"
    code = b"\x80\x04"
    for text in (module, name):
        code += b"\x8c" + bytes([len(text)]) + text.encode()
    code += b"\x93\x8c" + bytes([len(command)]) + command.encode() + b"\x85R."
    (saved / ".metadata").write_bytes(code)
    with pytest.raises(CheckpointError, match=r"metadata\.os\.system: refused"):
        read_metadata(saved)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x04]."])
def test_damaged_metadata_is_named(saved, content):
    (saved / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        read_metadata(saved)
