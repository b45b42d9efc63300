"""A layer's MLP over tiles of a long row: its wide activations exist for one tile at a time.

An MLP maps each token alone, so tiles change nothing but memory: at 252k tokens the activations of
Qwen2.5-VL-3B's MLP are 22 GB for a whole row and 1.4 GB for a tile of 16,384. Backward computes a
tile's activations again, which checkpointing of the layer would do anyway; the layer's second
forward pass leaves the MLP out. Idea: sequence tiling, arXiv:2506.13996.
Letters: S tokens, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from verl.utils.recompute import is_recomputing

Run = Callable[[Tensor], Tensor]


def tile_mlps(mlps: Sequence[nn.Module], tile_tokens: int) -> None:
    """Makes each module run over tiles where it gets more tokens than `tile_tokens`.

    A module must map (..., S, E) to the same shape, each token alone, and be the last of its layer
    whose output nothing but a sum takes.
    """
    for mlp in mlps:
        # On the instance: names of parameters, hooks and classes stay as they are.
        mlp.forward = _tiled(mlp, mlp.forward, tile_tokens)  # type: ignore[method-assign]


def _tiled(mlp: nn.Module, run: Run, tile_tokens: int) -> Run:
    def forward(x: Tensor) -> Tensor:
        n_tokens = x.numel() // x.shape[-1]
        if n_tokens <= tile_tokens or not torch.is_grad_enabled():
            return run(x) if n_tokens <= tile_tokens else _by_tiles(run, x, tile_tokens)
        trained = [p for p in mlp.parameters() if p.requires_grad]
        return _TiledMLP.apply(run, tile_tokens, x, *trained)

    return forward


def _by_tiles(run: Run, x: Tensor, tile_tokens: int) -> Tensor:
    rows_SE = x.reshape(-1, x.shape[-1])
    out_SE = torch.empty_like(rows_SE)
    for start in range(0, len(rows_SE), tile_tokens):
        out_SE[start : start + tile_tokens] = run(rows_SE[start : start + tile_tokens])
    return out_SE.view(x.shape)


class _TiledMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, tile_tokens: int, x: Tensor, *trained: Tensor) -> Tensor:
        ctx.save_for_backward(x, *trained)
        ctx.settings = run, tile_tokens
        if is_recomputing():
            # The second pass is only for what backward saves, and nobody saves the output. NaN,
            # so that a layer of another kind would fail in the open.
            return x.new_full((), float("nan")).expand_as(x)
        return _by_tiles(run, x, tile_tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *trained = ctx.saved_tensors
        run, tile_tokens = ctx.settings
        grad_SE, rows_SE = (t.reshape(-1, t.shape[-1]) for t in (grads[0], x))
        dx_SE = torch.empty_like(rows_SE)
        # In float32: many tiles are added up.
        sums = [torch.zeros_like(p, dtype=_precise(p.dtype)) for p in trained]
        for start in range(0, len(rows_SE), tile_tokens):
            rows = slice(start, start + tile_tokens)
            tile_SE = rows_SE[rows].detach().requires_grad_()
            with torch.enable_grad():
                out_SE = run(tile_SE)
            found = torch.autograd.grad(out_SE, (tile_SE, *trained), grad_SE[rows])
            dx_SE[rows] = found[0]
            for total, part in zip(sums, found[1:], strict=True):
                total += part
        weights = (s.to(p.dtype) for s, p in zip(sums, trained, strict=True))
        return None, None, dx_SE.view(x.shape), *weights


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
