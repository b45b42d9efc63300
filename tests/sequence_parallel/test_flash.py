"""The call of FlashAttention kernels, with stand-ins: the real ones need a GPU."""

import inspect
import sys
from types import ModuleType

import pytest
import torch

from tests.sequence_parallel.test_attention import LAYOUTS, dense_attention, dense_mask
from verl.sequence_parallel import flash
from verl.sequence_parallel.attention import PackedAttention
from verl.sequence_parallel.flash import (
    PACKAGE,
    flash_kernel,
    package_varlen,
    torch_varlen,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Exact attention under the signature and the checks of flash-attn 2.7 and 2.8."""
    assert (dropout_p, window_size, softcap, alibi_slopes) == (0.0, (-1, -1), 0.0, None)
    assert not return_attn_probs and block_table is None
    assert q.ndim == k.ndim == v.ndim == 3 and q.shape[1] % k.shape[1] == 0
    for cu, x, longest in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k)):
        assert cu.dtype == torch.int32 and cu.is_contiguous()
        assert cu[0] == 0 and cu[-1] == len(x) and (cu.diff() > 0).all()
        assert isinstance(longest, int) and longest == cu.diff().max()
    outs = []
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    spans_q = zip(cu_seqlens_q.tolist(), cu_seqlens_q[1:].tolist(), strict=False)
    spans_k = zip(cu_seqlens_k.tolist(), cu_seqlens_k[1:].tolist(), strict=False)
    for (q0, q1), (k0, k1) in zip(spans_q, spans_k, strict=True):
        scores = torch.einsum("qnd,wnd->nqw", q[q0:q1], k[k0:k1])
        scores = scores * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        if causal:
            # Aligned with the bottom right corner: the last query sees the last key.
            seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
            scores = scores.masked_fill(~seen, float("-inf"))
        outs.append(torch.einsum("nqw,wnd->qnd", scores.softmax(-1), v[k0:k1]))
    return torch.cat(outs)


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):
    """torch's own, which says causal by its window and wants as many heads of keys as of queries"""
    assert window_size == (-1, 0) and query.shape[1] == key.shape[1] == value.shape[1]
    return flash_attn_varlen_func(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale, causal=True
    )


@pytest.fixture(autouse=True)
def capability(monkeypatch):
    """Says which compute capability the GPU has, which need not be there: first an H100's."""

    def has(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))

    has(9, 0)
    return has


@pytest.fixture
def package(monkeypatch):
    """The package as it looks when it is installed."""
    module = ModuleType(PACKAGE)
    module.flash_attn_varlen_func = flash_attn_varlen_func  # pyright: ignore
    monkeypatch.setitem(sys.modules, PACKAGE, module)
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: module)


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kernel", [package_varlen, torch_varlen, True])
def test_flash_kernels_are_called_so_that_they_equal_sdpa_in_value_and_gradient(
    layout, kv_heads, kernel, package, monkeypatch
):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    mask = dense_mask(layout)
    g = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(n, len(mask), 8, generator=g, dtype=torch.float64, requires_grad=True)
        for n in (4, kv_heads, kv_heads)
    )
    weight = torch.randn(len(mask), 4, 8, generator=g, dtype=torch.float64)
    got = PackedAttention(layout, CPU, flash=kernel)(0, q, k, v, 0.3)
    gradients = torch.autograd.grad((got * weight).sum(), (q, k, v))
    for expected in (
        PackedAttention(layout, CPU)(0, q, k, v, 0.3),
        dense_attention(q, k, v, mask, 0.3),
    ):
        torch.testing.assert_close(got, expected)
        expected_gradients = torch.autograd.grad((expected * weight).sum(), (q, k, v))
        torch.testing.assert_close(gradients, expected_gradients)


def test_torchs_own_kernel_has_the_arguments_that_it_is_called_with():
    from torch.nn.attention.varlen import varlen_attn as real

    theirs = inspect.signature(real).parameters
    ours = inspect.signature(varlen_attn).parameters
    assert list(theirs)[:7] == list(ours)[:7]
    assert set(ours) <= set(theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_takes_the_package_when_it_is_installed(package, dtype):
    assert flash_kernel("auto", CUDA, dtype) is package_varlen
    assert flash_kernel("flash_attn", CUDA, dtype) is package_varlen
    assert flash_kernel("flash", CUDA, dtype) is torch_varlen
    assert flash_kernel("sdpa", CUDA, dtype) is None


def test_auto_takes_torchs_own_kernel_when_the_package_is_missing(no_package):
    assert flash_kernel("auto", CUDA, torch.bfloat16) is torch_varlen


@pytest.mark.parametrize(("device", "dtype"), [(CPU, torch.bfloat16), (CUDA, torch.float32)])
def test_auto_is_sdpa_where_no_flash_kernel_runs_and_a_named_one_is_refused(package, device, dtype):
    assert flash_kernel("auto", device, dtype) is None
    for name in ("flash", "flash_attn"):
        with pytest.raises(ValueError, match=f"attn_implementation={name} needs CUDA and bf16"):
            flash_kernel(name, device, dtype)


def test_a_missing_package_is_named_with_the_extra_that_installs_it(no_package):
    with pytest.raises(ValueError, match=r"flash-attn; run `pip install 'long-rl\[flash-attn\]'`"):
        flash_kernel("flash_attn", CUDA, torch.bfloat16)


@pytest.mark.parametrize("older", [(7, 0), (7, 5)])
def test_on_a_gpu_before_ampere_auto_is_sdpa_and_a_named_kernel_is_refused(
    package, capability, older
):
    capability(*older)
    assert flash_kernel("auto", CUDA, torch.bfloat16) is None
    assert flash_kernel("sdpa", CUDA, torch.bfloat16) is None
    for name in ("flash", "flash_attn"):
        reason = rf"={name} needs a GPU of compute capability 8\.0 .* has 7\.{older[1]}; use auto"
        with pytest.raises(ValueError, match=reason):
            flash_kernel(name, CUDA, torch.bfloat16)


@pytest.mark.parametrize("newer", [(8, 0), (8, 9), (10, 0)])
def test_ampere_and_later_gpus_run_flash(package, capability, newer):
    capability(*newer)
    assert flash_kernel("auto", CUDA, torch.bfloat16) is package_varlen
    assert flash_kernel("flash", CUDA, torch.bfloat16) is torch_varlen
