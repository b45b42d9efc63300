"""The tower's attention: all chunks at once give what transformers computes one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from torch import Tensor

from tests.tiny import tiny_config, write_tiny_model
from verl.config import ModelConfig
from verl.models import tower_attention
from verl.models.adapter import get_adapter
from verl.models.fingerprint import tower_fingerprint
from verl.models.loader import build_model, load_adapter
from verl.models.tower_attention import (
    TOWER_ATTENTION,
    Chunks,
    attend_within,
    register_tower_attention,
    runs_flash,
)

CPU = torch.device("cpu")
WIDTH = 3 * 2 * 14 * 14
CALLS = {
    "one image": [(1, 4, 4)],
    "one window": [(3, 2, 2)],
    "windows cut at both borders": [(1, 6, 10)],
    "a video of equal windows": [(5, 8, 8)],
    "videos and images of odd sizes": [(3, 6, 10), (1, 2, 14), (2, 8, 8), (1, 10, 2)],
}
"""Grids of media in one call; a window of the tiny tower is 4 x 4 patches."""


def tiny_tower(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model with our attention in its tower, and its adapter."""
    adapter = get_adapter(tiny_config())
    torch.manual_seed(0)
    hf: Any = adapter.model_class()(tiny_config()).to(dtype)
    register_tower_attention()
    hf.set_attn_implementation({"vision_config": TOWER_ATTENTION})
    return adapter, hf


def pixels_of(grids: list[tuple[int, int, int]], dtype: torch.dtype = torch.float32) -> Tensor:
    n = sum(t * h * w for t, h, w in grids)
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def with_gradients(run: Any, hf: Any, pixels: Tensor) -> list[Tensor]:
    """Features, and the gradients of pixels and of every weight of the tower."""
    leaf = pixels.clone().requires_grad_()
    features_ME = run(leaf)
    weight_ME = torch.randn(features_ME.shape, generator=torch.Generator().manual_seed(2))
    weights = list(hf.model.visual.parameters())
    loss = (features_ME * weight_ME.to(features_ME.dtype)).sum()
    return [features_ME.detach(), *torch.autograd.grad(loss, [leaf, *weights])]


@pytest.mark.parametrize("grids", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-5), (torch.float64, 1e-13)])
def test_values_and_gradients_equal_those_of_transformers(grids, dtype, close):
    adapter, hf = tiny_tower(dtype)
    pixels = pixels_of(grids, dtype)
    ours = with_gradients(lambda x: adapter.encode(hf, x, grids), hf, pixels)
    hf.set_attn_implementation({"vision_config": "sdpa"})
    grid_thw = torch.tensor(grids)
    theirs = with_gradients(lambda x: hf.model.visual(x, grid_thw=grid_thw)[1], hf, pixels)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=close, atol=close * expected.abs().max())


@torch.no_grad()
def test_a_temporal_step_has_the_same_bits_whatever_else_is_in_the_call():
    adapter, hf = tiny_tower()
    grids = [(6, 6, 10), (1, 2, 14), (2, 8, 8)]
    pixels = pixels_of(grids)
    together = adapter.encode(hf, pixels, grids)
    start = 0
    for t, h, w in grids:
        for _ in range(t):
            alone = adapter.encode(hf, pixels[start : start + h * w], [(1, h, w)])
            assert torch.equal(alone, together[start // 4 : (start + h * w) // 4])
            start += h * w


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_chunk_has_the_same_bits_whatever_other_chunks_there_are(dtype):
    lengths = [64, 7, 64, 300, 7, 1, 64]
    q, k, v = torch.randn(3, sum(lengths), 4, 80).to(dtype)
    together = attend_within(Chunks(lengths, CPU), q, k, v, 0.1).split(lengths)
    rows = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    for length, own, got in zip(lengths, rows, together, strict=True):
        assert torch.equal(attend_within(Chunks([length], CPU), *own, 0.1), got)


def test_a_layer_is_one_call_and_asks_for_no_lengths(monkeypatch):
    adapter, hf = tiny_tower()
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return attend_within(*args, **kwargs)

    def refused(*_: Any) -> None:
        raise AssertionError("a layer looked for lengths that were known")

    monkeypatch.setattr(tower_attention, "attend_within", counted)
    monkeypatch.setattr(tower_attention, "Chunks", refused)
    grids = CALLS["videos and images of odd sizes"]
    adapter.encode(hf, pixels_of(grids), grids).sum().backward()
    assert len(calls) == len(hf.model.visual.blocks)


def test_blocks_that_are_computed_again_give_the_same_gradients():
    grids = CALLS["videos and images of odd sizes"]
    found = []
    for again in (False, True):
        adapter, hf = tiny_tower()
        if again:
            hf.gradient_checkpointing_enable({"use_reentrant": False})
        hf.train()
        run = lambda x, adapter=adapter, hf=hf: adapter.encode(hf, x, grids)  # noqa: E731
        found.append(with_gradients(run, hf, pixels_of(grids)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@torch.no_grad()
def test_whoever_calls_the_tower_as_transformers_does_gets_the_same_features():
    adapter, hf = tiny_tower()
    for grids in CALLS.values():
        pixels = pixels_of(grids)
        plain = hf.model.visual(pixels, grid_thw=torch.tensor(grids)).pooler_output
        assert torch.equal(plain, adapter.encode(hf, pixels, grids))


@torch.no_grad()
def test_the_kernel_of_a_gpu_is_given_the_chunks_of_each_layer(monkeypatch):
    adapter, hf = tiny_tower()
    grids = CALLS["videos and images of odd sizes"]
    expected = adapter.encode(hf, pixels_of(grids), grids)
    given = []

    def stand_in(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
        max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        assert cu_seq_q.dtype == torch.int32 and cu_seq_q is cu_seq_k
        assert max_q == max_k == int(cu_seq_q.diff().max())
        assert window_size == (-1, -1)
        given.append(len(cu_seq_q) - 1)
        parts = [x.split(cu_seq_q.diff().tolist()) for x in (query, key, value)]
        out = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in qkv), scale=scale)
            for qkv in zip(*parts, strict=True)
        ]
        return torch.cat([x.transpose(0, 1) for x in out])

    monkeypatch.setattr(tower_attention, "runs_flash", lambda _: True)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", stand_in)
    got = adapter.encode(hf, pixels_of(grids), grids)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    # Windows in the first layer, frames in the second.
    windows = [t * -(-h // 4) * -(-w // 4) for t, h, w in grids]
    assert given == [sum(windows), sum(t for t, _, _ in grids)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dim", [32, 80])
def test_the_kernel_of_a_gpu_is_near_float32_in_values_and_gradients(dim):
    lengths = [64, 16, 64, 416, 4]
    chunks = Chunks(lengths, torch.device("cuda"))
    q, k, v, weight = torch.randn(4, sum(lengths), 16, dim, device="cuda").bfloat16()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        assert runs_flash(leaves[0]) == (dtype == torch.bfloat16)
        if dtype == torch.bfloat16:
            out = tower_attention._flash(*leaves, chunks.starts, chunks.longest, dim**-0.5)
        else:
            out = attend_within(chunks, *leaves, dim**-0.5)
        found.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for exact, got in zip(*found, strict=True):
        assert (got.float() - exact).norm() <= 0.01 * exact.norm()


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_call_on_a_gpu_never_waits_for_it():
    adapter, hf = tiny_tower(torch.bfloat16)
    hf.to("cuda")
    grids = CALLS["videos and images of odd sizes"]
    pixels = pixels_of(grids, torch.bfloat16).to("cuda")
    expected = adapter.encode(hf, pixels, grids)
    torch.cuda.set_sync_debug_mode("error")  # from here on, waiting raises
    try:
        found = adapter.encode(hf, pixels, grids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)


def test_the_choice_of_attention_is_no_part_of_a_towers_name_or_of_its_files(tmp_path):
    model = ModelConfig(model_path=str(write_tiny_model(tmp_path / "tiny")), init="random")
    hf: Any = build_model(model, dtype=torch.float32, attention="sdpa", materialize=True)
    tower = load_adapter(model).vision_tower(hf)
    assert tower is not None and hf.config.vision_config._attn_implementation == TOWER_ATTENTION
    name = tower_fingerprint(tower)
    hf.save_pretrained(tmp_path / "saved")
    assert TOWER_ATTENTION not in (tmp_path / "saved" / "config.json").read_text()
    for other in ("sdpa", "eager"):
        hf.set_attn_implementation({"vision_config": other})
        assert tower_fingerprint(tower) == name
