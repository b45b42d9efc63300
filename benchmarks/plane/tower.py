"""Towers of the shapes of Qwen2.5-VL with random weights, their arithmetic, and ways to run them.

Letters: E hidden size of the tower, I of its MLP, O width of its output, S patches.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

from verl.config import ModelConfig
from verl.models.adapter import Adapter, get_adapter
from verl.models.loader import build_model
from verl.models.tower_attention import TOWER_ATTENTION

Grid = tuple[int, int, int]
PATCH = 14
PATCH_WIDTH = 3 * 2 * PATCH * PATCH
_QWEN = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2,
        "fullatt_block_indexes": [1], "window_size": 112, "out_hidden_size": 128,
    },
    "3b": _QWEN | {"out_hidden_size": 2048},
    "7b": _QWEN | {"out_hidden_size": 3584},
}  # fmt: skip
"""The quickstart's tower, and those of Qwen2.5-VL-3B and 7B; pixels as in all of them."""
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""FLOP/s of dense bf16 by a part of the GPU's name, as its maker states them."""
FORMULA = (
    "multiply and add count as two; S patches: 2*S*1176*E + depth*2*S*E*(4E + 3I) + "
    "S/4*2*4E*(4E + O), and 4*E*sum(length^2) a block over its windows or frames; norms, rotary, "
    "softmax, activations count as nothing"
)


def build(shape: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Adapter]:
    """A model whose tower has a shape of `SHAPES`, behind a language model of one thin layer."""
    vision = SHAPES[shape]
    text = {
        "hidden_size": vision["out_hidden_size"], "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 64, "pad_token_id": 0,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    ids = {"image_token_id": 1, "video_token_id": 2}
    ids |= {"vision_start_token_id": 3, "vision_end_token_id": 4}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        model = ModelConfig(model_path=folder, init="random")
        hf: Any = build_model(model, dtype=dtype, attention="sdpa", materialize=True)
    return hf.to(device).eval().requires_grad_(False), get_adapter(config)


def flops(vision: Any, grids: Sequence[Grid]) -> float:
    """Floating-point operations of one call of the tower, by `FORMULA`."""
    hidden, inner, out = vision.hidden_size, vision.intermediate_size, vision.out_hidden_size
    patches = sum(t * h * w for t, h, w in grids)
    linear = 2 * patches * (PATCH_WIDTH * hidden + vision.depth * hidden * (4 * hidden + 3 * inner))
    merger = patches // 4 * 2 * 4 * hidden * (4 * hidden + out)
    grid = torch.tensor(grids)
    merge, window, patch = vision.spatial_merge_size, vision.window_size, vision.patch_size
    windows = get_vision_window_index(grid, merge, window, patch)[1]
    n_full = len(vision.fullatt_block_indexes)
    pairs = n_full * _squares(get_vision_cu_seqlens(grid))
    pairs += (vision.depth - n_full) * _squares(windows)
    return float(linear + merger + 4 * hidden * pairs)


def _squares(starts: Tensor) -> int:
    return int(starts.diff().long().square().sum())


def bf16_peak(device: torch.device) -> float | None:
    """FLOP/s of a GPU; None for what `BF16_PEAK` does not list."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in BF16_PEAK.items() if part in name), None)


class LinearPatches(nn.Module):
    """The tower's first layer as one matrix product; its convolution sees each pixel once."""

    def __init__(self, proj: nn.Conv3d) -> None:
        super().__init__()
        self.weight = nn.Parameter(proj.weight.flatten(1), requires_grad=False)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.flatten(1), self.weight)


def pad_mlps(tower: Any, multiple: int = 64) -> None:
    """Widens each MLP by zeros, which changes no result: 3,420 columns of bf16 are not aligned."""
    for block in tower.blocks:
        mlp = block.mlp
        more = -mlp.gate_proj.out_features % multiple
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.data = F.pad(linear.weight.data, (0, 0, 0, more))
            linear.bias.data = F.pad(linear.bias.data, (0, more))
        mlp.down_proj.weight.data = F.pad(mlp.down_proj.weight.data, (0, more))


def variant(hf: Any, name: str) -> Any:
    """A copy of a model whose tower runs in a way: words joined by `+`.

    `loop`: as transformers does, chunk by chunk with sdpa; `ours`: as this project does; `linear`:
    the first layer as a matrix product; `pad`: aligned MLPs; `compile`: torch.compile of the blocks
    with dynamic shapes. Raises SystemExit for another word.
    """
    words = name.split("+")
    known = ("loop", "ours", "linear", "pad", "compile")
    if unknown := [word for word in words if word not in known]:
        raise SystemExit(f"--variants {name}: {unknown[0]!r} is not one of {known}")
    made = copy.deepcopy(hf)
    made.set_attn_implementation({"vision_config": "sdpa" if "loop" in words else TOWER_ATTENTION})
    tower = made.model.visual
    if "linear" in words:
        tower.patch_embed.proj = LinearPatches(tower.patch_embed.proj)
    if "pad" in words:
        pad_mlps(tower)
    if "compile" in words:
        for block in tower.blocks:
            block.compile(dynamic=True)
    return made


def caller(hf: Any, adapter: Adapter, name: str) -> Callable[[Tensor, list[Grid]], Tensor]:
    """What encodes pixels with a variant of `variant`."""

    @torch.no_grad()
    def run(pixels: Tensor, grids: list[Grid]) -> Tensor:
        pixels = pixels.to(hf.dtype)
        if "loop" in name:
            grid_thw = torch.tensor(grids, device=pixels.device)
            return hf.model.visual(pixels, grid_thw=grid_thw).pooler_output
        return adapter.encode(hf, pixels, grids)

    return run
