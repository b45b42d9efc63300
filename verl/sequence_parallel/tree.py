"""Exact attention over a packed row whose segments share what they continue, as one operator.

A segment's softmax has several parts: its own tokens, causally, and each segment it continues,
whole. All parts of one kind run in one call of a kernel, and the parts of a query are merged by
their log-sum-exp, so a shared prompt's keys are neither repeated nor read once a response:

    lse = log sum_p exp(lse_p),    out = sum_p exp(lse_p - lse) out_p

In backward every part gets the merged output and log-sum-exp (`verl.sequence_parallel.kernels`).
As an operator of `torch.library` it is one node to `torch.compile`, and selective checkpointing can
keep its output: `ATTENTION_OP`.
With `tail`, the tokens that begin sequences are keys and values alone: what the last layer needs
of a prompt (`verl.sequence_parallel.tail`).
Letters: N heads, K key-value heads, D head dim, S packed tokens, R tokens that continue others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from verl.sequence_parallel.kernels import (
    CudnnKernel,
    ExactKernel,
    FlashKernel,
    PartKernel,
    SplitKernel,
    lse_dtype,
)
from verl.sequence_parallel.layout import ROOT, Layout
from verl.sequence_parallel.varlen import Varlen
from verl.utils.torch_functional import to_device

LONG = 2048 * 2048
"""Scores a head of a sequence from which cuDNN is faster than FlashAttention 2."""
KERNELS: dict[str, PartKernel] = {
    "cudnn": SplitKernel(CudnnKernel(), FlashKernel(), LONG),
    "flash": FlashKernel(),
    "exact": ExactKernel(),
}
Rows = slice | Tensor
"""Rows of a tensor: a slice where they are one piece, so that nothing is copied."""


@dataclass(frozen=True)
class _Cross:
    """Segments of one depth, as keys of everything that continues them."""

    queries: Rows
    """Among the R tokens that continue others."""
    keys: Rows
    seqs: Varlen


@dataclass(frozen=True)
class _Plan:
    """The calls of a layout."""

    own: Varlen
    own_rest: Varlen
    """The same of segments that continue others alone."""
    rest: Rows
    """The R tokens that continue others."""
    crosses: tuple[_Cross, ...]


def tree_attention(q_SND: Tensor, k_SKD: Tensor, v_SKD: Tensor, layout: Layout, scale: float,
                   kernel: str | None = None, *, tail: bool = False) -> Tensor:  # fmt: skip
    """Attention output of a row, (S, N, D).

    `kernel` is cudnn or flash (CUDA, bf16 or fp16), or exact; None takes flash where it runs. With
    `tail`, queries and output are those of the R tokens that continue others, (R, N, D).
    """
    if kernel is None:
        half = q_SND.dtype in (torch.bfloat16, torch.float16)
        kernel = "flash" if half and q_SND.is_cuda else "exact"
    return _attention(q_SND, k_SKD, v_SKD, layout.as_tensor, scale, kernel, tail)[0]


@torch.library.custom_op("verl::tree_attention", mutates_args=())
def _attention(
    q_SND: Tensor, k_SKD: Tensor, v_SKD: Tensor, tree_2n: Tensor, scale: float, kernel: str,
    tail: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (S, N, D) and log-sum-exp (N, S); with `tail`, (R, N, D) and (N, R)."""
    part, plan = KERNELS[kernel], _plan_of(tree_2n, q_SND.device)
    own, of_own, rest = _own(plan, tail)
    out_SND, lse_NS = part.forward(q_SND, k_SKD[of_own], v_SKD[of_own], own, True, scale)
    if not plan.crosses:
        return out_SND, lse_NS
    q_RND = q_SND[rest]
    out_RND, lse_NR = out_SND[rest].to(lse_NS.dtype), lse_NS[:, rest].clone()
    for cross in plan.crosses:
        rows, keys = cross.queries, cross.keys
        other_QND, other_NQ = part.forward(
            q_RND[rows], k_SKD[keys], v_SKD[keys], cross.seqs, False, scale
        )
        both_NQ = torch.logaddexp(lse_NR[:, rows], other_NQ)
        out_RND[rows] = out_RND[rows] * _weight(lse_NR[:, rows], both_NQ) + (
            other_QND * _weight(other_NQ, both_NQ)
        )
        lse_NR[:, rows] = both_NQ
    out_SND[rest] = out_RND.to(out_SND.dtype)
    lse_NS[:, rest] = lse_NR
    return out_SND, lse_NS


@torch.library.custom_op("verl::tree_attention_backward", mutates_args=())
def _attention_backward(
    grad_SND: Tensor, q_SND: Tensor, k_SKD: Tensor, v_SKD: Tensor, out_SND: Tensor, lse_NS: Tensor,
    tree_2n: Tensor, scale: float, kernel: str, tail: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    part, plan = KERNELS[kernel], _plan_of(tree_2n, q_SND.device)
    own, of_own, rest = _own(plan, tail)
    dq_SND, dk_SKD, dv_SKD = part.backward(
        grad_SND, q_SND, k_SKD[of_own], v_SKD[of_own], out_SND, lse_NS, own, True, scale
    )
    if tail:
        dk_SKD, dv_SKD = _at(of_own, dk_SKD, k_SKD), _at(of_own, dv_SKD, v_SKD)
    if not plan.crosses:
        return dq_SND, dk_SKD, dv_SKD
    grad_RND, q_RND, out_RND = (x[rest] for x in (grad_SND, q_SND, out_SND))
    lse_NR, dq_RND = lse_NS[:, rest], dq_SND[rest].clone()
    for cross in plan.crosses:
        rows, keys = cross.queries, cross.keys
        dq, dk, dv = part.backward(
            grad_RND[rows], q_RND[rows], k_SKD[keys], v_SKD[keys], out_RND[rows], lse_NR[:, rows],
            cross.seqs, False, scale,
        )  # fmt: skip
        dq_RND[rows] += dq
        dk_SKD[keys] += dk
        dv_SKD[keys] += dv
    dq_SND[rest] = dq_RND
    return dq_SND, dk_SKD, dv_SKD


def _own(plan: _Plan, tail: bool) -> tuple[Varlen, Rows, Rows]:
    """Segments that see themselves, their keys, and where the R tokens are among their queries."""
    everything = slice(None)
    return (plan.own_rest, plan.rest, everything) if tail else (plan.own, everything, plan.rest)


@_attention.register_fake
def _(
    q_SND: Tensor, k_SKD: Tensor, v_SKD: Tensor, tree_2n: Tensor, scale: float, kernel: str,
    tail: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lse_NS = q_SND.new_empty(q_SND.shape[1], q_SND.shape[0], dtype=lse_dtype(q_SND.dtype))
    return torch.empty_like(q_SND), lse_NS


@_attention_backward.register_fake
def _(
    grad_SND: Tensor, q_SND: Tensor, k_SKD: Tensor, v_SKD: Tensor, out_SND: Tensor, lse_NS: Tensor,
    tree_2n: Tensor, scale: float, kernel: str, tail: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q_SND), torch.empty_like(k_SKD), torch.empty_like(v_SKD)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_SND, k_SKD, v_SKD, tree_2n, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q_SND, k_SKD, v_SKD, *output, tree_2n)


def _differentiate(ctx: Any, grad_SND: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    if grad_lse is not None:
        raise RuntimeError("verl::tree_attention has no gradient of its log-sum-exp")
    if grad_SND is None:
        return (None,) * 7
    q_SND, k_SKD, v_SKD, out_SND, lse_NS, tree_2n = ctx.saved_tensors
    gradients = _attention_backward(
        grad_SND.contiguous(), q_SND, k_SKD, v_SKD, out_SND, lse_NS, tree_2n, *ctx.settings
    )
    return *gradients, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_keep)
ATTENTION_OP = torch.ops.verl.tree_attention.default
"""For the policy of selective checkpointing: what it keeps is not computed again."""


def _at(rows: Rows, values: Tensor, like: Tensor) -> Tensor:
    """Zeros with some rows given."""
    found = torch.zeros_like(like)
    found[rows] = values
    return found


def _weight(part_NQ: Tensor, whole_NQ: Tensor) -> Tensor:
    """A part's share of the softmax, (Q, N, 1)."""
    return (part_NQ - whole_NQ).exp().transpose(0, 1)[..., None]


def _plan_of(tree_2n: Tensor, device: torch.device) -> _Plan:
    return _plan(Layout.of_tensor(tree_2n), device)


@lru_cache(maxsize=8)
def _plan(layout: Layout, device: torch.device) -> _Plan:
    """The calls of a layout; kept, since every layer of a pass asks for the same."""
    lens = [n for n in layout.lengths if n]
    roots = [i for i, parent in enumerate(layout.parents) if parent == ROOT]
    rest = _pieces([(layout.spans[i][1], layout.branch_ends[i]) for i in roots])
    crosses = []
    for depth in range(max(layout.depths, default=0)):
        shared = [
            i for i, (start, end) in enumerate(layout.spans)
            if layout.depths[i] == depth and start < end < layout.branch_ends[i]
        ]  # fmt: skip
        if not shared:
            continue
        keys = [layout.spans[i] for i in shared]
        queries = [(layout.spans[i][1], layout.branch_ends[i]) for i in shared]
        seqs = Varlen.of([b - a for a, b in queries], [b - a for a, b in keys], device)
        crosses.append(_Cross(_rows(_within(queries, rest), device), _rows(keys, device), seqs))
    lens_rest = [
        n for n, parent in zip(layout.lengths, layout.parents, strict=True) if n and parent != ROOT
    ]
    own, own_rest = (Varlen.of(x, x, device) for x in (lens, lens_rest))
    return _Plan(own, own_rest, _rows(rest, device), tuple(crosses))


def _pieces(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(start, end) for start, end in spans if start < end]


def _within(
    spans: Sequence[tuple[int, int]], pieces: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Where spans of the row lie in the row made of some pieces of it."""
    found, before = [], 0
    for start, end in pieces:
        found += [(a - start + before, b - start + before) for a, b in spans if start <= a < end]
        before += end - start
    return found


def _rows(spans: Sequence[tuple[int, int]], device: torch.device) -> Rows:
    if all(end == start for (_, end), (start, _) in pairwise(spans)):
        return slice(spans[0][0], spans[-1][1]) if spans else slice(0, 0)
    return to_device(torch.cat([torch.arange(*span) for span in spans]), device)
