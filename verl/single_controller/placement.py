"""Where workers run, and with which environment."""

from __future__ import annotations

import os
from collections.abc import Mapping

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from verl.utils.exits import Explained
from verl.utils.processes import usable_cores

SECONDS_TO_PLACE = 60.0
_PASSED_ON = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HOME", "TRANSFORMERS_OFFLINE",
              "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "PYTHONHASHSEED")  # fmt: skip
_PASSED_ON_PREFIXES = ("VERL_", "VLLM_", "NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_FR_")


class ResourcesMissing(Explained, RuntimeError):
    """The Ray cluster cannot hold the workers."""

    exit_code = 2


def place(n_workers: int, cpus: float, gpus: int) -> tuple[PlacementGroup, list[int]]:
    """Reserves a bundle a worker; returns the placement and the bundle of each rank.

    Ranks that follow each other share a node as far as possible, so that groups of neighbours do.

    Raises:
        ResourcesMissing: the cluster is too small, or others hold what is needed. Ray itself
            would wait forever.
    """
    bundle = {"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {})}
    need = {kind: amount * n_workers for kind, amount in bundle.items()}
    _check(n_workers, need, ray.cluster_resources(), "has")
    placement = placement_group([dict(bundle) for _ in range(n_workers)], strategy="PACK")
    ready, _ = ray.wait([placement.ready()], timeout=SECONDS_TO_PLACE)
    if not ready:
        remove_placement_group(placement)
        _check(n_workers, need, ray.available_resources(), "has free")
        raise ResourcesMissing(
            f"{n_workers} workers of {bundle} do not fit on the nodes of the Ray cluster, although "
            f"their sum does; free resources: {ray.available_resources()}."
        )
    nodes = placement_group_table(placement)["bundles_to_node_id"]
    return placement, sorted(range(n_workers), key=lambda i: (nodes[i], i))


def worker_environment(n_workers: int, device: str, env_vars: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of a worker process; `env_vars` win over all others.

    Workers of a cluster that was started elsewhere do not inherit ours, so what matters is passed.
    """
    env = {
        key: value
        for key, value in os.environ.items()
        if key in _PASSED_ON or key.startswith(_PASSED_ON_PREFIXES)
    }
    n_nodes = sum(node["Alive"] for node in ray.nodes())
    workers_a_node = -(-n_workers // n_nodes)
    env.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // workers_a_node)))
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    return {**env, **env_vars}


def _check(n_workers: int, need: Mapping[str, float], have: Mapping[str, float], verb: str) -> None:
    missing = {kind for kind, amount in need.items() if have.get(kind, 0) < amount}
    if not missing:
        return
    wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in need.items())
    found = " and ".join(f"{have.get(kind, 0):g} {kind}" for kind in need)
    fits = int(min(have.get(kind, 0) * n_workers / amount for kind, amount in need.items()))
    advice = ["use trainer.device=cpu"] if "GPU" in missing else []
    if fits:
        advice.append(f"use at most {fits} workers (trainer.nnodes x trainer.n_gpus_per_node)")
    raise ResourcesMissing(
        f"{n_workers} workers need {wanted}; the Ray cluster {verb} {found}; "
        f"{' or '.join(advice) or 'wait until others have finished'}."
    )
