"""One of two gloo ranks; run by test_shards.py. Writes what it saw to `<folder>/rank_<r>.json`."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_net import TinyNet, make_optimizer, train

from verl.utils.checkpoint import CheckpointError, read_shards, write_shards
from verl.utils.torch_functional import clip_and_check


def sharded(seed: int):
    torch.manual_seed(seed)
    model = TinyNet()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=set(model.frozen.parameters()))
    return model, *make_optimizer(model)


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, value in model.state_dict().items():
        if name != "head.weight":
            tensors[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return tensors


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def message_of(work) -> str:
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return ""


def main(rank: int, port: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    seen: dict[str, object] = {}
    model, optimizer, schedule = sharded(0)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    train(model, optimizer, schedule, 3)
    write_shards(folder / "two", state, {"skipped": rank, "noise": torch.full((2,), rank)})
    if rank == 0:
        shutil.copytree(folder / "two", folder / "damaged")
    reference = full(model)
    if rank == 0:
        save_file(reference, folder / "reference.safetensors")
    on = train(model, optimizer, schedule, 2)

    again, optimizer2, schedule2 = sharded(1)
    state2 = {"model": again, "optimizer": optimizer2, "schedule": schedule2}
    rank_state = read_shards(folder / "two", state2)
    seen["rank_state"] = [rank_state["skipped"], rank_state["noise"].tolist()]
    seen["weights_equal"] = same(full(again), reference)
    seen["losses_equal"] = train(again, optimizer2, schedule2, 2) == on
    seen["weights_equal_after_two_more_steps"] = same(full(again), full(model))

    before = full(again)
    if rank == 0:
        shard = folder / "damaged" / "__1_0.distcp"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    dist.barrier()
    seen["damaged"] = message_of(lambda: read_shards(folder / "damaged", state2))
    seen["untouched_by_damage"] = same(full(again), before)

    seen["from_one"] = read_shards(folder / "one", state2)
    if rank == 0:
        save_file(full(again), folder / "from_one.safetensors")
    else:
        full(again)

    sum((p.float() ** 2).sum() for p in again.parameters() if p.requires_grad).backward()
    parameters = [p for p in again.parameters() if p.grad is not None]
    seen["norm"] = clip_and_check(parameters, 0.5)
    seen["norm_after"] = clip_and_check(parameters, 1e9)
    if rank == 1:
        parameters[0].grad.to_local().fill_(float("nan"))
    seen["finite_with_a_nan_on_rank_1"] = clip_and_check(parameters, 1.0)[1]

    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
    seen["disk_full"] = message_of(lambda: write_shards(folder / "full", state2))
    sys.stdout.write(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    # A write that failed can leave a native thread behind, which now and then aborts the exit of
    # the interpreter: "terminate called without an active exception".
    sys.stdout.flush()
    os._exit(0)
