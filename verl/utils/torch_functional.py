"""Small tensor helpers that several layers share."""

from __future__ import annotations

import importlib.util
import math
import random
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


@torch.no_grad()
def clip_and_check(parameters: Iterable[nn.Parameter], max_norm: float) -> tuple[float, bool]:
    """Scales gradients down to a global 2-norm of `max_norm`; returns (norm before, is it finite).

    The norm is over all ranks for sharded gradients, and both results agree on all ranks, so that
    a step is skipped everywhere or nowhere. A non-finite norm leaves the gradients untouched. A
    collective where gradients are sharded.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = math.hypot(_norm(gradients, sharded=True), _norm(gradients, sharded=False))
    finite = math.isfinite(norm)
    if finite and norm > max_norm:
        for gradient in gradients:
            _local(gradient).mul_(max_norm / (norm + 1e-6))
    return norm, finite


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _norm(gradients: list[Tensor], *, sharded: bool) -> float:
    chosen = [g for g in gradients if isinstance(g, DTensor) == sharded]
    if not chosen:
        return 0.0
    norm = get_total_norm(chosen)
    if isinstance(norm, DTensor):
        # With CPU offload gradients live on the host while the mesh communicates on the device.
        on_mesh: DTensor = norm.to(norm.device_mesh.device_type)  # type: ignore[assignment]
        return float(on_mesh.full_tensor())
    if dist.is_initialized():
        # Replicated gradients are equal by contract. Should one rank have a stray NaN, all see it:
        # as infinity, because a maximum may lose NaN.
        norm = norm.nan_to_num(nan=math.inf, posinf=math.inf)
        norm = norm.cuda() if dist.get_backend() == "nccl" else norm
        dist.all_reduce(norm, dist.ReduceOp.MAX)
    return float(norm)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values on a device; through pinned memory to a GPU, so that the host need not wait."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def compiler_missing(device: torch.device) -> str:
    """What `torch.compile` needs for a device and this machine does not have; empty: nothing."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
            return "there is no C compiler (cc, gcc or clang)"
        return ""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "there is no C++ compiler (c++, g++ or clang++)"
    return ""


@contextmanager
def same_random_state(device: torch.device) -> Iterator[None]:
    """After this block, random numbers go on as if it had not been: torch's, numpy's, Python's."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
