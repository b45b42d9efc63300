"""The call of FlashAttention kernels, with stand-ins: the real ones need a GPU."""

import sys
from types import ModuleType

import pytest
import torch
from torch.nn.attention import list_flash_attention_impls

from tests.sequence_parallel.oracle import LAYOUTS, dense_attention, dense_mask, random_qkv
from verl.sequence_parallel import flash
from verl.sequence_parallel.attention import attention_over
from verl.sequence_parallel.flash import PACKAGE, kernel_of

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
def test_the_package_is_called_so_that_it_equals_dense_attention_in_value_and_gradient(
    layout, kv_heads, package
):
    q, k, v, weight = random_qkv(layout, 4, kv_heads)
    got = attention_over(layout, CPU, PACKAGE)(0, q, k, v, 0.3)
    gradients = torch.autograd.grad((got * weight).sum(), (q, k, v))
    expected = dense_attention(q, k, v, dense_mask(layout), 0.3)
    torch.testing.assert_close(got, expected)
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    torch.testing.assert_close(gradients, wanted)


def test_torchs_operators_have_the_arguments_that_they_are_called_with():
    taken = [
        [a.name for a in getattr(torch.ops.aten, name).default._schema.arguments]
        for name in ("_flash_attention_forward", "_flash_attention_backward")
    ]
    lengths = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    assert taken[0][:10] == ["query", "key", "value", *lengths, "return_debug_mask"]
    assert taken[1][:14] == [
        "grad_out", "query", "key", "value", "out", "logsumexp", *lengths, "rng_state", "unused",
    ]  # fmt: skip
    assert all("scale" in names for names in taken)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_that_is_asked_for_by_name_is_taken(package, dtype):
    assert kernel_of("cudnn", CUDA, dtype) == "cudnn"
    assert kernel_of("flash_attn", CUDA, dtype) == "flash_attn"
    assert kernel_of("flash", CUDA, dtype) == "flash"
    assert kernel_of("sdpa", CUDA, dtype) == "sdpa"


@pytest.mark.parametrize(("device", "dtype"), [(CPU, torch.bfloat16), (CUDA, torch.float32)])
def test_auto_is_sdpa_where_no_other_kernel_runs_and_a_named_one_is_refused(package, device, dtype):
    assert kernel_of("auto", device, dtype) == "sdpa"
    for name in ("flash", "cudnn", "flash_attn"):
        with pytest.raises(ValueError, match=f"attn_implementation={name} needs CUDA and bf16"):
            kernel_of(name, device, dtype)


@pytest.mark.parametrize(("name", "known_as"), [("flash3", "FA3"), ("flash4", "FA4")])
def test_newer_flash_attention_takes_the_place_of_torchs(name, known_as, monkeypatch):
    activated = []
    monkeypatch.setattr(flash, "activate_flash_attention_impl", activated.append)
    assert known_as in list_flash_attention_impls()
    assert kernel_of(name, CUDA, torch.bfloat16) == "flash" and activated == [known_as]


@pytest.mark.parametrize(
    ("name", "module"), [("flash3", "flash_attn_interface"), ("flash4", "flash_attn.cute")]
)
def test_newer_flash_attention_that_cannot_be_loaded_is_refused_with_the_reason(name, module):
    with pytest.raises(ValueError, match=f"{name}: torch .* from the module {module} .*; install"):
        kernel_of(name, CUDA, torch.bfloat16)


def test_a_missing_package_is_named_with_the_extra_that_installs_it(no_package):
    with pytest.raises(ValueError, match=r"flash-attn; run `pip install 'long-rl\[flash-attn\]'`"):
        kernel_of("flash_attn", CUDA, torch.bfloat16)


@pytest.mark.parametrize("older", [(7, 0), (7, 5)])
def test_on_a_gpu_before_ampere_auto_is_sdpa_and_a_named_kernel_is_refused(
    package, capability, older
):
    capability(*older)
    assert kernel_of("auto", CUDA, torch.bfloat16) == "sdpa"
    assert kernel_of("sdpa", CUDA, torch.bfloat16) == "sdpa"
    for name in ("flash", "cudnn", "flash_attn"):
        reason = rf"={name} needs a GPU of compute capability 8\.0 .* has 7\.{older[1]}; use auto"
        with pytest.raises(ValueError, match=reason):
            kernel_of(name, CUDA, torch.bfloat16)


@pytest.mark.parametrize(
    ("capability_of", "kernel"),
    [((8, 0), "flash"), ((8, 9), "flash"), ((9, 0), "cudnn"), ((10, 0), "cudnn")],
)
def test_auto_takes_cudnn_from_hopper_on_and_flash_attention_before(
    package, capability, capability_of, kernel, monkeypatch
):
    capability(*capability_of)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert kernel_of("auto", CUDA, torch.bfloat16) == kernel
    assert kernel_of("flash", CUDA, torch.bfloat16) == "flash"
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert kernel_of("auto", CUDA, torch.bfloat16) == "flash"
