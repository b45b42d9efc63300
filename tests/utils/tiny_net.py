"""A small network with what makes checkpoints hard: tied weights, odd sizes, a frozen bf16 part."""

from __future__ import annotations

import torch
from torch import nn

WIDTH, VOCAB = 33, 17


class TinyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 5).to(torch.bfloat16).requires_grad_(False)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(self.norm(x))


def make_optimizer(model: nn.Module):
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return optimizer, schedule


def train(model: nn.Module, optimizer, schedule, steps: int) -> list[float]:
    """Steps on batches drawn from torch's global generator, so that its state matters."""
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, VOCAB, (4, 9))
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
