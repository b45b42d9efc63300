"""Attention of one part of a softmax: forward gives the log-sum-exp, backward takes the whole one.

A query that attends to several sets of keys gets one call a set; `verl.sequence_parallel.tree`
merges them. What a part's backward needs of the whole is its output and log-sum-exp: with these it
returns exactly its own share of the gradient. That is why autograd of the kernels cannot be used:
it would take the part's own output, and drops the gradient of the log-sum-exp.
Letters: N heads, K key-value heads, D head dim, Q queries and W keys of all sequences of a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from verl.sequence_parallel.varlen import Varlen

CHUNK = 512
"""Queries whose scores the exact kernel holds at a time."""
Gradients = tuple[Tensor, Tensor, Tensor]


class PartKernel(Protocol):
    """Attention of queries to one set of keys each, and its gradients."""

    def forward(
        self, q_QND: Tensor, k_WKD: Tensor, v_WKD: Tensor, seqs: Varlen, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output (Q, N, D) in the dtype of `q_QND`, and natural log-sum-exp of scores (N, Q).

        With `causal`, queries and keys of a sequence are equally many.
        """
        ...

    def backward(
        self, grad_QND: Tensor, q_QND: Tensor, k_WKD: Tensor, v_WKD: Tensor, out_QND: Tensor,
        lse_NQ: Tensor, seqs: Varlen, causal: bool, scale: float,
    ) -> Gradients:  # fmt: skip
        """This part's share of the gradients of queries, keys and values.

        `out_QND` and `lse_NQ` are those of the whole softmax, over all parts.
        """
        ...


class FlashKernel:
    """torch's FlashAttention operators: CUDA, bf16 or fp16.

    What `torch.nn.attention.activate_flash_attention_impl` puts in their place (FlashAttention 3
    and 4) is used through them as well. Fewer key-value heads are taken as they are.
    """

    def forward(
        self, q_QND: Tensor, k_WKD: Tensor, v_WKD: Tensor, seqs: Varlen, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        found = torch.ops.aten._flash_attention_forward(
            q_QND, k_WKD, v_WKD, seqs.cu_queries, seqs.cu_keys, seqs.longest_query,
            seqs.longest_key, 0.0, causal, False, scale=scale,
        )  # fmt: skip
        return found[0], found[1]

    def backward(
        self, grad_QND: Tensor, q_QND: Tensor, k_WKD: Tensor, v_WKD: Tensor, out_QND: Tensor,
        lse_NQ: Tensor, seqs: Varlen, causal: bool, scale: float,
    ) -> Gradients:  # fmt: skip
        # The two states of the random generator are read only where there is dropout.
        no_state = torch.empty(2, dtype=torch.uint64, device=q_QND.device)
        return torch.ops.aten._flash_attention_backward(
            grad_QND, q_QND, k_WKD, v_WKD, out_QND, lse_NQ.contiguous(), seqs.cu_queries,
            seqs.cu_keys, seqs.longest_query, seqs.longest_key, 0.0, causal, no_state,
            no_state[:0], scale=scale,
        )  # fmt: skip


class CudnnKernel:
    """cuDNN's attention, a call a sequence: CUDA, bf16 or fp16; twice as fast as FlashAttention 2
    on an H100 with long sequences (docs/performance.md).

    Fewer key-value heads are taken as they are.
    """

    def forward(
        self, q_QND: Tensor, k_WKD: Tensor, v_WKD: Tensor, seqs: Varlen, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out_QND = torch.empty_like(q_QND)
        lse_NQ = q_QND.new_empty(q_QND.shape[1], len(q_QND), dtype=torch.float32)
        for queries, keys in seqs.slices():
            qkv = (_batch_of_one(x) for x in (q_QND[queries], k_WKD[keys], v_WKD[keys]))
            out_1NQD, lse_1NQ1 = torch.ops.aten._scaled_dot_product_cudnn_attention(
                *qkv, None, True, 0.0, causal, False, scale=scale
            )[:2]
            out_QND[queries] = out_1NQD[0].transpose(0, 1)
            lse_NQ[:, queries] = lse_1NQ1[0, ..., 0]
        return out_QND, lse_NQ

    def backward(
        self, grad_QND: Tensor, q_QND: Tensor, k_WKD: Tensor, v_WKD: Tensor, out_QND: Tensor,
        lse_NQ: Tensor, seqs: Varlen, causal: bool, scale: float,
    ) -> Gradients:  # fmt: skip
        gradients = tuple(torch.empty_like(x) for x in (q_QND, k_WKD, v_WKD))
        # Read only where there is dropout.
        no_state = torch.empty((), dtype=torch.int64, device=q_QND.device)
        for queries, keys in seqs.slices():
            found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                *(_batch_of_one(x) for x in (
                    grad_QND[queries], q_QND[queries], k_WKD[keys], v_WKD[keys], out_QND[queries],
                )),
                lse_NQ[None, :, queries, None].contiguous(), no_state, no_state, None, None, None,
                queries.stop - queries.start, keys.stop - keys.start, 0.0, causal, scale=scale,
            )  # fmt: skip
            for whole, part, rows in zip(gradients, found, (queries, keys, keys), strict=True):
                whole[rows] = part[0].transpose(0, 1)
        return gradients  # type: ignore[return-value]


class SplitKernel:
    """One kernel for long sequences, another for all runs of shorter ones."""

    def __init__(self, long: PartKernel, short: PartKernel, least_scores: int) -> None:
        """Sequences with `least_scores` scores (queries times keys) a head or more are long."""
        self._long, self._short, self._least = long, short, least_scores

    def forward(
        self, q_QND: Tensor, k_WKD: Tensor, v_WKD: Tensor, seqs: Varlen, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out_QND = torch.empty_like(q_QND)
        lse_NQ = q_QND.new_empty(q_QND.shape[1], len(q_QND), dtype=lse_dtype(q_QND.dtype))
        for kernel, run, queries, keys in self._runs(seqs):
            out_QND[queries], lse_NQ[:, queries] = kernel.forward(
                q_QND[queries], k_WKD[keys], v_WKD[keys], run, causal, scale
            )
        return out_QND, lse_NQ

    def backward(
        self, grad_QND: Tensor, q_QND: Tensor, k_WKD: Tensor, v_WKD: Tensor, out_QND: Tensor,
        lse_NQ: Tensor, seqs: Varlen, causal: bool, scale: float,
    ) -> Gradients:  # fmt: skip
        dq_QND, dk_WKD, dv_WKD = (torch.empty_like(x) for x in (q_QND, k_WKD, v_WKD))
        for kernel, run, queries, keys in self._runs(seqs):
            dq_QND[queries], dk_WKD[keys], dv_WKD[keys] = kernel.backward(
                grad_QND[queries], q_QND[queries], k_WKD[keys], v_WKD[keys], out_QND[queries],
                lse_NQ[:, queries], run, causal, scale,
            )  # fmt: skip
        return dq_QND, dk_WKD, dv_WKD

    def _runs(self, seqs: Varlen) -> Iterator[tuple[PartKernel, Varlen, slice, slice]]:
        """A kernel, the sequences it takes in one call, and their queries and keys."""
        for is_long, run, queries, keys in seqs.runs(self._least):
            yield self._long if is_long else self._short, run, queries, keys


class ExactKernel:
    """Plain matrix products in the dtype of the inputs; any device.

    Holds the scores of `CHUNK` queries at a time, so memory grows with keys and not with their
    square. Half precisions are computed in float32.
    """

    def forward(
        self, q_QND: Tensor, k_WKD: Tensor, v_WKD: Tensor, seqs: Varlen, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out_QND = torch.empty_like(q_QND)
        lse_NQ = q_QND.new_empty(q_QND.shape[1], len(q_QND), dtype=lse_dtype(q_QND.dtype))
        for queries, keys in seqs.slices():
            k_NWD, v_NWD = (_per_head(x[keys], q_QND.shape[1]) for x in (k_WKD, v_WKD))
            for start in range(queries.start, queries.stop, CHUNK):
                rows = slice(start, min(start + CHUNK, queries.stop))
                score_NQW = _scores(q_QND[rows], k_NWD, rows, queries, causal, scale)
                norm_NQ = torch.logsumexp(score_NQW, dim=-1)
                weights_NQW = (score_NQW - norm_NQ[..., None]).exp()
                out_QND[rows] = (weights_NQW @ v_NWD).transpose(0, 1).to(out_QND.dtype)
                lse_NQ[:, rows] = norm_NQ
        return out_QND, lse_NQ

    def backward(
        self, grad_QND: Tensor, q_QND: Tensor, k_WKD: Tensor, v_WKD: Tensor, out_QND: Tensor,
        lse_NQ: Tensor, seqs: Varlen, causal: bool, scale: float,
    ) -> Gradients:  # fmt: skip
        dq_QND = torch.empty_like(q_QND)
        dk_WKD, dv_WKD = (torch.zeros_like(x) for x in (k_WKD, v_WKD))
        n_heads, n_kv = q_QND.shape[1], k_WKD.shape[1]
        for queries, keys in seqs.slices():
            k_NWD, v_NWD = (_per_head(x[keys], n_heads) for x in (k_WKD, v_WKD))
            dk_NWD, dv_NWD = torch.zeros_like(k_NWD), torch.zeros_like(v_NWD)
            for start in range(queries.start, queries.stop, CHUNK):
                rows = slice(start, min(start + CHUNK, queries.stop))
                score_NQW = _scores(q_QND[rows], k_NWD, rows, queries, causal, scale)
                p_NQW = (score_NQW - lse_NQ[:, rows, None]).exp()
                q_NQD, g_NQD, o_NQD = (
                    _per_head(x[rows], n_heads) for x in (q_QND, grad_QND, out_QND)
                )
                dv_NWD += p_NQW.transpose(1, 2) @ g_NQD
                # d softmax: p (dp - sum of p dp), and the sum is grad . out of the whole softmax.
                delta_NQ1 = (g_NQD * o_NQD).sum(-1, keepdim=True)
                ds_NQW = p_NQW * (g_NQD @ v_NWD.transpose(1, 2) - delta_NQ1) * scale
                dq_QND[rows] = (ds_NQW @ k_NWD).transpose(0, 1).to(dq_QND.dtype)
                dk_NWD += ds_NQW.transpose(1, 2) @ q_NQD
            dk_WKD[keys] = _summed(dk_NWD, n_kv).to(dk_WKD.dtype)
            dv_WKD[keys] = _summed(dv_NWD, n_kv).to(dv_WKD.dtype)
        return dq_QND, dk_WKD, dv_WKD


def _batch_of_one(x_SND: Tensor) -> Tensor:
    """As cuDNN takes it, (1, N, S, D)."""
    return x_SND.transpose(0, 1)[None]


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the log-sum-exp, and of what the exact kernel computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_head(x_SKD: Tensor, n_heads: int) -> Tensor:
    """Keys or values for every query head, (N, S, D), in the dtype of the computation."""
    x_SKD = x_SKD.to(lse_dtype(x_SKD.dtype))
    return x_SKD.repeat_interleave(n_heads // x_SKD.shape[1], dim=1).transpose(0, 1)


def _summed(grad_NWD: Tensor, n_kv: int) -> Tensor:
    """Gradients of the query heads' copies, summed by key-value head, (W, K, D)."""
    n, w, d = grad_NWD.shape
    return grad_NWD.view(n_kv, n // n_kv, w, d).sum(1).transpose(0, 1)


def _scores(
    q_QND: Tensor, k_NWD: Tensor, rows: slice, queries: slice, causal: bool, scale: float
) -> Tensor:
    """Scaled scores of some rows of a sequence, (N, Q, W); what is not seen is minus infinity."""
    score_NQW = _per_head(q_QND, q_QND.shape[1]) @ k_NWD.transpose(1, 2) * scale
    if causal:
        place_Q = torch.arange(rows.start - queries.start, rows.stop - queries.start)
        hidden_QW = torch.arange(k_NWD.shape[1])[None] > place_Q[:, None]
        score_NQW = score_NQW.masked_fill(hidden_QW.to(q_QND.device), float("-inf"))
    return score_NQW
