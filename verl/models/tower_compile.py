"""Compiles the blocks of a frozen vision tower for a GPU.

Norms, rotation and activations of a tower are many short passes over memory; `torch.compile` joins
them. Weights, names and fingerprints stay as they are; features differ
by rounding in bf16, as they do between kinds of GPUs.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from verl.models.adapter import Adapter
from verl.utils.torch_functional import compiler_missing

logger = logging.getLogger(__name__)
LEAST_PARAMETERS = 100_000_000
"""Smaller towers are done before a compiler is."""


def compile_tower(adapter: Adapter, hf: Any, device: torch.device, how: str) -> bool:
    """Compiles a tower that lies on `device`, when its features are first asked for.

    `how` is `model.compile_vision_tower`: auto compiles large towers, where a compiler is found; on
    compiles all of them. Returns whether it will. On the CPU nothing is compiled.
    """
    tower = adapter.vision_tower(hf)
    if tower is None or device.type != "cuda" or how == "off":
        return False
    if next(tower.parameters(), None) is None:  # a shell: the tower was not loaded
        return False
    if how == "auto" and not _is_large(tower):
        return False
    if missing := compiler_missing(device):
        logger.warning(
            "the vision tower runs uncompiled, at less than half the speed: %s; install it, or set "
            "compile_vision_tower=off",
            missing,
        )
        return False
    for block in adapter.tower_blocks(hf):
        block.compile(dynamic=True)
    return True


def _is_large(tower: nn.Module) -> bool:
    return sum(p.numel() for p in tower.parameters()) >= LEAST_PARAMETERS
