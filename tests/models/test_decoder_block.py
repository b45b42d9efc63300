"""Our forward pass of a block is transformers', compiled or not, and of a tail what it is whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_config
from verl.models.adapter import ModelError, get_adapter
from verl.models.decoder_block import use_packed_blocks
from verl.models.pointwise import Pointwise
from verl.sequence_parallel.attention import ATTENTION, TreeAttention, register_attention
from verl.sequence_parallel.packing import Group, pack
from verl.sequence_parallel.tail import tail_of
from verl.utils import torch_functional
from verl.utils.exits import UserError

CPU = torch.device("cpu")
ROW = pack([Group(torch.arange(10, 40), torch.arange(30).expand(3, -1), (torch.arange(5),) * 2)])
TAIL = tail_of(ROW, CPU)


def model(dtype: torch.dtype, ops: Pointwise | None) -> Any:
    """A tiny model, always of the same weights; with `ops`, its blocks are ours."""
    register_attention()
    config = tiny_config()
    adapter: Any = get_adapter(config)
    torch.manual_seed(0)
    found = adapter.model_class()(config).to(dtype)
    for p in found.parameters():  # norms, too, are to matter
        p.data.copy_(torch.randn(p.shape) * 0.3 + (1.0 if p.ndim == 1 else 0.0))
    found.set_attn_implementation({"text_config": ATTENTION})
    if ops is not None:
        assert adapter.use_packed_blocks(found, ops)
    return found


def run(hf: Any, *, tail: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Last hidden states of the predicting tokens, and the gradient of a weighting of them."""
    adapter: Any = get_adapter(tiny_config())
    embeds = adapter.embed(hf, ROW.ids_S, None)
    rows, predict = None, ROW.predict_T
    if tail:
        assert TAIL is not None
        rows, predict = TAIL.rows_R, TAIL.predict_T
    context = TreeAttention(ROW.layout, "exact", TAIL.layout if TAIL else None)
    hidden = adapter.hidden(hf, embeds, ROW.positions_3S, context, rows)
    wanted = hidden[predict]
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    hf.zero_grad()
    (wanted * weight.to(wanted.dtype)).sum().backward()
    return wanted.detach(), {n: p.grad for n, p in hf.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], right: dict[str, Tensor], rounding: float) -> None:
    """Gradients, each by the norm of what differs."""
    assert found.keys() == right.keys()
    for name, gradient in right.items():
        gap = (found[name] - gradient).norm()
        assert gap < rounding * max(float(gradient.norm()), 1e-3), name


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_plain_blocks_are_transformers_to_the_bit(dtype, rounding):
    theirs, ours = (run(model(dtype, ops)) for ops in (None, Pointwise.plain()))
    assert torch.equal(theirs[0], ours[0])
    # Backward adds the gradients of queries, keys and values in another order.
    assert_close(ours[1], theirs[1], rounding)


@pytest.mark.parametrize("ops", [Pointwise.plain(), Pointwise.compiled()], ids=["plain", "joined"])
@pytest.mark.parametrize("tail", [False, True], ids=["whole", "tail"])
def test_joined_operations_and_a_tail_change_nothing(ops, tail):
    expected, wanted = run(model(torch.float32, None))
    found, gradients = run(model(torch.float32, ops), tail=tail)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_close(gradients, wanted, 1e-5)


def test_the_last_layer_computes_the_tail_alone():
    hf = model(torch.float32, Pointwise.plain())
    seen: list[int] = []
    for layer in hf.model.language_model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda *_, out=seen: out.append(_[2].shape[1]))
    run(hf, tail=True)
    assert TAIL is not None
    assert seen == [len(ROW.ids_S)] * (len(seen) - 1) + [len(TAIL.rows_R)]


def test_another_activation_is_refused():
    hf = model(torch.float32, None).model.language_model
    hf.config.hidden_act = "gelu"
    with pytest.raises(ModelError, match="hidden_act='gelu'"):
        use_packed_blocks(hf, Pointwise.plain())


def test_compiling_is_chosen_by_device_and_by_what_is_installed(monkeypatch, caplog):
    cuda = torch.device("cuda")
    assert Pointwise.chosen("auto", CPU) == Pointwise.plain()
    assert Pointwise.chosen("off", cuda) == Pointwise.plain()
    assert Pointwise.chosen("on", CPU) is Pointwise.compiled()
    monkeypatch.setattr(torch_functional.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch_functional.importlib.util, "find_spec", lambda name: object())
    assert Pointwise.chosen("auto", cuda) == Pointwise.plain()
    assert "there is no C compiler" in caplog.text and "compile_pointwise=off" in caplog.text
    with pytest.raises(UserError, match=r"compile_pointwise=on: there is no C\+\+ comp") as caught:
        Pointwise.chosen("on", CPU)
    assert "use worker.actor.model.compile_pointwise=auto" in str(caught.value)
    assert "SFT: model.compile_pointwise=auto" in str(caught.value)
