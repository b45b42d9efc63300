"""The workers' half of a checkpoint: each rank writes and reads its share of the tensors.

A folder `actor/` holds DCP shards (`.metadata`, `__<rank>_*.distcp`), one `rank_<r>.safetensors` a
rank (random number generators and the rank's own state), `state.json` (learning-rate schedule,
hyperparameters of the optimizer) and `manifest.json`. Tensor names are `model.<name>` and
`optimizer.<name>.<moment>`, with the names of the module's `state_dict()`. Of tied parameters the
first name is stored.

All functions are collectives when torch.distributed is initialised, and work alone when it is not.
An error on one rank is raised on all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata

from verl.utils.manifest import (
    CheckpointError,
    check_files,
    from_json,
    fsync,
    hash_file,
    read_json,
    read_manifest,
    refuse,
    to_json,
    versions,
    write_json,
    write_manifest,
)
from verl.utils.rng import derive_rng_state, rng_state, set_rng_state
from verl.utils.safe_dcp import (
    METADATA,
    differences,
    load_tensors,
    read_metadata,
    save_tensors,
    tensor_table,
)

logger = logging.getLogger(__name__)
STATE = "state.json"
RNG_PREFIX = "rng."
T = TypeVar("T")


@dataclass(frozen=True)
class AbsentTensors:
    """Part of a model that the workers run without, and that a checkpoint holds all the same."""

    names: frozenset[str]
    """As in the `state_dict()` of the whole model."""
    load: Callable[[], dict[str, Tensor]]
    """Called on rank 0 when a checkpoint is written."""


def write_shards(
    folder: Path, state: Mapping[str, Any], rank_state: Mapping[str, Any] | None = None
) -> None:
    """Writes model, optimizer and further state into `folder`, which must be new or empty.

    `state`: "model" (a module, sharded or not), optionally "optimizer" (may be None), and any
    objects with `state_dict()` that JSON can hold, such as a learning-rate schedule, and `absent`,
    an `AbsentTensors`, so that a checkpoint is whole whatever part of the model ran. `rank_state`:
    what differs by rank, tensors or JSON values. Generators of random numbers are always saved.
    """
    rank, world_size = _rank(), _world_size()
    folder.mkdir(parents=True, exist_ok=True)
    tensors, host = _collect(state)
    save_tensors(folder, tensors)
    own = agree(lambda: _write_own_files(folder, rank, rank_state or {}, host), "writing")
    records = {name: record for part in _gather(own) for name, record in part.items()}
    agree(lambda: _write_manifest(folder, records, world_size) if rank == 0 else None, "writing")


def _collect(state: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Splits the state into tensors for DCP and the rest, which is the same on all ranks."""
    model: nn.Module = state["model"]
    tensors: dict[str, dict[str, Tensor]] = {"model": model_tensors(model)}
    host: dict[str, Any] = {"tied": tied_names(model)}
    for key, part in state.items():
        if key == "model" or part is None:
            continue
        if isinstance(part, AbsentTensors):
            load = part.load if _rank() == 0 else dict[str, Tensor]
            tensors["model"] |= agree(load, "reading the rest of the model for")
            continue
        if isinstance(part, torch.optim.Optimizer):
            tensors[key] = optimizer_tensors(model, part)
            host[key] = optimizer_groups(model, part)
        else:
            host[key] = part.state_dict()
    return tensors, host


def _write_own_files(
    folder: Path, rank: int, rank_state: Mapping[str, Any], host: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Writes and hashes the files of this rank; returns their manifest entries."""
    tensors = {f"{RNG_PREFIX}{k}": v for k, v in rng_state().items()}
    tensors |= {k: v.contiguous() for k, v in rank_state.items() if isinstance(v, Tensor)}
    values = {k: v for k, v in rank_state.items() if not isinstance(v, Tensor)}
    path = folder / f"rank_{rank}.safetensors"
    save_file(tensors, path, metadata={"values": json.dumps(values)})
    fsync(path)
    own = [path, *folder.glob(f"__{rank}_*.distcp")]
    if rank == 0:
        write_json(folder / STATE, host)
        own += [folder / STATE, folder / METADATA]
    return to_json({p.name: hash_file(p) for p in own})


def _write_manifest(folder: Path, records: Mapping[str, Any], world_size: int) -> None:
    table = tensor_table(read_metadata(folder))
    content = {
        "world_size": world_size,
        "versions": versions(),
        "files": records,
        "tensors": {
            name: {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
            for name, (dtype, shape) in table.items()
        },
    }
    write_manifest(folder, content)
    fsync(folder)


def read_shards(folder: Path, state: Mapping[str, Any], *, verify: bool = True) -> dict[str, Any]:
    """Fills the objects of `state` from what `write_shards` wrote; returns the rank's own state.

    Every file is compared with the manifest before any of it is parsed, and dtypes and shapes
    before anything is loaded. Random number generators continue where they were. With another
    number of workers tensors are resharded, generators are seeded anew (logged), and the state
    that is returned is rank 0's. After an error the objects must not be used.
    """
    manifest = agree(lambda: _verified_manifest(folder, verify), "verifying")
    metadata = agree(lambda: read_metadata(folder), "reading")
    host = agree(lambda: read_json(folder / STATE), "reading")
    model: nn.Module = state["model"]
    tensors: dict[str, dict[str, Tensor]] = {"model": model_tensors(model)}
    for key, part in state.items():
        if isinstance(part, torch.optim.Optimizer):
            tensors[key] = _allocate_optimizer(model, part, key, metadata)
    agree(lambda: _check_fit(folder, tensors, metadata, host, state), "comparing")
    load_tensors(folder, tensors, metadata)
    for key, part in state.items():
        if isinstance(part, torch.optim.Optimizer):
            _install_optimizer(model, part, tensors[key], host[key])
        elif key in host and part is not None:
            part.load_state_dict(host[key])
    return agree(lambda: _restore_rank(folder, int(manifest["world_size"])), "reading")


def _verified_manifest(folder: Path, verify: bool) -> dict[str, Any]:
    """The manifest, once this rank's share of the files has been found intact."""
    manifest = read_manifest(folder)
    records = from_json(manifest.get("files", {}))
    names = sorted(records, key=lambda n: -records[n].size)
    names = names[_rank() :: _world_size()] if verify else []
    refuse(folder, check_files(folder, {n: records[n] for n in names}))
    return manifest


def _check_fit(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    metadata: Metadata,
    host: Mapping[str, Any],
    state: Mapping[str, Any],
) -> None:
    wanted = {f"{key}.{n}": t for key, part in tensors.items() for n, t in part.items()}
    prefixes = tuple(f"{key}." for key in tensors)
    absent = state.get("absent")
    unread = {f"model.{name}" for name in absent.names} if absent is not None else set()
    table = tensor_table(metadata)
    found = {n: v for n, v in table.items() if n.startswith(prefixes) and n not in unread}
    problems = differences(wanted, found)
    problems += [
        f"{key} is not in the checkpoint"
        for key, part in state.items()
        if key not in ("model", "absent") and part is not None and key not in host
    ]
    if problems:
        raise CheckpointError(
            f"checkpoint {folder} does not fit this model: {'; '.join(problems[:5])}"
            f"{f' (and {len(problems) - 5} more)' if len(problems) > 5 else ''}; use the model "
            "and the settings it was trained with"
        )


def _restore_rank(folder: Path, saved_world_size: int) -> dict[str, Any]:
    rank, world_size = _rank(), _world_size()
    same = saved_world_size == world_size
    with safe_open(folder / f"rank_{rank if same else 0}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        values = json.loads((file.metadata() or {}).get("values", "{}"))
    generators = {
        n.removeprefix(RNG_PREFIX): t for n, t in tensors.items() if n.startswith(RNG_PREFIX)
    }
    if same:
        set_rng_state(generators)
    else:
        seed = derive_rng_state(generators, rank, world_size)
        logger.warning(
            "checkpoint %s was written by %d workers and is read by %d: tensors are resharded, "
            "random numbers of rank %d go on from seed %d",
            folder, saved_world_size, world_size, rank, seed,
        )  # fmt: skip
    return values | {n: t for n, t in tensors.items() if not n.startswith(RNG_PREFIX)}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The module's live tensors by name, each tied one once."""
    tied = tied_names(model)
    state = model.state_dict()  # FSDP reshards here, so that names below mean sharded parameters
    return {n: t for n, t in state.items() if n not in tied and isinstance(t, Tensor)}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names that mean the same parameter as an earlier name: {later name: first name}."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return tied


def _names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in reversed(list(model.named_parameters()))}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of the optimizer as `<parameter name>.<moment>`, for parameters that have any."""
    names = _names(model)
    tensors = {}
    for parameter, moments in optimizer.state.items():
        for moment, value in moments.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"the optimizer keeps {moment}={value!r} for {names[id(parameter)]}; only "
                    "tensors can be saved"
                )
            tensors[f"{names[id(parameter)]}.{moment}"] = value
    return tensors


def optimizer_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Parameter groups with names in place of tensors."""
    names = _names(model)
    return [
        {k: v for k, v in group.items() if k != "params"}
        | {"params": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]


def _allocate_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, key: str, metadata: Metadata
) -> dict[str, Tensor]:
    """Empty tensors for the moments that the checkpoint holds, sharded as their parameters are."""
    names = _names(model)
    parameters = {names[id(p)]: p for g in optimizer.param_groups for p in g["params"]}
    on_device = any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
    tensors = {}
    for full_name, (dtype, shape) in tensor_table(metadata).items():
        if not full_name.startswith(f"{key}."):
            continue
        name = full_name.removeprefix(f"{key}.")
        owner = name.rpartition(".")[0]
        if owner not in parameters:
            continue  # named by `_check_fit`, as a tensor without a place
        if shape == parameters[owner].shape:
            tensors[name] = torch.zeros_like(parameters[owner].detach(), dtype=dtype)
        else:
            device = parameters[owner].device if on_device else "cpu"
            tensors[name] = torch.zeros(shape, dtype=dtype, device=device)
    return tensors


def _install_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    groups: list[dict[str, Any]],
) -> None:
    names = _names(model)
    by_name = {names[id(p)]: p for g in optimizer.param_groups for p in g["params"]}
    saved = {name: group for group in groups for name in group["params"]}
    if saved.keys() != by_name.keys():
        odd = sorted(saved.keys() ^ by_name.keys())
        raise CheckpointError(
            f"{odd[0]} is trained in one of checkpoint and run but not in the other (and "
            f"{len(odd) - 1} more); freeze_vision_tower and the like must be as they were"
        )
    for group in optimizer.param_groups:
        for key, value in saved[names[id(group["params"][0])]].items():
            if key != "params":
                group[key] = tuple(value) if isinstance(value, list) else value
    optimizer.state.clear()
    for name, tensor in tensors.items():
        owner, _, moment = name.rpartition(".")
        optimizer.state[by_name[owner]][moment] = tensor


def agree(work: Callable[[], T], doing: str) -> T:
    """Runs `work` on every rank; when it fails on any, raises CheckpointError on all of them.

    Without it a rank that fails alone leaves the others waiting in the next collective.
    """
    result, problem = None, None
    try:
        result = work()
    except CheckpointError as error:
        problem = str(error)
    except Exception as error:  # Whatever it is, the other ranks must learn of it.
        problem = f"{type(error).__name__}: {error}"
        logger.exception("%s a checkpoint failed", doing)
    problems = {rank: p for rank, p in enumerate(_gather(problem)) if p is not None}
    if len(set(problems.values())) == 1 and len(problems) == _world_size():
        raise CheckpointError(next(iter(problems.values())))
    if problems:
        raise CheckpointError("; ".join(f"rank {rank}: {p}" for rank, p in problems.items()))
    return result  # type: ignore[return-value]


def _gather(value: T) -> list[T]:
    if not dist.is_initialized():
        return [value]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
