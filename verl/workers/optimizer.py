"""Optimizer and learning-rate schedule from their config."""

from __future__ import annotations

import math

import torch
from torch import nn

from verl.config import OptimConfig
from verl.workers.bf16_adamw import BF16MomentsAdamW


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) over trainable parameters; biases and norms are not decayed."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("every parameter is frozen; there is nothing to train")
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if config.moment_dtype == "bf16":
        return BF16MomentsAdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]))
    betas = config.betas[0], config.betas[1]
    # One parameter after another: all at once would take another copy of all of them.
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, foreach=False)


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then constant, cosine or linear decay to `min_lr_ratio`."""
    warmup = config.lr_warmup_steps
    if warmup is None:
        # 0.07 * 100 is a little over 7, which must not make 8 steps of it.
        warmup = math.ceil(config.lr_warmup_ratio * total_steps - 1e-9)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.warmup_style == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        shape = (
            1 - progress
            if config.warmup_style == "linear"
            else (1 + math.cos(math.pi * progress)) / 2
        )
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
