"""The operator that merges the parts of a softmax equals an explicit mask, wherever it is used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tests.sequence_parallel.oracle import (
    LAYOUTS,
    dense_attention,
    dense_mask,
    layouts,
    random_qkv,
)
from verl.sequence_parallel import kernels, tree
from verl.sequence_parallel.flex import flex_tree_attention
from verl.sequence_parallel.layout import ROOT, Layout
from verl.sequence_parallel.shared_prefix import shared_prefix_attention
from verl.sequence_parallel.tree import ATTENTION_OP, tree_attention

TREE = LAYOUTS[-1]


def by_token(*tensors):
    """(heads, S, D) as (S, heads, D)."""
    return [x.transpose(0, 1) for x in tensors]


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]))
def test_any_row_equals_dense_attention_in_value_and_gradient(layout, heads):
    q, k, v, weight = random_qkv(layout, *heads, dim=4)
    expected = dense_attention(q, k, v, dense_mask(layout), 0.4)
    out = tree_attention(*by_token(q, k, v), layout, 0.4)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-11)
    got, wanted = (torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (out, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(layout=layouts(), heads=st.sampled_from([(1, 1), (4, 2)]))
def test_queries_of_what_continues_others_alone_are_those_of_the_whole_row(layout, heads):
    q, k, v, weight = random_qkv(layout, *heads, dim=4)
    parents = zip(layout.spans, layout.parents, strict=True)
    of_roots = [span for span, parent in parents if parent == ROOT]
    kept = torch.tensor([not any(a <= i < b for a, b in of_roots) for i in range(layout.size)])
    assume(bool(kept.any()))
    expected = dense_attention(q, k, v, dense_mask(layout), 0.4)[kept]
    q_SND, k_SKD, v_SKD = by_token(q, k, v)
    out = tree_attention(q_SND[kept], k_SKD, v_SKD, layout, 0.4, tail=True)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-11)
    got, wanted = (
        torch.autograd.grad((o * weight[kept]).sum(), (q, k, v)) for o in (out, expected)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_differ_by_their_rounding(dtype):
    q, k, v, weight = random_qkv(TREE, 4, 2, dtype=dtype)
    exact = [x.double().detach().requires_grad_() for x in (q, k, v)]
    expected = dense_attention(*exact, dense_mask(TREE), 0.3)
    out = tree_attention(*by_token(q, k, v), TREE, 0.3)
    assert out.dtype == dtype
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=rounding)
    got = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight.double()).sum(), exact)
    for found, right in zip(got, wanted, strict=True):
        assert (found.double() - right).norm() < rounding * right.norm()


def test_more_queries_than_are_held_at_once_change_nothing(monkeypatch):
    q, k, v, weight = random_qkv(TREE, 4, 2)
    found = []
    for chunk in (512, 2):
        monkeypatch.setattr(kernels, "CHUNK", chunk)
        out = tree_attention(*by_token(q, k, v), TREE, 0.3)
        found.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("least_scores", [0, 4, 12, 1000])
@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_long_sequences_may_have_a_kernel_of_their_own(layout, least_scores, monkeypatch):
    exact = tree.KERNELS["exact"]
    taken = []

    class Long:
        def forward(self, q, k, v, seqs, causal, scale):
            taken.append(seqs.query_lens[0] * seqs.key_lens[0])
            assert len(seqs.query_lens) == 1
            return exact.forward(q, k, v, seqs, causal, scale)

        def backward(self, *args):
            return exact.backward(*args)

    split = kernels.SplitKernel(Long(), exact, least_scores)  # type: ignore[arg-type]
    monkeypatch.setitem(tree.KERNELS, "split", split)
    q, k, v, weight = random_qkv(layout, 4, 2)
    found = []
    for kernel in ("exact", "split"):
        out = tree_attention(*by_token(q, k, v), layout, 0.3, kernel)
        found.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert all(scores >= least_scores for scores in taken) and bool(taken) == (least_scores < 1000)


def test_a_layer_asks_for_the_plan_of_a_row_once():
    q, k, v, _ = random_qkv(TREE, 2, 1)
    tree._plan.cache_clear()
    for _ in range(3):
        tree_attention(*by_token(q, k, v), TREE, 0.3)
    assert tree._plan.cache_info().misses == 1


def test_torch_finds_the_operator_sound():
    q, k, v, _ = random_qkv(TREE, 4, 2, dtype=torch.float32)
    args = (*by_token(q, k, v), TREE.as_tensor, 0.3, "exact")
    # Its own check of gradients under compilation wants one of the log-sum-exp too; ours is below.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    assert set(torch.library.opcheck(ATTENTION_OP, args, test_utils=checks).values()) == {"SUCCESS"}


def test_a_compiled_caller_gets_the_same():
    q, k, v, weight = random_qkv(TREE, 4, 2)
    compiled = torch.compile(
        lambda *qkv: tree_attention(*qkv, TREE, 0.3) * 2, backend="aot_eager", fullgraph=True
    )
    found = []
    for call in (compiled, lambda *qkv: tree_attention(*qkv, TREE, 0.3) * 2):
        out = call(*by_token(q, k, v))
        found.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    torch.testing.assert_close(found[0], found[1])


def test_selective_checkpointing_keeps_the_output_instead_of_computing_it_again(monkeypatch):
    calls = []
    kernel = tree.KERNELS["exact"]

    class Counting:
        def forward(self, *args):
            calls.append("forward")
            return kernel.forward(*args)

        def backward(self, *args):
            return kernel.backward(*args)

    monkeypatch.setitem(tree.KERNELS, "exact", Counting())
    layout = Layout.of_groups((5,), ((2, 3),))
    q, k, v, weight = random_qkv(layout, 4, 2)

    def layer(*qkv):
        return tree_attention(*by_token(*(x.sin() for x in qkv)), layout, 0.3).cos()

    def contexts():
        return create_selective_checkpoint_contexts([ATTENTION_OP])

    found = []
    for call in (
        layer,
        lambda *x: checkpoint(layer, *x, use_reentrant=False),
        lambda *x: checkpoint(layer, *x, use_reentrant=False, context_fn=contexts),
    ):
        calls.clear()
        out = call(q, k, v)
        found.append([*torch.autograd.grad((out * weight).sum(), (q, k, v)), len(calls)])
    for other in found[1:]:
        torch.testing.assert_close(other[:3], found[0][:3])
    # Two parts: computed again by plain checkpointing, and kept by the selective one.
    assert [f[3] for f in found] == [2, 4, 2]


def test_a_gradient_of_the_log_sum_exp_is_refused_and_never_dropped():
    q, k, v, _ = random_qkv(TREE, 2, 1)
    _, lse = ATTENTION_OP(*by_token(q, k, v), TREE.as_tensor, 0.3, "exact")
    with pytest.raises(RuntimeError, match="no gradient of its log-sum-exp"):
        lse.sum().backward()


@settings(max_examples=40, deadline=None)
@given(prefix=st.integers(1, 40), lens=st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_a_shared_prefix_equals_rows_of_prefix_and_response(prefix, lens):
    layout = Layout.of_groups([prefix], [lens])
    q, k, v, weight = random_qkv(layout, 4, 2)
    out = shared_prefix_attention(*by_token(q, k, v), prefix, lens)
    got = torch.autograd.grad((out * weight).sum(), (q, k, v))
    loss, at = torch.zeros((), dtype=torch.float64), prefix
    for i, n in enumerate([*lens, 0]):
        # The prefix's own output counts once, in the row without a response.
        rows = [*range(prefix), *range(at, at + n)]
        row = dense_attention(
            q[:, rows], k[:, rows], v[:, rows],
            torch.ones(len(rows), len(rows)).tril().bool(), 8**-0.5,
        )  # fmt: skip
        own = slice(0, prefix) if i == len(lens) else slice(prefix, None)
        torch.testing.assert_close(out[rows][own], row[own])
        loss = loss + (row * weight[rows])[own].sum()
        at += n
    torch.testing.assert_close(got, torch.autograd.grad(loss, (q, k, v)))


def test_lengths_and_heads_that_do_not_fit_are_refused():
    q, k = torch.zeros(6, 4, 8), torch.zeros(6, 2, 8)
    with pytest.raises(ValueError, match=r"prefix of 4 tokens and responses of \[1\] are not"):
        shared_prefix_attention(q, k, k, 4, [1])
    with pytest.raises(ValueError, match="heads a multiple"):
        shared_prefix_attention(q, torch.zeros(6, 3, 8), torch.zeros(6, 3, 8), 4, [2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_kernels_of_a_gpu_differ_from_float64_by_the_rounding_of_bf16(layout, kernel, monkeypatch):
    monkeypatch.setattr(tree.KERNELS["cudnn"], "_least", 8)
    q, k, v, weight = (
        x.detach().cuda().requires_grad_() for x in random_qkv(layout, 4, 2, 64, torch.bfloat16)
    )
    exact = [x.double().detach().requires_grad_() for x in (q, k, v)]
    expected = dense_attention(*exact, dense_mask(layout).cuda(), 0.125)
    wanted = torch.autograd.grad((expected * weight.double()).sum(), exact)
    out = tree_attention(*by_token(q, k, v), layout, 0.125, kernel)
    got = torch.autograd.grad((out * weight).sum(), (q, k, v))
    for found, right in zip((out, *got), (expected, *wanted), strict=True):
        assert (found.double() - right).norm() < 8e-3 * right.norm()


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_flex_attention_sees_what_the_operator_sees(layout):
    # Without gradients: flex attention has none on a CPU.
    q, k, v, _ = (x.detach() for x in random_qkv(layout, 4, 2, dtype=torch.float32))
    expected = tree_attention(*by_token(q, k, v), layout, 0.3)
    found = flex_tree_attention(*by_token(q, k, v), layout, 0.3)
    torch.testing.assert_close(found, expected)
